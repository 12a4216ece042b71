#include "cpu/elastic_net.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/heuristics.h"
#include "cpu/small_net.h"

namespace daco {
namespace cpu {
namespace {

constexpr double kTolerance = 1e-6;  // a step of this share of |z| is no step any more
constexpr int64_t kAdmitted = 32;    // fewest places that a round offers
constexpr float kCoarseSquare = 1e-2f;
constexpr int kSettling = 4;  // rounds without an admission that refine the codes

double l1_of(const SteerPursuit& op, const Net& net) {
  return static_cast<double>(op.alpha) * op.tau * net.norm;
}
double l2_of(const SteerPursuit& op) { return static_cast<double>(op.alpha) * (1.0 - op.tau); }
bool both_signs(const SteerPursuit& op) { return op.sign == PursuitSign::kSigned; }

// How far correlations from the Gram matrix may be off: its entries may be rounded, and rows of it stand in
// for columns, which differ where E and A were rounded apart.
double coarseness(const SteerPursuit& op, const Net& net) {
  const double worst = op.gram_dtype == DType::kF16 ? 0x1p-10 : 0.0;
  if (net.symmetric) return worst;
  const double rounding = op.weight == DType::kF32    ? 0x1p-22
                          : op.weight == DType::kF16  ? 0x1p-10
                          : op.weight == DType::kBF16 ? 0x1p-8
                                                      : 0x1p-7;
  return std::max(worst, rounding);
}

// What to nearest may have cost an entry of row j of an fp16 Gram matrix, apart from the diagonal: half a
// step at the largest of them. In a dictionary that is an eighth of half a step at twice the diagonal.
float rounding_of_row(const SteerPursuit& op, int64_t j, float diagonal) {
  const auto* row = static_cast<const uint16_t*>(op.gram) + j * op.atoms;
  int16_t largest = 0;
  const auto look = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto size = static_cast<int16_t>(row[i] & 0x7fffu);
      largest = size > largest ? size : largest;
    }
  };
  look(0, j);
  look(j + 1, op.atoms);
  constexpr int kInfinite = 31, kBias = 15, kDigits = 11;
  const int exponent = largest >> 10;
  if (exponent == kInfinite) return 0x1p-10f * diagonal;
  // A tenth more, and the sums of fp32 that were rounded were rounded before.
  return 1.1f * std::ldexp(1.f, std::max(exponent, 1) - kBias - kDigits) + 0x1p-21f * diagonal;
}

// Bounds what the correlations of atoms without a code are off by.
double slack_of(const SteerPursuit& op, double coarse, Net* net) {
  double slack = 0;
  for (int64_t i = 0; i < net->count && coarse > 0; ++i) {
    if (net->code[i] == 0) continue;
    if (net->coarse[i] < 0) {
      const bool rounded_only = net->symmetric && op.gram_dtype == DType::kF16;
      net->coarse[i] = rounded_only ? rounding_of_row(op, net->index[i], net->diagonal[i])
                                    : static_cast<float>(coarse * net->diagonal[i]);
    }
    slack += std::fabs(static_cast<double>(net->code[i])) * net->coarse[i];
  }
  return slack;
}

// Whether one matrix plays both roles, with one set of scales if it is quantised.
bool is_one_matrix(const SteerPursuit& op) {
  if (op.analysis != op.synthesis) return false;
  const auto m = static_cast<size_t>(op.atoms);
  return op.scales == nullptr || std::memcmp(op.scales, op.scales + m, m * sizeof(float)) == 0;
}

bool is_member(const Net& net, int64_t j) { return (net.member[j / 64] >> (j % 64) & 1) != 0; }

// Takes the `count` candidates with their correlations into the working set, the most correlated first if
// there are too many; `left` [kSmallNet], where given, receives their correlations. Returns how many came in.
int64_t admit(const SteerPursuit& op, const Kernels& kernels, int64_t count, Net* net,
              const NetScratch& scratch, double* left) {
  int64_t on = 0;
  for (int64_t i = 0; i < net->count; ++i) on += net->code[i] != 0;
  const int64_t places = std::max(kAdmitted, on);
  int32_t* chosen = scratch.candidate;
  const float* value = scratch.value;
  if (count > places) {
    for (int64_t i = 0; i < count; ++i) scratch.correlation[i] = std::fabs(value[i]);
    std::nth_element(scratch.correlation, scratch.correlation + (places - 1), scratch.correlation + count,
                     std::greater<float>());
    const float level = scratch.correlation[places - 1];
    int64_t ties = places;
    for (int64_t i = 0; i < count; ++i) ties -= std::fabs(value[i]) > level;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float v = std::fabs(value[i]);
      if (!(v > level || (v == level && ties-- > 0))) continue;
      chosen[kept] = chosen[i];
      scratch.value[kept++] = value[i];
    }
    count = kept;
  }
  const int64_t before = net->count;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t j = chosen[i];
    net->member[j / 64] |= uint64_t{1} << (j % 64);
    float diagonal = op.gram != nullptr ? stored_entry(op, kernels, j, j) : 0.f;
    // fp16 has no digits left for the squares of short atoms.
    const bool is_exact = op.gram != nullptr && op.gram_dtype == DType::kF32;
    if (!is_exact && diagonal < kCoarseSquare) gram_row(op, kernels, j, &j, 1, scratch.atom, &diagonal);
    if (!(diagonal > 0)) continue;
    if (left != nullptr && net->count < kSmallNet) left[net->count] = value[i];
    net->index[net->count] = j;
    net->code[net->count] = 0;
    net->coarse[net->count] = -1;
    net->diagonal[net->count] = diagonal;
    net->length[net->count++] =
        net->symmetric ? std::sqrt(diagonal) : static_cast<float>(synthesis_norm(op, kernels, j));
  }
  return net->count - before;
}

