// What a call into the core says when it is done. No exceptions cross this boundary and nothing is
// allocated, so a status can be returned from a plugin's enqueue or a server's hot path.
#pragma once

#include <cstdint>

namespace daco {

enum class Code : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // an operand's shape, range or pointer is wrong: the message names it
  kUnsupported = 2,      // a valid request that this build or device has no kernel for
  kWorkspace = 3,        // the workspace is missing or smaller than the plan asked for
  kDevice = 4,           // the device's runtime reported an error; the message carries its code
};

struct Status {
  Code code = Code::kOk;
  char message[244] = {};

  bool ok() const { return code == Code::kOk; }
};

// Builds a status from a printf format; truncates what does not fit.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
Status make_status(Code code, const char* format, ...);

}  // namespace daco
