#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#include "cuda_emulator.h"
#include "cuda_emulator_ptx.h"
#include "cuda_emulator_ptx_hopper.h"

// What the files of the test program share.
namespace selftest {

using qkern::BFloat16;
using qkern::Float16;
namespace cuda = qkern::cuda;
namespace emulator = qkern::cuda::emulator;

inline constexpr unsigned kAll = 0xffffffffu;

inline std::string outcome(const char* failure, bool right) {
  if (failure != nullptr) return std::string("failed: ") + failure;
  return right ? "ok" : "wrong: result";
}

// Exactly as long as asked for, so that AddressSanitizer knows where it ends; 16-aligned.
template <typename T>
struct Buffer {
  std::unique_ptr<T[], decltype(&std::free)> data;
  std::size_t size;
  explicit Buffer(std::size_t n, T value = T{})
      : data(static_cast<T*>(std::malloc(n * sizeof(T))), &std::free), size(n) {
    for (std::size_t i = 0; i < n; ++i) data[i] = value;
  }
  T* get() { return data.get(); }
  T& operator[](std::size_t i) { return data[i]; }
};

inline Buffer<float> iota(std::size_t n) {
  Buffer<float> buffer(n);
  for (std::size_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(i);
  return buffer;
}

template <typename T>
std::uint16_t encode(float x) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  return std::is_same_v<T, Float16> ? __float2half_rn(x).bits : __float2bfloat16_rn(x).bits;
}

// Whether a launch of two blocks goes through, whatever it computes.
inline std::string run(unsigned threads, const std::function<void()>& body,
                       std::size_t shared = 0) {
  return outcome(emulator::launch(dim3(2), dim3(threads), shared, body), true);
}

inline constexpr unsigned kThreads = 128;
using Line = float[kThreads];

// Tests by name; each gives what it found, for the program to print.
using Tests = std::map<std::string, std::function<std::string()>>;
Tests barriers();
Tests bounds();
Tests copies();
Tests warpgroups();
Tests warps();
Tests arithmetic();

}  // namespace selftest
