// Runs one node on the GPU as an engine would: fields and inputs from a folder, outputs into it. Outputs and
// workspace hold garbage before, and a captured graph is replayed, which must give the same bits.
// usage: plugin_run LIBRARY FOLDER
// FOLDER/node.txt has a line each: `op NAME`, `text NAME VALUE`, `int NAME VALUE`, `floats NAME COUNT
// VALUES…`, `input TYPE RANK SIZES…` with the data of the n-th in n.in. The n-th output is written to n.out.
// Exit code 3: no GPU.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>

#include "host.h"

extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() { return NV_TENSORRT_VERSION; }

namespace {

using namespace host;  // NOLINT: the names of a small program

constexpr unsigned char kPoison = 0xcd;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

DataType type_named(const std::string& name) {
  if (name == "fp32") return DataType::kFLOAT;
  if (name == "fp16") return DataType::kHALF;
  if (name == "bf16") return DataType::kBF16;
  if (name == "int32") return DataType::kINT32;
  if (name == "int8") return DataType::kINT8;
  if (name == "fp8") return DataType::kFP8;
  if (name == "bool") return DataType::kBOOL;
  throw std::runtime_error("no such type: " + name);
}

size_t bytes_of(const Shape& shape) {
  size_t n = shape.type == DataType::kFLOAT || shape.type == DataType::kINT32 ? 4
             : shape.type == DataType::kHALF || shape.type == DataType::kBF16 ? 2
                                                                              : 1;
  for (const int64_t size : shape.sizes) n *= static_cast<size_t>(size);
  return n;
}

struct Node {
  std::string op;
  Fields fields;
  std::vector<Shape> inputs;
};

Node read_node(const std::string& path) {
  std::ifstream file(path);
  Node node;
  // Field names must outlive the fields.
  static std::deque<std::string> names;
  for (std::string kind; file >> kind;) {
    if (kind == "op") {
      file >> node.op;
    } else if (kind == "input") {
      std::string type;
      size_t rank = 0;
      file >> type >> rank;
      Shape shape{type_named(type), std::vector<int64_t>(rank)};
      for (auto& size : shape.sizes) file >> size;
      node.inputs.push_back(shape);
    } else {
      file >> names.emplace_back();
      if (kind == "text") {
        std::string value;
        file >> value;
        node.fields.text(names.back().c_str(), value);
      } else if (kind == "int") {
        int32_t value = 0;
        file >> value;
        node.fields.integer(names.back().c_str(), value);
      } else if (kind == "floats") {
        size_t count = 0;
        file >> count;
        std::vector<float> values(count);
        for (float& value : values) file >> value;
        node.fields.numbers(names.back().c_str(), values);
      } else {
        throw std::runtime_error("node.txt: what is " + kind);
      }
    }
  }
  return node;
}

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, bytes ? bytes : 1), "cudaMalloc");
    poison();
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void poison() { check(cudaMemset(data_, kPoison, bytes_), "cudaMemset"); }
  void fill(const std::vector<char>& from) {
    if (from.size() != bytes_) throw std::runtime_error("an input file has another size");
    check(cudaMemcpy(data_, from.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<char> read() const {
    std::vector<char> to(bytes_);
    check(cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

int run(const char* path, const std::string& folder) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return std::puts("no GPU"), 3;
  Library library(path);
  Node node = read_node(folder + "/node.txt");
  Driven driven(library.creator(node.op), node.fields.collection(), node.inputs);
  if (!driven.failed.empty()) throw std::runtime_error(driven.failed + ": " + library.logger.last());
  if (driven.shape_change() != 0) throw std::runtime_error("onShapeChange: " + library.logger.last());

  std::deque<Buffer> inputs, outputs;
  std::vector<void const*> from;
  std::vector<void*> to;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    std::ifstream file(folder + "/" + std::to_string(i) + ".in", std::ios::binary);
    const std::vector<char> data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    inputs.emplace_back(bytes_of(node.inputs[i])).fill(data);
    from.push_back(inputs.back().data());
  }
  for (const Shape& shape : driven.outputs) to.push_back(outputs.emplace_back(bytes_of(shape)).data());
  Buffer scratch(driven.workspace);

  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaDeviceSynchronize(), "poisoning");
  const auto enqueue = [&] {
    if (driven.enqueue(from.data(), to.data(), scratch.data(), stream) != 0)
      throw std::runtime_error("enqueue: " + library.logger.last());
  };
  enqueue();
  check(cudaStreamSynchronize(stream), "the kernels");
  std::vector<std::vector<char>> first;
  for (const Buffer& b : outputs) first.push_back(b.read());

  for (Buffer& b : outputs) b.poison();
  scratch.poison();
  check(cudaDeviceSynchronize(), "poisoning");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  enqueue();
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
  check(cudaStreamSynchronize(stream), "the replay");
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].read() != first[i])
      throw std::runtime_error("output " + std::to_string(i) + " of the replayed graph differs");
    std::ofstream(folder + "/" + std::to_string(i) + ".out", std::ios::binary)
        .write(first[i].data(), static_cast<std::streamsize>(first[i].size()));
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::printf("%s: workspace %zu bytes, a replayed graph gives the same bits\n", node.op.c_str(),
              driven.workspace);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return std::fprintf(stderr, "usage: plugin_run LIBRARY FOLDER\n"), 2;
  try {
    return run(words[1], words[2]);
  } catch (const std::exception& e) {
    return std::fprintf(stderr, "%s\n", e.what()), 1;
  }
}
