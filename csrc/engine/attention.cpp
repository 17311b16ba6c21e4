// The C interface of attention: documents cut into tasks, workspaces that are kept.
#include "attention.h"

#include <vector>

#include "engine.h"
#include "export.h"
#include "scratch.h"

namespace hb {
namespace {

// With fewer tasks than this the heads of a group become tasks of their own. A number of its own, not of threads: the
// order of the sums, and so the result, must not depend on those.
constexpr int64_t enough_tasks = 48;

thread_local Scratch workspace;

// Lays arrays end to end: run once to measure, once to place.
struct Layout {
  char* base = nullptr;
  int64_t size = 0;
  template <class T>
  T* take(int64_t bytes) {
    T* taken = base ? reinterpret_cast<T*>(base + size) : nullptr;
    size += round_up(bytes, 64);
    return taken;
  }
};

std::vector<Span> spans_of(const int64_t* lengths, int64_t documents, int64_t block) {
  std::vector<Span> spans;
  int64_t start = 0, room = 0;
  for (int64_t d = 0; d < documents; d++) {
    const int64_t length = lengths[d];
    for (int64_t first = 0; first < length; first += block) spans.push_back({start, length, first, room + first});
    start += length;
    room += round_up(length, 16);
  }
  return spans;
}

Attention describe(const int64_t* shape, const int64_t* lengths, int64_t documents, const float* numbers) {
  Attention a{};
  a.tokens = shape[0];
  a.heads = shape[1];
  a.kv_heads = shape[2];
  a.features = shape[3];
  a.window = shape[4];
  a.scale = numbers[0];
  a.softcap = numbers[1];
  for (int64_t d = 0; d < documents; d++) a.room += round_up(lengths[d], 16);
  return a;
}

Rows rows(const void* const* data, const int64_t* strides, int index) {
  return {const_cast<void*>(data[index]), strides[2 * index], strides[2 * index + 1]};
}

}  // namespace
}  // namespace hb

using namespace hb;

// shape    tokens, heads, kv_heads, features, window
// numbers  scale, softcap (0: none)
// data, strides  of q, k, v, out: pointers, and for each (token stride, head stride) in elements
// lse      float32 [heads, tokens], written
EXPORT int hb_attention(int dtype, const int64_t* shape, const float* numbers, const int64_t* lengths,
                        int64_t documents, const void* const* data, const int64_t* strides, float* lse) {
  return guarded([&] {
    const AttentionKernels& kernels = *engine->attention[dtype];
    const int64_t item = dtype == float32 ? 4 : 2;
    Attention a = describe(shape, lengths, documents, numbers);
    a.q = rows(data, strides, 0);
    a.k = rows(data, strides, 1);
    a.v = rows(data, strides, 2);
    a.out = rows(data, strides, 3);
    a.lse = lse;
    const std::vector<Span> queries = spans_of(lengths, documents, query_block);
    const std::vector<Span> keys = spans_of(lengths, documents, key_block);
    const int64_t scratch = round_up(kernels.scratch(a.features), 64), turned = a.kv_heads * a.room * a.features * item;
    char* memory = workspace.get<char>(round_up(turned, 64) + threads() * scratch);
    a.turned_v = memory;
    memory += round_up(turned, 64);
    over_tasks(int64_t(keys.size()) * a.kv_heads,
               [&](int64_t task, int64_t) { kernels.turn_values(a, keys[task / a.kv_heads], task % a.kv_heads); });
    // From the last query block, which sees most, to the first.
    const int64_t count = int64_t(queries.size());
    over_tasks(count * a.heads, [&](int64_t task, int64_t worker) {
      kernels.forward(a, queries[count - 1 - task / a.heads], task % a.heads, memory + worker * scratch);
    });
  });
}

// As above, with data of q, k, v, out, dout, dq, dk, dv; the last three are written.
EXPORT int hb_attention_backward(int dtype, const int64_t* shape, const float* numbers, const int64_t* lengths,
                                 int64_t documents, const void* const* data, const int64_t* strides, float* lse) {
  return guarded([&] {
    const AttentionKernels& kernels = *engine->attention[dtype];
    const int64_t item = dtype == float32 ? 4 : 2;
    Attention a = describe(shape, lengths, documents, numbers);
    Rows* all[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
    for (int i = 0; i < 8; i++) *all[i] = rows(data, strides, i);
    a.lse = lse;
    const std::vector<Span> queries = spans_of(lengths, documents, query_block);
    const std::vector<Span> keys = spans_of(lengths, documents, key_block);
    const int64_t tasks = int64_t(keys.size()) * a.kv_heads, group = a.heads / a.kv_heads;
    const bool split = group > 1 && tasks < enough_tasks;
    const int64_t scratch = round_up(kernels.scratch(a.features), 64), flags = a.heads * (a.room / 16);
    char* scratches = nullptr;
    auto place = [&](Layout layout) {
      const int64_t all_heads = a.heads * a.room;
      a.packed_q = layout.take<void>(all_heads * a.features * item);
      a.packed_dout = layout.take<void>(all_heads * a.features * item);
      a.dq_sums = layout.take<float>(all_heads * a.features * 4);
      a.delta = layout.take<float>(all_heads * 4);
      a.progress = layout.take<std::atomic<int32_t>>(flags * int64_t(sizeof(std::atomic<int32_t>)));
      const int64_t sums = split ? all_heads * round_up(a.features, 16) * 4 : 0;
      a.dk_sums = layout.take<float>(sums);
      a.dv_sums = layout.take<float>(sums);
      scratches = layout.take<char>(threads() * scratch);
      return layout.size;
    };
    place({workspace.get<char>(place({}))});
    if (!split) a.dk_sums = a.dv_sums = nullptr;
    for (int64_t i = 0; i < flags; i++) new (a.progress + i) std::atomic<int32_t>(0);
    over_tasks(int64_t(queries.size()) * a.heads,
               [&](int64_t task, int64_t) { kernels.prepare(a, queries[task / a.heads], task % a.heads); });
    // In the order of the key blocks: a task that waits for an earlier block's share waits for one that has begun.
    const int64_t parts = split ? a.heads : a.kv_heads, together = split ? 1 : group;
    over_tasks(int64_t(keys.size()) * parts, [&](int64_t task, int64_t worker) {
      kernels.backward(a, keys[task / parts], task % parts * together, together, scratches + worker * scratch);
    });
    if (!split) return;
    over_tasks(tasks, [&](int64_t task, int64_t) { kernels.reduce(a, keys[task / a.kv_heads], task % a.kv_heads); });
  });
}
