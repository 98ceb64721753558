#include "core/hash.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <new>

namespace headwater {

uint64_t hash_bytes(const void* bytes, size_t size) {
  return XXH3_64bits(bytes, size);
}

StreamingHash::StreamingHash() : state_(XXH3_createState()) {
  if (!state_) throw std::bad_alloc();
  XXH3_64bits_reset(state_);
}

StreamingHash::~StreamingHash() {
  XXH3_freeState(state_);
}

void StreamingHash::update(const void* bytes, size_t size) {
  XXH3_64bits_update(state_, bytes, size);
}

uint64_t StreamingHash::value() const {
  return XXH3_64bits_digest(state_);
}

std::string hash_text(uint64_t hash) {
  return fmt::format("{:016x}", hash);
}

}  // namespace headwater
