// The C interface that `halfbyte/ops/cpu.py` loads: which kernels run, on which threads, over which blocks.
//
// No header of torch: the thread pool comes in as a function pointer (`torch_parallel_for` of torch's stable C
// interface), because a second pool would spin against torch's own.
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cmath>

#include "engine/engine.h"
#include "engine/export.h"
#include "scalar.h"

namespace hb {

ParallelFor parallel_for = nullptr;
ThreadCount thread_count = nullptr;
const Engine* engine = &portable_engine;

namespace {

// Written at start, by `hb_use`, before any other call.
const Kernels* kernels = &portable_kernels;

// A thread's share is at least this many values: some 5 µs of work, against 2 to wake a thread.
constexpr int64_t values_per_thread = 1 << 15;

template <class Function>
void over_blocks(int64_t blocks, int64_t blocksize, const Function& function) {
  over_range(blocks, std::max<int64_t>(values_per_thread / blocksize, 1), function);
}

template <class Function>
void with_type(int dtype, const Function& function) {
  if (dtype == bfloat16) function(BFloat16{});
  if (dtype == float16) function(Float16{});
  if (dtype == float32) function(Float32{});
}

struct Dequantize {
  const uint8_t* codes;
  const float* absmax;  // null where the constants are nested
  const uint8_t* nested_codes;
  const float* nested_absmax;
  const float* nested_table;
  float nested_offset;
  int64_t nested_blocksize;
  const float* table;  // null for INT8
  int64_t blocksize, start, stop;
  uint8_t* out;
  int dtype;

  int64_t item_size() const { return dtype == float32 ? 4 : 2; }

  float constant(int64_t block) const {
    if (absmax) return absmax[block];
    return nested_table[nested_codes[block]] * nested_absmax[block / nested_blocksize] + nested_offset;
  }

  // The values from `first` to `last`, all of one block, one at a time.
  void partial(int64_t first, int64_t last) const {
    const float factor = constant(first / blocksize), step = factor / 127;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      T* to = reinterpret_cast<T*>(out);
      for (int64_t i = first; i < last; i++) {
        int code = table ? codes[i / 2] >> (i % 2 ? 0 : 4) & 15 : codes[i];
        to[i - start] = T::write(table ? table[code] * factor : float(code - 128) * step);
      }
    });
  }

  void whole(int64_t block, int64_t count, const float* constants) const {
    uint8_t* to = out + (block * blocksize - start) * item_size();
    if (table) {
      kernels->dequantize4[dtype](codes + block * blocksize / 2, constants, table, blocksize, count, to);
    } else {
      kernels->dequantize8[dtype](codes + block * blocksize, constants, blocksize, count, to);
    }
  }

  // The part of the blocks `begin` … `end` that lies between `start` and `stop`.
  void operator()(int64_t begin, int64_t end) const {
    if (begin < end && begin * blocksize < start) {
      partial(start, std::min(stop, (begin + 1) * blocksize));
      begin++;
    }
    if (begin < end && end * blocksize > stop) {
      end--;
      partial(end * blocksize, stop);
    }
    if (absmax) return whole(begin, end - begin, absmax + begin);
    constexpr int64_t at_once = 512;
    float constants[at_once];
    while (begin < end) {
      // Of one nested block, whose constant is read once.
      const int64_t outer = begin / nested_blocksize;
      const int64_t count = std::min({at_once, end - begin, (outer + 1) * nested_blocksize - begin});
      const float factor = nested_absmax[outer];
      for (int64_t i = 0; i < count; i++) constants[i] = nested_table[nested_codes[begin + i]] * factor + nested_offset;
      whole(begin, count, constants);
      begin += count;
    }
  }
};

// A shorter last block: its codes, unpacked, one at a time.
template <class T, class Encode>
void encode_tail(const T* x, int64_t count, float* absmax, const Encode& encode) {
  Scale scale = scale_of(x, count, false, absmax);
  for (int64_t i = 0; i < count; i++) encode(i, scale(T::read(x[i])));
}

}  // namespace
}  // namespace hb

using namespace hb;

