// How a pursuit runs: decided from sizes, dtypes and the device's properties alone. Host code, free of CUDA.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pursuit_state.h"

namespace daco::cuda {

enum class PursuitPath : int32_t {
  kResident,  // with a Gram matrix, a cluster a row from start to end
  kStepped,   // without one: a launch a step, correlations recomputed in between
  kElastic,
};

struct PursuitLayout {
  PursuitPath path = PursuitPath::kStepped;
  int64_t pass = 0;  // rows that go through together; bounds the workspace
  size_t shared_bytes = 0;

  // resident
  int cluster = 1;          // blocks a row
  int chunks_a_thread = 1;  // 1, 2 or 4
  int64_t chunks = 0;       // of a block
  int32_t cached = 0;       // rows of G that a block keeps

  // stepped
  int64_t state_bytes = 0;  // of a row

  // elastic
  bool in_shared = false;  // correlations and codes
  int rounds = 1;          // descents: the second corrects for the rounding of an fp16 Gram matrix
};

// Where everything lies in the workspace; null is not used.
struct PursuitBuffers {
  float* start = nullptr;     // [pass, m]
  float* alpha = nullptr;     // [pass, m]
  float* code = nullptr;      // [pass, m]
  float* dense = nullptr;     // [pass, m]
  float* residual = nullptr;  // [pass, d]
  float* diagonal = nullptr;  // [m]
  float* length = nullptr;    // [m]
  unsigned char* state = nullptr;
  void* codes = nullptr;    // of the code list
  int64_t capacity = 0;     // codes a row
  void* scratch = nullptr;  // of the matrix library
  size_t bytes = 0;
};

// `has_gram` instead of op.gram: hosts plan before they have pointers. `cluster` forces the size of a
// cluster; 0 chooses.
PursuitLayout lay_out(const SteerPursuit& op, const Device& device, bool has_gram, int cluster = 0);
PursuitBuffers carve(const SteerPursuit& op, const PursuitLayout& layout, void* base);

// Refuses valid requests that these kernels do not serve.
Status check_supported(const SteerPursuit& op);

// The size of cluster that the environment variable DACO_RT_CUDA_CLUSTER asks for, 0 if none: for
// measurements.
int asked_cluster();

}  // namespace daco::cuda
