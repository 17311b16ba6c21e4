// How a function of the library is exported, and what it returns: 0, or 1 where memory ran out, which
// `halfbyte/ops/native.py` raises as MemoryError. No exception may leave a C function.
#pragma once

#include <new>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace hb {

// What function() is worth to a caller in C.
template <class Function>
int guarded(const Function& function) {
  try {
    function();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace hb
