// Stacks that take turns: Boost.Context's switch, with what AddressSanitizer wants to know about it.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

namespace headwater::emulator {

/// One fiber. resume() runs it until it calls yield() or its function returns.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Begins anew: the next resume() calls function(argument). What ran here before is forgotten where it stood.
  void start(void (*function)(void*), void* argument);
  void resume();
  /// Only from inside this fiber.
  void yield();

 private:
  static void enter(boost::context::detail::transfer_t from);

  char* memory_;  // a guard page, then the stack
  boost::context::detail::fcontext_t context_ = nullptr, caller_ = nullptr;
  void (*function_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's, of this fiber
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

}  // namespace headwater::emulator
