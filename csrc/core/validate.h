// The part of validate() that needs no pointers, for planning a call before its buffers exist.
#pragma once

#include "core/steer.h"

namespace daco {

Status validate_shape(const SteerSae& op);
Status validate_shape(const SteerPursuit& op);
Status validate_shape(const SteerAffine& op);

}  // namespace daco
