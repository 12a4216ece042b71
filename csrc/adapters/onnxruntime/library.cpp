// The custom-op library of ONNX Runtime: domain ai.daco with SteerSae, SteerPursuit and SteerAffine, and
// the one exported symbol RegisterCustomOps.
//
// ONNX Runtime infers an output's type from the declared type of an input only when all of them are fixed,
// so each operator is declared once for every activation type; the types of the matrices stay open and
// are checked by the kernel.
#include <new>

#include "adapters/onnxruntime/kernels.h"
#ifdef DACO_RT_WITH_CUDA
#include "adapters/onnxruntime/cuda_kernels.h"
#endif

namespace daco::adapters {
namespace {

template <class F>
OrtStatus* guarded(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& e) {
    return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::bad_alloc&) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "daco: out of memory");
  } catch (const std::exception& e) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, e.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, "daco: unknown error");
  }
}

ONNXTensorElementDataType type_of(SaeInput i) {
  switch (i) {
    case kSaeSlots: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case kSaeUndesirable: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case kSaeEnc:
    case kSaeDec: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

ONNXTensorElementDataType type_of(PursuitInput i) {
  switch (i) {
    case kPursuitSlots: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case kPursuitUndesirable: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case kPursuitAnalysis:
    case kPursuitAtoms:
    case kPursuitGram: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

ONNXTensorElementDataType type_of(AffineInput i) {
  switch (i) {
    case kAffineSlots: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case kAffineA:
    case kAffineB: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// Owns what the shape function borrows.
struct ShapeInfo {
  explicit ShapeInfo(OrtTensorTypeAndShapeInfo* p) : info(p) {}
  ~ShapeInfo() { Ort::GetApi().ReleaseTensorTypeAndShapeInfo(info); }
  ShapeInfo(const ShapeInfo&) = delete;
  ShapeInfo& operator=(const ShapeInfo&) = delete;
  OrtTensorTypeAndShapeInfo* info;
};

void set_shape(OrtShapeInferContext* context, size_t i, ONNXTensorElementDataType type,
               std::vector<int64_t>& dims, std::vector<const char*>& symbols) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const ShapeInfo out(raw);
  Ort::ThrowOnError(api.SetTensorElementType(raw, type));
  Ort::ThrowOnError(api.SetDimensions(raw, dims.data(), dims.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, symbols.data(), symbols.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, i, raw));
}

// z' has the shape of z; the other outputs replace its last axis. Uses the plain C interface: the C++
// wrapper reads all inputs first and fails on absent ones.
void infer_shapes(OrtShapeInferContext* context, size_t outputs) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* z = nullptr;
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, kSaeZ, &z));
  ONNXTensorElementDataType type;
  Ort::ThrowOnError(api.GetTensorElementType(z, &type));
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(z, &rank));
  if (rank == 0) return;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank, "");
  Ort::ThrowOnError(api.GetDimensions(z, dims.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(z, symbols.data(), rank));

  set_shape(context, kOutZ, type, dims, symbols);
  symbols.back() = "";
  dims.back() = 2;
  set_shape(context, kOutDoses, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, dims, symbols);
  if (outputs <= kOutIndex) return;
  const OrtOpAttr* attribute = nullptr;
  Ort::ThrowOnError(api.ShapeInferContext_GetAttribute(context, "k_out", &attribute));
  size_t read = 0;
  Ort::ThrowOnError(api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &dims.back(), sizeof(int64_t), &read));
  set_shape(context, kOutIndex, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, dims, symbols);
  set_shape(context, kOutValue, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, dims, symbols);
}

// One operator for one activation type.
template <class K, class Input, size_t kInputs>
struct Declaration : OrtCustomOp {
  explicit Declaration(ONNXTensorElementDataType activation) : OrtCustomOp{}, activation_(activation) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return K::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return K::kProvider; };
    GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
    GetInputType = [](const OrtCustomOp* self, size_t i) {
      return i == 0 ? of(self).activation_ : type_of(static_cast<Input>(i));
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return is_optional(static_cast<Input>(i)) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return K::kOutputCount; };
    GetOutputType = [](const OrtCustomOp* self, size_t i) {
      if (i == kOutZ) return of(self).activation_;
      return i == kOutIndex ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return i == kOutZ ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new K(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const K*>(kernel)->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<K*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] { infer_shapes(context, K::kOutputCount); });
    };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    // z' may take z's place: rows of slot 0 are then not even copied.
    GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      *inputs = new (std::nothrow) int[1]{0};
      *outputs = new (std::nothrow) int[1]{static_cast<int>(kOutZ)};
      return *inputs != nullptr && *outputs != nullptr ? 1 : 0;
    };
    ReleaseMayInplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
  }

 private:
  static const Declaration& of(const OrtCustomOp* self) { return *static_cast<const Declaration*>(self); }
  ONNXTensorElementDataType activation_;
};

using Sae = Declaration<SaeKernel, SaeInput, kSaeInputs>;
using Pursuit = Declaration<PursuitKernel, PursuitInput, kPursuitInputs>;
using Affine = Declaration<AffineKernel, AffineInput, kAffineInputs>;
#ifdef DACO_RT_WITH_CUDA
using CudaSae = Declaration<CudaSaeKernel, SaeInput, kSaeInputs>;
using CudaPursuit = Declaration<CudaPursuitKernel, PursuitInput, kPursuitInputs>;
using CudaAffine = Declaration<CudaAffineKernel, AffineInput, kAffineInputs>;
#endif

// Lives as long as the process: sessions keep pointers into it, and ONNX Runtime may be gone before the
// static destructors of this library run.
OrtCustomOpDomain* domain() {
  static OrtCustomOpDomain* const made = [] {
    auto* d = new Ort::CustomOpDomain("ai.daco");
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      d->Add(new Sae(type));
      d->Add(new Pursuit(type));
      d->Add(new Affine(type));
#ifdef DACO_RT_WITH_CUDA
      d->Add(new CudaSae(type));
      d->Add(new CudaPursuit(type));
      d->Add(new CudaAffine(type));
#endif
    }
    return static_cast<OrtCustomOpDomain*>(*d);
  }();
  return made;
}

}  // namespace
}  // namespace daco::adapters

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // Every runtime knows the first interface, and creating a status is part of it.
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED,
        ("daco: this library needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) + " or later").c_str());
  }
  Ort::InitApi(api);
  return daco::adapters::guarded(
      [&] { Ort::ThrowOnError(api->AddCustomOpDomain(options, daco::adapters::domain())); });
}
