// Scratch memory of one call, cut into 64-byte aligned pieces: one allocation, freed when the call returns, or memory that
// the caller lends.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace blockffn {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(own_); }

  // First reserve every piece, then allocate or borrow, then fetch them by the offsets that `reserve` gave.
  int64_t reserve(int64_t bytes) {
    const int64_t offset = size_;
    size_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  bool allocate() {
    if (posix_memalign(&own_, 64, static_cast<size_t>(size_ ? size_ : 64)) != 0) own_ = nullptr;
    memory_ = own_;
    return own_ != nullptr;
  }
  void borrow(void* memory) { memory_ = memory; }
  int64_t size() const { return size_; }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_) + offset);
  }

 private:
  void* own_ = nullptr;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace blockffn
