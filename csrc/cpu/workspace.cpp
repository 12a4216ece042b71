#include "cpu/workspace.h"

#include <algorithm>

#include "cpu/dictionary.h"
#include "cpu/small_net.h"

namespace daco {
namespace cpu {
namespace {

// Hands out pieces of a buffer, each on a cache line of its own; from a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return count > 0 ? reinterpret_cast<T*>(at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

Worker carve_worker(const Sizes& s, Carver* carver) {
  Worker w{};
  const int64_t selected = s.selects ? s.codes : 0;
  const int64_t reported = s.reports ? s.codes : 0;
  w.code.index = carver->take<int32_t>(selected);
  w.code.value = carver->take<float>(selected);
  w.select = carver->take<float>(selected);
  w.edit.index = carver->take<int32_t>(s.codes);
  w.edit.amount = carver->take<float>(s.codes);
  w.edit.strength = carver->take<float>(reported);
  w.edit.rank = carver->take<int32_t>(reported);
  w.edit.delta = carver->take<float>(s.dim);
  w.edit.edited = carver->take<float>(s.dim);
  if (s.pursuit > 0) {
    w.pursuit.correlation = carver->take<float>(s.gram_row);
    w.pursuit.residual = carver->take<float>(s.gram_row > 0 ? s.dim : 0);
    w.pursuit.atom = carver->take<float>(s.dim);
    w.pursuit.cross = carver->take<float>(2 * s.pursuit);
    w.pursuit.wide = carver->take<float>(s.widened * s.dim);
    w.pursuit.entries = carver->take<float>(s.gram_row > 0 ? s.pursuit * s.pursuit : 0);
  }
  if (s.net > 0) {
    w.net.correlation = carver->take<float>(s.net);
    w.net.candidate = carver->take<int32_t>(s.net);
    w.net.value = carver->take<float>(s.net);
    w.net.column = carver->take<float>(kSmallNet * kSmallNet);
    w.net.left = carver->take<double>(kSmallNet);
    w.net.code = carver->take<double>(kSmallNet);
    w.net.inverse = carver->take<SmallInverse>(1);
    w.net.entry = carver->take<float>(kSmallNet);
    w.net.residual = carver->take<float>(s.dim);
    w.net.atom = carver->take<float>(s.dim);
  }
  return w;
}

Pursuit carve_pursuit(const Sizes& s, Carver* carver) {
  Pursuit p{};
  p.memory = carver->take<double>(LeastSquares::doubles(s.pursuit, s.non_negative));
  p.index = carver->take<int32_t>(s.pursuit);
  p.code = carver->take<float>(s.pursuit);
  p.negative = carver->take<float>(s.pursuit);
  p.barred = carver->take<uint64_t>(s.barred);
  return p;
}

Net carve_net(const Sizes& s, Carver* carver) {
  Net n{};
  n.index = carver->take<int32_t>(s.net);
  n.code = carver->take<float>(s.net);
  n.diagonal = carver->take<float>(s.net);
  n.length = carver->take<float>(s.net);
  n.coarse = carver->take<float>(s.net);
  n.member = carver->take<uint64_t>(member_words(s.net));
  return n;
}

Sizes sizes_of_rows(const Rows& op, int threads) {
  Sizes s;
  s.window = std::min(op.rows, kWindowRows);
  s.block = std::min(op.rows, kBlockRows);
  s.workers = std::min<int64_t>(std::max(threads, 1), s.block);
  s.dim = op.dim;
  s.reports = op.k_out > 0;
  return s;
}

}  // namespace

Sizes sizes_of(const SteerSae& op, int threads) {
  Sizes s = sizes_of_rows(op, threads);
  switch (op.coder) {
    case SaeCoder::kTopK:
      s.correlations = op.atoms;
      s.codes = selection_capacity(op.atoms, op.k);
      s.selects = true;
      break;
    case SaeCoder::kRelu:
    case SaeCoder::kJumpRelu:
      s.correlations = op.atoms;
      s.codes = op.atoms;
      s.watched = op.atoms;
      s.selects = true;
      break;
    case SaeCoder::kNone: break;
  }
  return s;
}

Sizes sizes_of(const SteerPursuit& op, int threads, bool has_gram) {
  const int64_t m = op.atoms;
  Sizes s = sizes_of_rows(op, threads);
  s.correlations = m;
  // With a Gram matrix a row's code is found from start to end on one worker, else all rows' are open.
  s.in_step = !has_gram;
  s.open = s.in_step ? s.block : s.workers;
  if (op.coder == PursuitCoder::kElasticNet) {
    s.codes = m;
    s.net = m;
    return s;
  }
  s.codes = op.k;
  s.pursuit = op.k;
  s.non_negative = op.sign == PursuitSign::kNonNegative;
  s.gram_row = has_gram ? m : 0;
  s.widened = has_gram && op.weight != DType::kF32 ? kGramRows : 0;
  s.barred = has_gram ? 0 : barred_words(m);
  return s;
}

Workspace::Workspace(const Sizes& s, void* base) : sizes_(s) {
  Carver carver(base);
  needs_code = carver.take<uint8_t>(s.window);
  row = carver.take<int32_t>(s.window);
  norm = carver.take<double>(s.block);
  x = carver.take<const float*>(s.block);
  correlation = carver.take<float*>(s.block);
  alive = carver.take<const float*>(s.in_step ? s.block : 0);
  alive_y = carver.take<float*>(s.in_step ? s.block : 0);
  pursuits = carver.take<Pursuit>(s.in_step && s.pursuit > 0 ? s.block : 0);
  nets = carver.take<Net>(s.in_step && s.net > 0 ? s.block : 0);
  watched = carver.take<int32_t>(s.watched);
  seen = carver.take<uint8_t>(s.watched);
  rows = carver.take<float>(s.block * s.dim);
  residuals = carver.take<float>(s.in_step ? s.block * s.dim : 0);
  correlations = carver.take<float>(s.block * s.correlations);

  Carver one_worker(nullptr);
  carve_worker(s, &one_worker);
  worker_bytes_ = one_worker.used();
  workers_ = carver.take<char>(static_cast<int64_t>(worker_bytes_) * s.workers);

  Carver one_open(nullptr);
  if (s.pursuit > 0) carve_pursuit(s, &one_open);
  if (s.net > 0) carve_net(s, &one_open);
  open_bytes_ = one_open.used();
  open_buffers_ = carver.take<char>(static_cast<int64_t>(open_bytes_) * s.open);
  bytes_ = carver.used();
}

Worker Workspace::worker(int64_t i) const {
  Carver carver(workers_ + static_cast<size_t>(i) * worker_bytes_);
  return carve_worker(sizes_, &carver);
}

void Workspace::open(int64_t i, Pursuit* row) const {
  Carver carver(open_buffers_ + static_cast<size_t>(i) * open_bytes_);
  *row = carve_pursuit(sizes_, &carver);
}

void Workspace::open(int64_t i, Net* row) const {
  Carver carver(open_buffers_ + static_cast<size_t>(i) * open_bytes_);
  *row = carve_net(sizes_, &carver);
}

}  // namespace cpu
}  // namespace daco
