// The launchers. Rows go through in windows; a window is looked at first, and only the rows that need a code
// are gathered, in blocks, and encoded: rows that are off cost a copy, and when all are off no weight is
// read. Within a block threads share the atoms while encoding and the rows afterwards.
//
// z' may be z itself. A block's rows are read before any of them is written, and no row reads another.
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/encode.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"

namespace daco {
namespace cpu {
namespace {

// Gives every thread a worker and lets it take rows until none is left.
template <class F>
void for_each_row(const Workspace& space, int64_t workers, int64_t rows, const Executor& executor, F&& body) {
  std::atomic<int64_t> next{0};
  parallel_for(executor, workers < rows ? workers : rows, [&](int64_t task) {
    const Worker worker = space.worker(task);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < rows;) body(i, task, worker);
  });
}

// Settles rows that need no code and says whether this is not one of them.
bool needs_code(const Rows& op, const Kernels& kernels, bool coded, int64_t t) {
  const int32_t slot = op.slots[t];
  if (slot < 0 || slot >= op.policies) {
    fill_row_with_nan(op, t);
    report_nothing(op, t, std::numeric_limits<float>::quiet_NaN());
    return false;
  }
  const char* z =
      static_cast<const char*>(op.z) + t * op.z_stride * static_cast<int64_t>(size_of(op.activation));
  float dose = 0;
  if (slot != kSlotOff) {
    if (kernels.of(op.activation).all_finite(z, op.dim)) {
      if (coded || slot >= kFirstPolicy) return true;
    } else {
      dose = std::numeric_limits<float>::quiet_NaN();
    }
  }
  copy_row(op, t);
  report_nothing(op, t, dose);
  return false;
}

template <class Op>
struct Call {
  const Op& op;
  const Kernels& kernels;
  const Workspace& space;
  const Executor& executor;
  int64_t workers;
  const Rows& rows() const { return op; }
};

// Lists the watched latents once a call: their codes are the only ones that can matter.
int64_t list_watched(const Call<SteerSae>& call) {
  const SteerSae& op = call.op;
  constexpr int64_t kPiece = 4096;
  uint8_t* seen = call.space.seen;
  parallel_for(call.executor, (op.atoms + kPiece - 1) / kPiece, [&](int64_t task) {
    const int64_t begin = task * kPiece;
    const int64_t n = op.atoms - begin < kPiece ? op.atoms - begin : kPiece;
    for (int64_t i = begin; i < begin + n; ++i) seen[i] = 0;
    for (int64_t p = kSlotObserve; p < op.policies; ++p) {
      const int64_t at = p * op.atoms + begin;
      const bool edits = p >= kFirstPolicy;
      call.kernels.mark_watched(edits ? op.gain + at : nullptr,
                                edits && op.boost != nullptr ? op.boost + at : nullptr, op.undesirable + at,
                                seen + begin, n);
    }
  });
  int64_t count = 0;
  for (int64_t i = 0; i < op.atoms; ++i) {
    if (seen[i] != 0) call.space.watched[count++] = static_cast<int32_t>(i);
  }
  return count;
}

// Codes and edits `n` rows of a block: row i is row t0 + space.row[first + i] of the call.
void steer_block(const Call<SteerSae>& call, int64_t t0, int64_t first, int64_t n, int64_t watched) {
  const SteerSae& op = call.op;
  const Workspace& space = call.space;
  const bool all = op.coder == SaeCoder::kTopK;
  if (op.coder != SaeCoder::kNone) {
    const Encoder encoder{
        op.enc, op.enc_bias, all ? nullptr : space.watched, op.weight, all ? op.atoms : watched, op.dim};
    encode(call.kernels, encoder, space.x, n, space.correlation, call.executor);
  }
  for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t, const Worker& worker) {
    SparseCode code = worker.code;
    code.count = 0;
    if (all) {
      keep_largest(call.kernels, space.correlation[i], op.atoms, op.k, &code, worker.select);
    } else if (op.coder != SaeCoder::kNone) {
      const float* threshold = op.coder == SaeCoder::kJumpRelu ? op.threshold : nullptr;
      keep_above(space.correlation[i], space.watched, watched, threshold, &code);
    }
    steer_row(op, op.dec, call.kernels, t0 + space.row[first + i], space.x[i], space.norm[i], code,
              worker.edit);
  });
}

// All rows of the block go through their pursuits together, a step at a time.
void pursue_in_step(const Call<SteerPursuit>& call, int64_t n) {
  const SteerPursuit& op = call.op;
  const Workspace& space = call.space;
  const Encoder encoder{op.analysis, op.bias, nullptr, op.weight, call.rows().atoms, op.dim};
  for (int64_t i = 0; i < n; ++i) {
    space.pursuits[i] = space.pursuit(i);
    begin(op, space.x[i], space.norm[i], &space.pursuits[i]);
  }
  int64_t running = n;
  while (running > 0) {
    for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t, const Worker& worker) {
      Pursuit* row = &space.pursuits[i];
      if (!row->running) return;
      pursue_step(op, call.kernels, space.correlation[i], space.residuals + i * op.dim, row, worker.pursuit);
    });
    running = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!space.pursuits[i].running) continue;
      space.alive[running] = space.residuals + i * op.dim;
      space.alive_y[running++] = space.correlation[i];
    }
    encode(call.kernels, encoder, space.alive, running, space.alive_y, call.executor);
  }
}

