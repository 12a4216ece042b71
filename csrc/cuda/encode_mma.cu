// Pre-activations on the tensor cores: y[t, i] = sum_d z[t, d] * E[i, d], products exact, sums in fp32. A block
// streams up to 128 weight rows once, for 16 or 64 rows of z, through a ring of shared-memory stages filled
// by 16-byte asynchronous copies. Up to about 200 rows of z this is bound by reading the weights, whatever
// the number of rows.
//
// A dot product does not mind the order of its columns. A lane therefore reads 16 neighbouring bytes of a
// weight row and the same columns of z, and the columns that an mma calls 2q, 2q+1, 2q+8, 2q+9 are four
// neighbours. Nothing is transposed, and 8-bit weights unpack in registers.
#include "cuda/element.cuh"
#include "cuda/encode.h"
#include "cuda/launch.cuh"

namespace daco::cuda {
namespace {

struct Tiles {
  Encode call;
  int64_t weights = 0;  // latents per block
  int64_t row_tiles = 0;
};

__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <bool kBf16>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ uint32_t bits(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }
__device__ __forceinline__ uint32_t bits(__nv_bfloat162 x) { return *reinterpret_cast<const uint32_t*>(&x); }

// Four 8-bit weights as two words of the activation's type, exactly.
template <DType W, bool kBf16>
__device__ __forceinline__ void unpack(uint32_t w, uint32_t (&out)[2]) {
  if constexpr (W == DType::kI8) {
    const uint32_t x = w ^ 0x80808080u;  // q + 128
    if constexpr (kBf16) {
      float f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f[i] = __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7440u + i)) - 8388736.f;  // 2^23 + 128
      }
      out[0] = __byte_perm(__float_as_uint(f[0]), __float_as_uint(f[1]), 0x7632);
      out[1] = __byte_perm(__float_as_uint(f[2]), __float_as_uint(f[3]), 0x7632);
    } else {
      const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t shifted = __byte_perm(x, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
        out[i] = bits(__hsub2(*reinterpret_cast<const __half2*>(&shifted), offset));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t upper = __byte_perm(w, 0, i == 0 ? 0x1404 : 0x3424);
      if constexpr (kBf16) {
        const uint32_t scaled = ((upper & 0x7f007f00u) >> 4) | (upper & 0x80008000u);
        const __nv_bfloat162 factor = __bfloat162bfloat162(__ushort_as_bfloat16(0x7b80));  // 2^120
        out[i] = bits(__hmul2(*reinterpret_cast<const __nv_bfloat162*>(&scaled), factor));
      } else {
        const uint32_t scaled = e4m3_to_scaled_half2(upper);
        const __half2 factor = __half2half2(__ushort_as_half(0x5c00));  // 2^8
        out[i] = bits(__hmul2(*reinterpret_cast<const __half2*>(&scaled), factor));
      }
    }
  }
}

// Shapes of a block and of its stages. Pieces of 16 bytes are placed so that the eight lanes that shared
// memory serves at once touch all banks: odd rows have their pieces swapped.
template <DType W, int kRowBlocks>
struct Shape {
  static constexpr int kSize = W == DType::kI8 || W == DType::kF8E4M3 ? 1 : 2;
  static constexpr int kRows = 16 * kRowBlocks;
  static constexpr int kStages = kRowBlocks == 1 ? 8 : 4;
  static constexpr int kColumns = 128 / kSize;        // of a stage
  static constexpr int kWeightPieces = 8;             // of 16 bytes, per weight row
  static constexpr int kRowPieces = 2 * 8 / kSize;    // per row of z
  static constexpr int kWeightBytes = 128 * 128;
  static constexpr int kStageBytes = kWeightBytes + kRows * kRowPieces * 16;
  static constexpr int kWarpRows = kRowBlocks == 1 ? 1 : 2;  // blocks of 16 rows of z, and ...
  static constexpr int kWarpTiles = kRowBlocks == 1 ? 2 : 4;  // ... of 8 latents, per warp

