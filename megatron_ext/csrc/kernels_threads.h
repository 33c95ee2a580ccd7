// Divides the work of kernels among threads. The number and bounds of a kernel's tasks depend only on
// its shapes, so results are the same for any number of threads.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <sys/mman.h>
#endif

namespace kernels {

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

// torch's OpenMP threads spin for milliseconds after each of its operators; a second pool would compete
// with them for the cores. We therefore use that pool, through the entry point that compilers emit for
// `#pragma omp parallel`, if the process has one (with the Linux wheels of torch it has).
inline GompParallel find_torch_pool() {
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

// libgomp's pool does not survive a fork: using it in the child would wait forever for threads that
// exist only in the parent. A forked child starts its own threads instead.
inline std::atomic<bool> in_forked_child{false};

inline void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
}

struct Job {
  void (*call)(const void *, int64_t);
  const void *body;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) call(body, i);
  }
};

// Calls body(i) for i in [0, tasks), in any order, on up to `threads` threads.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body &body) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  Job job{[](const void *b, int64_t i) { (*static_cast<const Body *>(b))(i); }, &body, tasks};
  static const GompParallel torch_pool = find_torch_pool();
  if (torch_pool && !in_forked_child) {
    torch_pool([](void *j) { static_cast<Job *>(j)->work(); }, &job, threads, 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back([&job] { job.work(); });
  job.work();
  for (auto &helper : helpers) helper.join();
}

// New memory is mapped page by page when it is first written; for large results that costs more than
// computing them. If the system supports it, request 2 MiB pages instead of 4 KiB ones.
inline void expect_large_write(void *data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2u << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kernels