// Lists the atoms outside the working set whose correlations are above `level`.
int64_t list_above(const SteerPursuit& op, const Kernels& kernels, const float* correlation, double level,
                   const Net& net, const NetScratch& scratch) {
  const int64_t m = op.atoms;
  const auto cut = static_cast<float>(level);
  int64_t found = 0;
  if (both_signs(op)) {
    for (int64_t i = 0; i < m; ++i) {
      if (!(std::fabs(correlation[i]) > cut)) continue;
      scratch.candidate[found] = static_cast<int32_t>(i);
      scratch.value[found++] = correlation[i];
    }
  } else {
    found = kernels.collect_above(correlation, m, cut, 0, scratch.candidate, scratch.value);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    const int32_t j = scratch.candidate[i];
    // A correlation that overflowed says nothing about its atom.
    if (is_member(net, j) || !(std::fabs(scratch.value[i]) <= std::numeric_limits<float>::max())) continue;
    scratch.candidate[kept] = j;
    scratch.value[kept++] = scratch.value[i];
  }
  return kept;
}

// Brings the table of Gram entries up to the working set, where that is small enough.
void extend_model(const SteerPursuit& op, const Kernels& kernels, Net* net, const NetScratch& scratch) {
  if (net->modelled == 0) scratch.inverse->count = 0;  // it was another row's
  if (net->count > kSmallNet) return;
  for (int64_t a = net->modelled; a < net->count; ++a) {
    const int32_t j = net->index[a];
    float* column = scratch.column + a * kSmallNet;
    if (op.gram != nullptr) {
      stored_row(op, kernels, j, net->index, a, scratch.entry);
      for (int64_t i = 0; i < a && !net->symmetric; ++i) {
        column[i] = stored_entry(op, kernels, net->index[i], j);
      }
    } else {
      gram_row(op, kernels, j, net->index, a, scratch.atom, scratch.entry);
      if (!net->symmetric) gram_column(op, kernels, j, net->index, a, scratch.atom, column);
    }
    if (net->symmetric) std::copy(scratch.entry, scratch.entry + a, column);
    for (int64_t i = 0; i < a; ++i) scratch.column[i * kSmallNet + a] = scratch.entry[i];
    column[a] = net->diagonal[a];
  }
  net->modelled = net->count;
}

// x - sum_i c_i A_i.
void residual_of(const SteerPursuit& op, const Kernels& kernels, const Net& net, const NetScratch& scratch,
                 float* residual) {
  int64_t on = 0;
  for (int64_t i = 0; i < net.count; ++i) {
    if (net.code[i] == 0) continue;
    scratch.candidate[on] = net.index[i];
    scratch.value[on++] = -net.code[i];
  }
  find_residual(op, kernels, net.x, scratch.candidate, scratch.value, on, scratch.value, residual);
}

