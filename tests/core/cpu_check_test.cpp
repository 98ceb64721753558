// The sentence that a program says on a CPU which lacks what it was compiled for. That it is said at all, and in
// time, is seen only on such a CPU.

#include "core/cpu_check.h"

#include <cstring>
#include <string>

#include "tests/catch.h"

using namespace headwater;

namespace {

constexpr const char* up_to_avx2 = "sse3 sse4.2 avx fma avx2 ";
constexpr const char* up_to_avx512 = "sse3 sse4.2 avx fma avx2 avx512f avx512vl ";

std::string missing(const char* needed, bool (*is_available)(const char*)) {
  char text[2048] = "";
  const bool found = describe_missing_cpu_features(needed, is_available, text, sizeof text);
  CHECK(found == (text[0] != '\0'));
  return text;
}

bool has_avx2(const char* name) {
  return std::strstr(up_to_avx2, name) != nullptr;
}

}  // namespace

TEST_CASE("cpu check: a CPU that has everything is not complained of") {
  CHECK(missing("", [](const char*) { return false; }).empty());
  CHECK(missing(up_to_avx2, has_avx2).empty());
  CHECK(missing(up_to_avx512, [](const char*) { return true; }).empty());
}

TEST_CASE("cpu check: what is missing is named, with a build that will run") {
  CHECK(
      missing(up_to_avx512, has_avx2) ==
      "this program was compiled for CPUs with AVX-512 (x86-64-v4); this CPU has AVX2 (x86-64-v3) and lacks: "
      "avx512f avx512vl. Compile it on this machine (tools/build), or for every CPU with AVX2: cmake "
      "--preset "
      "portable && cmake --build --preset portable");
}

TEST_CASE("cpu check: without AVX2, the advice is a build without it") {
  const std::string text =
      missing(up_to_avx2, [](const char* name) { return std::strstr(name, "sse") != nullptr; });
  CHECK_THAT(text, ContainsSubstring("this CPU has SSE4.2 (x86-64-v2) and lacks: avx fma avx2."));
  CHECK_THAT(text, ContainsSubstring("cmake --preset portable -DHEADWATER_ARCH=x86-64 &&"));
}

TEST_CASE("cpu check: a text that is too long is cut") {
  char text[10];
  CHECK(describe_missing_cpu_features(up_to_avx512, has_avx2, text, sizeof text));
  CHECK(std::string(text) == "this prog");
}
