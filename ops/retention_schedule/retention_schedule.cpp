#include "ops/retention_schedule/retention_schedule.h"

#include "ops/check.h"
#include "ops/retention_schedule/retention_schedule_kernels.h"

namespace headwater {

RetentionSchedule retention_schedule(const Tensor& first_position, const Tensor& resets,
                                     const RetentionScheduleSizes& sizes) {
  constexpr const char* op = "retention_schedule";
  require(sizes.d_key >= 2 && sizes.d_key % 2 == 0, "{}: d_key is {}; it must be even", op, sizes.d_key);
  if (first_position.defined()) {
    const Variable first(first_position);
    check_shape(op, "first_position", first, {sizes.batch}, "(batch)");
    require(first.dtype() == DType::i64, "{}: first_position is {}; it must be i64", op,
            name_of(first.dtype()));
  }
  check_resets(op, resets, sizes.batch, sizes.length);
  const auto output = [&](const Shape& shape) { return Tensor::empty(shape, sizes.dtype, sizes.device); };
  const RetentionScheduleArgs args{first_position,
                                   resets,
                                   Tensor::empty({sizes.batch, sizes.length}, DType::i64, sizes.device),
                                   Tensor::empty({sizes.batch}, DType::i64, sizes.device),
                                   output({sizes.batch, sizes.length, sizes.d_key / 2, 2}),
                                   output({sizes.batch, sizes.length, sizes.n_heads}),
                                   output({sizes.n_heads})};
  retention_schedule_kernel(sizes.device, args);
  return {args.rotation, args.row_scale, args.log_decay, args.next_position};
}

}  // namespace headwater
