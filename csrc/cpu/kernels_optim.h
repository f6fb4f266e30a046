// Optimizer steps over flat memory. The arithmetic is plain loops over arrays, which compilers make
// vectors of; the same bits on each instruction set.
#pragma once

namespace qkern::cpu {
namespace {

// In place where memory has the elements as floats already.
inline void adamw_floats(const AdamWScalars& from, std::int64_t n, const float* __restrict grad,
                         float* __restrict param, float* __restrict exp_avg,
                         float* __restrict exp_avg_sq) {
  const AdamWScalars scalars = from;  // in registers: stores might else change it
  for (std::int64_t i = 0; i < n; ++i) {
    adamw_element<PlainMath>(scalars, grad[i], param + i, exp_avg + i, exp_avg_sq + i);
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

// One of the moments of a block, as floats.
struct Moment {
  void* state;
  float* absmax;  // of 8-bit codes, else nullptr
  const float* map;
  const float* thresholds;
  float buffer[kStateBlockSize];

  float* load(std::int64_t at, std::int64_t n) {
    if (absmax == nullptr) return static_cast<float*>(state) + at;
    dequantize_8bit<float>(static_cast<const std::uint8_t*>(state) + at,
                           absmax + at / kStateBlockSize, map, BlockRange{n, kStateBlockSize, 0, 1},
                           buffer);
    return buffer;
  }

  void store(std::int64_t at, std::int64_t n) {
    if (absmax == nullptr) return;
    quantize_8bit<float>(buffer, BlockRange{n, kStateBlockSize, 0, 1}, thresholds,
                         static_cast<std::uint8_t*>(state) + at, absmax + at / kStateBlockSize);
  }
};

template <typename T>
void adamw_step(const AdamWArgs& args, const AdamWTensor& tensor, std::int64_t begin,
                std::int64_t end) {
  T* params = static_cast<T*>(tensor.param);
  const T* grads = static_cast<const T*>(tensor.grad);
  Moment exp_avg{
      tensor.exp_avg, tensor.exp_avg_absmax, kDynamicMapSigned, kDynamicThresholdsSigned, {}};
  Moment exp_avg_sq{tensor.exp_avg_sq,
                    tensor.exp_avg_sq_absmax,
                    kDynamicMapUnsigned,
                    kDynamicThresholdsUnsigned,
                    {}};
  for (std::int64_t at = begin; at < end; at += kStateBlockSize) {
    const std::int64_t n = min64(kStateBlockSize, end - at);
    float* m = exp_avg.load(at, n);
    float* v = exp_avg_sq.load(at, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      adamw_floats(args.scalars, n, grads + at, params + at, m, v);
    } else {
      float grad[kStateBlockSize], param[kStateBlockSize];
      convert_row(grads + at, n, grad);
      convert_row(params + at, n, param);
      adamw_floats(args.scalars, n, grad, param, m, v);
      const std::int64_t block = (tensor.first + at) / kStateBlockSize;
      store_params(param, n, args, block_seed(args.seed, tensor.index, block), params + at);
    }
    exp_avg.store(at, n);
    exp_avg_sq.store(at, n);
  }
}

}  // namespace
}  // namespace qkern::cpu