  __device__ static int weight_at(int row, int piece) { return row * 128 + (piece ^ ((row & 1) << 2)) * 16; }
  __device__ static int row_at(int row, int piece) {
    return kWeightBytes + row * kRowPieces * 16 + (piece ^ ((row & 1) << (kSize == 2 ? 2 : 0))) * 16;
  }
};

template <DType W, bool kBf16, int kRowBlocks>
__global__ void __launch_bounds__(kMmaThreads, 1) encode_mma(const Tiles p) {
  using S = Shape<W, kRowBlocks>;
  extern __shared__ uint4 ring[];
  char* stages = reinterpret_cast<char*>(ring);
  wait_for_previous();
  let_next_start();
  const Encode& c = p.call;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t t0 = blockIdx.x % p.row_tiles * S::kRows;
  const int64_t i0 = blockIdx.x / p.row_tiles * p.weights;
  const int rows = static_cast<int>(c.rows - t0 < S::kRows ? c.rows - t0 : S::kRows);
  const int latents = static_cast<int>(c.atoms - i0 < p.weights ? c.atoms - i0 : p.weights);
  if (!__syncthreads_or(tid < rows && coded_slot(c.slots[t0 + tid], c.policies))) return;

  const char* weights = static_cast<const char*>(c.weights) + i0 * c.dim * S::kSize;
  const char* z = static_cast<const char*>(c.z) + t0 * c.z_stride * 2;
  const auto fill = [&](int64_t step) {
    char* stage = stages + step % S::kStages * S::kStageBytes;
    const int64_t column = step * S::kColumns;
#pragma unroll
    for (int j = 0; j < 128 * S::kWeightPieces / kMmaThreads; ++j) {
      const int row = (tid + j * kMmaThreads) / S::kWeightPieces, piece = tid % S::kWeightPieces;
      const int64_t at = column + piece * (16 / S::kSize);
      const bool inside = at < c.dim;  // rows are whole pieces long, so a piece is in or out
      if (row < latents) {
        copy_async(stage + S::weight_at(row, piece), weights + (inside ? (row * c.dim + at) * S::kSize : 0),
                   inside ? 16 : 0);
      }
    }
#pragma unroll
    for (int j = tid; j < S::kRows * S::kRowPieces; j += kMmaThreads) {
      const int row = j / S::kRowPieces, piece = j % S::kRowPieces;
      const int64_t at = column + piece * 8;
      const bool inside = at < c.dim && row < rows;
      copy_async(stage + S::row_at(row, piece), z + (inside ? (row * c.z_stride + at) * 2 : 0),
                 inside ? 16 : 0);
    }
  };

  const int64_t steps = (c.dim + S::kColumns - 1) / S::kColumns;
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) fill(s);
    commit();
  }
  constexpr int kAlong = 8 / (kRowBlocks / S::kWarpRows);  // warps along the latents
  const int first_tile = warp % kAlong * S::kWarpTiles * 8, first_row = warp / kAlong * S::kWarpRows * 16;
  const int group = lane / 4, quad = lane % 4;
  float sum[S::kWarpRows][S::kWarpTiles][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    wait_groups<S::kStages - 2>();
    // Behind this barrier everyone sees this stage, and nobody still reads the one that is filled next.
    __syncthreads();
    if (step + S::kStages - 1 < steps) fill(step + S::kStages - 1);
    commit();
    if (first_tile >= latents) continue;
    const char* stage = stages + step % S::kStages * S::kStageBytes;
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      uint4 w[S::kWarpTiles];
#pragma unroll
      for (int n = 0; n < S::kWarpTiles; ++n) {
        w[n] = *reinterpret_cast<const uint4*>(stage +
                                               S::weight_at(first_tile + 8 * n + group, 4 * chunk + quad));
      }
#pragma unroll
      for (int half = 0; half < 2 / S::kSize; ++half) {
        const int piece = S::kSize == 2 ? 4 * chunk + quad : 8 * chunk + 2 * quad + half;
        uint4 upper[S::kWarpRows], lower[S::kWarpRows];
#pragma unroll
        for (int m = 0; m < S::kWarpRows; ++m) {
          upper[m] = *reinterpret_cast<const uint4*>(stage + S::row_at(first_row + 16 * m + group, piece));
          lower[m] = *reinterpret_cast<const uint4*>(stage + S::row_at(first_row + 16 * m + group + 8, piece));
        }
#pragma unroll
        for (int n = 0; n < S::kWarpTiles; ++n) {
          uint32_t b[4];
          if constexpr (S::kSize == 2) {
            b[0] = w[n].x, b[1] = w[n].y, b[2] = w[n].z, b[3] = w[n].w;
          } else {
            uint32_t two[2];
            unpack<W, kBf16>(half == 0 ? w[n].x : w[n].z, two);
            b[0] = two[0], b[1] = two[1];
            unpack<W, kBf16>(half == 0 ? w[n].y : w[n].w, two);
            b[2] = two[0], b[3] = two[1];
          }
#pragma unroll
          for (int m = 0; m < S::kWarpRows; ++m) {
            mma<kBf16>(sum[m][n], upper[m].x, lower[m].x, upper[m].y, lower[m].y, b[0], b[1]);
            mma<kBf16>(sum[m][n], upper[m].z, lower[m].z, upper[m].w, lower[m].w, b[2], b[3]);
          }
        }
      }
    }
  }
  wait_groups<0>();

