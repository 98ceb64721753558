// Compiled without -march, and with plain C inside: an inline function of the standard library that the program
// also uses elsewhere may be linked in as compiled there, with the very instructions that are in question.

#include "core/cpu_check.h"

#include <cstdio>
#include <cstring>

#include <unistd.h>

namespace headwater {
namespace {

/// The generation of CPUs that a set of features amounts to.
const char* generation(bool has_sse42, bool has_avx2, bool has_avx512) {
  if (has_avx512) return "AVX-512 (x86-64-v4)";
  if (has_avx2) return "AVX2 (x86-64-v3)";
  if (has_sse42) return "SSE4.2 (x86-64-v2)";
  return "SSE2 (x86-64)";
}

}  // namespace

bool describe_missing_cpu_features(const char* needed, bool (*is_available)(const char* name), char* text,
                                   size_t size) {
  char missing[1024] = "";
  size_t length = 0;
  for (const char* name = needed; *name != '\0';) {
    const size_t name_length = strcspn(name, " ");
    char copy[32];
    snprintf(copy, sizeof copy, "%.*s", static_cast<int>(name_length), name);
    if (!is_available(copy) && length < sizeof missing) {
      length += static_cast<size_t>(snprintf(missing + length, sizeof missing - length, " %s", copy));
    }
    name += name_length + strspn(name + name_length, " ");
  }
  if (length == 0) return false;
  const bool has_avx2 = is_available("avx2");
  snprintf(
      text, size,
      "this program was compiled for CPUs with %s; this CPU has %s and lacks:%s. Compile it on this machine "
      "(tools/build), or for every CPU with %s: cmake --preset portable%s && cmake --build --preset "
      "portable",
      generation(strstr(needed, "sse4.2 "), strstr(needed, "avx2 "), strstr(needed, "avx512f ")),
      generation(is_available("sse4.2"), has_avx2, is_available("avx512f")), missing,
      has_avx2 ? "AVX2" : "x86-64", has_avx2 ? "" : " -DHEADWATER_ARCH=x86-64");
  return true;
}

#ifdef __x86_64__
namespace {

bool cpu_has(const char* name) {
#define HEADWATER_CPU_FEATURE(feature) \
  if (strcmp(name, feature) == 0) return __builtin_cpu_supports(feature)
  HEADWATER_CPU_FEATURE("sse3");
  HEADWATER_CPU_FEATURE("ssse3");
  HEADWATER_CPU_FEATURE("sse4.1");
  HEADWATER_CPU_FEATURE("sse4.2");
  HEADWATER_CPU_FEATURE("popcnt");
  HEADWATER_CPU_FEATURE("avx");
  HEADWATER_CPU_FEATURE("f16c");
  HEADWATER_CPU_FEATURE("fma");
  HEADWATER_CPU_FEATURE("lzcnt");
  HEADWATER_CPU_FEATURE("bmi");
  HEADWATER_CPU_FEATURE("bmi2");
  HEADWATER_CPU_FEATURE("movbe");
  HEADWATER_CPU_FEATURE("avx2");
  HEADWATER_CPU_FEATURE("avx512f");
  HEADWATER_CPU_FEATURE("avx512cd");
  HEADWATER_CPU_FEATURE("avx512bw");
  HEADWATER_CPU_FEATURE("avx512dq");
  HEADWATER_CPU_FEATURE("avx512vl");
  HEADWATER_CPU_FEATURE("avx512ifma");
  HEADWATER_CPU_FEATURE("avx512vbmi");
  HEADWATER_CPU_FEATURE("avx512vpopcntdq");
  HEADWATER_CPU_FEATURE("avx512vnni");
  HEADWATER_CPU_FEATURE("avx512vbmi2");
  HEADWATER_CPU_FEATURE("avx512bitalg");
  HEADWATER_CPU_FEATURE("gfni");
  HEADWATER_CPU_FEATURE("avx512bf16");
  HEADWATER_CPU_FEATURE("avxvnni");
  HEADWATER_CPU_FEATURE("avx512fp16");
#undef HEADWATER_CPU_FEATURE
  return false;
}

/// 101: before every static object of the program.
__attribute__((constructor(101))) void check_cpu() {
  __builtin_cpu_init();
  char text[2048];
  if (!describe_missing_cpu_features(needed_cpu_features, cpu_has, text, sizeof text)) return;
  dprintf(STDERR_FILENO, "error: %s\n", text);
  _exit(3);
}

}  // namespace
#endif

}  // namespace headwater
