// What TensorRT is to a plugin, without TensorRT: dimension expressions, a logger, a loaded library and the
// calls in TensorRT's order. TensorRT's headers declare these interfaces as abstract classes.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace host {

using namespace nvinfer1;  // NOLINT: a host speaks nothing else

// ---- dimension expressions: all constant, as for a fixed shape

struct Number : apiv::VDimensionExpr {
  explicit Number(int64_t v) : value(v) {}
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  int64_t value;
};

struct Expr : IDimensionExpr {
  explicit Expr(int64_t v) : number(v) { mImpl = &number; }
  Number number;
};

struct Builder : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(int64_t value) override {
    made.push_back(std::make_unique<Expr>(value));
    return made.back().get();
  }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  std::deque<std::unique_ptr<Expr>> made;
};

// ---- a logger that keeps what was said

struct Logger : ILogger {
  void log(Severity, AsciiChar const* message) noexcept override { said.emplace_back(message); }
  bool heard(const char* part) const {
    for (const auto& line : said)
      if (line.find(part) != std::string::npos) return true;
    return false;
  }
  std::string last() const { return said.empty() ? "" : said.back(); }
  std::vector<std::string> said;
};

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return logger; }
  ILogger* logger = nullptr;
};

// ---- the plugin library

class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle_, "setLoggerFinder"));
    auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle_, "getCreators"));
    if (set_finder == nullptr || get == nullptr) throw std::runtime_error("a symbol is missing");
    finder.logger = &logger;
    set_finder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* all = get(count);
    for (int32_t i = 0; i < count; ++i) {
      if (std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0)
        throw std::runtime_error("a creator of another kind");
      creators.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
    }
  }
  ~Library() { set_finder(nullptr); }

  IPluginCreatorV3One* creator(const std::string& name) const {
    for (auto* c : creators)
      if (name == c->getPluginName()) return c;
    throw std::runtime_error("no creator of " + name);
  }

  Logger logger;
  Finder finder;
  std::vector<IPluginCreatorV3One*> creators;
  void (*set_finder)(ILoggerFinder*) = nullptr;

 private:
  void* handle_;
};

// ---- fields as the ONNX parser makes them

class Fields {
 public:
  Fields() = default;
  Fields(Fields&&) = default;  // a copy would point into the original
  Fields& operator=(Fields&&) = default;

  Fields& text(const char* name, const std::string& value) {
    texts_.push_back(value);
    fields_.emplace_back(name, texts_.back().data(), PluginFieldType::kCHAR,
                         static_cast<int32_t>(value.size()));
    return *this;
  }
  Fields& integer(const char* name, int32_t value) {
    integers_.push_back(value);
    fields_.emplace_back(name, &integers_.back(), PluginFieldType::kINT32, 1);
    return *this;
  }
  Fields& numbers(const char* name, std::vector<float> values) {
    numbers_.push_back(std::move(values));
    fields_.emplace_back(name, numbers_.back().data(), PluginFieldType::kFLOAT32,
                         static_cast<int32_t>(numbers_.back().size()));
    return *this;
  }
  PluginFieldCollection const* collection() {
    all_.nbFields = static_cast<int32_t>(fields_.size());
    all_.fields = fields_.data();
    return &all_;
  }

 private:
  std::deque<std::string> texts_;
  std::deque<int32_t> integers_;
  std::deque<std::vector<float>> numbers_;
  std::vector<PluginField> fields_;
  PluginFieldCollection all_{};
};

// What serialising keeps of a collection: TensorRT stores the bytes, not the pointers.
class Stored {
 public:
  explicit Stored(PluginFieldCollection const& from) {
    for (int32_t i = 0; i < from.nbFields; ++i) {
      const PluginField& f = from.fields[i];
      const size_t width = f.type == PluginFieldType::kCHAR ? 1 : f.type == PluginFieldType::kINT64 ? 8 : 4;
      names_.emplace_back(f.name);
      const auto* bytes = static_cast<const char*>(f.data);
      data_.emplace_back(bytes, bytes + width * static_cast<size_t>(f.length));
      data_.back().resize(data_.back().size() + 8, '\x7f');  // no closing zero to lean on
      fields_.emplace_back(names_.back().c_str(), data_.back().data(), f.type, f.length);
    }
  }
  PluginFieldCollection collection() const { return {static_cast<int32_t>(fields_.size()), fields_.data()}; }

 private:
  std::deque<std::string> names_;
  std::deque<std::vector<char>> data_;
  std::vector<PluginField> fields_;
};

// ---- tensors

struct Shape {
  DataType type;
  std::vector<int64_t> sizes;
};

inline PluginTensorDesc describe(const Shape& shape) {
  PluginTensorDesc d{};
  d.type = shape.type;
  d.format = TensorFormat::kLINEAR;
  d.dims.nbDims = static_cast<int32_t>(shape.sizes.size());
  for (size_t i = 0; i < shape.sizes.size(); ++i) d.dims.d[i] = shape.sizes[i];
  return d;
}

