// Optimizer steps over flat memory. The arithmetic is plain loops over arrays, which compilers make
// vectors of; the same bits on each instruction set.
#pragma once

#include <cstdint>

#include "kernels_elementwise.h"
#include "qkern/optim_math.h"
#include "simd.h"

namespace qkern::cpu {
namespace {

// In place where memory has the elements as floats already.
template <bool kCodes>
void adamw_floats(const AdamWFactors& from, std::int64_t n, const float* __restrict grad,
                  float* __restrict param, float* __restrict exp_avg,
                  float* __restrict exp_avg_sq) {
  const AdamWFactors factors = from;  // in registers: stores might else change it
  for (std::int64_t i = 0; i < n; ++i) {
    const float scaled = PlainMath::mul(grad[i], factors.grad_scale);
    const float g = kCodes ? bounded_gradient(scaled) : scaled;
    adamw_element<PlainMath, kCodes>(factors, g, param + i, exp_avg + i, exp_avg_sq + i);
  }
}

template <typename T>
void store_params(const float* values, std::int64_t n, const AdamWArgs&, std::uint32_t, T* to) {
  store_row(values, n, to);
}

inline void store_params(const float* values, std::int64_t n, const AdamWArgs& args,
                         std::uint32_t seed, BFloat16* to) {
  if (!args.stochastic_rounding) return store_row(values, n, to);
  for (std::int64_t i = 0; i < n; ++i) {
    to[i].bits = round_stochastically(values[i], hash_bits(seed + static_cast<std::uint32_t>(i)));
  }
}

// The codes of a block or less, as quantize_8bit gives them.
inline void encode_by_buckets(const BucketTable& table, float reciprocal, std::int64_t n,
                              const float* __restrict values, std::uint8_t* __restrict codes) {
  const std::uint32_t first = table.first;
  const int shift = table.shift;
  const std::uint32_t low_bits = (1u << shift) - 1u;
  std::uint32_t bits[kStateBlockSize], buckets[kStateBlockSize], words[kStateBlockSize];
  for (std::int64_t i = 0; i < n; ++i) {
    bits[i] = float_bits(values[i] * reciprocal);
    const std::uint32_t bucket = (bits[i] & 0x7fffffffu) >> shift;
    buckets[i] = (bucket < first ? 0u : bucket - first) + (bits[i] >> 31) * BucketTable::kBuckets;
  }
  for (std::int64_t i = n; i % Simd::kLanes != 0; ++i) buckets[i] = 0;
  for (std::int64_t i = 0; i < n; i += Simd::kLanes) {
    Simd::gather_words(table.words, buckets + i, words + i);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const bool next = (bits[i] & low_bits) > (words[i] & 0xffffffu);
    const std::uint32_t step = next ? 1u : 0u;
    codes[i] = static_cast<std::uint8_t>(
        (words[i] >> 24) + (static_cast<std::int32_t>(bits[i]) < 0 ? 0u - step : step));
  }
}

// One of the moments of a block, as floats.
struct Moment {
  void* state;
  float* absmax;  // of 8-bit codes, else nullptr
  const BucketTable& table;
  float buffer[kStateBlockSize];

  float* load(std::int64_t at, std::int64_t n) {
    if (absmax == nullptr) return static_cast<float*>(state) + at;
    dequantize_8bit<float>(static_cast<const std::uint8_t*>(state) + at,
                           absmax + at / kStateBlockSize, table.map,
                           BlockRange{n, kStateBlockSize, 0, 1}, buffer);
    return buffer;
  }

  void store(std::int64_t at, std::int64_t n) {
    if (absmax == nullptr) return;
    std::uint8_t* codes = static_cast<std::uint8_t*>(state) + at;
    float* scale = absmax + at / kStateBlockSize;
    *scale = block_absmax(buffer, n);
    const float reciprocal = block_reciprocal(*scale);
    if (float_bits(reciprocal) < kFloatInf) {
      encode_by_buckets(table, reciprocal, n, buffer, codes);
    } else {  // a NaN, or of a subnormal scale: t may be beyond the buckets
      quantize_8bit<float>(buffer, BlockRange{n, kStateBlockSize, 0, 1}, table.thresholds, codes,
                           scale);
    }
  }
};

template <typename T>
void adamw_step(const AdamWArgs& args, const BucketTable* tables, const AdamWTensor& tensor,
                std::int64_t begin, std::int64_t end) {
  const AdamWFactors& factors = *tensor.factors;
  if (factors.skip != 0.0f) return;
  T* params = static_cast<T*>(tensor.param);
  const T* grads = static_cast<const T*>(tensor.grad);
  const auto floats = tensor.exp_avg_absmax == nullptr ? adamw_floats<false> : adamw_floats<true>;
  Moment exp_avg{tensor.exp_avg, tensor.exp_avg_absmax, tables[0], {}};
  Moment exp_avg_sq{tensor.exp_avg_sq, tensor.exp_avg_sq_absmax, tables[1], {}};
  for (std::int64_t at = begin; at < end; at += kStateBlockSize) {
    const std::int64_t n = min64(kStateBlockSize, end - at);
    float* m = exp_avg.load(at, n);
    float* v = exp_avg_sq.load(at, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      floats(factors, n, grads + at, params + at, m, v);
    } else {
      float grad[kStateBlockSize], param[kStateBlockSize];
      convert_row(grads + at, n, grad);
      convert_row(params + at, n, param);
      floats(factors, n, grad, param, m, v);
      const std::int64_t block = (tensor.first + at) / kStateBlockSize;
      const std::uint64_t seed = step_seed(args.seed, factors.step);
      store_params(param, n, args, block_seed(seed, tensor.index, block), params + at);
    }
    exp_avg.store(at, n);
    exp_avg_sq.store(at, n);
  }
}

}  // namespace
}  // namespace qkern::cpu
