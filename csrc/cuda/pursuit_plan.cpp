#include "cuda/pursuit_plan.h"

#include <algorithm>
#include <cstdlib>

#include "core/validate.h"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/tiling.h"

namespace daco::cuda {
namespace {

constexpr int64_t kResidentPass = 2048, kSteppedPass = 512, kElasticPass = 512;
constexpr int kMostChunks = 4;  // a thread's, in registers

int64_t atoms_of(const Rows& rows) { return rows.atoms; }

// Sixteen blocks need a device that grants more than the portable eight; before sm_90 a block is alone.
int largest_cluster(const Device& device) {
  if (device.compute < 90) return 1;
  return device.compute < 110 ? kMaxCluster : 8;
}

// As many blocks a row as the device has room for when all rows run at once. Many rows take pairs: half of
// G's chosen rows fit beside each other then, and reading them again costs more than waiting for one peer.
int choose_cluster(int64_t rows, const Device& device) {
  const int largest = largest_cluster(device);
  int cluster = largest;
  while (cluster > 2 && rows * cluster > device.multiprocessors) cluster /= 2;
  return std::min(cluster, largest);
}

bool lay_out_resident(const SteerPursuit& op, const Device& device, int asked, PursuitLayout* layout) {
  const int largest = largest_cluster(device);
  const int64_t chunks = ceil_div(atoms_of(op), kChunk);
  int cluster =
      asked > 0 ? std::min(asked, largest) : choose_cluster(std::min(op.rows, layout->pass), device);
  while (cluster < largest && ceil_div(ceil_div(chunks, cluster), kPursuitThreads) > kMostChunks)
    cluster *= 2;
  layout->cluster = cluster;
  layout->chunks = ceil_div(chunks, cluster);
  const int64_t a_thread = ceil_div(layout->chunks, kPursuitThreads);
  if (a_thread > kMostChunks) return false;
  layout->chunks_a_thread = a_thread > 2 ? 4 : static_cast<int>(a_thread);
  const auto fixed = static_cast<int64_t>(padded(sizeof(PursuitState)) + inverse_bytes(op.k));
  const int64_t row_bytes = layout->chunks * kChunk * static_cast<int64_t>(size_of(op.gram_dtype));
  const int64_t room = std::max<int64_t>(device.shared_bytes - fixed, 0) / row_bytes;
  // The last atom's row is never read.
  layout->cached = static_cast<int32_t>(std::min<int64_t>(room, op.k - 1));
  layout->shared_bytes = static_cast<size_t>(fixed + layout->cached * row_bytes);
  return true;
}

void lay_out_elastic(const SteerPursuit& op, const Device& device, PursuitLayout* layout) {
  const auto fixed = static_cast<int64_t>(padded(sizeof(PursuitState)));
  const int64_t both = 2 * atoms_of(op) * static_cast<int64_t>(sizeof(float));
  layout->path = PursuitPath::kElastic;
  layout->pass = kElasticPass;
  layout->in_shared = fixed + both <= device.shared_bytes;
  layout->shared_bytes = static_cast<size_t>(layout->in_shared ? fixed + both : fixed);
  layout->rounds = op.gram_dtype == DType::kF32 ? 1 : 2;
}

}  // namespace

PursuitLayout lay_out(const SteerPursuit& op, const Device& device, bool has_gram, int cluster) {
  PursuitLayout layout;
  if (op.coder == PursuitCoder::kElasticNet) {
    lay_out_elastic(op, device, &layout);
    return layout;
  }
  layout.path = PursuitPath::kResident;
  layout.pass = kResidentPass;
  if (has_gram && lay_out_resident(op, device, cluster, &layout)) return layout;
  layout = PursuitLayout{};
  layout.pass = kSteppedPass;
  layout.shared_bytes = padded(sizeof(PursuitState)) + inverse_bytes(op.k);
  layout.state_bytes =
      static_cast<int64_t>(padded(sizeof(SteppedState)) +
                           padded(sizeof(double) * static_cast<size_t>(inverse_entries(op.k)) +
                                  sizeof(uint32_t) * static_cast<size_t>(barred_words(atoms_of(op)))));
  return layout;
}

PursuitBuffers carve(const SteerPursuit& op, const PursuitLayout& layout, void* base) {
  const int64_t m = atoms_of(op), rows = std::min(op.rows, layout.pass);
  const bool stepped = layout.path == PursuitPath::kStepped, elastic = layout.path == PursuitPath::kElastic;
  const int64_t stride = padded_atoms(m);  // of correlations
  Carver carver(base);
  PursuitBuffers b;
  b.capacity = elastic ? m : op.k;
  b.start = carver.take<float>(rows * stride);
  b.alpha = carver.take<float>(stepped || (elastic && !layout.in_shared) ? rows * stride : 0);
  b.code = carver.take<float>(elastic && !layout.in_shared ? rows * m : 0);
  b.dense = carver.take<float>(layout.rounds > 1 ? rows * m : 0);
  b.residual = carver.take<float>(stepped || layout.rounds > 1 ? rows * op.dim : 0);
  b.diagonal = carver.take<float>(elastic ? m : 0);
  b.length = carver.take<float>(elastic ? m : 0);
  b.state = carver.take<unsigned char>(stepped ? rows * layout.state_bytes : 0);
  b.codes = carver.take<unsigned char>(static_cast<int64_t>(codes_bytes(rows, b.capacity, op.k_out)));
  b.scratch = carver.take<unsigned char>(static_cast<int64_t>(kLibraryScratch));
  b.bytes = carver.used();
  return b;
}

Status check_supported(const SteerPursuit& op) {
  if (op.coder == PursuitCoder::kOmp && op.sign == PursuitSign::kNonNegative) {
    return make_status(
        Code::kUnsupported,
        "SteerPursuit: sign: the CUDA kernels have no nnls for omp; use positive, whose codes that "
        "end below zero are dropped, or run on the CPU");
  }
  return {};
}

int asked_cluster() {
  const char* text = std::getenv("DACO_RT_CUDA_CLUSTER");
  const int asked = text == nullptr ? 0 : std::atoi(text);
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    if (asked == size) return asked;
  }
  return 0;
}

}  // namespace daco::cuda
