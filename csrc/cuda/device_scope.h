// Makes a device the current one while an object lives, for hosts whose current device may be another than
// that of the tensors they pass.
#pragma once

namespace daco::cuda {

class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

}  // namespace daco::cuda
