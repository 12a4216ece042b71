// cuBLASLt, opened at run time: no header of it is needed to build and no library to load this one. The few
// entry points and constants below are part of its stable interface since version 11.
#include "cuda/gemm.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <mutex>

namespace daco::cuda {
namespace {

constexpr int kComputeF32 = 68;  // CUBLAS_COMPUTE_32F
constexpr int kTransposeA = 3;   // CUBLASLT_MATMUL_DESC_TRANSA
constexpr int32_t kTransposed = 1;
constexpr int kMostScratch = 1;             // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
constexpr int kAlignment[] = {5, 6, 7, 8};  // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, then B, C and D

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t scratch;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  const char* state = "not looked for yet";
  bool open = false;
  int (*create)(void** handle);
  int (*matmul)(void* handle, void* operation, const void* alpha, const void* a, void* layout_a,
                const void* b, void* layout_b, const void* beta, const void* c, void* layout_c, void* d,
                void* layout_d, const Algorithm* algorithm, void* scratch, size_t scratch_bytes,
                cudaStream_t stream);
  int (*operation_create)(void** operation, int compute, int scale);
  int (*operation_set)(void* operation, int attribute, const void* value, size_t bytes);
  int (*operation_destroy)(void* operation);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(void* layout);
  int (*preference_create)(void** preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(void* preference);
  int (*heuristic)(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference,
                   int asked, Heuristic* found, int* count);
};

template <class F>
bool find(void* file, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(file, name));
  return *function != nullptr;
}

Library open_library() {
  Library l;
  void* file = nullptr;
  // A framework in this process has loaded one of them as a rule; then this finds the very same.
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    file = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
    if (file != nullptr) {
      l.state = name;
      break;
    }
  }
  if (file == nullptr) {
    l.state = "neither libcublasLt.so.13 nor libcublasLt.so.12 was found";
    return l;
  }
  l.open = find(file, "cublasLtCreate", &l.create) && find(file, "cublasLtMatmul", &l.matmul) &&
           find(file, "cublasLtMatmulDescCreate", &l.operation_create) &&
           find(file, "cublasLtMatmulDescSetAttribute", &l.operation_set) &&
           find(file, "cublasLtMatmulDescDestroy", &l.operation_destroy) &&
           find(file, "cublasLtMatrixLayoutCreate", &l.layout_create) &&
           find(file, "cublasLtMatrixLayoutDestroy", &l.layout_destroy) &&
           find(file, "cublasLtMatmulPreferenceCreate", &l.preference_create) &&
           find(file, "cublasLtMatmulPreferenceSetAttribute", &l.preference_set) &&
           find(file, "cublasLtMatmulPreferenceDestroy", &l.preference_destroy) &&
           find(file, "cublasLtMatmulAlgoGetHeuristic", &l.heuristic);
  if (!l.open) l.state = "libcublasLt lacks an entry point";
  return l;
}

// Never unloaded: its handles live as long as the process.
const Library& library() {
  static const Library l = open_library();
  return l;
}

constexpr int kMostDevices = 64;
std::mutex handle_lock;
void* handles[kMostDevices];
bool tried[kMostDevices];

void* handle_of(int device) {
  if (device < 0 || device >= kMostDevices || !library().open) return nullptr;
  const std::lock_guard<std::mutex> guard(handle_lock);
  if (!tried[device]) {
    tried[device] = true;
    // A handle belongs to the device that is current when it is made.
    int current = 0;
    if (cudaGetDevice(&current) != cudaSuccess || current != device) {
      cudaGetLastError();
      tried[device] = false;
      return nullptr;
    }
    if (library().create(&handles[device]) != 0) handles[device] = nullptr;
  }
  return handles[device];
}

// The library assumes 256 bytes unless it is told less: rows may begin anywhere in a larger tensor.
uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  uint32_t alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

int data_type(DType t) { return t == DType::kF32 ? CUDA_R_32F : t == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF; }

// The four descriptions of a product. Destroying what was never made is left out.
struct Descriptions {
  const Library& l;
  void* operation = nullptr;
  void* w = nullptr;
  void* x = nullptr;
  void* out = nullptr;
  void* preference = nullptr;

  explicit Descriptions(const Library& library) : l(library) {}
  Descriptions(const Descriptions&) = delete;
  Descriptions& operator=(const Descriptions&) = delete;
  ~Descriptions() {
    if (preference != nullptr) l.preference_destroy(preference);
    if (out != nullptr) l.layout_destroy(out);
    if (x != nullptr) l.layout_destroy(x);
    if (w != nullptr) l.layout_destroy(w);
    if (operation != nullptr) l.operation_destroy(operation);
  }

  // The library's matrices run down columns, so rows of ours are columns of its: out' = w x', [m, rows].
  bool make(const Product& p) {
    const auto m = static_cast<uint64_t>(p.m), d = static_cast<uint64_t>(p.d),
               rows = static_cast<uint64_t>(p.rows);
    const size_t scratch = kLibraryScratch;
    const uint32_t alignment[] = {alignment_of(p.w), alignment_of(p.x), alignment_of(p.out),
                                  alignment_of(p.out)};
    bool good = l.operation_create(&operation, kComputeF32, CUDA_R_32F) == 0 &&
                l.operation_set(operation, kTransposeA, &kTransposed, sizeof kTransposed) == 0 &&
                l.layout_create(&w, data_type(p.w_type), d, m, p.d) == 0 &&
                l.layout_create(&x, data_type(p.x_type), d, rows, p.x_stride) == 0 &&
                l.layout_create(&out, CUDA_R_32F, m, rows, p.out_stride) == 0 &&
                l.preference_create(&preference) == 0 &&
                l.preference_set(preference, kMostScratch, &scratch, sizeof scratch) == 0;
    for (int i = 0; good && i < 4; ++i) {
      good = l.preference_set(preference, kAlignment[i], &alignment[i], sizeof alignment[i]) == 0;
    }
    return good;
  }
};

}  // namespace

bool library_serves(DType x_type, DType w_type) {
  return x_type == w_type && (x_type == DType::kF32 || x_type == DType::kF16 || x_type == DType::kBF16);
}

bool library_ready(int device) { return handle_of(device) != nullptr; }

const char* library_state() { return library().state; }

bool library_product(const Product& p, int device, void* scratch, Stream stream) {
  void* handle = handle_of(device);
  if (handle == nullptr || !library_serves(p.x_type, p.w_type)) return false;
  const Library& l = library();
  Descriptions described(l);
  Heuristic found;
  int count = 0;
  if (!described.make(p)) return false;
  if (l.heuristic(handle, described.operation, described.w, described.x, described.out, described.out,
                  described.preference, 1, &found, &count) != 0 ||
      count == 0) {
    return false;
  }
  const float one = 1.f, zero = 0.f;
  return l.matmul(handle, described.operation, &one, p.w, described.w, p.x, described.x, &zero, p.out,
                  described.out, p.out, described.out, &found.algorithm, scratch, kLibraryScratch,
                  stream) == 0;
}

}  // namespace daco::cuda
