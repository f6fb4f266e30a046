// How integers become the arguments of an op, whoever passes them: Python, for the CPU and for
// CUDA, or another process (the emulator of AArch64). Knows nothing of Python.
//
// Pointers arrive as addresses of tensors that qkern/backends has checked; sizes and strides are in
// elements. A list is its length and then its items, a tuple its items, None is kNone. Only None
// says that a tensor is absent: the address of one whose memory was freed is 0, which is refused.
// (tensors.cpp reads tensors themselves.)
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

// Marks a size that must be one of a block's.
struct BlockSize {
  Size& value;
};

// Marks a pointer that may be absent.
template <typename T>
struct Optional {
  T*& value;
};
template <typename T>
Optional(T*&) -> Optional<T>;

// Marks a handle of the CUDA driver, of which 0 is one like any other.
struct Handle {
  void*& value;
};

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

  // Reads each of `fields` by its type; throws std::invalid_argument where a value is not one.
  template <typename... Fields>
  void read(Fields&&... fields) {
    (read_one(fields), ...);
  }

  int num_threads() {
    const Size number = value();
    require(number >= 1 && number <= INT_MAX, "num_threads: takes 1 and above");
    return static_cast<int>(number);
  }

 private:
  template <typename T>
  void read_one(T*& pointer) {
    const Size address = value();
    require(address != kNone, "address: got None; takes that of a tensor");
    pointer = at<T>(address);
  }
  template <typename T>
  void read_one(Optional<T>& pointer) {
    const Size address = value();
    pointer.value = address == kNone ? nullptr : at<T>(address);
  }
  void read_one(Handle& handle) {
    handle.value = reinterpret_cast<void*>(static_cast<std::uintptr_t>(value()));
  }
  void read_one(Size& size) {
    size = value();
    require(size >= 0, "sizes: take 0 and above");
  }
  void read_one(BlockSize& size) {
    size.value = value();
    if (!is_block_size(size.value)) {
      throw std::invalid_argument(std::string("block_size: takes ") + kBlockSizes);
    }
  }
  void read_one(bool& flag) { flag = value() != 0; }
  // As the integer of its bits.
  void read_one(float& number) {
    const auto bits = static_cast<std::uint32_t>(value());
    std::memcpy(&number, &bits, sizeof(number));
  }
  void read_one(DType& dtype) {
    dtype = static_cast<DType>(one_of(kDTypes, "dtype", kDTypeNumbers));
  }
  void read_one(CudaPath& path) {
    path = static_cast<CudaPath>(one_of(kCudaPaths, "path", kCudaPathNumbers));
  }
  void read_one(Codebook& codes) {
    read(Optional{codes.codebook});
    codes.format = one_of(kFormats, "format_id", kFormatNumbers);
    require(codes.format != kFormatCustom || codes.codebook != nullptr,
            "codebook: absent for format custom");
  }
  // All but the shape.
  void read_one(Weight4bit& weight) {
    read(weight.packed, weight.absmax, Optional{weight.nested_absmax},
         Optional{weight.nested_offset}, weight.codes, BlockSize{weight.block_size});
    require((weight.nested_absmax == nullptr) == (weight.nested_offset == nullptr),
            "nested_absmax and nested_offset: take both or neither");
  }

  template <typename T>
  static T* at(Size address) {
    require(address != 0, "address: got 0, that of freed memory; takes that of a tensor, or None");
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
  }

  // A number below `count`; `numbers` names them all.
  int one_of(int count, const char* what, const char* numbers) {
    const Size number = value();
    if (number < 0 || number >= count) {
      throw std::invalid_argument(std::string(what) + ": takes " + numbers);
    }
    return static_cast<int>(number);
  }

  const std::vector<Size>& values_;
  std::size_t next_ = 0;
};

// The arguments of each op in their order, up to what says where it runs.

inline void read_fields(Arguments& from, Quantize4bitArgs& to) {
  from.read(to.x, to.x_dtype, to.numel, to.codes, BlockSize{to.block_size}, to.packed, to.absmax);
}

inline void read_fields(Arguments& from, Dequantize4bitArgs& to) {
  from.read(to.weight, to.out, to.out_dtype, to.weight.cols);
  to.weight.rows = 1;
}

