// The GPU kernels of SteerSae and SteerAffine, run on the CPU by a scheduler of fibers, against the CPU
// kernels on the same numbers: every pair of types, both encoders, one and several blocks a row, awkward
// sizes, broken rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdlib>
#include <numeric>

#include "cuda/layout.h"
#include "cuda/order.h"
#include "cuda/sae_plan.h"
#include "cuda/select.h"
#include "problem.h"

using daco::Code;
using daco::DType;
using daco::SaeCoder;
using problem::Operands;
using problem::Shape;

namespace {

constexpr DType kFloats[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr DType kWeights[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8, DType::kF8E4M3};

daco::cuda::Device device(int multiprocessors = 4) {
  daco::cuda::Device d;
  d.index = -1;
  d.compute = 90;
  d.multiprocessors = multiprocessors;
  d.shared_bytes = 227 * 1024;
  d.l2_bytes = 50 << 20;
  return d;
}

// A matrix in some type, and what its numbers are.
struct Matrix {
  std::vector<unsigned char> raw;
  std::vector<float> exact;
};

void put(DType type, float x, unsigned char* to, float* exact) {
  switch (type) {
    case DType::kF32: std::memcpy(to, &x, 4), *exact = x; break;
    case DType::kF16: {
      const __half h = __float2half_rn(x);
      std::memcpy(to, &h, 2), *exact = __half2float(h);
      break;
    }
    case DType::kBF16: {
      const __nv_bfloat16 b = __float2bfloat16_rn(x);
      std::memcpy(to, &b, 2), *exact = __bfloat162float(b);
      break;
    }
    case DType::kI8: {
      const auto q = static_cast<int8_t>(std::lrint(x));
      std::memcpy(to, &q, 1), *exact = q;
      break;
    }
    case DType::kF8E4M3: {
      const __nv_fp8_e4m3 f(x);
      std::memcpy(to, &f, 1), *exact = static_cast<float>(f);
      break;
    }
  }
}

float get(DType type, const unsigned char* from) {
  if (type == DType::kF16) {
    __half h;
    std::memcpy(&h, from, 2);
    return __half2float(h);
  }
  if (type == DType::kBF16) {
    __nv_bfloat16 b;
    std::memcpy(&b, from, 2);
    return __bfloat162float(b);
  }
  float x;
  std::memcpy(&x, from, 4);
  return x;
}

// Rows of quantised types fill their range; `scale` [rows] takes it back.
Matrix matrix(DType type, const std::vector<float>& x, int64_t width, std::vector<float>* scale) {
  Matrix m;
  m.raw.resize(x.size() * daco::size_of(type));
  m.exact.resize(x.size());
  const float top = type == DType::kI8 ? 127.f : type == DType::kF8E4M3 ? 448.f : 0.f;
  for (size_t row = 0; row < x.size() / static_cast<size_t>(width); ++row) {
    const size_t first = row * static_cast<size_t>(width);
    float largest = 0;
    for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const float s = top > 0 && largest > 0 ? largest / top : 1.f;
    if (scale != nullptr) scale->push_back(s);
    for (int64_t i = 0; i < width; ++i) {
      const size_t at = first + static_cast<size_t>(i);
      put(type, x[at] / s, m.raw.data() + at * daco::size_of(type), &m.exact[at]);
      m.exact[at] *= s;
    }
  }
  return m;
}

struct Results {
  std::vector<float> out, doses, value;
  std::vector<int32_t> index;
};

// Runs an operator by the GPU's launchers on poisoned, fenced buffers.
template <class Op>
Results run_cuda(Op op, const daco::cuda::Device& on, bool in_place) {
  const size_t size = daco::size_of(op.activation);
  const auto row = static_cast<size_t>(op.dim), rows = static_cast<size_t>(op.rows);
  const size_t supports = rows * static_cast<size_t>(op.k_out);
  problem::Fenced out(rows * row * size, 0x7b), doses(rows * 8, 0x7b), index(supports * 4, 0x7b),
      value(supports * 4, 0x7b);
  if (in_place) {
    std::memcpy(out.as<>(), op.z, rows * row * size);
    op.z = out.as<>();
  }
  op.out = out.as<>();
  op.doses = doses.as<float>();
  op.support_index = op.k_out > 0 ? index.as<int32_t>() : nullptr;
  op.support_value = op.k_out > 0 ? value.as<float>() : nullptr;
  daco::cuda::Plan plan;
  CHECK_OK(daco::cuda::plan(op, on, &plan));
  CHECK(plan.workspace_bytes % daco::cuda::kAlignment == 0);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, plan.workspace_bytes + 256) != 0) std::abort();
  std::memset(memory, 0xff, plan.workspace_bytes + 256);
  CHECK_OK(daco::cuda::steer(op, plan, memory, nullptr));
  for (size_t i = 0; i < 256; ++i) {
    CHECK(static_cast<unsigned char*>(memory)[plan.workspace_bytes + i] == 0xff);
  }
  std::free(memory);
  Results r;
  for (size_t i = 0; i < rows * row; ++i) {
    r.out.push_back(get(op.activation, out.as<unsigned char>() + i * size));
  }
  r.doses.assign(doses.as<float>(), doses.as<float>() + rows * 2);
  r.index.assign(index.as<int32_t>(), index.as<int32_t>() + supports);
  r.value.assign(value.as<float>(), value.as<float>() + supports);
  return r;
}