#pragma unroll
  for (int n = 0; n < S::kWarpTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int latent = first_tile + 8 * n + 2 * quad + e;
      if (latent >= latents) continue;
      const float scale = c.scales != nullptr ? c.scales[i0 + latent] : 1.f;
      const float bias = c.bias[i0 + latent];
#pragma unroll
      for (int m = 0; m < S::kWarpRows; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = first_row + 16 * m + group + 8 * h;
          if (row < rows) {
            c.y[(t0 + row) * c.y_stride + i0 + latent] = fmaf(scale, sum[m][n][2 * h + e], bias);
          }
        }
      }
    }
  }
}

template <DType W, bool kBf16>
Status launch_of(const Tiles& tiles, const MmaTiling& tiling, const Launch& how, const Device& device,
                 Stream stream) {
  if (tiling.rows == kMmaFewRows) return launch(how, device, stream, encode_mma<W, kBf16, 1>, tiles);
  return launch(how, device, stream, encode_mma<W, kBf16, 4>, tiles);
}

}  // namespace

Status launch_encode_mma(const Encode& call, const MmaTiling& tiling, const Device& device, Stream stream) {
  Launch how;
  how.what = "encode";
  how.grid = dim3(static_cast<unsigned>(tiling.row_tiles * tiling.weight_tiles));
  how.threads = kMmaThreads;
  how.shared = tiling.shared;
  const Tiles tiles{call, tiling.weights, tiling.row_tiles};
  const bool bf16 = call.activation == DType::kBF16;
  switch (call.weight) {
    case DType::kBF16: return launch_of<DType::kBF16, true>(tiles, tiling, how, device, stream);
    case DType::kF16: return launch_of<DType::kF16, false>(tiles, tiling, how, device, stream);
    case DType::kI8:
      return bf16 ? launch_of<DType::kI8, true>(tiles, tiling, how, device, stream)
                  : launch_of<DType::kI8, false>(tiles, tiling, how, device, stream);
    case DType::kF8E4M3:
      return bf16 ? launch_of<DType::kF8E4M3, true>(tiles, tiling, how, device, stream)
                  : launch_of<DType::kF8E4M3, false>(tiles, tiling, how, device, stream);
    case DType::kF32: break;
  }
  return make_status(Code::kUnsupported, "encode: the tensor cores take no fp32 weights");
}

}  // namespace daco::cuda
