#pragma once

#include <cstdint>
#include <cstring>

#include "qkern/codes.h"

#if defined(__CUDACC__)
#define QKERN_MATH __host__ __device__ __forceinline__
#else
#define QKERN_MATH inline
#endif

// One element of an optimizer's step, for every backend. The same operations in the same order,
// each rounded once and none contracted, so that all backends give the same bits.
namespace qkern {

namespace {

// Plain operators: for compilers that are told not to contract them.
struct PlainMath {
  static float add(float a, float b) { return a + b; }
  static float sub(float a, float b) { return a - b; }
  static float mul(float a, float b) { return a * b; }
  static float div(float a, float b) { return a / b; }
  static float sqrt(float a) { return __builtin_sqrtf(a); }
};

// A finite gradient of kMaxGradient at most, so that its square is finite. By bits, which compilers
// make vectors of; an infinity and a NaN stay what they are.
QKERN_MATH float bounded_gradient(float grad) {
  constexpr std::int32_t kBound = 0x5f000000;
  constexpr std::int32_t kInfinity = 0x7f800000;
  static_assert(kMaxGradient == 0x1p+63f, "kBound has its bits");
  std::int32_t bits;
  std::memcpy(&bits, &grad, sizeof(bits));
  const std::int32_t magnitude = bits & 0x7fffffff;
  const bool beyond = (magnitude > kBound) & (magnitude < kInfinity);
  bits = beyond ? (bits ^ magnitude) | kBound : bits;
  std::memcpy(&grad, &bits, sizeof(grad));
  return grad;
}

// A gradient's share of the second moment. Where the square alone would be infinite it is
// multiplied the other way about, as torch does always. By a mask, for a choice would move the
// other product into a branch, and a loop with one is not made vectors of.
template <typename Math>
QKERN_MATH float square_share(const AdamWFactors& s, float g) {
  const float square = Math::mul(g, g);
  const float usual = Math::mul(square, s.beta2_complement);
  const float other = Math::mul(Math::mul(s.beta2_complement, g), g);
  std::int32_t square_bits, bits, other_bits;
  std::memcpy(&square_bits, &square, sizeof(square));
  std::memcpy(&bits, &usual, sizeof(usual));
  std::memcpy(&other_bits, &other, sizeof(other));
  const std::int32_t overflowed = -static_cast<std::int32_t>(square_bits == 0x7f800000);
  bits = (other_bits & overflowed) | (bits & ~overflowed);
  float share;
  std::memcpy(&share, &bits, sizeof(bits));
  return share;
}

// Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2:
// the decay comes before the update and does not pass through the moments. g is the gradient times
// grad_scale. kCodes: it is bounded, for an infinite moment would make its block of codes NaN.
template <typename Math, bool kCodes>
QKERN_MATH void adamw_element(const AdamWFactors& s, float g, float* param, float* exp_avg,
                              float* exp_avg_sq) {
  const float m = Math::add(*exp_avg, Math::mul(Math::sub(g, *exp_avg), s.beta1_complement));
  const float share =
      kCodes ? Math::mul(Math::mul(g, g), s.beta2_complement) : square_share<Math>(s, g);
  const float v = Math::add(Math::mul(*exp_avg_sq, s.beta2), share);
  const float denominator = Math::add(Math::mul(Math::sqrt(v), s.root_bias2_inverse), s.eps);
  const float update = Math::div(Math::mul(m, s.step_size), denominator);
  *param = Math::sub(Math::mul(*param, s.decay), update);
  *exp_avg = m;
  *exp_avg_sq = v;
}

// 32 bits that look random: Wellons' "lowbias32", a bijection with little bias.
QKERN_MATH std::uint32_t hash_bits(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Another seed for each step.
QKERN_MATH std::uint64_t step_seed(std::uint64_t seed, float step) {
  return seed << 31 ^ static_cast<std::uint64_t>(step);
}

// The seed of 256 neighbours, of which the i-th draws hash_bits(seed + i).
QKERN_MATH std::uint32_t block_seed(std::uint64_t seed, std::int64_t tensor, std::int64_t block) {
  const std::uint64_t place = static_cast<std::uint64_t>(block);
  std::uint32_t x = hash_bits(static_cast<std::uint32_t>(seed));
  x = hash_bits(x ^ static_cast<std::uint32_t>(seed >> 32));
  x = hash_bits(x ^ static_cast<std::uint32_t>(tensor));
  x = hash_bits(x ^ static_cast<std::uint32_t>(place));
  return hash_bits(x ^ static_cast<std::uint32_t>(place >> 32));
}

// bfloat16's bits of a value, up or down with the probability of being nearer: unbiased, where
// rounding to nearest drops every update below half a step.
QKERN_MATH std::uint16_t round_stochastically(float value, std::uint32_t random) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace
}  // namespace qkern
