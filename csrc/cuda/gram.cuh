// The Gram matrix: products of rows with rows, out[i, j] = x_i . w_j, in fp32 arithmetic for every element
// type.
#pragma once

#include "cuda/simt.cuh"

namespace daco::cuda {

constexpr int kTileX = 64, kTileW = 128, kTileD = 16, kGramThreads = 256;
constexpr int kEachX = 4, kEachW = 8;  // entries of out that a thread computes
constexpr int kStrideX = kTileX + 4, kStrideW = kTileW + 4;
constexpr size_t kGramShared = sizeof(float) * kTileD * (kStrideX + kStrideW);

struct GramArgs {
  const void* x;        // [m, d]
  const void* w;        // [m, d]
  const float* scales;  // [2, m], of x and of w, or null
  DType type;
  int64_t m;
  int64_t d;
};

// Brings kTileD columns of `count` rows into a tile whose columns are contiguous, zeros beyond the edges.
DACO_DEVICE void load_tile(float* tile, int stride, int count, const GramArgs& g, const void* matrix,
                           int64_t first, int64_t column) {
  with_type(g.type, matrix, [&](const auto* p) {
    for (int e = threadIdx.x; e < count * kTileD; e += kGramThreads) {
      const int row = e / kTileD, c = e % kTileD;
      const int64_t i = first + row, k = column + c;
      tile[c * stride + row] = i < g.m && k < g.d ? to_float(p[i * g.d + k]) : 0.f;
    }
  });
}

DACO_DEVICE void store(float* out, int64_t at, float x) { out[at] = x; }
DACO_DEVICE void store(__half* out, int64_t at, float x) { out[at] = __float2half_rn(x); }

// grid: tiles of out, the x tiles of one w tile in a row so that they share it in the cache.
template <class Out>
DACO_DEVICE void multiply_tile(const GramArgs& g, Out* out) {
  auto* tile_x = reinterpret_cast<float*>(dynamic_shared());
  float* tile_w = tile_x + kTileD * kStrideX;
  const int64_t tiles_x = (g.m + kTileX - 1) / kTileX;
  const int64_t first_x = blockIdx.x % tiles_x * kTileX;
  const int64_t first_w = blockIdx.x / tiles_x * kTileW;
  const int tx = threadIdx.x / 16, tw = threadIdx.x % 16;
  float sum[kEachX][kEachW] = {};
  for (int64_t column = 0; column < g.d; column += kTileD) {
    load_tile(tile_x, kStrideX, kTileX, g, g.x, first_x, column);
    load_tile(tile_w, kStrideW, kTileW, g, g.w, first_w, column);
    block_sync();
#pragma unroll 4
    for (int k = 0; k < kTileD; ++k) {
      float x[kEachX], w[kEachW];
#pragma unroll
      for (int i = 0; i < kEachX; ++i) x[i] = tile_x[k * kStrideX + tx * kEachX + i];
#pragma unroll
      for (int j = 0; j < kEachW; ++j) w[j] = tile_w[k * kStrideW + tw + j * 16];
#pragma unroll
      for (int i = 0; i < kEachX; ++i) {
#pragma unroll
        for (int j = 0; j < kEachW; ++j) sum[i][j] = fmaf(x[i], w[j], sum[i][j]);
      }
    }
    block_sync();
  }
#pragma unroll
  for (int i = 0; i < kEachX; ++i) {
    const int64_t row = first_x + tx * kEachX + i;
    if (row >= g.m) continue;
    const float x_scale = g.scales != nullptr ? g.scales[row] : 1.f;
#pragma unroll
    for (int j = 0; j < kEachW; ++j) {
      const int64_t atom = first_w + tw + j * 16;
      if (atom >= g.m) continue;
      float value = sum[i][j] * x_scale;
      if (g.scales != nullptr) value *= g.scales[g.m + atom];
      store(out, row * g.m + atom, value);
    }
  }
}

}  // namespace daco::cuda