#ifdef HB_ENGINE_AMX
// Whether the processor has tiles of bfloat16 and the kernel lets this process use them.
static bool amx_allowed() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// The engine of that name if this build has it and this processor runs it.
static const Engine* engine_named(const char* name) {
  auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("portable")) return &portable_engine;
#ifdef HB_ENGINE_AVX2
  if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &avx2_engine;
#endif
#ifdef HB_ENGINE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is("avx512") && avx512) return &avx512_engine;
#endif
#ifdef HB_ENGINE_AVX512BF16
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (is("avx512bf16") && bf16) return &avx512bf16_engine;
#endif
#ifdef HB_ENGINE_AMX
  if (is("amx") && bf16 && amx_allowed()) return &amx_engine;
#endif
#ifdef HB_ENGINE_AMX_EMULATED
  if (is("amx_emulated") && bf16) return &amx_emulated_engine;
#endif
  return nullptr;
}

// Choose the kernels by name; 0 if this processor or this build has none of that name.
EXPORT int hb_use(const char* isa, void* torch_parallel_for, void* torch_get_num_threads) {
  parallel_for = reinterpret_cast<ParallelFor>(torch_parallel_for);
  thread_count = reinterpret_cast<ThreadCount>(torch_get_num_threads);
  const Engine* chosen = engine_named(isa);
  if (chosen) {
    engine = chosen;
    kernels = chosen->codec;
  }
  return chosen != nullptr;
}

// Whether the engine in use multiplies this type itself (0: bfloat16, 2: float32).
EXPORT int hb_multiplies(int dtype) { return engine->block[dtype] != nullptr; }

// Raised whenever a signature below changes, so that a stale library is refused rather than called wrongly.
EXPORT int hb_version() { return 8; }

EXPORT int hb_dequantize(const uint8_t* codes, const void* absmax, const float* table, int64_t blocksize,
                         int64_t start, int64_t count, void* out, int dtype, const float* nested_absmax,
                         const float* nested_offset, const float* nested_table, int64_t nested_blocksize) {
  return guarded([&] {
    if (count == 0) return;
    Dequantize work{};
    work.codes = codes;
    work.absmax = nested_absmax ? nullptr : static_cast<const float*>(absmax);
    work.nested_codes = static_cast<const uint8_t*>(absmax);
    work.nested_absmax = nested_absmax;
    work.nested_table = nested_table;
    work.nested_offset = nested_offset ? *nested_offset : 0;
    work.nested_blocksize = nested_blocksize;
    work.table = table;
    work.blocksize = blocksize;
    work.start = start;
    work.stop = start + count;
    work.out = static_cast<uint8_t*>(out);
    work.dtype = dtype;
    int64_t first = start / blocksize, last = (work.stop + blocksize - 1) / blocksize;
    over_blocks(last - first, blocksize, [&](int64_t begin, int64_t end) { work(first + begin, first + end); });
  });
}

// 4-bit where there are midpoints, INT8 where not.
EXPORT int hb_quantize(const void* x, int dtype, int64_t count, const float* midpoints, const uint8_t* order,
                       int64_t blocksize, uint8_t* codes, float* absmax) {
  return guarded([&] {
    const int64_t blocks = count / blocksize, tail = count % blocksize;
    const int64_t item_size = dtype == float32 ? 4 : 2;
    over_blocks(blocks, blocksize, [&](int64_t begin, int64_t end) {
      const uint8_t* from = static_cast<const uint8_t*>(x) + begin * blocksize * item_size;
      if (midpoints) {
        kernels->quantize4[dtype](from, midpoints, order, blocksize, end - begin, codes + begin * blocksize / 2,
                                  absmax + begin);
      } else {
        kernels->quantize8[dtype](from, blocksize, end - begin, codes + begin * blocksize, absmax + begin);
      }
    });
    if (tail == 0) return;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      const T* from = static_cast<const T*>(x) + blocks * blocksize;
      uint8_t* to = codes + blocks * blocksize / (midpoints ? 2 : 1);
      encode_tail(from, tail, absmax + blocks, [&](int64_t i, float value) {
        if (!midpoints) {
          to[i] = code8(value);
        } else if (i % 2) {
          to[i / 2] = uint8_t(to[i / 2] | order[rank(midpoints, value)]);
        } else {
          // The low half stays the code of 0 where no further value comes.
          uint8_t padding = i + 1 < tail ? 0 : order[rank(midpoints, 0)];
          to[i / 2] = uint8_t(order[rank(midpoints, value)] << 4 | padding);
        }
      });
    });
  });
}

