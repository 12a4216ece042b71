// Which kernel runs with which tiles: arithmetic on sizes and device properties. Host code only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/steer.h"
#include "cuda/steer_cuda.h"

namespace daco::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Pre-activations y [rows, atoms] are padded to whole 16-byte pieces.
constexpr int64_t padded_atoms(int64_t atoms) { return round_up(atoms, 4); }

// ---- encode on the fp32 units: any dtypes, rows of z staged in shared memory

constexpr int kDotThreads = 256;
constexpr int64_t kDotListed = 1024;  // latents that a block looks at between two barriers

struct DotTiling {
  int rows = 1;         // of z per block: 1, 4 or 8
  int64_t columns = 0;  // of z per launch, a multiple of a warp's pieces; wider rows take several launches
  int64_t blocks = 1;   // along the latents
  int64_t group = 2;    // neighbouring latents that stay together
  size_t shared = 0;
};

inline DotTiling dot_tiling(int64_t rows, int64_t dim, int64_t atoms, DType weight, bool watched,
                            const Device& device) {
  DotTiling t;
  const int64_t step = 32 * 16 / static_cast<int64_t>(size_of(weight));  // columns a warp reads at once
  const int64_t fits = (device.shared_bytes - 6 * 1024) / static_cast<int64_t>(sizeof(float)) / step * step;
  const int64_t wanted = round_up(dim, step);
  t.rows = rows > 4 && 8 * wanted <= fits ? 8 : rows > 1 && 4 * wanted <= fits ? 4 : 1;
  t.columns = std::min(wanted, fits / t.rows / step * step);
  t.shared = static_cast<size_t>(t.rows * t.columns) * sizeof(float);
  // Sectors of the tables hold 8 entries; scattered groups keep runs of watched latents from one block.
  t.group = watched ? 8 : 2;
  const int64_t resident = t.rows == 1 ? 3 : t.rows == 4 ? 2 : 1;
  const int64_t by_memory = std::max<int64_t>(1, device.shared_bytes / std::max<int64_t>(1, static_cast<int64_t>(t.shared) + 6 * 1024));
  t.blocks = std::min(ceil_div(atoms, t.group), device.multiprocessors * std::min(resident, by_memory));
  return t;
}

// ---- encode on the tensor cores: 16-bit activations, weights of the same type, int8 or fp8

constexpr int kMmaThreads = 256;
constexpr int64_t kMmaWeights = 128;    // largest number of latents per block
constexpr int64_t kMmaStageBytes = 128;  // of each weight row in a stage
constexpr int64_t kMmaFewRows = 16;
constexpr int64_t kMmaManyRows = 64;

constexpr int mma_stages(int64_t rows) { return rows == kMmaFewRows ? 8 : 4; }

constexpr size_t mma_shared(int64_t rows, size_t weight_bytes) {
  return static_cast<size_t>(mma_stages(rows)) *
         (kMmaWeights * kMmaStageBytes + rows * kMmaStageBytes / static_cast<int64_t>(weight_bytes) * 2);
}

struct MmaTiling {
  int64_t rows = 0;       // of z per block: 16 or 64; 0 when this kernel cannot run
  int64_t weights = 0;    // latents per block, a multiple of 8
  int64_t row_tiles = 0;
  int64_t weight_tiles = 0;
  size_t shared = 0;
};

// Whether the 16-byte copies of this kernel can read the operands.
inline bool mma_takes(DType activation, DType weight, int64_t dim, int64_t z_stride) {
  if (activation == DType::kF32 || weight == DType::kF32) return false;
  if (size_of(weight) == 2 && weight != activation) return false;
  return dim * static_cast<int64_t>(size_of(weight)) % 16 == 0 && dim % 8 == 0 && z_stride % 8 == 0;
}

inline MmaTiling mma_tiling(int64_t rows, int64_t atoms, DType weight, const Device& device) {
  MmaTiling t;
  if (device.compute < 80) return t;
  t.rows = rows <= kMmaFewRows ? kMmaFewRows : kMmaManyRows;
  t.shared = mma_shared(t.rows, size_of(weight));
  if (static_cast<int64_t>(t.shared) + 1024 > device.shared_bytes) return MmaTiling{};
  t.row_tiles = ceil_div(rows, t.rows);
  // All multiprocessors should finish together, so a whole number of waves of equal blocks.
  const int64_t waves = ceil_div(atoms, kMmaWeights * device.multiprocessors);
  const int64_t even = round_up(ceil_div(atoms, waves * device.multiprocessors), 8);
  t.weights = t.row_tiles > 1 ? kMmaWeights : std::min(kMmaWeights, even);
  t.weight_tiles = ceil_div(atoms, t.weights);
  return t;
}

// ---- edit: blocks that share one row through a cluster

constexpr int kEditThreads = 256;
constexpr int kEditVector = 8;  // columns that a thread handles at once
constexpr int64_t kEditStatic = 18 * 1024;  // shared memory of a block that does not grow with the slice

struct EditTiling {
  int blocks = 1;     // per row: the cluster
  int64_t slice = 0;  // columns per block, a multiple of kEditVector
  int lanes = 32;     // threads that read one atom together; kEditThreads / lanes atoms are read at once
  size_t shared = 0;
};

inline EditTiling edit_tiling(int64_t rows, int64_t dim, const Device& device, int largest = 8) {
  EditTiling t;
  const auto describe = [&](int blocks) {
    t.blocks = blocks;
    t.slice = round_up(ceil_div(dim, blocks), kEditVector);
    const int64_t vectors = t.slice / kEditVector;
    t.lanes = 32;
    while (t.lanes < kEditThreads && t.lanes < vectors) t.lanes *= 2;
    t.shared = static_cast<size_t>(t.slice * (1 + kEditThreads / t.lanes)) * sizeof(float);
  };
  const int top = device.compute >= 90 ? largest : 1;
  describe(1);
  while (t.blocks < top && ((t.slice > 128 && rows * t.blocks * 2 <= 4 * device.multiprocessors) ||
                            static_cast<int64_t>(t.shared) + kEditStatic > device.shared_bytes)) {
    describe(t.blocks * 2);
  }
  return t;
}

// Whether a row's slice fits in shared memory at all.
inline bool edit_fits(const EditTiling& t, const Device& device) {
  return static_cast<int64_t>(t.shared) + kEditStatic <= device.shared_bytes;
}

// ---- rows that go through the stages together, so that the workspace stays small

constexpr int64_t kWindowBytes = int64_t{256} << 20;
constexpr int64_t kWindowRows = 8192;

inline int64_t window_rows(int64_t rows, int64_t bytes_per_row) {
  const int64_t fit = std::max<int64_t>(64, kWindowBytes / std::max<int64_t>(1, bytes_per_row) / 64 * 64);
  return std::min(rows, std::min(fit, kWindowRows));
}

}  // namespace daco::cuda
