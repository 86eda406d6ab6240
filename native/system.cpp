// Memory: huge pages, and a plain read of a range for measuring bandwidth.
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "blockffn.h"
#include "dispatch.h"
#include "parallel.h"

extern "C" int32_t blockffn_advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin >= end) return 1;
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0 ? 0 : 1;
#else
  (void)address, (void)bytes;
  return 1;
#endif
}

namespace {

struct Read {
  const uint8_t* data;
  int64_t bytes;
  uint64_t sum;
  blockffn::Counter counter;
};

void read_chunks(void* argument) {
  Read& read = *static_cast<Read*>(argument);
  constexpr int64_t kChunk = 1 << 20;
  uint64_t sum = 0;
  for (int64_t at; (at = read.counter.take() * kChunk) < read.bytes;)
    sum += blockffn::kernels().sum(read.data + at, read.bytes - at < kChunk ? read.bytes - at : kChunk);
  __atomic_fetch_add(&read.sum, sum, __ATOMIC_RELAXED);
}

}  // namespace

extern "C" uint64_t blockffn_read(const void* address, int64_t bytes) {
  Read read{static_cast<const uint8_t*>(address), bytes, 0, {}};
  blockffn::run_on_threads(read_chunks, &read, bytes >> 20);
  return read.sum;
}
