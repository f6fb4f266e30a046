// What of DLPack (https://github.com/dmlc/dlpack, version 1) reading a tensor takes. Its C exchange
// interface gives a tensor's address, sizes and strides without a call of Python, and is the same
// for every version of torch that has it.
#pragma once

#include <cstdint>

namespace qkern::binding::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;
inline constexpr const char* kCapsuleName = "dlpack_exchange_api";
inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kCuda = 2;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

inline constexpr Device kCpuDevice = {kCpu, 0};

enum DataTypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

// The functions that are not called here are declared as addresses.
struct ExchangeApi {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  // Fills `out` with what belongs to the tensor `object`; -1 and a Python exception on failure.
  // Absent where the library does not offer it.
  int (*tensor_from_object)(void* object, Tensor* out);
  // The stream that the library's work on a device goes to; -1 and an exception on failure.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace qkern::binding::dlpack
