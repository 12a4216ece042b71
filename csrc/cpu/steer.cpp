// The launchers. Rows go through in windows; a window is looked at first, and only the rows that need a code
// are gathered, in blocks, and encoded: rows that are off cost a copy, and when all are off no weight is
// read. Within a block threads share the atoms while encoding and the rows afterwards.
//
// z' may be z itself. A block's rows are read before any of them is written, and no row reads another.
#include <atomic>
#include <cmath>

#include "cpu/dictionary.h"
#include "cpu/encode.h"
#include "cpu/launch.h"
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
  // Written always and kept if seen: at one watched latent in ten a branch would be guessed wrong too often.
  int64_t count = 0;
  for (int64_t i = 0; i < op.atoms; ++i) {
    call.space.watched[count] = static_cast<int32_t>(i);
    count += seen[i] != 0;
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
        op.enc, op.enc_bias, all ? nullptr : space.watched, op.weight, all ? op.atoms : watched,
        op.dim, op.scales};
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

// The pursuit, or the elastic net, of row i of a block.
void start_row(const Call<SteerPursuit>& call, int64_t i, Pursuit* row) {
  begin(call.op, call.space.x[i], call.space.norm[i], row);
}
void start_row(const Call<SteerPursuit>& call, int64_t i, Net* row) {
  begin(call.op, call.kernels, call.space.x[i], call.space.norm[i], call.space.correlation[i], row);
}

void step(const Call<SteerPursuit>& call, int64_t i, Pursuit* row, const Worker& worker) {
  float* residual = call.space.residuals + i * call.op.dim;
  pursue_step(call.op, call.kernels, call.space.correlation[i], residual, row, worker.pursuit);
}
void step(const Call<SteerPursuit>& call, int64_t i, Net* row, const Worker& worker) {
  float* residual = call.space.residuals + i * call.op.dim;
  solve_net_step(call.op, call.kernels, call.space.correlation[i], residual, row, worker.net);
}

void run_alone(const Call<SteerPursuit>& call, int64_t i, Pursuit* row, const Worker& worker) {
  pursue(call.op, call.kernels, call.space.correlation[i], row, worker.pursuit);
}
void run_alone(const Call<SteerPursuit>& call, int64_t i, Net* row, const Worker& worker) {
  solve_net(call.op, call.kernels, call.space.correlation[i], row, worker.net);
}

SparseCode code_of(const Call<SteerPursuit>& call, Pursuit* row) { return finish(call.op, row); }
SparseCode code_of(const Call<SteerPursuit>&, Net* row) { return finish(row); }

// All rows of the block go on together, a step at a time, and each step reads E once for all of them.
template <class Row>
void run_in_step(const Call<SteerPursuit>& call, int64_t n, Row* rows) {
  const SteerPursuit& op = call.op;
  const Workspace& space = call.space;
  const Encoder encoder = analysis_of(op);
  for (int64_t i = 0; i < n; ++i) {
    space.open(i, &rows[i]);
    start_row(call, i, &rows[i]);
  }
  int64_t running = n;
  while (running > 0) {
    for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t, const Worker& worker) {
      if (rows[i].running) step(call, i, &rows[i], worker);
    });
    running = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!rows[i].running) continue;
      space.alive[running] = space.residuals + i * op.dim;
      space.alive_y[running++] = space.correlation[i];
    }
    encode(call.kernels, encoder, space.alive, running, space.alive_y, call.executor);
  }
}

template <class Row>
void code_block(const Call<SteerPursuit>& call, int64_t t0, int64_t first, int64_t n, Row* rows) {
  const SteerPursuit& op = call.op;
  const Workspace& space = call.space;
  encode(call.kernels, analysis_of(op), space.x, n, space.correlation, call.executor);
  if (op.gram == nullptr) run_in_step(call, n, rows);
  for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t task, const Worker& worker) {
    Row own;
    if (op.gram == nullptr) {
      own = rows[i];
    } else {
      space.open(task, &own);
      start_row(call, i, &own);
      run_alone(call, i, &own, worker);
    }
    const SparseCode code = code_of(call, &own);
    steer_row(op, op.synthesis, call.kernels, t0 + space.row[first + i], space.x[i], space.norm[i], code,
              worker.edit);
  });
}

void steer_block(const Call<SteerPursuit>& call, int64_t t0, int64_t first, int64_t n, int64_t) {
  if (call.op.coder == PursuitCoder::kOmp) {
    code_block(call, t0, first, n, call.space.pursuits);
  } else {
    code_block(call, t0, first, n, call.space.nets);
  }
}

// Brings `n` rows into fp32 and takes their norms.
template <class Op>
void load_block(const Call<Op>& call, int64_t t0, int64_t first, int64_t n, int64_t correlations) {
  const Rows& op = call.rows();
  const Workspace& space = call.space;
  for_each_row(space, call.workers, n, call.executor, [&](int64_t i, int64_t, const Worker&) {
    const int64_t t = t0 + space.row[first + i];
    float* x = space.rows + i * op.dim;
    call.kernels.of(op.activation).widen(row_of(op, t), x, op.dim);
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
