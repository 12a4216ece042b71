#include "adapters/tensorrt/fields.h"

#include <cstring>

namespace daco::tensorrt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const PluginField* FieldReader::find(const char* name) const {
  if (fields_ == nullptr || fields_->fields == nullptr) return nullptr;
  for (int32_t i = 0; i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (field.name != nullptr && std::strcmp(field.name, name) == 0 && field.data != nullptr) return &field;
  }
  return nullptr;
}

Status FieldReader::refuse(const char* name, const char* expected) const {
  const PluginField* field = find(name);
  if (field == nullptr)
    return make_status(Code::kInvalidArgument, "%s: attribute %s must be %s, got none", op_, name, expected);
  return make_status(Code::kInvalidArgument,
                     "%s: attribute %s must be %s, got %d value(s) of plugin field type %d", op_, name,
                     expected, field->length, static_cast<int>(field->type));
}

Status FieldReader::text(const char* name, std::string* out) const {
  const PluginField* field = find(name);
  if (field == nullptr || field->type != PluginFieldType::kCHAR || field->length < 0)
    return refuse(name, "a text");
  // Whether the closing zero is counted depends on who made the field.
  const auto* start = static_cast<const char*>(field->data);
  out->assign(start, strnlen(start, static_cast<size_t>(field->length)));
  return {};
}

Status FieldReader::integer(const char* name, int64_t* out) const {
  const PluginField* field = find(name);
  if (field != nullptr && field->length == 1 && field->type == PluginFieldType::kINT32) {
    int32_t narrow = 0;
    std::memcpy(&narrow, field->data, sizeof(narrow));
    *out = narrow;
    return {};
  }
  if (field != nullptr && field->length == 1 && field->type == PluginFieldType::kINT64) {
    std::memcpy(out, field->data, sizeof(*out));
    return {};
  }
  return refuse(name, "an integer");
}

Status FieldReader::integers(const char* name, int64_t* out, int32_t count) const {
  const PluginField* field = find(name);
  if (field == nullptr || field->type != PluginFieldType::kINT64 || field->length != count)
    return refuse(name, "a list of integers of this library");
  std::memcpy(out, field->data, sizeof(*out) * static_cast<size_t>(count));
  return {};
}

Status FieldReader::number(const char* name, float* out) const { return numbers(name, out, 1); }

Status FieldReader::numbers(const char* name, float* out, int32_t count) const {
  const PluginField* field = find(name);
  if (field != nullptr && field->length == count && field->type == PluginFieldType::kFLOAT32) {
    std::memcpy(out, field->data, sizeof(float) * static_cast<size_t>(count));
    return {};
  }
  if (field != nullptr && field->length == count && field->type == PluginFieldType::kFLOAT64) {
    for (int32_t i = 0; i < count; ++i) {
      double wide = 0;
      std::memcpy(&wide, static_cast<const double*>(field->data) + i, sizeof(wide));
      out[i] = static_cast<float>(wide);
    }
    return {};
  }
  return refuse(name, count == 1 ? "a number" : "two numbers");
}

void FieldWriter::clear() {
  texts_.clear();
  integers_.clear();
  numbers_.clear();
  fields_.clear();
}

void FieldWriter::text(const char* name, const std::string& value) {
  texts_.push_back(value);
  const std::string& kept = texts_.back();
  fields_.emplace_back(name, kept.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(kept.size()));
}

void FieldWriter::integer(const char* name, int64_t value) { integers(name, {value}); }

void FieldWriter::integers(const char* name, const std::vector<int64_t>& values) {
  integers_.push_back(values);
  const auto& kept = integers_.back();
  fields_.emplace_back(name, kept.data(), PluginFieldType::kINT64, static_cast<int32_t>(kept.size()));
}

void FieldWriter::numbers(const char* name, const std::vector<float>& values) {
  numbers_.push_back(values);
  const auto& kept = numbers_.back();
  fields_.emplace_back(name, kept.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(kept.size()));
}

void FieldWriter::declare(const char* name, PluginFieldType type) {
  fields_.emplace_back(name, nullptr, type, 1);
}

const nvinfer1::PluginFieldCollection* FieldWriter::collection() {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

}  // namespace daco::tensorrt
