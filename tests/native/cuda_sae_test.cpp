// The GPU kernels of SteerSae and SteerAffine, run on the CPU by a scheduler of fibers, against the CPU
// kernels on the same numbers: every pair of types, both encoders, one and several blocks a row, awkward
// sizes, broken rows.
#include <numeric>

#include "cuda/select.h"
#include "cuda/tiling.h"
#include "cuda_case.h"

using daco::Code;
using daco::SaeCoder;
using namespace cuda_case;

namespace {

// SteerSae in the asked types, and the same numbers in fp32 for the CPU. Encoder and decoder of quantised
// types are the same bytes under scales that differ.
void check_types(daco::SteerSae op, Operands* o, DType activation, DType weight, const daco::cuda::Device& on,
                 const std::string& what) {
  disturb(o, activation);
  std::vector<float> scales;
  const Matrix z = matrix(activation, o->z, o->shape.dim, nullptr);
  const Matrix weights = matrix(weight, o->atoms, o->shape.dim, &scales);
  std::vector<float> decoder = weights.exact;
  const bool quantised = daco::size_of(weight) == 1;
  for (size_t i = 0, m = scales.size(); i < m; ++i) scales.push_back(1.5f * scales[i]);
  if (quantised) {
    for (float& v : decoder) v *= 1.5f;
  }
  daco::SteerSae exact = op;
  exact.z = z.exact.data();
  exact.enc = weights.exact.data();
  exact.dec = decoder.data();
  op.activation = activation;
  op.weight = weight;
  op.z = z.raw.data();
  op.scales = quantised ? scales.data() : nullptr;
  op.enc = op.dec = weights.raw.data();
  compare(run_cuda(op, on, o->shape.dim % 2 == 0), run_cpu(exact), op, what);
}

void check_sae(SaeCoder coder, Shape shape, DType activation, DType weight, unsigned seed,
               int processors = 4) {
  Operands o(shape, seed);
  const std::string what = std::string(daco::name_of(coder)) + ", rows " + std::to_string(shape.rows) +
                           ", d " + std::to_string(shape.dim) + ", m " + std::to_string(shape.atoms) + ", " +
                           daco::name_of(activation) + " by " + daco::name_of(weight);
  check_types(o.sae(coder), &o, activation, weight, device(processors), what);
}

std::vector<int32_t> largest(const std::vector<float>& y, int64_t k) {
  std::vector<int32_t> order(y.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return y[a] > y[b]; });
  order.resize(static_cast<size_t>(std::min<int64_t>(k, static_cast<int64_t>(y.size()))));
  while (!order.empty() && !(y[static_cast<size_t>(order.back())] > 0)) order.pop_back();
  return order;
}

void check_selection(const std::vector<float>& y, int64_t k, const char* what) {
  const auto m = static_cast<int64_t>(y.size());
  const int64_t stride = daco::cuda::padded_atoms(m);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(stride) * 4) != 0) std::abort();
  std::memset(memory, 0x7f, static_cast<size_t>(stride) * 4);  // past the end: a large number
  std::memcpy(memory, y.data(), y.size() * 4);
  std::vector<int32_t> index(static_cast<size_t>(k), -7);
  std::vector<float> value(static_cast<size_t>(k), -7.f);
  int32_t count = -7, slot = 1;
  daco::cuda::Select select;
  select.y = static_cast<float*>(memory);
  select.y_stride = stride;
  select.rows = 1;
  select.atoms = m;
  select.k = k;
  select.slots = &slot;
  select.policies = 2;
  select.codes.count = &count;
  select.codes.index = index.data();
  select.codes.value = value.data();
  select.codes.capacity = k;
  CHECK_OK(daco::cuda::launch_select(select, device(), nullptr));
  std::vector<int32_t> want = largest(y, k);
  bool same = count == static_cast<int32_t>(want.size());
  index.resize(want.size());
  for (size_t i = 0; same && i < want.size(); ++i) same = value[i] == y[static_cast<size_t>(index[i])];
  std::sort(index.begin(), index.end());
  std::sort(want.begin(), want.end());
  if (!same || index != want) check::fail(__FILE__, __LINE__, std::string("selection: ") + what);
  std::free(memory);
}

}  // namespace

TEST(topk_in_every_pair_of_types) {
  unsigned seed = 1;
  for (DType weight : kWeights) {
    for (DType activation : kFloats) {
      check_sae(SaeCoder::kTopK, Shape{21, 64, 150, 5, 7, 9}, activation, weight, ++seed);
      check_sae(SaeCoder::kTopK, Shape{1 + static_cast<int64_t>(seed % 3), 48, 37, 4, 37, 2}, activation,
                weight, ++seed);
    }
  }
}

