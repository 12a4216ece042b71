// Exact top-k, one block a row. A first look finds a level that at least k entries reach: the least of the
// maxima of k or more groups. What reaches it, seldom more than a few times k, is ranked by counting, so the
// list comes out sorted and the order of arrival does not matter. Where too many reach it (large k, or data
// made for it) the k-th key is found digit by digit from histograms, and the list is made in order of index.
#include "cuda/launch.cuh"
#include "cuda/order.h"
#include "cuda/reduce.cuh"
#include "cuda/select.h"

namespace daco::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kCandidates = 2048;
constexpr int kKept = 4;  // 16-byte pieces of y that a thread keeps in registers

struct Shared {
  union {
    struct {
      uint32_t key[kCandidates];
      int32_t index[kCandidates];
    } candidate;
    int32_t bin[kBins];
  };
  int32_t sums[32];
  uint32_t level[32];
  int32_t found;
  uint32_t prefix;
  int32_t missing;
};

// A row of pre-activations as keys.
struct Row {
  const float* y;
  const float* bias;

  __device__ uint32_t key(int64_t i) const {
    return key_of(__float_as_uint(bias != nullptr ? y[i] + bias[i] : y[i]));
  }
  // Four from i on, a multiple of 4; 0 past the end.
  __device__ uint4 keys(int64_t i, int64_t m) const {
    if (i >= m) return make_uint4(0, 0, 0, 0);
    float4 v = *reinterpret_cast<const float4*>(y + i);
    if (bias != nullptr) {
      v.x += bias[i];
      if (i + 1 < m) v.y += bias[i + 1];
      if (i + 2 < m) v.z += bias[i + 2];
      if (i + 3 < m) v.w += bias[i + 3];
    }
    return make_uint4(key_of(__float_as_uint(v.x)), i + 1 < m ? key_of(__float_as_uint(v.y)) : 0u,
                      i + 2 < m ? key_of(__float_as_uint(v.z)) : 0u,
                      i + 3 < m ? key_of(__float_as_uint(v.w)) : 0u);
  }
};

// Calls body(key, index) for the entries of this thread: the first pieces from registers, the rest from memory.
template <class Body>
__device__ __forceinline__ void for_my_keys(const uint4 (&kept)[kKept], const Row& y, int64_t m, Body&& body) {
  const int64_t at = static_cast<int64_t>(threadIdx.x) * 4;
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    const int64_t i = at + j * int64_t{kThreads} * 4;
    const uint32_t four[4] = {kept[j].x, kept[j].y, kept[j].z, kept[j].w};
#pragma unroll
    for (int e = 0; e < 4; ++e) body(four[e], i + e);
  }
  for (int64_t i = at + kKept * int64_t{kThreads} * 4; i < m; i += int64_t{kThreads} * 4) {
    const uint4 v = y.keys(i, m);
    body(v.x, i);
    body(v.y, i + 1);
    body(v.z, i + 2);
    body(v.w, i + 3);
  }
}

// The exact threshold: the k-th largest key and how many of the keys equal to it still belong.
__device__ void refine(const Row& y, int64_t m, int64_t k, Shared& s) {
  if (threadIdx.x == 0) {
    s.prefix = 0;
    s.missing = static_cast<int32_t>(k);
  }
  for (int d = 0; d < kDigits; ++d) {
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads) s.bin[b] = 0;
    const uint32_t prefix = s.prefix;
    const int32_t missing = s.missing;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < m; i += kThreads) {
      const uint32_t key = y.key(i);
      if (key != 0 && has_prefix(key, prefix, d)) atomicAdd(&s.bin[digit_of(key, d)], 1);
    }
    __syncthreads();
    // Thread j looks at bins from the top: 2j and 2j + 1.
    const int top = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const int32_t first = s.bin[top], second = s.bin[top - 1];
    int32_t total;
    const int32_t above = block_prefix(first + second, s.sums, &total);
    if (above < missing && above + first + second >= missing) {
      const bool upper = above + first >= missing;
      s.prefix = prefix | static_cast<uint32_t>(upper ? top : top - 1) << digit_shift(d);
      s.missing = missing - above - (upper ? 0 : first);
    }
  }
  __syncthreads();
}

// Lists, in order of index, the keys above the threshold and the first `ties` of those equal to it.
__device__ int32_t list_in_order(const Row& y, int64_t m, uint32_t threshold, int32_t ties, Shared& s,
                                 int32_t* index, float* value) {
  int32_t kept = 0, equal_before = 0;
  for (int64_t base = 0; base < m; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < m ? y.key(i) : 0u;
    int32_t total;
    const int32_t equal = equal_before + block_prefix(key == threshold, s.sums, &total);
    equal_before += total;
    const bool take = key > threshold || (key == threshold && equal < ties);
    const int32_t place = kept + block_prefix(take, s.sums, &total);
    kept += total;
    if (take) {
      index[place] = static_cast<int32_t>(i);
      value[place] = __uint_as_float(key);
    }
  }
  return kept;
}

