#include "adapters/tensorrt/report.h"

#include <NvInferVersion.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace daco::tensorrt {

// The plugin interfaces are the same in TensorRT 10 and 11. These two are not: 11 gave them a base class, so
// that their functions moved to other places of the virtual table. A library that runs in both has to know
// which it was handed; it calls through these mirrors, never through the headers' own classes.
//
// They have a named namespace: of an unnamed one the compiler knows every class, sees none that implements
// these, and makes each call a call of a pure virtual function.
namespace mirror {

struct Logger10 {
  virtual void log(int32_t severity, const char* message) noexcept = 0;

 protected:
  ~Logger10() = default;
};
struct Finder10 {
  virtual Logger10* findLogger() = 0;

 protected:
  ~Finder10() = default;
};
struct Logger11 : nvinfer1::IVersionedInterface {
  virtual void log(int32_t severity, const char* message) noexcept = 0;
};
struct Finder11 : nvinfer1::IVersionedInterface {
  virtual Logger11* findLogger() = 0;
};

}  // namespace mirror

namespace {

using namespace mirror;

constexpr int32_t kError = static_cast<int32_t>(nvinfer1::ILogger::Severity::kERROR);

int major_of(int32_t (*version)()) {
  const int32_t v = version();
  return v >= 10000 ? v / 10000 : v / 1000;  // 101401 since 10, 8601 before
}

// Which TensorRT made this object: its virtual table lies in that library, which tells its version.
int major_version_behind(const void* object) {
  constexpr const char* kSymbol = "getInferLibVersion";
  using Version = int32_t (*)();
  const void* table = *static_cast<void* const*>(object);
  Dl_info where{};
  if (dladdr(table, &where) != 0 && where.dli_fname != nullptr) {
    if (void* library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD); library != nullptr) {
      const auto version = reinterpret_cast<Version>(dlsym(library, kSymbol));
      const int major = version != nullptr ? major_of(version) : 0;
      dlclose(library);
      if (major != 0) return major;
    }
  }
  const auto version = reinterpret_cast<Version>(dlsym(RTLD_DEFAULT, kSymbol));
  return version != nullptr ? major_of(version) : NV_TENSORRT_MAJOR;
}

// TensorRT sets it when it loads the library and keeps it alive; builders on several threads read it.
struct Finder {
  std::atomic<void*> object{nullptr};
  std::atomic<int> major{NV_TENSORRT_MAJOR};
} of_process;

// A sanitizer would, rightly, find another class behind the mirrors.
__attribute__((no_sanitize("vptr"))) bool told(const char* message) {
  void* object = of_process.object.load(std::memory_order_acquire);
  if (object == nullptr) return false;
  if (of_process.major.load(std::memory_order_relaxed) >= 11) {
    Logger11* logger = static_cast<Finder11*>(object)->findLogger();
    if (logger == nullptr) return false;
    logger->log(kError, message);
  } else {
    Logger10* logger = static_cast<Finder10*>(object)->findLogger();
    if (logger == nullptr) return false;
    logger->log(kError, message);
  }
  return true;
}

}  // namespace

void set_logger_finder(void* finder) noexcept {
  if (finder != nullptr) of_process.major.store(major_version_behind(finder), std::memory_order_relaxed);
  of_process.object.store(finder, std::memory_order_release);
}

void report(const char* message) noexcept {
  try {
    if (told(message)) return;
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
