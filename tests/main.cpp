// The test program's main: Catch2 v2 makes it here, v3 brings its own.
#ifndef HEADWATER_CATCH2_V3
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
#endif
