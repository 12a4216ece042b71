// The plugin library: one creator an operator, and the two symbols that TensorRT looks for when it loads it.
// It links nothing of TensorRT: every interface is abstract and reaches us as an object.
#include "adapters/tensorrt/plugin.h"
#include "adapters/tensorrt/report.h"

namespace daco::tensorrt {
namespace {

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    declare(Op{}, &fields_);
    fields_.declare("operands", nvinfer1::PluginFieldType::kCHAR);
  }

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const*, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Plugin<Op>* made = nullptr;
    return guarded([&] { return Plugin<Op>::make(fields, &made); }) == 0 ? made : nullptr;
  }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return Spec<Op>::kName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  FieldWriter fields_;
};

// Live as long as the process: registries keep the pointers, and may outlast static destructors.
nvinfer1::IPluginCreatorInterface* const* creators() {
  static nvinfer1::IPluginCreatorInterface* const all[] = {new Creator<SteerSae>, new Creator<SteerPursuit>,
                                                           new Creator<SteerAffine>};
  return all;
}

}  // namespace
}  // namespace daco::tensorrt

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(void* finder) {
  daco::tensorrt::set_logger_finder(finder);
}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  count = 0;
  nvinfer1::IPluginCreatorInterface* const* all = nullptr;
  daco::tensorrt::guarded([&] {
    all = daco::tensorrt::creators();
    count = 3;
    return daco::Status{};
  });
  return all;
}

}  // extern "C"
