// Pre-activations on the fp32 units. Every weight row is read once per block of 1, 4 or 8 rows of z, in 16-byte
// pieces with several in flight per thread; rows of z lie in shared memory as fp32. For one row of z this is
// bound by memory; for more it serves what the tensor cores cannot take, and the latents that a policy watches.
#include "cuda/element.cuh"
#include "cuda/encode.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace daco::cuda {
namespace {

struct Panel {
  Encode call;
  int64_t first = 0;     // column
  int64_t count = 0;     // columns of this launch
  int64_t columns = 0;   // of a staged row, padded with zeros
  int64_t group = 0;
  bool vectors = false;  // pieces of every weight row are 16-byte aligned
  bool last = false;     // of the panels
};

// Whether some policy edits or reports latent i.
__device__ bool watched(const Encode& c, int64_t i) {
  bool found = false;
  for (int64_t p = kSlotObserve; p < c.policies; ++p) {
    const int64_t at = p * c.atoms + i;
    found |= c.undesirable[at] != 0;
    if (p >= kFirstPolicy) {
      found |= c.gain[at] != 1.f;
      if (c.boost != nullptr) found |= c.boost[at] != 0.f;
    }
  }
  return found;
}

// Lays a row of z out so that neighbouring lanes read neighbouring 16 bytes: a lane's piece of kPer columns
// is cut into quarters, and a quarter's place is [chunk, quarter, lane].
template <int kPer>
__device__ __forceinline__ int64_t staged_at(int64_t i) {
  const int64_t chunk = i / (32 * kPer);
  const int lane = static_cast<int>(i / kPer % 32), quarter = static_cast<int>(i % kPer / 4);
  return ((chunk * (kPer / 4) + quarter) * 32 + lane) * 4 + i % 4;
}

template <int kPer, int kLatents, int kRows>
__device__ __forceinline__ void multiply(const float (&w)[kLatents][kPer], const float4* x, int64_t chunk,
                                         int64_t quads, int lane, float (&sum)[kLatents][kRows]) {
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
#pragma unroll
    for (int q = 0; q < kPer / 4; ++q) {
      const float4 v = x[t * quads + (chunk * (kPer / 4) + q) * 32 + lane];
#pragma unroll
      for (int r = 0; r < kLatents; ++r) {
        sum[r][t] = fmaf(w[r][4 * q], v.x, sum[r][t]);
        sum[r][t] = fmaf(w[r][4 * q + 1], v.y, sum[r][t]);
        sum[r][t] = fmaf(w[r][4 * q + 2], v.z, sum[r][t]);
        sum[r][t] = fmaf(w[r][4 * q + 3], v.w, sum[r][t]);
      }
    }
  }
}

