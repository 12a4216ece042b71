// The launchers on a GPU: the operands of core/steer.h as device pointers, a plan that is a pure function of
// sizes, dtypes, attributes and the device's properties, and a stream instead of an executor. steer()
// allocates nothing, never synchronises and makes the same launches for equal plans, so that a call can be
// captured in a CUDA graph and replayed after slots, policies or z were refilled in place.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"
#include "core/steer.h"

struct CUstream_st;  // cudaStream_t is CUstream_st*: adapters need no CUDA header to pass one on

namespace daco::cuda {

using Stream = CUstream_st*;

// What a plan depends on. Filled once per device by properties(); a test fills it by hand.
struct Device {
  int index = 0;
  int compute = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // per block, opted in
  int64_t l2_bytes = 0;
};

struct Plan {
  size_t workspace_bytes = 0;  // aligned to 256; 0 needs none
  const char* variant = "";    // static string: which algorithm runs
  const char* reason = "";     // static string: why that one
  Device device;
};

// Properties of a device, or of the current one at -1. Code::kDevice with the runtime's number and text where
// there is none: a machine without a driver answers 35 (insufficient driver).
Status properties(int index, Device* device);

Status plan(const SteerSae& op, const Device& device, Plan* plan);
Status plan(const SteerPursuit& op, const Device& device, Plan* plan);
Status plan(const SteerAffine& op, const Device& device, Plan* plan);

// The workspace is the caller's, 256-byte aligned, at least plan.workspace_bytes, and may be dirty; it must
// not serve two streams at once. A launch that fails returns Code::kDevice; what fails later belongs to the
// stream.
Status steer(const SteerSae& op, const Plan& plan, void* workspace, Stream stream);
Status steer(const SteerPursuit& op, const Plan& plan, void* workspace, Stream stream);
Status steer(const SteerAffine& op, const Plan& plan, void* workspace, Stream stream);

// gram[i, j] = sum_d analysis[i, d] * atoms[j, d] (times scales, [2, m], of quantised weights), accumulated
// in fp32, stored as fp32 or fp16. [m, m]. For the start of a session: not tuned.
Status build_gram(const void* analysis, const void* atoms, DType weight, const float* scales, int64_t m,
                  int64_t d, void* gram, DType gram_dtype, Stream stream);

}  // namespace daco::cuda