template <class Op>
Results run_cpu(const Op& op) {
  const problem::Result bytes = problem::run(op, daco::Isa::kScalar, 1);
  Results r;
  const auto copy = [](const std::vector<unsigned char>& from, auto* to) {
    to->resize(from.size() / 4);
    if (!from.empty()) std::memcpy(to->data(), from.data(), from.size());
  };
  copy(bytes.out, &r.out), copy(bytes.doses, &r.doses), copy(bytes.index, &r.index),
      copy(bytes.value, &r.value);
  return r;
}

bool near(float a, float b, float relative, float floor) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= relative * std::fabs(b) + floor;
}

void compare(const Results& got, const Results& want, const daco::Rows& op, const std::string& what) {
  const float rounding = op.activation == DType::kF32 ? 1e-6f : op.activation == DType::kF16 ? 1e-3f : 8e-3f;
  for (int64_t t = 0; t < op.rows; ++t) {
    float largest = 0;
    for (int64_t i = 0; i < op.dim; ++i) {
      const float x = want.out[t * op.dim + i];
      if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
    }
    bool same = true;
    for (int64_t i = 0; i < op.dim; ++i) {
      same =
          same && near(got.out[t * op.dim + i], want.out[t * op.dim + i], rounding, 3e-5f * largest + 1e-6f);
    }
    for (int64_t i = 2 * t; i < 2 * t + 2; ++i)
      same = same && near(got.doses[i], want.doses[i], 1e-4f, 1e-5f);
    for (int64_t i = t * op.k_out; i < (t + 1) * op.k_out; ++i) {
      same =
          same && got.index[i] == want.index[i] && near(got.value[i], want.value[i], 2e-5f, 2e-5f * largest);
    }
    if (!same) check::fail(__FILE__, __LINE__, what + ": row " + std::to_string(t) + " differs");
  }
}

// Rows that are broken, zero, huge, or have no slot.
void disturb(Operands* o, DType activation) {
  const int64_t d = o->shape.dim;
  for (int64_t t = 0; t < o->shape.rows; ++t) {
    float* z = o->z.data() + t * d;
    switch (t % 8) {
      case 3: std::fill(z, z + d, 0.f); break;
      case 4: z[t % d] = t % 16 == 4 ? NAN : -INFINITY; break;
      case 5:
        o->slots[static_cast<size_t>(t)] = t % 16 == 5 ? -1 : static_cast<int32_t>(o->shape.policies);
        break;
      case 6:
        if (activation != DType::kF16) {
          for (int64_t i = 0; i < d; ++i) z[i] *= 1e16f;
        }
        break;
      default: break;
    }
  }
}

struct Typed {
  Matrix z, weights;
  std::vector<float> scales;
};

// The operator in the asked types, and the same numbers in fp32 for the CPU.
template <class Op, class Set>
void check_types(Op op, Operands* o, DType activation, DType weight, const daco::cuda::Device& on,
                 const std::string& what, Set&& set) {
  Typed typed;
  disturb(o, activation);
  typed.z = matrix(activation, o->z, o->shape.dim, nullptr);
  typed.weights = matrix(weight, o->atoms, o->shape.dim, &typed.scales);
  typed.scales.insert(typed.scales.end(), typed.scales.begin(), typed.scales.end());
  Op exact = op;
  exact.z = typed.z.exact.data();
  set(&exact, typed.weights.exact.data());
  op.activation = activation;
  op.weight = weight;
  op.z = typed.z.raw.data();
  op.scales = daco::size_of(weight) == 1 ? typed.scales.data() : nullptr;
  set(&op, typed.weights.raw.data());
  compare(run_cuda(op, on, o->shape.dim % 2 == 0), run_cpu(exact), op, what);
}

void check_sae(SaeCoder coder, Shape shape, DType activation, DType weight, unsigned seed,
               int processors = 4) {
  Operands o(shape, seed);
  const std::string what = std::string(daco::name_of(coder)) + ", rows " + std::to_string(shape.rows) +
                           ", d " + std::to_string(shape.dim) + ", m " + std::to_string(shape.atoms) + ", " +
                           daco::name_of(activation) + " by " + daco::name_of(weight);
  check_types(o.sae(coder), &o, activation, weight, device(processors), what,
              [](daco::SteerSae* op, const void* w) { op->enc = op->dec = w; });
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
