// How the workspace is cut into pieces. Host code only, so that its arithmetic is tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace daco::cuda {

constexpr size_t kAlignment = 256;  // of the workspace and of every piece of it

// Hands out pieces of a buffer; from a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ != nullptr && count > 0 ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace daco::cuda
