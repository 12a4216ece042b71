#include "adapters/tensorrt/report.h"

#include <atomic>
#include <cstdio>

namespace daco::tensorrt {
namespace {

// TensorRT sets it when it loads the library and keeps it alive; builders on several threads read it.
std::atomic<nvinfer1::ILoggerFinder*> finder_of_process{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  finder_of_process.store(finder, std::memory_order_release);
}

void report(const char* message) noexcept {
  try {
    nvinfer1::ILoggerFinder* finder = finder_of_process.load(std::memory_order_acquire);
    nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, message);
      return;
    }
  } catch (...) {
    // findLogger() is not noexcept; the sentence still has a place below.
  }
  std::fprintf(stderr, "%s\n", message);
}

int32_t answer(const Status& status) noexcept {
  if (status.ok()) return 0;
  report(status.message);
  return static_cast<int32_t>(status.code);
}

}  // namespace daco::tensorrt
