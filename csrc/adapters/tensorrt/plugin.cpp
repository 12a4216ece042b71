#include "adapters/tensorrt/plugin.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <sstream>

#include "adapters/tensorrt/report.h"

namespace daco::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;

#define DACO_TRY(expression)                        \
  do {                                              \
    if (Status s = (expression); !s.ok()) return s; \
  } while (false)

// Up to here every number of rows is planned for, a tenth of a microsecond each; beyond, powers of two and
// the last.
constexpr int64_t kEveryRow = 1 << 17;

// Stands for data that is not there yet: plans ask whether an operand is given, never what is in it.
const void* placeholder() { return reinterpret_cast<const void*>(uintptr_t{256}); }

DataType output_type(int32_t output, DataType z) {
  return output == kOutZ ? z : output == kOutIndex ? DataType::kINT32 : DataType::kFLOAT;
}

int64_t rows_of(const nvinfer1::Dims& z) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < z.nbDims; ++i) rows *= z.d[i];
  return rows;
}

// The most that any number of rows up to op.rows needs. A plan's need may jump where the variant changes, so
// that of the largest number of rows alone would not do.
template <class Op>
Status largest_workspace(Op op, const cuda::Device& device, size_t* bytes) {
  const int64_t most = std::max<int64_t>(op.rows, 1);
  *bytes = 0;
  const auto consider = [&](int64_t rows) -> Status {
    op.rows = rows;
    cuda::Plan plan;
    DACO_TRY(cuda::plan(op, device, &plan));
    *bytes = std::max(*bytes, plan.workspace_bytes);
    return {};
  };
  for (int64_t rows = 1; rows <= std::min(most, kEveryRow); ++rows) DACO_TRY(consider(rows));
  for (int64_t rows = 2 * kEveryRow; rows < most; rows *= 2) DACO_TRY(consider(rows));
  if (most > kEveryRow) DACO_TRY(consider(most));
  return {};
}

bool same_device(const cuda::Device& a, const cuda::Device& b) {
  return a.compute == b.compute && a.multiprocessors == b.multiprocessors &&
         a.shared_bytes == b.shared_bytes && a.l2_bytes == b.l2_bytes;
}

}  // namespace

template <class Op>
Plugin<Op>::Plugin(const Plugin& other)
    : attributes_(other.attributes_),
      layout_(other.layout_),
      inputs_(other.inputs_),
      built_on_(other.built_on_),
      running_on_(other.running_on_),
      device_status_(other.device_status_) {}

template <class Op>
Status Plugin<Op>::make(const nvinfer1::PluginFieldCollection* fields, Plugin** out) {
  const FieldReader reader(Spec<Op>::kName, fields);
  Op attributes;
  DACO_TRY(read(reader, &attributes));
  Layout layout = Layout::positional(Spec<Op>::kInput, Spec<Op>::kInputs);
  if (reader.has("operands")) {
    std::string names;
    DACO_TRY(reader.text("operands", &names));
    // A serialised positional layout is an empty text.
    if (!names.empty())
      DACO_TRY(Layout::parse(Spec<Op>::kName, names, Spec<Op>::kInput, Spec<Op>::kInputs, &layout));
  }
  auto* made = new Plugin(attributes, layout);
  if (reader.has("device")) {
    int64_t built_on[4] = {};
    if (Status s = reader.integers("device", built_on, 4); !s.ok()) {
      delete made;
      return s;
    }
    made->built_on_.compute = static_cast<int>(built_on[0]);
    made->built_on_.multiprocessors = static_cast<int>(built_on[1]);
    made->built_on_.shared_bytes = built_on[2];
    made->built_on_.l2_bytes = built_on[3];
  }
  *out = made;
  return {};
}

template <class Op>
nvinfer1::IPluginCapability* Plugin<Op>::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
  }
  return nullptr;
}

template <class Op>
nvinfer1::IPluginV3* Plugin<Op>::clone() noexcept {
  Plugin* made = nullptr;
  guarded([&] {
    made = new Plugin(*this);
    return Status{};
  });
  return made;
}

template <class Op>
Status Plugin<Op>::check_count(int32_t inputs, int32_t outputs) const {
  if (!layout_.accepts(inputs))
    return make_status(Code::kInvalidArgument,
                       "%s: got %d inputs; give all operands of the contract, or name the given ones in "
                       "attribute operands (%s)",
                       Spec<Op>::kName, inputs, layout_.names().empty() ? "absent" : layout_.names().c_str());
  if (outputs < 1 || outputs > Spec<Op>::kOutputs)
    return make_status(Code::kInvalidArgument, "%s: expected up to %d outputs, got %d", Spec<Op>::kName,
                       Spec<Op>::kOutputs, outputs);
  return {};
}

