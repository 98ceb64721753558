// XXH3, 64 bits: the hash that tells damaged bytes from whole ones. Not for secrets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct XXH3_state_s;  // xxHash's

namespace headwater {

/// XXH3_64 of `size` bytes; the same number on every machine.
uint64_t hash_bytes(const void* bytes, size_t size);

/// hash_bytes of bytes that come in pieces.
class StreamingHash {
 public:
  StreamingHash();
  ~StreamingHash();
  StreamingHash(const StreamingHash&) = delete;
  StreamingHash& operator=(const StreamingHash&) = delete;

  void update(const void* bytes, size_t size);
  /// The hash of all bytes so far; more may follow.
  uint64_t value() const;

 private:
  XXH3_state_s* state_;
};

/// 16 lower-case hexadecimal digits, as `xxhsum -H3` prints them.
std::string hash_text(uint64_t hash);

}  // namespace headwater
