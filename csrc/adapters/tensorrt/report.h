// How this library speaks to TensorRT when something is wrong: one sentence to the logger that TensorRT gave,
// a number back, and never an exception across the boundary.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>

#include "core/status.h"

namespace daco::tensorrt {

// What entry points answer when they refuse; TensorRT takes every number but 0 for a failure.
constexpr int32_t kRefused = -1;

// Keeps the nvinfer1::ILoggerFinder that TensorRT hands over when it loads the library; null forgets it.
// Untyped, because that class is not the same in all versions that may load this library.
void set_logger_finder(void* finder) noexcept;

// To the logger of the calling context, or to stderr where there is none: a refusal is never silent.
void report(const char* message) noexcept;

// Reports a status that is not ok. Returns what an entry point answers: 0, or the code of the status.
int32_t answer(const Status& status) noexcept;

// Runs body() -> Status at the boundary.
template <class F>
int32_t guarded(F&& body) noexcept {
  try {
    return answer(body());
  } catch (const std::exception& e) {
    report(e.what());
  } catch (...) {
    report("daco: unknown error");
  }
  return kRefused;
}

}  // namespace daco::tensorrt