template <DType W, int kRows>
__global__ void __launch_bounds__(kDotThreads, kRows == 1 ? 3 : kRows == 4 ? 2 : 1) encode_dot(const Panel p) {
  constexpr int kPer = kPiece<W>;
  constexpr int kLatents = kRows > 1 && kPer < 16 ? 4 : 2;  // weight rows of a warp at once
  constexpr int kAhead = 8 / kLatents;                      // pieces of each that are in flight
  constexpr int kWarps = kDotThreads / 32;
  extern __shared__ float4 staged[];
  __shared__ int32_t list[kDotListed];
  __shared__ int32_t listed;
  wait_for_previous();
  let_next_start();
  const Encode& c = p.call;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t t0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int rows = static_cast<int>(c.rows - t0 < kRows ? c.rows - t0 : kRows);
  if (!__syncthreads_or(tid < rows && coded_slot(c.slots[t0 + tid], c.policies))) return;

  float* x = reinterpret_cast<float*>(staged);
  for (int t = 0; t < kRows; ++t) {
    const char* z = row_of(c.z, t0 + t, c.z_stride, c.activation);
#pragma unroll 8
    for (int64_t i = tid; i < p.columns; i += kDotThreads) {
      x[t * p.columns + staged_at<kPer>(i)] =
          t < rows && i < p.count ? load_activation(z, p.first + i, c.activation) : 0.f;
    }
  }

  const int64_t groups = (c.atoms + p.group - 1) / p.group;
  const int64_t at_once = kDotListed / p.group;  // groups between two barriers
  const int64_t chunks = p.columns / (32 * kPer);
  const int64_t full = p.vectors ? p.count / (32 * kPer) : 0;
  const int64_t row_bytes = c.dim * static_cast<int64_t>(size_of(W));
  const char* weights = static_cast<const char*>(c.weights) + p.first * static_cast<int64_t>(size_of(W));
  for (int64_t turn = 0; blockIdx.x + turn * gridDim.x < groups; turn += at_once) {
    __syncthreads();
    if (tid == 0) listed = 0;
    __syncthreads();
    for (int64_t s = tid; s < kDotListed; s += kDotThreads) {
      const int64_t group = blockIdx.x + (turn + s / p.group) * gridDim.x;
      const int64_t i = group * p.group + s % p.group;
      if (group >= groups || i >= c.atoms) continue;
      if (!c.watched || watched(c, i)) {
        // The order of the list is left to chance: each latent's sum does not depend on it.
        list[atomicAdd(&listed, 1)] = static_cast<int32_t>(i);
      } else {
        for (int t = 0; t < rows; ++t) c.y[(t0 + t) * c.y_stride + i] = 0.f;
      }
    }
    __syncthreads();
    const int n = listed;
    for (int r0 = warp * kLatents; r0 < n; r0 += kWarps * kLatents) {
      const char* row[kLatents];
      float sum[kLatents][kRows];
#pragma unroll
      for (int r = 0; r < kLatents; ++r) {
        row[r] = weights + list[r0 + r < n ? r0 + r : n - 1] * row_bytes;
#pragma unroll
        for (int t = 0; t < kRows; ++t) sum[r][t] = 0.f;
      }
      int64_t chunk = 0;
      for (; chunk + kAhead <= full; chunk += kAhead) {
        uint4 raw[kAhead][kLatents];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int r = 0; r < kLatents; ++r) {
            raw[a][r] = load_streaming(row[r] + ((chunk + a) * 32 + lane) * 16);
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          float w[kLatents][kPer];
#pragma unroll
          for (int r = 0; r < kLatents; ++r) decode<W>(raw[a][r], w[r]);
          multiply<kPer, kLatents, kRows>(w, staged, chunk + a, p.columns / 4, lane, sum);
        }
      }
      for (; chunk < chunks; ++chunk) {
        const int64_t i = (chunk * 32 + lane) * kPer;
        float w[kLatents][kPer];
#pragma unroll
        for (int r = 0; r < kLatents; ++r) {
          if (p.vectors && i + kPer <= p.count) {
            decode<W>(load_streaming(row[r] + (chunk * 32 + lane) * 16), w[r]);
          } else {
#pragma unroll
            for (int e = 0; e < kPer; ++e) w[r][e] = i + e < p.count ? element<W>(row[r], i + e) : 0.f;
          }
        }
        multiply<kPer, kLatents, kRows>(w, staged, chunk, p.columns / 4, lane, sum);
      }
      float mine = 0.f;  // lane r * kRows + t keeps latent r's sum for row t
#pragma unroll
      for (int r = 0; r < kLatents; ++r) {
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
          const float total = warp_sum(sum[r][t]);
          if (lane == r * kRows + t) mine = total;
        }
      }
      const int r = lane / kRows, t = lane % kRows;
      if (lane < kLatents * kRows && r0 + r < n && t < rows) {
        const int64_t i = list[r0 + r];
        float* y = c.y + (t0 + t) * c.y_stride + i;
        float a = c.scales != nullptr ? mine * c.scales[i] : mine;
        a += p.first == 0 ? c.bias[i] : *y;
        if (c.watched && p.last && !(a > (c.threshold != nullptr ? c.threshold[i] : 0.f))) a = 0.f;
        *y = a;
      }
    }
  }
}

template <DType W>
Status launch_of(const Panel& panel, const DotTiling& tiling, const Launch& how, const Device& device,
                 Stream stream) {
  switch (tiling.rows) {
    case 8: return launch(how, device, stream, encode_dot<W, 8>, panel);
    case 4: return launch(how, device, stream, encode_dot<W, 4>, panel);
    default: return launch(how, device, stream, encode_dot<W, 1>, panel);
  }
}

}  // namespace

Status launch_encode_dot(const Encode& call, const DotTiling& tiling, const Device& device, Stream stream) {
  const auto size = static_cast<int64_t>(size_of(call.weight));
  Launch how;
  how.what = "encode";
  how.grid = dim3(static_cast<unsigned>(tiling.blocks), static_cast<unsigned>(ceil_div(call.rows, tiling.rows)));
  how.threads = kDotThreads;
  how.shared = tiling.shared;
  Status status;
  for (int64_t first = 0; status.ok() && first < call.dim; first += tiling.columns) {
    Panel panel;
    panel.call = call;
    panel.first = first;
    panel.count = std::min(tiling.columns, call.dim - first);
    panel.columns = tiling.columns;
    panel.group = tiling.group;
    panel.vectors = reinterpret_cast<uintptr_t>(call.weights) % 16 == 0 && call.dim * size % 16 == 0;
    panel.last = first + tiling.columns >= call.dim;
    how.overlap = first > 0;
    switch (call.weight) {
      case DType::kF32: status = launch_of<DType::kF32>(panel, tiling, how, device, stream); break;
      case DType::kF16: status = launch_of<DType::kF16>(panel, tiling, how, device, stream); break;
      case DType::kBF16: status = launch_of<DType::kBF16>(panel, tiling, how, device, stream); break;
      case DType::kI8: status = launch_of<DType::kI8>(panel, tiling, how, device, stream); break;
      case DType::kF8E4M3: status = launch_of<DType::kF8E4M3>(panel, tiling, how, device, stream); break;
    }
  }
  return status;
}

}  // namespace daco::cuda
