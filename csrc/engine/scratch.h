// Scratch memory that is owned, not allocated anew: a fresh buffer of tens of MB costs a product a fifth of its time in
// page faults. Every thread has its own; it grows to what was asked and is kept until the thread ends.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hb {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` elements, their content arbitrary, aligned to 64 bytes. What was there before is lost. Out of
  // memory: std::bad_alloc, which `over_range` brings to the calling thread and `guarded` to Python.
  template <class T>
  T* get(int64_t count) {
    int64_t bytes = count * int64_t(sizeof(T));
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      constexpr int64_t huge = 1 << 21;
      const int64_t alignment = bytes >= 2 * huge ? huge : 4096;
      bytes = (bytes + alignment - 1) / alignment * alignment;
      data_ = std::aligned_alloc(alignment, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (alignment == huge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace hb
