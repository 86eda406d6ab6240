// Scratch memory of one call: one allocation, cut into 64-byte aligned pieces, freed when the call returns.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace blockffn {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(memory_); }

  // First reserve every piece, then allocate, then fetch them by the offsets that `reserve` gave.
  int64_t reserve(int64_t bytes) {
    const int64_t offset = size_;
    size_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  bool allocate() {
    if (posix_memalign(&memory_, 64, static_cast<size_t>(size_ ? size_ : 64)) == 0) return true;
    memory_ = nullptr;
    return false;
  }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_) + offset);
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace blockffn
