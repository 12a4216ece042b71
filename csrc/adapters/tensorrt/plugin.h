// One steering operator as an IPluginV3: core, build and runtime capabilities in one object.
//
// The steering operands are inputs, constants of the network, and not fields: an engine then stores them
// once, a refit replaces them, and swapping a policy needs no new plugin. Fields carry attributes alone.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "adapters/operands.h"
#include "adapters/tensorrt/fields.h"
#include "adapters/tensorrt/operators.h"
#include "core/steer.h"
#include "cuda/steer_cuda.h"

namespace daco::tensorrt {

template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  using Tensor = nvinfer1::PluginTensorDesc;
  using Ranged = nvinfer1::DynamicPluginTensorDesc;

  Plugin(const Op& attributes, const Layout& layout) : attributes_(attributes), layout_(layout) {}
  Plugin(const Plugin& other);
  Plugin& operator=(const Plugin&) = delete;

  // From fields of a node or of a serialised engine. Throws on lack of memory alone.
  static Status make(const nvinfer1::PluginFieldCollection* fields, Plugin** out);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return Spec<Op>::kName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // build
  int32_t configurePlugin(Ranged const* in, int32_t inputs, Ranged const* out,
                          int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs, nvinfer1::DataType const* in,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, Ranged const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return Spec<Op>::kOutputs; }
  size_t getWorkspaceSize(Ranged const* in, int32_t inputs, Ranged const* out,
                          int32_t outputs) const noexcept override;
  // Without an id TensorRT times the plugin in every build. Sizes and types are part of TensorRT's own key.
  char const* getTimingCacheID() noexcept override;
  char const* getMetadataString() noexcept override { return getTimingCacheID(); }

  // runtime
  int32_t onShapeChange(Tensor const* in, int32_t inputs, Tensor const* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(Tensor const* in, Tensor const* out, void const* const* from, void* const* to,
                  void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  // Binds descriptions to the operator's struct: shapes, types, and data when `from` is given.
  Status bind(Tensor const* in, void const* const* from, Op* op) const;
  Status check_count(int32_t inputs, int32_t outputs) const;
  Status plan_for(const Op& op);
  Kind kind_of(int32_t input) const { return Spec<Op>::kInput[layout_.places()[input]].kind; }

  // Sizes and types decide a plan; data and attributes do not change within a plugin.
  static bool same_sizes(const Op& a, const Op& b);

  Op attributes_;
  Layout layout_;
  int32_t inputs_ = 0;       // of the node, known once TensorRT has described them
  cuda::Device built_on_{};  // compute 0: not known
  cuda::Device running_on_{};
  Status device_status_{};
  bool planned_ = false;
  Op planned_for_;
  cuda::Plan plan_{};
  FieldWriter fields_;
  std::string description_;
};

}  // namespace daco::tensorrt