template <class Op>
Status Plugin<Op>::bind(Tensor const* in, void const* const* from, Op* op) const {
  adapters::Operand operands[Spec<Op>::kInputs];
  for (int32_t i = 0; i < inputs_; ++i) {
    adapters::Operand& o = operands[layout_.places()[i]];
    o.data = from != nullptr ? from[i] : placeholder();
    o.element = element_of(in[i].type);
    o.element_name = name_of(in[i].type);
    o.shape = in[i].dims.d;
    o.rank = static_cast<size_t>(std::max(in[i].dims.nbDims, 0));
  }
  *op = attributes_;
  return adapters::bind(operands, op);
}

template <class Op>
bool Plugin<Op>::same_sizes(const Op& a, const Op& b) {
  const Rows &x = a, &y = b;
  return x.rows == y.rows && x.dim == y.dim && x.atoms == y.atoms && x.policies == y.policies &&
         x.activation == y.activation && x.weight == y.weight;
}

template <class Op>
Status Plugin<Op>::plan_for(const Op& op) {
  if (planned_ && same_sizes(op, planned_for_)) return {};
  planned_ = false;
  DACO_TRY(device_status_);
  DACO_TRY(cuda::plan(op, running_on_, &plan_));
  if (built_on_.compute != 0 && !same_device(built_on_, running_on_)) {
    // The workspace was sized for another device. It was sized from this very function, so what it holds is
    // known, and running on with too little of it would corrupt memory.
    cuda::Plan reserved;
    DACO_TRY(cuda::plan(op, built_on_, &reserved));
    if (plan_.workspace_bytes > reserved.workspace_bytes)
      return make_status(
          Code::kWorkspace,
          "%s: the engine was built on a device of compute %d with %d multiprocessors and this "
          "one (%d, %d) needs more workspace; build the engine again here",
          Spec<Op>::kName, built_on_.compute, built_on_.multiprocessors, running_on_.compute,
          running_on_.multiprocessors);
  }
  planned_for_ = op;
  planned_ = true;
  return {};
}

template <class Op>
int32_t Plugin<Op>::configurePlugin(Ranged const* in, int32_t inputs, Ranged const*,
                                    int32_t outputs) noexcept {
  return guarded([&]() -> Status {
    DACO_TRY(check_count(inputs, outputs));
    inputs_ = inputs;
    std::vector<Tensor> largest(static_cast<size_t>(inputs));
    for (int32_t i = 0; i < inputs; ++i) {
      largest[static_cast<size_t>(i)] = in[i].desc;
      largest[static_cast<size_t>(i)].dims = in[i].max;
    }
    Op op;
    DACO_TRY(bind(largest.data(), nullptr, &op));
    // Without a device nothing can be planned, but a network can still be described.
    if (cuda::Device here; cuda::properties(-1, &here).ok()) built_on_ = here;
    return {};
  });
}

template <class Op>
int32_t Plugin<Op>::getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in,
                                       int32_t inputs) const noexcept {
  return guarded([&]() -> Status {
    DACO_TRY(check_count(inputs, outputs));
    for (int32_t i = 0; i < outputs; ++i) out[i] = output_type(i, in[0]);
    return {};
  });
}

template <class Op>
int32_t Plugin<Op>::getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t,
                                    DimsExprs* out, int32_t outputs,
                                    nvinfer1::IExprBuilder& builder) noexcept {
  return guarded([&]() -> Status {
    DACO_TRY(check_count(inputs, outputs));
    if (in[0].nbDims < 1)
      return make_status(Code::kInvalidArgument, "%s: z must have at least one axis", Spec<Op>::kName);
    const int32_t last = in[0].nbDims - 1;
    for (int32_t i = 0; i < outputs; ++i) {
      out[i] = in[0];
      if (i != kOutZ) out[i].d[last] = builder.constant(i == kOutDoses ? 2 : attributes_.k_out);
    }
    return {};
  });
}

template <class Op>
bool Plugin<Op>::supportsFormatCombination(int32_t position, Ranged const* tensors, int32_t inputs,
                                           int32_t outputs) noexcept {
  if (!layout_.accepts(inputs) || position < 0 || position >= inputs + outputs) return false;
  const nvinfer1::PluginTensorDesc& here = tensors[position].desc;
  if (here.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position >= inputs) return here.type == output_type(position - inputs, tensors[0].desc.type);
  const Kind kind = kind_of(position);
  if (!allows(kind, here.type)) return false;
  // The two big matrices have one type.
  for (int32_t i = 0; kind == Kind::kWeight && i < position; ++i)
    if (kind_of(i) == Kind::kWeight && tensors[i].desc.type != here.type) return false;
  return true;
}

