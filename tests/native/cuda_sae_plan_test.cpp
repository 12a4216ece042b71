// Tiles, workspaces and the order of keys of the GPU's SAE path: arithmetic that needs neither a GPU nor its
// headers.
#include <cstring>

#include "cuda/order.h"
#include "cuda/sae_plan.h"
#include "problem.h"

using daco::DType;
using daco::SaeCoder;
using problem::Operands;
using problem::Shape;

namespace {

daco::cuda::Device device(int multiprocessors = 4) {
  daco::cuda::Device d;
  d.index = -1;
  d.compute = 90;
  d.multiprocessors = multiprocessors;
  d.shared_bytes = 227 * 1024;
  d.l2_bytes = 50 << 20;
  return d;
}

}  // namespace

TEST(workspaces_stay_small_and_pieces_apart) {
  Operands o(Shape{1, 64, 100, 3, 8, 4}, 81);
  daco::SteerSae op = o.sae(SaeCoder::kTopK);
  size_t last = 0;
  for (int64_t rows : {1, 2, 63, 64, 65, 1000, 4096, 100000, 10000000}) {
    op.rows = rows;
    for (SaeCoder coder : {SaeCoder::kTopK, SaeCoder::kRelu}) {
      op.coder = coder;
      const daco::cuda::SaeLayout layout = daco::cuda::lay_out(op, device(), true);
      CHECK(layout.window >= 1 && layout.window <= rows &&
            layout.capacity == (coder == SaeCoder::kTopK ? 8 : 100));
      const daco::cuda::SaeBuffers b = daco::cuda::carve(op, layout, reinterpret_cast<void*>(uintptr_t{256}));
      CHECK(reinterpret_cast<char*>(b.codes) >=
            reinterpret_cast<char*>(b.y + layout.window * layout.y_stride));
      CHECK(b.bytes < (size_t{300} << 20));
      if (coder == SaeCoder::kTopK) {
        CHECK(b.bytes >= last);
        last = b.bytes;
      }
    }
  }
}

TEST(tilings_cover_every_latent_and_fit) {
  const daco::cuda::Device h200 = device(132);
  for (int64_t atoms : {1, 8, 100, 15000, 16896, 16897, 65536, 1 << 20}) {
    for (int64_t rows : {1, 16, 17, 64, 65, 2048}) {
      for (DType weight : {DType::kBF16, DType::kI8}) {
        const daco::cuda::MmaTiling t = daco::cuda::mma_tiling(rows, atoms, weight, h200);
        CHECK(t.weights % 8 == 0 && t.weights <= daco::cuda::kMmaWeights);
        CHECK(t.weights * t.weight_tiles >= atoms && t.weights * (t.weight_tiles - 1) < atoms);
        CHECK(t.rows * t.row_tiles >= rows);
        CHECK(static_cast<int64_t>(t.shared) <= h200.shared_bytes);
      }
      const daco::cuda::DotTiling d = daco::cuda::dot_tiling(rows, 4096, atoms, DType::kF32, false, h200);
      CHECK(d.columns >= 4096 && static_cast<int64_t>(d.shared) <= h200.shared_bytes && d.blocks >= 1);
    }
  }
  // The reference case: one wave, nearly all multiprocessors.
  CHECK(daco::cuda::mma_tiling(1, 15000, DType::kBF16, h200).weight_tiles == 125);
  const daco::cuda::DotTiling wide = daco::cuda::dot_tiling(3, 200000, 100, DType::kF32, false, h200);
  CHECK(wide.rows == 1 && wide.columns < 200000 && wide.columns % 128 == 0);
}

TEST(order_of_keys) {
  const auto key = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return daco::cuda::key_of(bits);
  };
  CHECK(key(-1.f) == 0 && key(-0.f) == 0 && key(0.f) == 0 && key(NAN) == 0 && key(-NAN) == 0);
  CHECK(key(1e-40f) > 0 && key(1.f) > key(0.5f) && key(INFINITY) > key(3e38f));
  for (int64_t k : {1, 32, 33, 64, 65, 1024}) CHECK(1024 / daco::cuda::lanes_per_group(k) >= k);
  CHECK(daco::cuda::lanes_per_group(1025) == 0);
  for (uint32_t x : {1u, 0x3f800000u, 0x7f800000u, 0x12345678u}) {
    uint32_t whole = 0;
    for (int d = 0; d < daco::cuda::kDigits; ++d) {
      CHECK(daco::cuda::has_prefix(x, whole, d));
      whole |= daco::cuda::digit_of(x, d) << daco::cuda::digit_shift(d);
    }
    CHECK(whole == x);
  }
}

int main() { return check::run_all(); }