TEST(topk_at_awkward_sizes) {
  check_sae(SaeCoder::kTopK, Shape{5, 17, 33, 4, 6, 3}, DType::kF32, DType::kF32, 3);
  check_sae(SaeCoder::kTopK, Shape{9, 1, 1, 3, 1, 1}, DType::kBF16, DType::kBF16, 4);
  check_sae(SaeCoder::kTopK, Shape{3, 31, 70, 4, 5, 0}, DType::kF16, DType::kI8, 5);
  check_sae(SaeCoder::kTopK, Shape{2, 600, 20, 4, 5, 4}, DType::kBF16, DType::kF8E4M3, 6);
  check_sae(SaeCoder::kTopK, Shape{1, 1304, 300, 4, 40, 4}, DType::kBF16, DType::kBF16, 7, 1);
  check_sae(SaeCoder::kTopK, Shape{70, 72, 140, 4, 5, 2}, DType::kF16, DType::kF16, 8);
  check_sae(SaeCoder::kTopK, Shape{66, 144, 30, 4, 5, 2}, DType::kBF16, DType::kI8, 9);
}

TEST(relu_and_jumprelu_code_watched_latents_only) {
  unsigned seed = 20;
  for (SaeCoder coder : {SaeCoder::kRelu, SaeCoder::kJumpRelu}) {
    for (DType weight : kWeights) {
      check_sae(coder, Shape{10, 40, 90, 4, 0, 6}, DType::kF32, weight, ++seed);
      check_sae(coder, Shape{1, 33, 55, 3, 0, 6}, DType::kBF16, weight, ++seed);
    }
  }
  check_sae(SaeCoder::kRelu, Shape{1, 24, 1500, 3, 0, 6}, DType::kF32, DType::kF32, ++seed);
}

TEST(coder_none_adds_the_shift) {
  for (DType activation : kFloats) {
    check_sae(SaeCoder::kNone, Shape{17, 100, 1, 4, 0, 2}, activation, DType::kF32, 40);
  }
}

TEST(one_row_is_spread_over_a_cluster) {
  const daco::cuda::EditTiling tiling = daco::cuda::edit_tiling(1, 1100, device(132));
  CHECK(tiling.blocks == 8 && tiling.slice == 144);
  check_sae(SaeCoder::kTopK, Shape{1, 1100, 40, 3, 12, 5}, DType::kF32, DType::kF32, 50, 132);
  check_sae(SaeCoder::kTopK, Shape{2, 1100, 40, 4, 12, 5}, DType::kBF16, DType::kI8, 51, 132);
}

TEST(devices_without_clusters_and_with_little_shared_memory) {
  daco::cuda::Device old = device();
  old.compute = 86;
  old.shared_bytes = 99 * 1024;
  for (DType weight : {DType::kBF16, DType::kI8}) {
    for (int64_t rows : {1, 20}) {
      Operands o(Shape{rows, 1200, 40, 4, 12, 5}, 55);
      check_types(o.sae(SaeCoder::kTopK), &o, DType::kBF16, weight, old, "an older device");
    }
  }
  // A row wider than one launch stages.
  old.shared_bytes = 32 * 1024;
  Operands wide(Shape{1, 7700, 12, 3, 4, 2}, 57);
  old.compute = 90;
  CHECK(daco::cuda::dot_tiling(1, 7700, 12, DType::kF32, true, old).columns < 7700);
  for (SaeCoder coder : {SaeCoder::kTopK, SaeCoder::kJumpRelu}) {
    check_types(wide.sae(coder), &wide, DType::kF32, DType::kF32, old, "several launches a row");
  }
}