void steer_block(const Call<SteerPursuit>& call, int64_t t0, int64_t first, int64_t n, int64_t) {
  const SteerPursuit& op = call.op;
  const Workspace& space = call.space;
  const Encoder encoder{op.analysis, op.bias, nullptr, op.weight, call.rows().atoms, op.dim};
  encode(call.kernels, encoder, space.x, n, space.correlation, call.executor);
  if (op.gram == nullptr) pursue_in_step(call, n);
  for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t task, const Worker& worker) {
    Pursuit own = op.gram == nullptr ? space.pursuits[i] : space.pursuit(task);
    if (op.gram != nullptr) {
      begin(op, space.x[i], space.norm[i], &own);
      pursue(op, call.kernels, space.correlation[i], &own, worker.pursuit);
    }
    const SparseCode code = finish(op, &own);
    steer_row(op, op.atoms, call.kernels, t0 + space.row[first + i], space.x[i], space.norm[i], code,
              worker.edit);
  });
}

// Brings `n` rows into fp32 and takes their norms.
template <class Op>
void load_block(const Call<Op>& call, int64_t t0, int64_t first, int64_t n, int64_t correlations) {
  const Rows& op = call.rows();
  const Workspace& space = call.space;
  for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t, const Worker&) {
    const int64_t t = t0 + space.row[first + i];
    float* x = space.rows + i * op.dim;
    const char* z =
        static_cast<const char*>(op.z) + t * op.z_stride * static_cast<int64_t>(size_of(op.activation));
    call.kernels.of(op.activation).widen(z, x, op.dim);
    space.x[i] = x;
    space.correlation[i] = space.correlations + i * correlations;
    space.norm[i] = std::sqrt(call.kernels.of(DType::kF32).sum_squares(x, op.dim));
  });
}

int64_t watched_latents(const Call<SteerSae>& call) {
  const bool only_watched = call.op.coder == SaeCoder::kRelu || call.op.coder == SaeCoder::kJumpRelu;
  return only_watched ? list_watched(call) : 0;
}
int64_t watched_latents(const Call<SteerPursuit>&) { return 0; }

bool has_codes(const SteerSae& op) { return op.coder != SaeCoder::kNone; }
bool has_codes(const SteerPursuit&) { return true; }

template <class Op>
void run(const Call<Op>& call, const Sizes& sizes) {
  const Rows& op = call.rows();
  const Workspace& space = call.space;
  constexpr int64_t kRowsATask = 16;
  int64_t watched = -1;
  for (int64_t t0 = 0; t0 < op.rows; t0 += kWindowRows) {
    const int64_t window = op.rows - t0 < kWindowRows ? op.rows - t0 : kWindowRows;
    parallel_for(call.executor, (window + kRowsATask - 1) / kRowsATask, [&](int64_t task) {
      const int64_t stop = (task + 1) * kRowsATask < window ? (task + 1) * kRowsATask : window;
      for (int64_t i = task * kRowsATask; i < stop; ++i) {
        space.needs_code[i] = needs_code(op, call.kernels, has_codes(call.op), t0 + i);
      }
    });
    int64_t coded = 0;
    for (int64_t i = 0; i < window; ++i) {
      if (space.needs_code[i] != 0) space.row[coded++] = static_cast<int32_t>(i);
    }
    if (coded > 0 && watched < 0) watched = watched_latents(call);
    for (int64_t first = 0; first < coded; first += kBlockRows) {
      const int64_t n = coded - first < kBlockRows ? coded - first : kBlockRows;
      load_block(call, t0, first, n, sizes.correlations);
      steer_block(call, t0, first, n, watched);
    }
  }
}

Sizes sizes_for(const SteerSae& op, int threads) { return sizes_of(op, threads); }
Sizes sizes_for(const SteerPursuit& op, int threads) { return sizes_of(op, threads, op.gram != nullptr); }

Status check_plan(const char* op, const Plan& plan) {
  if (plan.isa < Isa::kScalar || !has(plan.isa)) {
    return make_status(Code::kUnsupported, "%s: the plan's instruction set %s does not run on this machine",
                       op, name_of(plan.isa));
  }
  if (plan.threads < 1 || plan.threads > kMaxThreads) {
    return make_status(Code::kInvalidArgument, "%s: the plan's threads: expected 1 to %d, got %d", op,
                       static_cast<int>(kMaxThreads), plan.threads);
  }
  return {};
}

Status check_workspace(const char* op, const Plan& plan, size_t needed, const void* workspace) {
  if (plan.workspace_bytes < needed) {
    return make_status(Code::kWorkspace,
                       "%s: workspace: this call needs %zu bytes, its plan has %zu; plan again", op, needed,
                       plan.workspace_bytes);
  }
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 64 != 0) {
    return make_status(Code::kWorkspace,
                       "%s: workspace: expected %zu bytes aligned to 64, got the pointer %p", op, needed,
                       workspace);
  }
  return {};
}

template <class Op>
Status launch(const char* name, const Op& op, const Plan& plan, void* memory, const Executor& executor) {
  Status status = validate(op);
  if (status.ok()) status = check_supported(op);
  if (status.ok()) status = check_plan(name, plan);
  if (!status.ok() || static_cast<const Rows&>(op).rows == 0) return status;
  const Sizes sizes = sizes_for(op, plan.threads);
  const Workspace space(sizes, memory);
  status = check_workspace(name, plan, space.bytes(), memory);
  if (status.ok()) run(Call<Op>{op, kernels(plan.isa), space, executor, sizes.workers}, sizes);
  return status;
}

}  // namespace

Status steer(const SteerSae& op, const Plan& plan, void* workspace, const Executor& executor) {
  return launch("SteerSae", op, plan, workspace, executor);
}

Status steer(const SteerPursuit& op, const Plan& plan, void* workspace, const Executor& executor) {
  return launch("SteerPursuit", op, plan, workspace, executor);
}

}  // namespace cpu
}  // namespace daco