// A binary search among 255 midpoints costs ten times as much as this: `first` says, for the upper 16 bits of a float,
// the rank of the least value that has them, and at most two of the `midpoints` (256, the last infinite) lie between.
template <class T>
static void encode_dynamic(const T* from, int64_t size, int64_t blocksize, const uint8_t* first, const float* midpoints,
                           uint8_t* codes, float* absmax) {
  Scale scale = scale_of(from, size, size == blocksize, absmax);
  for (int64_t i = 0; i < size; i++) {
    float value = scale(T::read(from[i]));
    int rank = first[bits_of(value) >> 16];
    rank += midpoints[rank] < value;
    rank += midpoints[rank] < value;
    codes[i] = uint8_t(rank);
  }
}

EXPORT int hb_quantize_dynamic(const void* x, int dtype, int64_t count, const uint8_t* first, const float* midpoints,
                               int64_t blocksize, uint8_t* codes, float* absmax) {
  return guarded([&] {
    over_blocks((count + blocksize - 1) / blocksize, blocksize, [&](int64_t begin, int64_t end) {
      with_type(dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t block = begin; block < end; block++) {
          const int64_t base = block * blocksize, size = std::min(blocksize, count - base);
          encode_dynamic(static_cast<const T*>(x) + base, size, blocksize, first, midpoints, codes + base,
                         absmax + block);
        }
      });
    });
  });
}

// One moment in one byte an element: codes and a float for every 256, the map, and what `hb_quantize_dynamic` needs.
struct ByteMoment {
  uint8_t* codes;
  float* absmax;
  const float* table;
  const uint8_t* first;
  const float* midpoints;
};

// AdamW (arXiv 1711.05101) over weights whose moments are bytes (arXiv 2110.02861), a block at a time: nothing of the
// moments exists in float but the block at hand.
//   numbers: gradient's factor, beta1, beta2, learning rate / correction of the first moment, root of the correction of
//            the second, epsilon, what decay leaves of a weight
EXPORT int hb_adamw_bytes(int64_t count, float* weights, const float* gradients, const ByteMoment* moments,
                          const float* numbers) {
  return guarded([&] {
    constexpr int64_t blocksize = 256;
    const float factor = numbers[0], beta1 = numbers[1], beta2 = numbers[2], step = numbers[3], root = numbers[4],
                epsilon = numbers[5], keep = numbers[6];
    const ByteMoment &m = moments[0], &v = moments[1];
    over_blocks((count + blocksize - 1) / blocksize, blocksize, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t base = block * blocksize, size = std::min(blocksize, count - base);
        Float32 first[blocksize], second[blocksize];
        for (int64_t i = 0; i < size; i++) {
          first[i].raw = m.table[m.codes[base + i]] * m.absmax[block];
          second[i].raw = v.table[v.codes[base + i]] * v.absmax[block];
        }
        for (int64_t i = 0; i < size; i++) {
          const float gradient = gradients[base + i] * factor;
          first[i].raw += (gradient - first[i].raw) * (1 - beta1);
          second[i].raw = second[i].raw * beta2 + gradient * gradient * (1 - beta2);
          const float change = first[i].raw / (std::sqrt(second[i].raw) / root + epsilon);
          weights[base + i] = weights[base + i] * keep - step * change;
        }
        encode_dynamic(first, size, blocksize, m.first, m.midpoints, m.codes + base, m.absmax + block);
        encode_dynamic(second, size, blocksize, v.first, v.midpoints, v.codes + base, v.absmax + block);
      }
    });
  });
}

EXPORT int hb_dequantize_dynamic(const uint8_t* codes, const float* absmax, const float* table, int64_t blocksize,
                                 int64_t count, float* out) {
  return guarded([&] {
    over_blocks((count + blocksize - 1) / blocksize, blocksize, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * blocksize, last = std::min(first + blocksize, count);
        for (int64_t i = first; i < last; i++) out[i] = table[codes[i]] * absmax[block];
      }
    });
  });
}
