// Plugin fields: attributes in when a plugin is created, the same attributes out when it is serialised.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/status.h"

namespace daco::tensorrt {

// Reads a collection that the ONNX parser, a user or a serialised engine made. The parser delivers integers
// as int32 and floats as float; a program may give int64 and double just as well.
class FieldReader {
 public:
  FieldReader(const char* op, const nvinfer1::PluginFieldCollection* fields) : op_(op), fields_(fields) {}

  // Refuse a field that is missing or of another kind.
  Status text(const char* name, std::string* out) const;
  Status integer(const char* name, int64_t* out) const;
  // Exactly `count` int64, as FieldWriter::integers() leaves them.
  Status integers(const char* name, int64_t* out, int32_t count) const;
  Status number(const char* name, float* out) const;
  // Exactly `count` of them.
  Status numbers(const char* name, float* out, int32_t count) const;

  bool has(const char* name) const { return find(name) != nullptr; }

 private:
  const nvinfer1::PluginField* find(const char* name) const;
  Status refuse(const char* name, const char* expected) const;

  const char* op_;
  const nvinfer1::PluginFieldCollection* fields_;
};

// Owns what a collection points at; valid until the next clear() or the writer's end.
class FieldWriter {
 public:
  void clear();
  void text(const char* name, const std::string& value);
  void integer(const char* name, int64_t value);
  void integers(const char* name, const std::vector<int64_t>& values);
  void numbers(const char* name, const std::vector<float>& values);
  // A field by name and type alone: how a creator lists what it takes.
  void declare(const char* name, nvinfer1::PluginFieldType type);

  const nvinfer1::PluginFieldCollection* collection();

 private:
  // Deques: what is pointed at must not move while more is added.
  std::deque<std::string> texts_;
  std::deque<std::vector<int64_t>> integers_;
  std::deque<std::vector<float>> numbers_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace daco::tensorrt
