// How integers become the arguments of an op, whoever passes them: Python, for the CPU and for
// CUDA, or another process (the emulator of AArch64). Knows nothing of Python.
//
// Pointers arrive as addresses (0 = absent) that qkern/backends/_args.py took from checked tensors;
// sizes and strides are in elements. A list is its length and then its items, a tuple its items,
// None is kNone. (tensors.cpp reads tensors themselves.)
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "qkern/codes.h"
#include "qkern/ops.h"

namespace qkern::binding {

using Size = std::int64_t;

inline constexpr Size kNone = std::numeric_limits<Size>::min();

// What the Python functions raise as a ValueError.
inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

inline bool is_block_size(Size size) {
  return size >= kMinBlockSize && size <= kMaxBlockSize && (size & (size - 1)) == 0;
}

// The values of one call, each read once and in order.
class Arguments {
 public:
  explicit Arguments(const std::vector<Size>& values) : values_(values) {}

  // Throws std::length_error where too few were passed, and end() where too many were.
  Size value() {
    if (next_ == values_.size()) throw std::length_error("got too few arguments");
    return values_[next_++];
  }
  void end() const {
    if (next_ != values_.size()) throw std::length_error("got too many arguments");
  }

  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value()));
  }

  Size size() {
    const Size size = value();
    require(size >= 0, "sizes: take 0 and above");
    return size;
  }

  bool flag() { return value() != 0; }

  // A number below `count`; `numbers` names them all.
  int one_of(int count, const char* what, const char* numbers) {
    const Size number = value();
    if (number < 0 || number >= count) {
      throw std::invalid_argument(std::string(what) + ": takes " + numbers);
    }
    return static_cast<int>(number);
  }

  DType dtype() { return static_cast<DType>(one_of(kDTypes, "dtype", kDTypeNumbers)); }

  int num_threads() {
    const Size number = value();
    require(number >= 1 && number <= INT_MAX, "num_threads: takes 1 and above");
    return static_cast<int>(number);
  }

  Size block_size() {
    const Size size = value();
    require(is_block_size(size), "block_size: takes a power of two from 32 to 4096");
    return size;
  }

  Codebook codebook() {
    const int format = one_of(kFormats, "format_id", kFormatNumbers);
    const auto* values = pointer<const float>();
    require(format != kFormatCustom || values != nullptr, "codebook: absent for format custom");
    return {format, values};
  }

  // The caller adds the shape.
  Weight4bit weight() {
    Weight4bit weight;
    weight.packed = pointer<const std::uint8_t>();
    weight.absmax = pointer<const void>();
    weight.nested_absmax = pointer<const float>();
    weight.nested_offset = pointer<const float>();
    require((weight.nested_absmax == nullptr) == (weight.nested_offset == nullptr),
            "nested_absmax and nested_offset: take both or neither");
    weight.codes = codebook();
    weight.block_size = block_size();
    return weight;
  }

 private:
  const std::vector<Size>& values_;
  std::size_t next_ = 0;
};

// The arguments of each op, up to what says where it runs.

inline Quantize4bitArgs read_quantize_4bit(Arguments& from) {
  Quantize4bitArgs args;
  args.x = from.pointer<const void>();
  args.x_dtype = from.dtype();
  args.numel = from.size();
  args.codes = from.codebook();
  args.block_size = from.block_size();
  args.packed = from.pointer<std::uint8_t>();
  args.absmax = from.pointer<float>();
  return args;
}

inline Dequantize4bitArgs read_dequantize_4bit(Arguments& from) {
  Dequantize4bitArgs args;
  args.weight = from.weight();
  args.weight.rows = 1;
  args.weight.cols = from.size();
  args.out = from.pointer<void>();
  args.out_dtype = from.dtype();
  return args;
}

inline Quantize8bitArgs read_quantize_8bit(Arguments& from) {
  Quantize8bitArgs args;
  args.x = from.pointer<const void>();
  args.x_dtype = from.dtype();
  args.numel = from.size();
  args.map = from.pointer<const float>();
  args.block_size = from.block_size();
  args.codes = from.pointer<std::uint8_t>();
  args.absmax = from.pointer<float>();
  return args;
}

inline Dequantize8bitArgs read_dequantize_8bit(Arguments& from) {
  Dequantize8bitArgs args;
  args.codes = from.pointer<const std::uint8_t>();
  args.absmax = from.pointer<const float>();
  args.map = from.pointer<const float>();
  args.block_size = from.block_size();
  args.numel = from.size();
  args.out = from.pointer<void>();
  args.out_dtype = from.dtype();
  return args;
}

inline QuantizeAbsmaxArgs read_quantize_absmax(Arguments& from) {
  QuantizeAbsmaxArgs args;
  args.absmax = from.pointer<const float>();
  args.numel = from.size();
  args.codes = from.pointer<std::uint8_t>();
  args.nested_absmax = from.pointer<float>();
  args.nested_offset = from.pointer<float>();
  return args;
}

template <bool kHasBias>
Linear4bitArgs read_matmul(Arguments& from) {
  Linear4bitArgs args;
  args.x = from.pointer<const void>();
  args.dtype = from.dtype();
  args.m = from.size();
  args.x_row_stride = from.size();
  args.weight = from.weight();
  args.weight.rows = from.size();
  args.weight.cols = from.size();
  if (kHasBias) args.bias = from.pointer<const void>();
  args.y = from.pointer<void>();
  args.batch_invariant = from.flag();
  return args;
}

inline Linear4bitArgs read_linear_4bit(Arguments& from) { return read_matmul<true>(from); }
inline Linear4bitArgs read_linear_4bit_dx(Arguments& from) { return read_matmul<false>(from); }

// AdamWArgs and the tensors they point to.
struct AdamWStep : AdamWArgs {
  // The seed kNone is no stochastic rounding.
  AdamWStep(std::vector<AdamWTensor> list, Size seed_or_none) : owned(std::move(list)) {
    require(seed_or_none == kNone || seed_or_none >= 0, "seed: takes None, or 0 and above");
    tensors = owned.data();
    count = static_cast<Size>(owned.size());
    stochastic_rounding = seed_or_none != kNone;
    seed = stochastic_rounding ? static_cast<std::uint64_t>(seed_or_none) : 0;
  }
  AdamWStep(AdamWStep&&) = default;

  std::vector<AdamWTensor> owned;
};

inline AdamWTensor read_adamw_tensor(Arguments& from) {
  AdamWTensor tensor;
  tensor.param = from.pointer<void>();
  tensor.grad = from.pointer<const void>();
  tensor.exp_avg = from.pointer<void>();
  tensor.exp_avg_sq = from.pointer<void>();
  tensor.exp_avg_absmax = from.pointer<float>();
  tensor.exp_avg_sq_absmax = from.pointer<float>();
  require((tensor.exp_avg_absmax == nullptr) == (tensor.exp_avg_sq_absmax == nullptr),
          "absmax: takes those of both moments or neither");
  tensor.factors = from.pointer<const AdamWFactors>();
  tensor.dtype = from.dtype();
  tensor.numel = from.size();
  tensor.index = from.size();
  tensor.first = from.size();
  require(tensor.first % kStateBlockSize == 0, "first: takes a multiple of the block size");
  return tensor;
}

inline AdamWStep read_adamw_step(Arguments& from) {
  std::vector<AdamWTensor> tensors;
  for (Size left = from.size(); left > 0; --left) tensors.push_back(read_adamw_tensor(from));
  return {std::move(tensors), from.value()};
}

// An op on one backend.
struct Op {
  const char* name;
  Status (*run)(Arguments& from);
};

}  // namespace qkern::binding