__global__ void __launch_bounds__(kThreads, 1) select_largest(const Select p) {
  __shared__ Shared s;
  wait_for_previous();
  let_next_start();
  const int64_t t = blockIdx.x, m = p.atoms;
  if (!(p.slots[t] >= 1 && p.slots[t] < p.policies)) {
    if (threadIdx.x == 0) p.codes.count[t] = -1;
    return;
  }
  const Row y{p.y + t * p.y_stride, p.bias};
  int32_t* index = p.codes.index + t * p.codes.capacity;
  float* value = p.codes.value + t * p.codes.capacity;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;

  uint4 kept[kKept];
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    kept[j] = y.keys((static_cast<int64_t>(threadIdx.x) + j * kThreads) * 4, m);
  }

  uint32_t largest = 0;
  for_my_keys(kept, y, m, [&](uint32_t key, int64_t) { largest = key > largest ? key : largest; });
  const int group = lanes_per_group(p.k);
  for (int step = group / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, step);
    largest = other > largest ? other : largest;
  }
  const uint32_t least = __reduce_min_sync(kAllLanes, group > 0 ? largest : 0u);
  if (lane == 0) s.level[warp] = least;
  if (threadIdx.x == 0) s.found = 0;
  __syncthreads();
  const uint32_t level = max(__reduce_min_sync(kAllLanes, s.level[lane]), 1u);

  for_my_keys(kept, y, m, [&](uint32_t key, int64_t i) {
    if (key < level) return;
    const int32_t at = atomicAdd(&s.found, 1);
    if (at < kCandidates) {
      s.candidate.key[at] = key;
      s.candidate.index[at] = static_cast<int32_t>(i);
    }
  });
  __syncthreads();
  const int32_t found = s.found;
  int32_t count;
  if (found <= kCandidates) {
    count = found < p.k ? found : static_cast<int32_t>(p.k);
    for (int c = threadIdx.x; c < found; c += kThreads) {
      const uint32_t key = s.candidate.key[c];
      const int32_t own = s.candidate.index[c];
      int32_t rank = 0;
      for (int o = 0; o < found; ++o) rank += before(s.candidate.key[o], s.candidate.index[o], key, own);
      if (rank < count) {
        index[rank] = own;
        value[rank] = __uint_as_float(key);
      }
    }
  } else {
    // With a level of 1 every positive entry was counted, and they may all belong.
    uint32_t threshold = 0;
    int32_t ties = 0;
    if (level > 1 || found > p.k) {
      refine(y, m, p.k, s);
      threshold = s.prefix;
      ties = s.missing;
    }
    count = list_in_order(y, m, threshold, ties, s, index, value);
  }
  if (threadIdx.x == 0) p.codes.count[t] = count;
}

// Lists every entry that is not zero. The order is that of threads, then of index: fixed, if not sorted.
__global__ void __launch_bounds__(kThreads, 1) select_all(const Select p) {
  __shared__ int32_t sums[32];
  wait_for_previous();
  let_next_start();
  const int64_t t = blockIdx.x, m = p.atoms;
  if (!(p.slots[t] >= 1 && p.slots[t] < p.policies)) {
    if (threadIdx.x == 0) p.codes.count[t] = -1;
    return;
  }
  const float* y = p.y + t * p.y_stride;
  const auto for_mine = [&](auto&& body) {
#pragma unroll 4
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * 4; i < m; i += int64_t{kThreads} * 4) {
      const float4 v = *reinterpret_cast<const float4*>(y + i);
      if (v.x != 0.f) body(v.x, i);
      if (i + 1 < m && v.y != 0.f) body(v.y, i + 1);
      if (i + 2 < m && v.z != 0.f) body(v.z, i + 2);
      if (i + 3 < m && v.w != 0.f) body(v.w, i + 3);
    }
  };
  int32_t mine = 0, total;
  for_mine([&](float, int64_t) { ++mine; });
  int64_t place = t * p.codes.capacity + block_prefix(mine, sums, &total);
  for_mine([&](float v, int64_t i) {
    p.codes.index[place] = static_cast<int32_t>(i);
    p.codes.value[place++] = v;
  });
  if (threadIdx.x == 0) p.codes.count[t] = total;
}

}  // namespace

Status launch_select(const Select& call, const Device& device, Stream stream) {
  Launch how;
  how.what = "select";
  how.grid = dim3(static_cast<unsigned>(call.rows));
  how.threads = kThreads;
  how.overlap = true;
  return call.k > 0 ? launch(how, device, stream, select_largest, call)
                    : launch(how, device, stream, select_all, call);
}

}  // namespace daco::cuda
