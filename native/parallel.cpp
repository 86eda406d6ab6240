#include "parallel.h"

#include <sched.h>

#include "blockffn.h"

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Barrier = void (*)();
using MaxThreads = int (*)();

Parallel gomp_parallel = nullptr;
Barrier gomp_barrier = nullptr;
MaxThreads omp_max_threads = nullptr;
thread_local bool alone = true;  // whether this thread's current region has no other threads to wait for

struct Region {
  void (*work)(void*);
  void* context;
};

void enter(void* argument) {
  const Region region = *static_cast<Region*>(argument);
  alone = false;
  region.work(region.context);
  alone = true;
}

}  // namespace

int64_t blockffn::num_threads() { return omp_max_threads ? omp_max_threads() : 1; }

void blockffn::run_on_threads(void (*work)(void*), void* context, int64_t max_threads) {
  const int64_t available = num_threads();
  const int64_t threads = max_threads < available ? max_threads : available;
  if (threads <= 1) {
    work(context);
    return;
  }
  Region region{work, context};
  gomp_parallel(enter, &region, static_cast<unsigned>(threads), 0);
}

void blockffn::wait_for_all() {
  if (!alone) gomp_barrier();
}

void blockffn::Meeting::pause(int64_t tries) {
  constexpr int64_t kSpins = 4000;  // some 50 us; then whoever else wants this core may have it
  if (tries >= kSpins) {
    sched_yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

extern "C" void blockffn_use_threads(void* parallel, void* barrier, void* max_threads) {
  gomp_parallel = reinterpret_cast<Parallel>(parallel);
  gomp_barrier = reinterpret_cast<Barrier>(barrier);
  omp_max_threads = reinterpret_cast<MaxThreads>(max_threads);
}