template <class Op>
size_t Plugin<Op>::getWorkspaceSize(Ranged const* in, int32_t inputs, Ranged const*,
                                    int32_t outputs) const noexcept {
  size_t bytes = 0;
  guarded([&]() -> Status {
    DACO_TRY(check_count(inputs, outputs));
    Plugin sized(*this);
    sized.inputs_ = inputs;
    std::vector<Tensor> largest(static_cast<size_t>(inputs));
    for (int32_t i = 0; i < inputs; ++i) {
      largest[static_cast<size_t>(i)] = in[i].desc;
      largest[static_cast<size_t>(i)].dims = in[i].max;
    }
    Op op;
    DACO_TRY(sized.bind(largest.data(), nullptr, &op));
    op.rows = rows_of(in[0].max);
    cuda::Device here;
    DACO_TRY(cuda::properties(-1, &here));
    return largest_workspace(op, here, &bytes);
  });
  return bytes;
}

template <class Op>
char const* Plugin<Op>::getTimingCacheID() noexcept {
  const int32_t failed = guarded([&] {
    std::ostringstream text;
    text << kNamespace << '.' << Spec<Op>::kName << '.' << kVersion;
    FieldWriter fields;
    write(attributes_, &fields);
    const auto* all = fields.collection();
    for (int32_t i = 0; i < all->nbFields; ++i) {
      const nvinfer1::PluginField& field = all->fields[i];
      text << ';' << field.name << '=';
      for (int32_t j = 0; j < field.length; ++j) {
        if (field.type == nvinfer1::PluginFieldType::kCHAR)
          text << static_cast<const char*>(field.data)[j];
        else if (field.type == nvinfer1::PluginFieldType::kINT64)
          text << (j ? "," : "") << static_cast<const int64_t*>(field.data)[j];
        else
          text << (j ? "," : "") << static_cast<const float*>(field.data)[j];
      }
    }
    text << ";operands=" << layout_.names();
    description_ = text.str();
    return Status{};
  });
  return failed ? nullptr : description_.c_str();
}

template <class Op>
int32_t Plugin<Op>::onShapeChange(Tensor const* in, int32_t inputs, Tensor const*, int32_t outputs) noexcept {
  return guarded([&]() -> Status {
    DACO_TRY(check_count(inputs, outputs));
    inputs_ = inputs;
    planned_ = false;
    Op op;
    DACO_TRY(bind(in, nullptr, &op));
    if (op.rows == 0) return {};
    return plan_for(op);
  });
}

template <class Op>
int32_t Plugin<Op>::enqueue(Tensor const* in, Tensor const*, void const* const* from, void* const* to,
                            void* workspace, cudaStream_t stream) noexcept {
  return guarded([&]() -> Status {
    if (inputs_ == 0)
      return make_status(Code::kInvalidArgument, "%s: enqueue before onShapeChange", Spec<Op>::kName);
    Op op;
    DACO_TRY(bind(in, from, &op));
    if (op.rows == 0) return {};
    op.out = to[kOutZ];
    op.doses = static_cast<float*>(to[kOutDoses]);
    if (Spec<Op>::kOutputs > kOutIndex && op.k_out > 0) {
      op.support_index = static_cast<int32_t*>(to[kOutIndex]);
      op.support_value = static_cast<float*>(to[kOutValue]);
    }
    DACO_TRY(plan_for(op));
    return cuda::steer(op, plan_, workspace, stream);
  });
}

template <class Op>
nvinfer1::IPluginV3* Plugin<Op>::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  auto* made = static_cast<Plugin*>(clone());
  // A context belongs to the device that is current now. A failure is told by the first shape change, which
  // can refuse; this function cannot without losing the sentence.
  if (made != nullptr) made->device_status_ = cuda::properties(-1, &made->running_on_);
  return made;
}

template <class Op>
nvinfer1::PluginFieldCollection const* Plugin<Op>::getFieldsToSerialize() noexcept {
  const int32_t failed = guarded([&] {
    fields_.clear();
    write(attributes_, &fields_);
    fields_.text("operands", layout_.names());
    fields_.integers(
        "device", {built_on_.compute, built_on_.multiprocessors, built_on_.shared_bytes, built_on_.l2_bytes});
    return Status{};
  });
  return failed ? nullptr : fields_.collection();
}

template class Plugin<SteerSae>;
template class Plugin<SteerPursuit>;
template class Plugin<SteerAffine>;

}  // namespace daco::tensorrt
