// Torch's own thread pool, handed in as function pointers: a second pool would spin against it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace hb {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
using ThreadCount = int32_t (*)(uint32_t* count);

// Written by `hb_use` before any other call; null where torch has no such symbol: then one thread does everything.
extern ParallelFor parallel_for;
extern ThreadCount thread_count;

inline int64_t threads() {
  uint32_t count = 1;
  if (!parallel_for || !thread_count || thread_count(&count) != 0) return 1;
  return count;
}

// function(begin, end) over [0, count), in pieces of at least `grain`. std::bad_alloc of a piece is thrown when all are
// done: torch's threads know nothing of our exceptions.
template <class Function>
void over_range(int64_t count, int64_t grain, const Function& function) {
  struct Context {
    const Function& function;
    std::atomic<bool> out_of_memory{false};
  } context{function};
  auto body = [](int64_t begin, int64_t end, void* shared) {
    Context& of = *static_cast<Context*>(shared);
    try {
      of.function(begin, end);
    } catch (const std::bad_alloc&) {
      of.out_of_memory = true;
    }
  };
  if (count <= grain || !parallel_for || parallel_for(0, count, grain, body, &context) != 0) {
    function(0, count);
  } else if (context.out_of_memory) {
    throw std::bad_alloc();
  }
}

// function(task, worker) for every task in [0, tasks); worker in [0, threads()) names this call's scratch. Whoever is
// free takes the next task, so that a core which is busy elsewhere does not hold up the others.
template <class Function>
void over_tasks(int64_t tasks, const Function& function) {
  const int64_t workers = std::min(threads(), tasks);
  std::atomic<int64_t> next{0};
  over_range(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      for (int64_t task = next++; task < tasks; task = next++) function(task, worker);
    }
  });
}

}  // namespace hb
