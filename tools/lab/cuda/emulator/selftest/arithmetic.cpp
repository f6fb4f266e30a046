// Arithmetic, and how a launch is laid out.
#include "selftest.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>

namespace selftest {
namespace {

// Around every point where the nearest 16-bit value changes: the point itself goes to the even
// neighbour, the floats beside it to the nearer one. `value` decodes without the emulator.
bool rounds_to_nearest(std::uint16_t infinity, const std::function<double(unsigned)>& value,
                       const std::function<std::uint16_t(float)>& convert) {
  for (unsigned low = 0; low < infinity; ++low) {
    const auto middle = static_cast<float>((value(low) + value(low + 1)) / 2);
    const unsigned even = low % 2 == 0 ? low : low + 1;
    for (const unsigned sign : {0u, 0x8000u}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      if (convert(s * middle) != (sign | even)) return false;
      if (convert(s * std::nextafterf(middle, 0.0f)) != (sign | low)) return false;
      if (convert(s * std::nextafterf(middle, INFINITY)) != (sign | (low + 1))) return false;
      if (convert(s * static_cast<float>(value(low))) != (sign | low)) return false;
    }
  }
  return convert(INFINITY) == infinity && (convert(NAN) & 0x7fff) > infinity;
}

double binary(unsigned bits, int mantissa_bits, int bias) {
  const unsigned mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits);
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

std::string conversions() {
  // One above the largest finite value is what infinity's neighbour would be: 2^16 and 2^128.
  bool right = rounds_to_nearest(
      0x7c00, [](unsigned bits) { return binary(bits, 10, 15); },
      [](float x) { return __float2half_rn(x).bits; });
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    right = right && __half2float({static_cast<std::uint16_t>(bits)}) == binary(bits, 10, 15);
  }
  right = right && std::isinf(__half2float({0xfc00})) && std::isnan(__half2float({0x7c01}));
  // bfloat16's last step, to infinity, has its middle beyond float32's range of midpoints checked
  // by `rounds_to_nearest` in float32: it is exact there, too (1.5 ulp of 8 bits).
  right = right && rounds_to_nearest(
                       0x7f80, [](unsigned bits) { return binary(bits, 7, 127); },
                       [](float x) { return __float2bfloat16_rn(x).bits; });
  right = right && std::signbit(__half2float(__float2half_rn(-0.0f)));
  return outcome(nullptr, right);
}

std::string byte_perm() {
  const bool right = __byte_perm(0x33221100, 0x77665544, 0x3210) == 0x33221100 &&
                     __byte_perm(0x33221100, 0x77665544, 0x7654) == 0x77665544 &&
                     __byte_perm(0x33221100, 0x77665544, 0x0246) == 0x00224466 &&
                     __byte_perm(0x80000000, 0x0000007f, 0xcb3b) == 0x00ff80ff;
  return outcome(nullptr, right);
}

// Differs from the two roundings asked for if anything fuses them.
std::string never_contracted() {
  volatile float a = 1.0f + 0x1p-12f;
  volatile float c = -1.0f - 0x1p-11f;
  return outcome(nullptr, __fadd_rn(__fmul_rn(a, a), c) == 0.0f && __fmaf_rn(a, a, c) == 0x1p-24f &&
                              __fsqrt_rn(a) == 1.0f + 0x1p-13f);
}

std::string grids() {
  bool right = true;
  for (const auto& [grid, block] :
       {std::pair{dim3(3, 2, 2), dim3(5, 3, 7)}, std::pair{dim3(1), dim3(1024)},
        std::pair{dim3(70000), dim3(1)}}) {
    const std::size_t threads = std::size_t{block.x} * block.y * block.z;
    const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
    Buffer<int> seen(threads * blocks);
    const char* failure = emulator::launch(grid, block, 0, [&] {
      const std::size_t b =
          blockIdx.x + gridDim.x * (blockIdx.y + std::size_t{gridDim.y} * blockIdx.z);
      const std::size_t t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      ++seen[b * threads + t];
    });
    if (failure != nullptr) return outcome(failure, false);
    for (std::size_t i = 0; i < threads * blocks; ++i) right = right && seen[i] == 1;
  }
  return outcome(nullptr, right);
}

std::string launch_limits() {
  const auto refused = [](dim3 grid, dim3 block, std::size_t shared) {
    return emulator::launch(grid, block, shared, [] {}) != nullptr;
  };
  return outcome(nullptr, refused(dim3(1), dim3(1025), 0) && refused(dim3(0), dim3(1), 0) &&
                              refused(dim3(1, 65536), dim3(1), 0) && refused(dim3(1), dim3(0), 0) &&
                              refused(dim3(1), dim3(1), 228 << 10) &&
                              !refused(dim3(1), dim3(1024), 64 << 10));
}

}  // namespace

Tests arithmetic() {
  return {
      {"conversions", conversions},           {"byte_perm", byte_perm},
      {"never_contracted", never_contracted}, {"grids", grids},
      {"launch_limits", launch_limits},
  };
}

}  // namespace selftest