// Coordinate descent on the residual itself, for a working set beyond the table. Returns the longest way
// that a code went in all.
double descend(const SteerPursuit& op, const Kernels& kernels, Net* net, const NetScratch& scratch) {
  residual_of(op, kernels, *net, scratch, scratch.residual);
  std::copy(net->code, net->code + net->count, scratch.value);
  const double l1 = l1_of(op, *net), l2 = l2_of(op);
  Encoder encoder = analysis_of(op);
  for (int sweep = 0; sweep < kNetSweeps; ++sweep) {
    double longest = 0;
    for (int64_t i = 0; i < net->count; ++i) {
      encoder.index = &net->index[i];
      float left;
      const float* const x[] = {scratch.residual};
      float* const y[] = {&left};
      encode_range(kernels, encoder, 0, 1, x, 1, y);
      const double g = net->diagonal[i], before = net->code[i];
      const auto after = static_cast<float>(shrink(left + g * before, l1, both_signs(op)) / (g + l2));
      if (after == net->code[i] || !std::isfinite(after)) continue;
      net->code[i] = after;
      const auto by = static_cast<float>(before - after);
      add_atom(op, kernels, net->index[i], by, scratch.residual);
      longest = std::max(longest, std::fabs(static_cast<double>(by)) * net->length[i]);
    }
    if (longest <= kTolerance * net->norm) break;
  }
  double moved = 0;
  for (int64_t i = 0; i < net->count; ++i) {
    moved = std::max(moved, std::fabs(static_cast<double>(net->code[i]) - scratch.value[i]) * net->length[i]);
  }
  return moved;
}

// Solves the net over the working set, of which scratch.left has the correlations under the present codes, or
// comes `near` its solution; returns the longest way that a code went.
double solve_over_members(const SteerPursuit& op, const Kernels& kernels, Net* net, const NetScratch& scratch,
                          bool near = false) {
  if (net->count > kSmallNet) return descend(op, kernels, net, scratch);
  extend_model(op, kernels, net, scratch);
  SmallNet small;
  small.kernels = &kernels;
  small.n = net->count;
  small.column = scratch.column;
  small.length = net->length;
  small.left = scratch.left;
  small.code = scratch.code;
  small.inverse = scratch.inverse;
  small.l1 = l1_of(op, *net);
  small.l2 = l2_of(op);
  small.both_signs = both_signs(op);
  small.tolerance = kTolerance * net->norm;
  std::copy(net->code, net->code + net->count, scratch.code);
  near ? small.approach() : small.solve();
  double moved = 0;
  for (int64_t i = 0; i < net->count; ++i) {
    moved = std::max(moved, std::fabs(scratch.code[i] - net->code[i]) * net->length[i]);
    net->code[i] = static_cast<float>(scratch.code[i]);
  }
  return moved;
}

// Correlations of the working set under the present codes, from those at the start and the table.
void model_left(Net* net, const float* start, const NetScratch& scratch) {
  if (net->count > kSmallNet) return;
  for (int64_t i = 0; i < net->count; ++i) scratch.left[i] = start[net->index[i]];
  for (int64_t j = 0; j < net->count; ++j) {
    const double c = net->code[j];
    if (c == 0) continue;
    const float* column = scratch.column + j * kSmallNet;
    for (int64_t i = 0; i < net->count; ++i) scratch.left[i] -= c * static_cast<double>(column[i]);
  }
}

// Where correlations from the Gram matrix are coarse: takes exact ones of the working set and of the atoms
// that may yet violate, admits those that do, and solves again. False when nothing moved any more.
bool look_again(const SteerPursuit& op, const Kernels& kernels, const float* correlation, double slack,
                Net* net, const NetScratch& scratch) {
  const double level = l1_of(op, *net) + net->floor;
  residual_of(op, kernels, *net, scratch, scratch.residual);
  const float* const x[] = {scratch.residual};
  Encoder encoder = analysis_of(op);
  // Members at zero that are far from the bound stay there whatever the rounding: the table's correlations
  // do.
  int32_t place[kSmallNet];
  int64_t close = 0;
  const int64_t known = std::min(net->count, kSmallNet);
  for (int64_t i = 0; i < known; ++i) {
    const double left = both_signs(op) ? std::fabs(scratch.left[i]) : scratch.left[i];
    if (net->code[i] == 0 && left < level - 2 * slack) continue;
    scratch.candidate[close] = net->index[i];
    place[close++] = static_cast<int32_t>(i);
  }
  encoder.index = scratch.candidate;
  float* const own[] = {scratch.entry};
  encode_range(kernels, encoder, 0, close, x, 1, own);
  for (int64_t i = 0; i < close; ++i) scratch.left[place[i]] = scratch.entry[i];

  const int64_t near = list_above(op, kernels, correlation, level - slack, *net, scratch);
  float* const others[] = {scratch.value};
  encode_range(kernels, encoder, 0, near, x, 1, others);
  int64_t violating = 0;
  for (int64_t i = 0; i < near; ++i) {
    const double v = both_signs(op) ? std::fabs(scratch.value[i]) : scratch.value[i];
    if (!(v > level)) continue;
    scratch.candidate[violating] = scratch.candidate[i];
    scratch.value[violating++] = scratch.value[i];
  }
  const bool grew = admit(op, kernels, violating, net, scratch, scratch.left) > 0;
  const double moved = solve_over_members(op, kernels, net, scratch);
  net->settling = grew ? 0 : net->settling + 1;
  return grew || (moved > kTolerance * net->norm && net->settling < kSettling);
}

}  // namespace

