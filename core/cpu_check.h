// Does this CPU have the instructions that the program was compiled for? Asked before anything else runs, so
// that a program built for another CPU says so and does not die of an illegal instruction.
//
// An executable that links headwater_cpu_check asks before its first static object is made; where the answer is
// no, it writes the reason to stderr and exits with 3, as for every ErrorKind::machine. Nobody calls it: once
// main runs, it is too late.
#pragma once

#include <cstddef>

namespace headwater {

/// What the compiler was allowed to use beyond plain x86-64: names as in /proc/cpuinfo's spirit ("avx2"), each
/// with a space behind it.
extern const char needed_cpu_features[];

/// Writes a sentence into `text` (at most `size` bytes, with the 0 at its end) and returns true if not all
/// names in `needed` are available. `needed` is as needed_cpu_features.
bool describe_missing_cpu_features(const char* needed, bool (*is_available)(const char* name), char* text,
                                   size_t size);

}  // namespace headwater