inline void read_fields(Arguments& from, QuantizeAbsmaxArgs& to) {
  DType dtype = DType::kFloat32;
  from.read(to.absmax, dtype, to.numel, to.codes, to.nested_absmax, to.nested_offset);
  require(dtype == DType::kFloat32, "absmax: takes float32");
}

inline void read_fields(Arguments& from, Quantize8bitArgs& to) {
  from.read(to.x, to.x_dtype, to.numel, to.map, BlockSize{to.block_size}, to.codes, to.absmax);
}

inline void read_fields(Arguments& from, Dequantize8bitArgs& to) {
  from.read(to.codes, to.absmax, to.map, BlockSize{to.block_size}, to.out, to.out_dtype, to.numel);
}

template <typename Args>
Args read_args(Arguments& from) {
  Args args;
  read_fields(from, args);
  return args;
}

// Of linear_4bit, and without a bias of linear_4bit_dx.
template <bool kHasBias>
Linear4bitArgs read_matmul(Arguments& from) {
  Linear4bitArgs args;
  from.read(args.x, args.dtype, args.m, args.x_row_stride, args.weight, args.weight.rows,
            args.weight.cols);
  if (kHasBias) from.read(Optional{args.bias});
  from.read(args.y, args.batch_invariant);
  return args;
}

inline void read_fields(Arguments& from, GroupOffsets& to) {
  from.read(to.experts, to.offsets, to.wide);
}

// Of grouped_linear_4bit, and without a bias of grouped_linear_4bit_dx.
template <bool kHasBias>
GroupedLinear4bitArgs read_grouped_matmul(Arguments& from) {
  GroupedLinear4bitArgs args;
  args.all = read_matmul<kHasBias>(from);
  read_fields(from, args.groups);
  return args;
}

inline void read_fields(Arguments& from, LowRank& to) {
  from.read(to.rank, to.left, to.left_row_stride, to.right, to.right_row_stride,
            to.right_col_stride, to.alpha);
}

// Of linear_4bit_add, and without a bias of linear_4bit_dx_add.
template <bool kHasBias>
Linear4bitArgs read_matmul_add(Arguments& from) {
  Linear4bitArgs args = read_matmul<kHasBias>(from);
  read_fields(from, args.added);
  return args;
}

// Of grouped_linear_4bit_add, and without a bias of grouped_linear_4bit_dx_add.
template <bool kHasBias>
GroupedLinear4bitArgs read_grouped_matmul_add(Arguments& from) {
  GroupedLinear4bitArgs args = read_grouped_matmul<kHasBias>(from);
  read_fields(from, args.all.added);
  from.read(args.right_stride);
  return args;
}

inline void read_fields(Arguments& from, MatmulIntoArgs& to) {
  from.read(to.out, to.out_dtype, to.m, to.n, to.k, to.out_row_stride, to.a, to.a_dtype,
            to.a_row_stride, to.a_col_stride, to.b, to.b_dtype, to.b_row_stride, to.b_col_stride,
            to.alpha, to.accumulate);
}

inline void read_fields(Arguments& from, GroupedMatmulIntoArgs& to) {
  MatmulIntoArgs& all = to.all;
  from.read(all.out, all.out_dtype, all.m, all.n, all.k, all.a, all.a_dtype, all.a_row_stride,
            all.a_col_stride, all.b, all.b_dtype, all.b_row_stride, all.b_col_stride, all.alpha,
            all.accumulate);
  all.out_row_stride = all.n;
  read_fields(from, to.groups);
  from.read(to.own_b, to.b_stride);
}

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
  from.read(tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq,
            Optional{tensor.exp_avg_absmax}, Optional{tensor.exp_avg_sq_absmax}, tensor.factors,
            tensor.dtype, tensor.numel, tensor.index, tensor.first);
  require((tensor.exp_avg_absmax == nullptr) == (tensor.exp_avg_sq_absmax == nullptr),
          "absmax: takes those of both moments or neither");
  require(tensor.first % kStateBlockSize == 0, "first: takes a multiple of the block size");
  return tensor;
}

inline AdamWStep read_adamw_step(Arguments& from) {
  std::vector<AdamWTensor> tensors;
  Size left = 0;
  for (from.read(left); left > 0; --left) tensors.push_back(read_adamw_tensor(from));
  return {std::move(tensors), from.value()};
}

// An op on one backend.
struct Op {
  const char* name;
  Status (*run)(Arguments& from);
};

}  // namespace qkern::binding
