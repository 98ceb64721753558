#include "core/cuda/emulator/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace headwater::emulator {
namespace {

using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 256 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
constexpr size_t guard_bytes = 4096;

/// Tells AddressSanitizer that another stack follows; `leaving` is where this one's shadow frames are kept, null when it
/// is left for good.
void announce_switch([[maybe_unused]] void** leaving, [[maybe_unused]] const void* to,
                     [[maybe_unused]] size_t to_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving, to, to_bytes);
#endif
}
void arrive([[maybe_unused]] void* arriving, [[maybe_unused]] const void** from,
            [[maybe_unused]] size_t* from_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(arriving, from, from_bytes);
#endif
}

}  // namespace

Fiber::Fiber() {
  void* memory =
      mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_bytes, PROT_NONE);
  memory_ = static_cast<char*>(memory);
}

Fiber::~Fiber() {
  munmap(memory_, guard_bytes + stack_bytes);
}

void Fiber::start(void (*function)(void*), void* argument) {
  function_ = function;
  argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that was given up leaves the marks of its frames behind.
  __asan_unpoison_memory_region(memory_ + guard_bytes, stack_bytes);
#endif
  context_ = make_fcontext(memory_ + guard_bytes + stack_bytes, stack_bytes, &Fiber::enter);
  fake_stack_ = nullptr;
}

void Fiber::resume() {
  void* own_fake_stack = nullptr;
  announce_switch(&own_fake_stack, memory_ + guard_bytes, stack_bytes);
  context_ = jump_fcontext(context_, this).fctx;
  arrive(own_fake_stack, nullptr, nullptr);
}

void Fiber::enter(transfer_t from) {
  Fiber* self = static_cast<Fiber*>(from.data);
  arrive(nullptr, &self->caller_stack_, &self->caller_stack_bytes_);
  self->caller_ = from.fctx;
  self->function_(self->argument_);
  announce_switch(nullptr, self->caller_stack_, self->caller_stack_bytes_);
  jump_fcontext(self->caller_, nullptr);
}

void Fiber::yield() {
  announce_switch(&fake_stack_, caller_stack_, caller_stack_bytes_);
  const transfer_t from = jump_fcontext(caller_, nullptr);
  arrive(fake_stack_, &caller_stack_, &caller_stack_bytes_);
  caller_ = from.fctx;
}

}  // namespace headwater::emulator
