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

struct Stretch {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

// Shares 0 .. count - 1 out: long stretches first, so that memory is read in long stretches, and short ones last, so that
// all threads finish together.
struct Share {
  int64_t next = 0;

  Stretch take(int64_t count, int64_t threads, int64_t shortest) {
    int64_t begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    while (begin < count) {
      const int64_t left = count - begin, part = left / (2 * threads);
      const int64_t length = left < 2 * shortest ? left : part > shortest ? part : shortest;
      if (__atomic_compare_exchange_n(&next, &begin, begin + length, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return {begin, begin + length};
    }
    return {count, count};
  }
};

// Where the threads of a region wait for each other, many times in a call: they spin, for a while, because the wait is
// shorter than going to sleep and waking.
class Meeting {
 public:
  // The last of `threads` threads to come runs `last`; then all go on, and see what it wrote.
  template <typename Work>
  void wait(int64_t threads, Work last) {
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      last();
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int64_t tries = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++tries) pause(tries);
  }

 private:
  static void pause(int64_t tries);

  alignas(64) int64_t arrived_ = 0;
  alignas(64) uint32_t round_ = 0;
};

}  // namespace blockffn
