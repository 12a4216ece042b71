#pragma once

#include "core/steer.h"
#include "cuda/steer_cuda.h"

namespace daco::cuda {

Status launch_affine(const SteerAffine& op, const Device& device, Stream stream);

}  // namespace daco::cuda