int64_t member_words(int64_t m) { return (m + 63) / 64; }

void begin(const SteerPursuit& op, const Kernels& kernels, const float* x, double norm, const float* start,
           Net* net) {
  net->x = x;
  net->norm = norm;
  net->count = net->modelled = 0;
  net->settling = 0;
  // Against a zero row every correlation that a bias leaves is infinitely large; its code is empty.
  net->running = norm > 0;
  net->symmetric = is_one_matrix(op);
  const float peak = kernels.peak(start, op.atoms, both_signs(op)).value;
  net->floor = kTolerance * std::max(static_cast<double>(peak), 0.0);
  std::memset(net->member, 0, static_cast<size_t>(member_words(op.atoms)) * sizeof(uint64_t));
}

void solve_net(const SteerPursuit& op, const Kernels& kernels, const float* start, Net* net,
               const NetScratch& scratch) {
  const double coarse = coarseness(op, *net), level = l1_of(op, *net) + net->floor;
  const float* correlation = start;
  while (net->running) {
    const double slack = slack_of(op, coarse, net);
    const int64_t violating = list_above(op, kernels, correlation, level + slack, *net, scratch);
    if (admit(op, kernels, violating, net, scratch, nullptr) > 0) {
      net->settling = 0;
      extend_model(op, kernels, net, scratch);
      model_left(net, start, scratch);
      // Where a second look follows in any case, it solves.
      solve_over_members(op, kernels, net, scratch, coarse > 0);
    } else {
      net->running = coarse > 0 && look_again(op, kernels, correlation, slack, net, scratch);
      if (!net->running) return;
    }
    int64_t on = 0;
    for (int64_t i = 0; i < net->count; ++i) {
      if (net->code[i] == 0) continue;
      scratch.candidate[on] = net->index[i];
      scratch.value[on++] = -net->code[i];
    }
    correlation = start;
    for (int64_t i = 0; i < on; i += kRowsAPass) {
      kernels.remaining[static_cast<int>(op.gram_dtype)](
          correlation, op.gram, op.atoms, scratch.candidate + i, scratch.value + i,
          std::min(on - i, kRowsAPass), scratch.correlation, false);
      correlation = scratch.correlation;
    }
  }
}

void solve_net_step(const SteerPursuit& op, const Kernels& kernels, const float* correlation, float* residual,
                    Net* net, const NetScratch& scratch) {
  if (!net->running) return;
  net->running = false;
  const int64_t violating = list_above(op, kernels, correlation, l1_of(op, *net) + net->floor, *net, scratch);
  const bool grew = admit(op, kernels, violating, net, scratch, nullptr) > 0;
  net->settling = grew ? 0 : net->settling + 1;
  if (net->count == 0) return;
  net->modelled = 0;  // the table belongs to the thread; another row used it since
  for (int64_t i = 0; i < std::min(net->count, kSmallNet); ++i) scratch.left[i] = correlation[net->index[i]];
  const double moved = solve_over_members(op, kernels, net, scratch);
  if (!grew && (moved <= kTolerance * net->norm || net->settling >= kSettling)) return;
  residual_of(op, kernels, *net, scratch, residual);
  net->running = true;
}

SparseCode finish(Net* net) {
  SparseCode code{net->index, net->code, 0};
  for (int64_t i = 0; i < net->count; ++i) {
    const float c = net->code[i];
    if (c == 0 || !std::isfinite(c)) continue;
    code.index[code.count] = net->index[i];
    code.value[code.count++] = c;
  }
  return code;
}

}  // namespace cpu
}  // namespace daco
