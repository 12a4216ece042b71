// Where every buffer of a call lies in the caller's workspace: computed here for planning and running alike.
#pragma once

#include <cstddef>

#include "cpu/edit.h"
#include "cpu/elastic_net.h"
#include "cpu/plan.h"
#include "cpu/pursuit.h"

namespace daco {
namespace cpu {

constexpr int64_t kWindowRows = 4096;  // rows that are looked at together to find those that need a code
constexpr int64_t kBlockRows = 64;     // rows that are coded together; bounds the workspace

// The sizes that decide the layout. Zero leaves a buffer out.
struct Sizes {
  int64_t window = 0;  // min(T, kWindowRows)
  int64_t block = 0;   // min(T, kBlockRows)
  int64_t workers = 0;
  int64_t dim = 0;
  int64_t correlations = 0;  // pre-activations a row
  int64_t watched = 0;       // m, for coders that compute watched latents only
  int64_t codes = 0;         // room for a code
  bool selects = false;      // a code is selected into buffers of its own
  bool reports = false;      // k_out > 0
  int32_t pursuit = 0;       // k of a pursuit
  bool non_negative = false;
  int64_t gram_row = 0;  // m, for a pursuit with a Gram matrix
  int64_t widened = 0;   // atoms that it widens at a time
  int64_t barred = 0;    // words of a pursuit without one
  int64_t net = 0;       // m, for an elastic net
  int64_t open = 0;      // pursuits or nets that are under way together
  bool in_step = false;  // those of a block, for want of a Gram matrix
};

Sizes sizes_of(const SteerSae& op, int threads);
Sizes sizes_of(const SteerPursuit& op, int threads, bool has_gram);

// What one task at a time uses.
struct Worker {
  SparseCode code;
  float* select;
  EditScratch edit;
  PursuitScratch pursuit;
  NetScratch net;
};

class Workspace {
 public:
  Workspace(const Sizes& sizes, void* base);

  size_t bytes() const { return bytes_; }
  Worker worker(int64_t i) const;
  // Sets the buffers of pursuit or net number i.
  void open(int64_t i, Pursuit* row) const;
  void open(int64_t i, Net* row) const;

  uint8_t* needs_code;  // [window]
  int32_t* row;         // [window] rows of the window that need a code
  double* norm;         // [block]
  const float** x;      // [block] rows in fp32
  float** correlation;  // [block] pre-activations or correlations
  const float** alive;  // [block] residuals of the rows that a pursuit goes on with
  float** alive_y;      // [block] and where their correlations go
  Pursuit* pursuits;    // [block]
  Net* nets;            // [block]
  int32_t* watched;     // [m] list
  uint8_t* seen;        // [m]
  float* rows;          // [block, d] what x points to
  float* residuals;     // [block, d]
  float* correlations;  // [block, correlations]

 private:
  Sizes sizes_;
  size_t worker_bytes_;
  size_t open_bytes_;
  char* workers_;
  char* open_buffers_;
  size_t bytes_;
};

}  // namespace cpu
}  // namespace daco
