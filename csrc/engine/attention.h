// Causal attention over documents laid end to end: the problem, and what an instruction set brings to it.
//
// Dao 2023 (FlashAttention-2, arXiv 2307.08691), turned: scores are held as [keys x queries], so that a vector's lanes
// are queries, the softmax is vertical and each factor is used as it lies or packed once. `attention.cpp` cuts the work
// into tasks; `attention.inc` does one. Every sum has a fixed order, whatever the number of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace hb {

constexpr int64_t query_block = 64, key_block = 128;

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// [tokens, heads, features], features contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t token, head;
};

// A block of queries or keys of one document. `room` is where the block begins when every document is rounded up to 16
// tokens: workspaces are laid out so.
struct Span {
  int64_t start, length;  // the document: its first token, its tokens
  int64_t first, room;    // the block: its first token in the document, its place in a workspace
};

struct Attention {
  int64_t tokens, heads, kv_heads, features, room;  // room: of all documents
  int64_t window;                                   // keys a query sees, itself included
  float scale, softcap;                             // softcap 0: none
  Rows q, k, v, out, dout, dq, dk, dv;
  float* lse;  // [heads, tokens]: log of the sum of the exponentials of a query's scores

  // Workspaces, [heads or kv_heads, room, features]; within a block as `attention.inc` says.
  void* turned_v;
  void *packed_q, *packed_dout;
  float* dq_sums;
  float* delta;                    // [heads, room]: dout . out
  float *dk_sums, *dv_sums;        // of one query head, [heads, room, features rounded up to 16], or null
  std::atomic<int32_t>* progress;  // [heads, room / 16]: key blocks that a query block's `dq_sums` hold
};

// For one element type. Heads are query heads unless they are called `kv_head`.
struct AttentionKernels {
  int64_t (*scratch)(int64_t features);  // bytes a worker needs
  void (*turn_values)(const Attention&, const Span& keys, int64_t kv_head);
  void (*forward)(const Attention&, const Span& queries, int64_t head, char* scratch);
  void (*prepare)(const Attention&, const Span& queries, int64_t head);
  // Of heads `head` to `head + count`, which share a key-value head. Key blocks of a document must be begun in order.
  void (*backward)(const Attention&, const Span& keys, int64_t head, int64_t count, char* scratch);
  void (*reduce)(const Attention&, const Span& keys, int64_t kv_head);
};

}  // namespace hb