inline DynamicPluginTensorDesc ranged(const Shape& shape) {
  DynamicPluginTensorDesc d{};
  d.desc = describe(shape);
  d.min = d.max = d.opt = d.desc.dims;
  return d;
}

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
inline IPluginV3OneCore* core(IPluginV3* p) {
  return capability<IPluginV3OneCore>(p, PluginCapabilityType::kCORE);
}
inline IPluginV3OneBuild* build(IPluginV3* p) {
  return capability<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD);
}
inline IPluginV3OneRuntime* runtime(IPluginV3* p) {
  return capability<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME);
}

// Drives one node from its fields to an object attached to a context. Every step that TensorRT takes must
// succeed; `failed` names the first that did not.
struct Driven {
  Driven(IPluginCreatorV3One* creator, PluginFieldCollection const* fields, const std::vector<Shape>& shapes)
      : inputs(shapes), failed(live(creator, fields)) {}

  int32_t shape_change() {
    std::vector<PluginTensorDesc> in, out;
    descriptions(&in, &out);
    return runtime(attached.get())
        ->onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                        static_cast<int32_t>(out.size()));
  }

  int32_t enqueue(void const* const* from, void* const* to, void* scratch, cudaStream_t stream) {
    std::vector<PluginTensorDesc> in, out;
    descriptions(&in, &out);
    return runtime(attached.get())->enqueue(in.data(), out.data(), from, to, scratch, stream);
  }

  std::vector<Shape> inputs, outputs;
  std::unique_ptr<IPluginV3> built, configured, loaded, attached;
  size_t workspace = 0;
  std::string failed;

 private:
  // Every step up to a context.
  const char* live(IPluginCreatorV3One* creator, PluginFieldCollection const* fields) {
    built.reset(creator->createPlugin("node", fields, TensorRTPhase::kBUILD));
    if (!built) return "createPlugin";
    IPluginV3OneBuild* b = build(built.get());
    const auto count = static_cast<int32_t>(inputs.size());
    const int32_t results = b->getNbOutputs();

    std::vector<DataType> in_types;
    for (const Shape& s : inputs) in_types.push_back(s.type);
    std::vector<DataType> out_types(static_cast<size_t>(results));
    if (b->getOutputDataTypes(out_types.data(), results, in_types.data(), count) != 0)
      return "getOutputDataTypes";

    Builder builder;
    std::vector<DimsExprs> in_dims(inputs.size()), out_dims(static_cast<size_t>(results));
    for (size_t i = 0; i < inputs.size(); ++i) {
      in_dims[i].nbDims = static_cast<int32_t>(inputs[i].sizes.size());
      for (size_t j = 0; j < inputs[i].sizes.size(); ++j)
        in_dims[i].d[j] = builder.constant(inputs[i].sizes[j]);
    }
    if (b->getOutputShapes(in_dims.data(), count, nullptr, 0, out_dims.data(), results, builder) != 0)
      return "getOutputShapes";
    for (size_t i = 0; i < out_dims.size(); ++i) {
      outputs.push_back({out_types[i], {}});
      for (int32_t j = 0; j < out_dims[i].nbDims; ++j)
        outputs.back().sizes.push_back(out_dims[i].d[j]->getConstantValue());
    }

    std::vector<DynamicPluginTensorDesc> tensors;
    for (const Shape& s : inputs) tensors.push_back(ranged(s));
    for (const Shape& s : outputs) tensors.push_back(ranged(s));
    for (int32_t i = 0; i < count + results; ++i)
      if (!b->supportsFormatCombination(i, tensors.data(), count, results))
        return "supportsFormatCombination";
    // TensorRT works on clones from here on and drops the original.
    configured.reset(built->clone());
    b = build(configured.get());
    if (b->configurePlugin(tensors.data(), count, tensors.data() + count, results) != 0)
      return "configurePlugin";
    workspace = b->getWorkspaceSize(tensors.data(), count, tensors.data() + count, results);

    const Stored stored(*runtime(configured.get())->getFieldsToSerialize());
    const PluginFieldCollection kept = stored.collection();
    loaded.reset(creator->createPlugin("node", &kept, TensorRTPhase::kRUNTIME));
    if (!loaded) return "createPlugin from serialised fields";
    attached.reset(runtime(loaded.get())->attachToContext(nullptr));
    if (!attached) return "attachToContext";
    return "";
  }

  void descriptions(std::vector<PluginTensorDesc>* in, std::vector<PluginTensorDesc>* out) const {
    for (const Shape& s : inputs) in->push_back(describe(s));
    for (const Shape& s : outputs) out->push_back(describe(s));
  }
};

}  // namespace host
