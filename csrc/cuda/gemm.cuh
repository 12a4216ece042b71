// Products of rows with rows, out[i, j] = x_i . w_j, in fp32 arithmetic for every pair of element types. Serves
// what the vendor's library does not: mixed and quantised types, machines without it, and Gram matrices.
#pragma once

#include "cuda/simt.cuh"

namespace daco::cuda {

constexpr int kTileX = 64, kTileW = 128, kTileD = 16, kGemmThreads = 256;
constexpr int kEachX = 4, kEachW = 8;  // entries of out that a thread computes
constexpr int kStrideX = kTileX + 4, kStrideW = kTileW + 4;
constexpr size_t kGemmShared = sizeof(float) * kTileD * (kStrideX + kStrideW);

struct GemmArgs {
  const void* x;  // [rows, d], row stride x_stride
  int64_t x_stride;
  DType x_type;
  const float* x_scale;  // [rows] or null
  int64_t rows;
  const void* w;  // [m, d]
  DType w_type;
  const float* w_scale;  // [m] or null
  int64_t m;
  int64_t d;
  const float* bias;  // [m] or null
};

// Brings kTileD columns of `count` rows into a tile whose columns are contiguous, zeros beyond the edges.
DACO_DEVICE void load_tile(float* tile, int stride, int count, DType type, const void* matrix, int64_t row_stride,
                           int64_t first, int64_t rows, int64_t column, int64_t d) {
  with_type(type, matrix, [&](const auto* p) {
    for (int e = threadIdx.x; e < count * kTileD; e += kGemmThreads) {
      const int row = e / kTileD, c = e % kTileD;
      const int64_t i = first + row, k = column + c;
      tile[c * stride + row] = i < rows && k < d ? to_float(p[i * row_stride + k]) : 0.f;
    }
  });
}

DACO_DEVICE void store(float* out, int64_t at, float x) { out[at] = x; }
DACO_DEVICE void store(__half* out, int64_t at, float x) { out[at] = __float2half_rn(x); }

// grid: tiles of out, the x tiles of one w tile in a row so that they share it in the cache.
template <class Out>
DACO_DEVICE void multiply_tile(const GemmArgs& g, Out* out) {
  auto* tile_x = reinterpret_cast<float*>(dynamic_shared());
  float* tile_w = tile_x + kTileD * kStrideX;
  const int64_t tiles_x = (g.rows + kTileX - 1) / kTileX;
  const int64_t first_x = blockIdx.x % tiles_x * kTileX;
  const int64_t first_w = blockIdx.x / tiles_x * kTileW;
  const int tx = threadIdx.x / 16, tw = threadIdx.x % 16;
  float sum[kEachX][kEachW] = {};
  for (int64_t column = 0; column < g.d; column += kTileD) {
    load_tile(tile_x, kStrideX, kTileX, g.x_type, g.x, g.x_stride, first_x, g.rows, column, g.d);
    load_tile(tile_w, kStrideW, kTileW, g.w_type, g.w, g.d, first_w, g.m, column, g.d);
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
    if (row >= g.rows) continue;
    const float x_scale = g.x_scale != nullptr ? g.x_scale[row] : 1.f;
#pragma unroll
    for (int j = 0; j < kEachW; ++j) {
      const int64_t atom = first_w + tw + j * 16;
      if (atom >= g.m) continue;
      float value = sum[i][j] * x_scale;
      if (g.w_scale != nullptr) value *= g.w_scale[atom];
      if (g.bias != nullptr) value += g.bias[atom];
      store(out, row * g.m + atom, value);
    }
  }
}

}  // namespace daco::cuda