TEST(selection_is_exact_on_hard_data) {
  std::mt19937 engine(9);
  std::normal_distribution<float> normal;
  std::vector<float> y(5003);
  for (float& v : y) v = normal(engine);
  for (int64_t k : {1, 31, 32, 33, 64, 200, 1000, 2400, 5003}) check_selection(y, k, "normal data");
  for (float& v : y) v = std::floor(v * 2);  // few values, many ties
  for (int64_t k : {1, 40, 500, 1200, 3000}) check_selection(y, k, "ties");
  std::fill(y.begin(), y.end(), 1.5f);
  for (int64_t k : {1, 32, 700, 5003}) check_selection(y, k, "one value");
  std::fill(y.begin(), y.end(), -1.f);
  check_selection(y, 32, "nothing above zero");
  y[4000] = 1e-40f;
  y[7] = INFINITY;
  check_selection(y, 32, "a subnormal and an infinity");
  y[5] = NAN;
  y[5] = -0.f;
  check_selection(y, 2, "negative zero");
  // Neighbouring bit patterns, so that the threshold is found in the last digit.
  for (size_t i = 0; i < y.size(); ++i) {
    const uint32_t bits = 0x40000000u + static_cast<uint32_t>(i * 2654435761u % 5003u);
    std::memcpy(&y[i], &bits, 4);
  }
  for (int64_t k : {5, 900, 4000}) check_selection(y, k, "neighbours");
  std::vector<float> wide(20011);  // more than a block keeps in registers
  for (float& v : wide) v = normal(engine);
  for (int64_t k : {32, 3000}) check_selection(wide, k, "many latents");
  check_selection({0.f, 2.f, 1.f}, 3, "three entries");
}

TEST(long_code_lists_report_a_ranked_support) {
  // More than 512 codes are ranked one by one.
  Operands o(Shape{2, 12, 3000, 3, 0, 40}, 60);
  std::fill(o.gain.begin(), o.gain.end(), 0.f);
  o.slots = {1, 2};
  const daco::SteerSae op = o.sae(SaeCoder::kRelu);
  compare(run_cuda(op, device(), false), run_cpu(op), op, "long lists");
}

TEST(affine_edits) {
  for (int64_t rank : {1, 3, 130}) {
    for (DType weight : kFloats) {
      for (daco::AffinePhi phi :
           {daco::AffinePhi::kIdentity, daco::AffinePhi::kRelu, daco::AffinePhi::kClamp}) {
        const Shape shape{11, 37, rank, 5, 0, 0};
        Operands o(shape, 70 + static_cast<unsigned>(rank));
        disturb(&o, DType::kBF16);
        const auto count = static_cast<size_t>(shape.policies * rank * shape.dim);
        std::vector<float> a(count), bias(static_cast<size_t>(shape.policies * rank));
        std::mt19937 engine(static_cast<unsigned>(rank));
        std::normal_distribution<float> normal;
        for (float& v : a) v = 0.2f * normal(engine);
        for (float& v : bias) v = 0.2f * normal(engine);
        const Matrix typed = matrix(weight, a, shape.dim, nullptr);
        const Matrix z = matrix(DType::kBF16, o.z, shape.dim, nullptr);
        daco::SteerAffine op;
        o.bind(&op);
        op.gain = op.boost = nullptr;
        op.undesirable = nullptr;
        op.phi = phi;
        op.low = -0.1f;
        op.high = 0.4f;
        op.a_bias = bias.data();
        daco::SteerAffine exact = op;
        exact.z = z.exact.data();
        exact.a = exact.b = typed.exact.data();
        op.activation = DType::kBF16;
        op.weight = weight;
        op.z = z.raw.data();
        op.a = op.b = typed.raw.data();
        compare(run_cuda(op, device(rank == 3 ? 132 : 4), false), run_cpu(exact), op, "affine");
      }
    }
  }
}

TEST(plans_are_refused_or_say_why) {
  Operands o(Shape{2, 16, 20, 3, 4, 0}, 80);
  daco::SteerSae op = o.sae(SaeCoder::kTopK);
  daco::cuda::Plan plan;
  op.k = 21;
  CHECK_STATUS(daco::cuda::plan(op, device(), &plan), Code::kInvalidArgument, "k: expected");
  op.k = 4;
  CHECK_OK(daco::cuda::plan(op, device(), &plan));
  CHECK(std::strstr(plan.variant, "fp32 arithmetic") != nullptr);
  op.activation = op.weight = DType::kBF16;
  CHECK_OK(daco::cuda::plan(op, device(), &plan));
  CHECK(std::strstr(plan.variant, "tensor cores") != nullptr);
  op = o.sae(SaeCoder::kTopK);
  std::vector<float> out(64), doses(4);
  op.out = out.data();
  op.doses = doses.data();
  CHECK_OK(daco::cuda::plan(op, device(), &plan));
  CHECK_STATUS(daco::cuda::steer(op, plan, nullptr, nullptr), Code::kWorkspace, "aligned to 256");
  plan.workspace_bytes -= 256;
  CHECK_STATUS(daco::cuda::steer(op, plan, nullptr, nullptr), Code::kWorkspace, "plan again");
  op.dim = op.z_stride = op.out_stride = 10'000'000;
  CHECK_STATUS(daco::cuda::plan(op, device(), &plan), Code::kUnsupported, "d=10000000 does not fit");
}

int main() { return check::run_all(); }
