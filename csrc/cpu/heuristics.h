// Which variant runs at which shape, and why: every number that was chosen by measurement, and none
// elsewhere.
//
// Measured on a Xeon with AVX-512 and 2 MB of second-level cache a core, one thread, m x 4,096 weights, best
// of alternating runs in one process, cold weights. Multiply-adds alone reach 230 GFLOP/s there, with the
// loads of a tile from the first-level cache 175, each half as much when two threads share the core.
//
//   T        weights   variant                                             found
//   1        fp32      eight atoms side by side                            1.00 x one read
//   1        16 bits   the same, the next eight rows asked for ahead       1.05 x one read, without 1.16
//   1        int8      the same                                            1.04 x one read, without 1.20
//   2 - 23   any       tiles, passes of kDepth, weights in place: they     T = 8, fp32: 1.2 x one read,
//                      are used too few times to be copied                 in one pass over all of d 1.5
//   24 -     any       the same, a pass's weights widened into a panel:    T = 64: fp32 120, bf16 140
//                      each is used at least 24 times                      GFLOP/s; one pass 100, 105
//
// Passes keep one accumulator a pair and carry it along, so the variant never shows in a result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace daco {
namespace cpu {

// ---- dot products (dots.inl)

// The register block of each instruction set: as many accumulators as leave room for one weight and the rows.
struct Tile {
  int atoms;
  int rows;
  int lone_row_atoms;  // atoms, each a stream of memory, when there is one row
};
// Sixteen registers of four floats. Larger tiles spill.
constexpr Tile kScalarTile{4, 2, 4};
// Sixteen registers of eight floats: T = 64 takes 11.2 ms where 4 x 2 takes 18.4 and 2 x 4 takes 18.0.
constexpr Tile kAvx2Tile{4, 3, 8};
// Thirty-two registers of sixteen floats: T = 64 in bf16 takes 8.4 ms where 4 x 4 takes 9.0; 2 x 8 and 3 x 8
// spill and take 13.
constexpr Tile kAvx512Tile{4, 6, 8};

constexpr int64_t kGroup = 8;  // atoms that go through the rows together; 16 gains nothing
// Elements a pass: a group and a tile's rows are 8 and 6 times 1.5 KB. Of 256, 384, 512 and 1,024 the middle
// two are within 2 % of each other, the last loses up to 10 %, more so when a core runs two threads.
constexpr int64_t kDepth = 384;
constexpr int64_t kPackedRows =
    24;  // rows from which a pass's weights are copied: 16 is a draw, 32 gains 4 %
constexpr int64_t kCarriedRows = 64;  // rows whose accumulators fit: 32 KB of stack with AVX-512

// One row: fp32 rows fill the memory's queue by themselves, narrower ones do not.
constexpr bool prefetches_rows(size_t element_size) { return element_size < 4; }

// ---- pursuit (remaining.inl, pursuit.cpp)

// Exact Gram entries beside an fp16 Gram matrix come at the end, for all chosen atoms together: at T = 64, d
// = 4,096, k = 32 that takes 92 us a row where one step at a time takes 187 (fp32); in bf16 the two are
// alike.

constexpr int64_t kPrefetchedSteps =
    8;  // steps of eight vectors by which the newest Gram row is asked for ahead

// Gram rows that the elastic net, which may have hundreds, subtracts in one pass: each is a page of its own,
// and many more than these leave the first-level table of pages. A pursuit's up to 64 go in one pass: at 32
// rows the registers save a tenth of what four rows at a time through the cache take.
constexpr int64_t kRowsAPass = 32;

// ---- tasks (encode.cpp)

// Weights a task: enough that handing it over costs nothing and that a thread's streams get going, small
// enough that the last task keeps nobody waiting. Many rows do many times the work a byte.
constexpr int64_t kTaskBytes = 512 << 10;
constexpr int64_t kManyRows = 16;
constexpr int64_t kManyRowsTaskBytes = 256 << 10;

}  // namespace cpu
}  // namespace daco
