#include "cuda/sae_plan.h"

#include "cuda/gemm.h"
#include "cuda/layout.h"

namespace daco::cuda {

SaeLayout lay_out(const SteerSae& op, const Device& device, bool library) {
  SaeLayout layout;
  if (op.coder == SaeCoder::kNone) return layout;
  const bool topk = op.coder == SaeCoder::kTopK;
  layout.y_stride = padded_atoms(op.atoms);
  layout.capacity = topk ? op.k : op.atoms;
  const int64_t per_row = 4 * (layout.y_stride + (op.k_out > 0 ? 3 : 2) * layout.capacity);
  layout.window = window_rows(op.rows, per_row);
  // Strides are unknown while a call is planned; rows of an odd stride fall back when it runs.
  const bool tensor = mma_takes(op.activation, op.weight, op.dim, 8) &&
                      mma_tiling(layout.window, op.atoms, op.weight, device).rows > 0;
  if (!topk) {
    layout.path = SaePath::kWatched;
  } else if (library && layout.window >= kLibraryRows && op.atoms == layout.y_stride &&
             library_serves(op.activation, op.weight)) {
    layout.path = SaePath::kLibrary;
  } else {
    layout.path = tensor ? SaePath::kTensor : SaePath::kVector;
  }
  return layout;
}

SaeBuffers carve(const SteerSae& op, const SaeLayout& layout, void* base) {
  SaeBuffers b;
  Carver carver(base);
  b.y = carver.take<float>(layout.window * layout.y_stride);
  if (layout.window > 0) {
    b.codes = carver.take<char>(static_cast<int64_t>(codes_bytes(layout.window, layout.capacity, op.k_out)));
  }
  if (layout.path == SaePath::kLibrary) b.scratch = carver.take<char>(kLibraryScratch);
  b.bytes = carver.used();
  return b;
}

}  // namespace daco::cuda
