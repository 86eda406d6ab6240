// Threads, borrowed from the OpenMP library that the process already runs (torch's). See blockffn_use_threads.
#pragma once

#include <stdint.h>

namespace blockffn {

// Calls work(context) on up to `max_threads` threads at once, the calling one among them, and returns when all are done.
void run_on_threads(void (*work)(void*), void* context, int64_t max_threads);

// Inside `work`: waits until all threads have come here.
void wait_for_all();

int64_t num_threads();

// Hands out 0, 1, 2, … to whichever thread asks next.
struct Counter {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

}  // namespace blockffn
