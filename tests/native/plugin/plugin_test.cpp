// Drives every creator of the plugin library through what TensorRT does, without TensorRT and without a GPU.
// usage: plugin_test LIBRARY
#include <cuda_runtime_api.h>

#include "../check.h"
#include "host.h"

// TensorRT's library says its version; so does this host, which is built on the headers of one.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() { return NV_TENSORRT_VERSION; }

namespace {

using namespace host;  // NOLINT: the names of a small test

Library* library = nullptr;

constexpr int64_t kB = 2, kS = 3, kD = 64, kM = 48, kP = 3, kR = 4;
constexpr int32_t kOut = 5;

Fields sae_fields() {
  Fields f;
  f.text("coder", "topk").integer("k", 8).integer("k_out", kOut);
  return f;
}

std::vector<Shape> sae_inputs(DataType z, DataType weight) {
  return {{z, {kB, kS, kD}},
          {DataType::kINT32, {kB, kS}},
          {weight, {kM, kD}},
          {DataType::kFLOAT, {kM}},
          {weight, {kM, kD}},
          {DataType::kFLOAT, {kM}},
          {DataType::kFLOAT, {kP, kM}},
          {DataType::kFLOAT, {kP, kM}},
          {DataType::kBOOL, {kP, kM}},
          {DataType::kFLOAT, {kP, kD}},
          {DataType::kFLOAT, {kP, 4}}};
}

Fields pursuit_fields(const char* operands = nullptr) {
  Fields f;
  f.text("coder", "omp").text("sign", "positive").integer("k", 8).integer("k_out", kOut);
  f.numbers("tol", {0.f}).numbers("tau", {0.95f}).numbers("alpha", {0.05f});
  if (operands != nullptr) f.text("operands", operands);
  return f;
}

constexpr const char* kCompact = "z,slots,analysis,bias,gram,atoms,gain,undesirable,shift,limits";

std::vector<Shape> compact_pursuit_inputs(DataType z, DataType weight, DataType gram) {
  return {{z, {kB, kS, kD}},
          {DataType::kINT32, {kB, kS}},
          {weight, {kM, kD}},
          {DataType::kFLOAT, {kM}},
          {gram, {kM, kM}},
          {weight, {kM, kD}},
          {DataType::kFLOAT, {kP, kM}},
          {DataType::kBOOL, {kP, kM}},
          {DataType::kFLOAT, {kP, kD}},
          {DataType::kFLOAT, {kP, 4}}};
}

Fields affine_fields() {
  Fields f;
  f.text("phi", "clamp").numbers("clamp", {-1.f, 1.f});
  return f;
}

std::vector<Shape> affine_inputs(DataType z, DataType weight) {
  return {{z, {kB, kS, kD}},          {DataType::kINT32, {kB, kS}},
          {weight, {kP, kR, kD}},     {DataType::kFLOAT, {kP, kR}},
          {weight, {kP, kD, kR}},     {DataType::kFLOAT, {kP, kD}},
          {DataType::kFLOAT, {kP, 4}}};
}

bool gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// All of a node's life; on a machine without a driver the two calls that need one must say so.
void drive(const char* name, Fields fields, const std::vector<Shape>& inputs, size_t outputs) {
  Driven node(library->creator(name), fields.collection(), inputs);
  if (!node.failed.empty()) {
    check::fail(__FILE__, __LINE__, std::string(name) + ": " + node.failed + ": " + library->logger.last());
    return;
  }
  CHECK(node.outputs.size() == outputs);
  CHECK(node.outputs[0].type == inputs[0].type && node.outputs[0].sizes == inputs[0].sizes);
  CHECK(node.outputs[1].type == DataType::kFLOAT);
  CHECK((node.outputs[1].sizes == std::vector<int64_t>{kB, kS, 2}));
  if (outputs > 2) {
    CHECK(node.outputs[2].type == DataType::kINT32 && node.outputs[3].type == DataType::kFLOAT);
    CHECK((node.outputs[2].sizes == std::vector<int64_t>{kB, kS, kOut}));
    CHECK(node.outputs[3].sizes == node.outputs[2].sizes);
  }
  CHECK(std::strcmp(core(node.attached.get())->getPluginName(), name) == 0);
  CHECK(std::strcmp(core(node.attached.get())->getPluginNamespace(), "ai.daco") == 0);
  // Serialising and loading changes nothing that decides what runs.
  const std::string id = build(node.built.get())->getTimingCacheID();
  CHECK(id == build(node.loaded.get())->getTimingCacheID());
  CHECK(id.find(name) != std::string::npos);
  if (gpu()) {
    CHECK(node.shape_change() == 0);
    return;
  }
  CHECK(node.workspace == 0 && library->logger.heard("35"));
  library->logger.said.clear();
  CHECK(node.shape_change() != 0);
  CHECK(library->logger.heard("35"));
  library->logger.said.clear();
  const std::vector<void const*> from(inputs.size(), node.outputs.data());
  const std::vector<void*> to(outputs, node.outputs.data());
  CHECK(node.enqueue(from.data(), to.data(), nullptr, nullptr) != 0);
  CHECK(library->logger.heard("35"));
}

TEST(three_creators_with_their_names) {
  CHECK(library->creators.size() == 3);
  for (const char* name : {"SteerSae", "SteerPursuit", "SteerAffine"}) {
    auto* creator = library->creator(name);
    CHECK(std::strcmp(creator->getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(creator->getPluginNamespace(), "ai.daco") == 0);
    CHECK(creator->getFieldNames()->nbFields > 0);
  }
}

TEST(sae_lives_in_every_type) {
  for (const DataType z : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    for (const DataType weight : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
      drive("SteerSae", sae_fields(), sae_inputs(z, weight), 4);
}

TEST(sae_takes_quantised_weights_with_scales) {
  for (const DataType weight : {DataType::kINT8, DataType::kFP8}) {
    auto inputs = sae_inputs(DataType::kHALF, weight);
    inputs.push_back({DataType::kFLOAT, {2, kM}});
    drive("SteerSae", sae_fields(), inputs, 4);
  }
}

TEST(pursuit_lives_with_named_operands) {
  for (const DataType z : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    for (const DataType gram : {DataType::kFLOAT, DataType::kHALF})
      drive("SteerPursuit", pursuit_fields(kCompact), compact_pursuit_inputs(z, DataType::kHALF, gram), 4);
}

TEST(affine_lives) {
  for (const DataType z : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    drive("SteerAffine", affine_fields(), affine_inputs(z, DataType::kHALF), 2);
}

// ---- refusals: null or a number, and a sentence, never an exception

bool refused(const char* op, Fields fields, const char* sentence) {
  library->logger.said.clear();
  const bool none =
      library->creator(op)->createPlugin("n", fields.collection(), TensorRTPhase::kBUILD) == nullptr;
  if (!library->logger.heard(sentence))
    check::fail(__FILE__, __LINE__, "said '" + library->logger.last() + "', not '" + sentence + "'");
  return none;
}

TEST(bad_fields_are_refused_with_a_sentence) {
  Fields missing;
  missing.text("coder", "topk").integer("k", 8);
  CHECK(refused("SteerSae", std::move(missing), "attribute k_out must be an integer, got none"));
  Fields coder;
  coder.text("coder", "nope").integer("k", 8).integer("k_out", 0);
  CHECK(refused("SteerSae", std::move(coder), "coder must be one of topk, relu, jumprelu, none, got 'nope'"));
  Fields k;
  k.text("coder", "topk").integer("k", 0).integer("k_out", 0);
  CHECK(refused("SteerSae", std::move(k), "k must be at least 1, got 0"));
  Fields kind;
  kind.integer("coder", 1).integer("k", 8).integer("k_out", 0);
  CHECK(refused("SteerSae", std::move(kind), "attribute coder must be a text"));
  CHECK(refused("SteerPursuit", pursuit_fields("z,slots,bees"), "names 'bees', which is no operand"));
  CHECK(refused("SteerPursuit", pursuit_fields("z,slots,z"), "names z twice"));
  CHECK(refused("SteerPursuit", pursuit_fields("slots,z"), "must begin with z"));
  CHECK(refused("SteerPursuit", pursuit_fields("z,slots,analysis"), "leaves out bias, which is required"));
  Fields clamp;
  clamp.text("phi", "clamp");
  CHECK(refused("SteerAffine", std::move(clamp), "attribute clamp must be two numbers, got none"));
  CHECK(library->creator("SteerSae")->createPlugin("n", nullptr, TensorRTPhase::kBUILD) == nullptr);
}

TEST(wrong_numbers_of_inputs_are_refused) {
  Fields fields = pursuit_fields(kCompact);
  std::unique_ptr<IPluginV3> plugin(
      library->creator("SteerPursuit")->createPlugin("n", fields.collection(), TensorRTPhase::kBUILD));
  DataType in[12] = {}, out[4];
  library->logger.said.clear();
  CHECK(build(plugin.get())->getOutputDataTypes(out, 4, in, 9) != 0);
  CHECK(library->logger.heard("got 9 inputs"));
  CHECK(build(plugin.get())->getOutputDataTypes(out, 4, in, 10) == 0);
}

TEST(wrong_shapes_are_refused_when_configured) {
  auto inputs = sae_inputs(DataType::kHALF, DataType::kHALF);
  inputs[3].sizes = {kM + 1};
  Fields fields = sae_fields();
  library->logger.said.clear();
  Driven node(library->creator("SteerSae"), fields.collection(), inputs);
  CHECK(node.failed == "configurePlugin");
  CHECK(library->logger.heard("enc_bias must have shape (m,) with m=48, got (49,)"));
}

TEST(format_negotiation_looks_back_only) {
  Fields fields = sae_fields();
  std::unique_ptr<IPluginV3> plugin(
      library->creator("SteerSae")->createPlugin("n", fields.collection(), TensorRTPhase::kBUILD));
  const auto inputs = sae_inputs(DataType::kHALF, DataType::kHALF);
  std::vector<DynamicPluginTensorDesc> d;
  for (const auto& s : inputs) d.push_back(ranged(s));
  d.push_back(ranged(inputs[0]));
  d.push_back(ranged({DataType::kFLOAT, {kB, kS, 2}}));
  d.push_back(ranged({DataType::kINT32, {kB, kS, kOut}}));
  d.push_back(ranged({DataType::kFLOAT, {kB, kS, kOut}}));
  const auto count = static_cast<int32_t>(inputs.size());
  const auto ok = [&](int32_t at) {
    return build(plugin.get())->supportsFormatCombination(at, d.data(), count, 4);
  };
  for (int32_t i = 0; i < count + 4; ++i) CHECK(ok(i));
  d[4].desc.type = DataType::kFLOAT;  // dec unlike enc
  CHECK(ok(2) && !ok(4));
  d[4].desc.type = DataType::kHALF;
  d[0].desc.format = TensorFormat::kCHW32;
  CHECK(!ok(0));
  d[0].desc.format = TensorFormat::kLINEAR;
  d[1].desc.type = DataType::kINT64;
  CHECK(!ok(1));
  d[static_cast<size_t>(count)].desc.type = DataType::kFLOAT;  // z' unlike z
  CHECK(!ok(count));
  CHECK(!ok(-1) && !ok(count + 4));
}

TEST(no_rows_need_no_device) {
  auto inputs = sae_inputs(DataType::kHALF, DataType::kHALF);
  Fields fields = sae_fields();
  Driven node(library->creator("SteerSae"), fields.collection(), inputs);
  node.inputs[0].sizes = {kB, 0, kD};
  node.inputs[1].sizes = {kB, 0};
  CHECK(node.shape_change() == 0);
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) return std::fprintf(stderr, "usage: plugin_test LIBRARY\n"), 2;
  try {
    Library loaded(words[1]);
    library = &loaded;
    std::printf("%s\n", gpu() ? "on a GPU" : "without a GPU");
    return check::run_all();
  } catch (const std::exception& e) {
    return std::fprintf(stderr, "%s: %s\n", words[1], e.what()), 2;
  }
}
