#pragma once

#include <cstdint>

#include "qkern/codes.h"
#include "qkern/dtype.h"
#include "qkern/status.h"

// What the host hands to a kernel: pointers, sizes and strides, already validated by the caller.
// Element counts and strides are 64-bit and in elements. An absent pointer is nullptr.
namespace qkern {

// The 16 values a 4-bit code stands for. `codebook` is read for kFormatCustom only.
struct Codebook {
  int format = 0;
  const float* codebook = nullptr;
};

// A row-major weight of rows x cols (rows * cols elements, flat blocks of block_size).
struct Weight4bit {
  const std::uint8_t* packed = nullptr;  // [(rows * cols + 1) / 2]
  const void* absmax = nullptr;          // float [blocks], or uint8 [blocks] with nested_absmax
  const float* nested_absmax = nullptr;  // [ceil(blocks / 256)]
  const float* nested_offset = nullptr;  // [1]
  Codebook codes;
  std::int64_t block_size = 64;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

struct Quantize4bitArgs {
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  std::int64_t numel = 0;
  Codebook codes;
  std::int64_t block_size = 64;
  std::uint8_t* packed = nullptr;
  float* absmax = nullptr;
};

struct Dequantize4bitArgs {
  Weight4bit weight;  // rows = 1, cols = numel
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};

// A rectangle of a row-major weight, read in rows: its element i is the weight's element
// first + i + i / row_length * row_skip.
struct Region {
  std::int64_t first = 0;
  std::int64_t row_length = 1;
  std::int64_t row_skip = 0;  // elements between the end of a row and the start of the next
};

struct Quantize8bitArgs {
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  std::int64_t numel = 0;
  const float* map = nullptr;  // [256], ascending
  std::int64_t block_size = 256;
  std::uint8_t* codes = nullptr;
  float* absmax = nullptr;
};

struct Dequantize8bitArgs {
  const std::uint8_t* codes = nullptr;
  const float* absmax = nullptr;
  const float* map = nullptr;  // [256]
  std::int64_t block_size = 256;
  std::int64_t numel = 0;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};

struct QuantizeAbsmaxArgs {
  const float* absmax = nullptr;
  std::int64_t numel = 0;
  std::uint8_t* codes = nullptr;
  float* nested_absmax = nullptr;
  float* nested_offset = nullptr;
};

// alpha left right, float32, that a matmul adds before it rounds; nothing where the rank is 0.
struct LowRank {
  std::int64_t rank = 0;
  const float* left = nullptr;  // [m, rank], its columns side by side
  std::int64_t left_row_stride = 0;
  const float* right = nullptr;  // [rank, the result's columns]
  std::int64_t right_row_stride = 0;
  std::int64_t right_col_stride = 0;
  float alpha = 1;
};

// y[m, :] = x[m, :] W^T + bias (forward) or y[m, :] = x[m, :] W (input gradient).
struct Linear4bitArgs {
  const void* x = nullptr;  // [m, cols] forward, [m, rows] input gradient; unit inner stride
  DType dtype = DType::kFloat32;
  std::int64_t m = 0;
  std::int64_t x_row_stride = 0;
  Weight4bit weight;
  const void* bias = nullptr;  // [rows], forward only
  void* y = nullptr;           // contiguous
  bool batch_invariant = false;
  LowRank added;  // CPU
  CudaPath path = CudaPath::kTiled;
  float* workspace = nullptr;  // CUDA: as many bytes as linear_4bit_paths says
};

// Which rows are whose: those of each expert end where its offset says. They ascend, from 0 to the
// number of rows.
struct GroupOffsets {
  std::int64_t experts = 0;
  const void* offsets = nullptr;  // [experts]
  bool wide = false;              // int64, else int32
};

// A matmul for each of several weights of one shape, whose fields lie one after the other, by its
// rows of x: those from where the ones of the weight before end. Rows after the last give zeros.
struct GroupedLinear4bitArgs {
  Linear4bitArgs all;  // of all rows, by the first weight, bias and right factor that is added
  GroupOffsets groups;
  std::int64_t right_stride = 0;  // from one right factor to the next
};

// out = alpha a b, or out += alpha a b, of dense matrices: a [m, k], b [k, n], out [m, n].
struct MatmulIntoArgs {
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t out_row_stride = 0;  // its columns lie side by side
  const void* a = nullptr;
  DType a_dtype = DType::kFloat32;
  std::int64_t a_row_stride = 0;
  std::int64_t a_col_stride = 0;
  const void* b = nullptr;
  DType b_dtype = DType::kFloat32;
  std::int64_t b_row_stride = 0;
  std::int64_t b_col_stride = 0;
  float alpha = 1.0f;
  bool accumulate = false;
};

// A matmul of dense matrices for each expert, by its rows of a, which is [m, k]: into its rows of
// out, [m, n], by its own b, [k, n], of which there are several; or into its own out, [k, n], with
// its rows of a, transposed, and of b, [m, n].
struct GroupedMatmulIntoArgs {
  MatmulIntoArgs all;  // m, n and k as above; of the first expert
  GroupOffsets groups;
  bool own_b = false;         // else own out
  std::int64_t b_stride = 0;  // from one expert's to the next
};

// One parameter, its gradient and its moments, all flat and contiguous. With `exp_avg_absmax` the
// moments are 8-bit codes in blocks of kStateBlockSize (exp_avg against the signed dynamic map,
// exp_avg_sq against the unsigned one), else float.
struct AdamWTensor {
  void* param = nullptr;
  const void* grad = nullptr;
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  float* exp_avg_absmax = nullptr;
  float* exp_avg_sq_absmax = nullptr;
  const AdamWFactors* factors = nullptr;
  DType dtype = DType::kFloat32;  // of param and grad
  std::int64_t numel = 0;
  std::int64_t index = 0;  // among all, for random numbers
  std::int64_t first = 0;  // of its parameter's elements, a multiple of kStateBlockSize
};

struct AdamWArgs {
  const AdamWTensor* tensors = nullptr;
  std::int64_t count = 0;
  bool stochastic_rounding = false;  // of bfloat16 parameters
  std::uint64_t seed = 0;
};

namespace cpu {

Status adamw_step(const AdamWArgs& args, int num_threads);
Status quantize_4bit(const Quantize4bitArgs& args, int num_threads);
Status dequantize_4bit(const Dequantize4bitArgs& args, int num_threads);
Status quantize_8bit(const Quantize8bitArgs& args, int num_threads);
Status dequantize_8bit(const Dequantize8bitArgs& args, int num_threads);
Status quantize_absmax(const QuantizeAbsmaxArgs& args, int num_threads);
Status linear_4bit(const Linear4bitArgs& args, int num_threads);
Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads);
Status linear_4bit_int8(const Linear4bitArgs& args, int num_threads);
Status grouped_matmul_into(const GroupedMatmulIntoArgs& args, int num_threads);
Status grouped_linear_4bit(const GroupedLinear4bitArgs& args, int num_threads);
Status grouped_linear_4bit_dx(const GroupedLinear4bitArgs& args, int num_threads);
Status matmul_into(const MatmulIntoArgs& args, int num_threads);

}  // namespace cpu

// Each only starts work on `stream` (a cudaStream_t; nullptr is the default stream) of the current
// device: no allocation, no wait. Pointers are device memory.
namespace cuda {

Status adamw_step(const AdamWArgs& args, void* stream);
Status quantize_4bit(const Quantize4bitArgs& args, void* stream);
Status dequantize_4bit(const Dequantize4bitArgs& args, void* stream);
// `args.weight.cols` elements of `region`; the weight's pointers are those of its beginning.
Status dequantize_4bit_region(const Dequantize4bitArgs& args, const Region& region, void* stream);
Status quantize_8bit(const Quantize8bitArgs& args, void* stream);
Status dequantize_8bit(const Dequantize8bitArgs& args, void* stream);
Status quantize_absmax(const QuantizeAbsmaxArgs& args, void* stream);
Status linear_4bit(const Linear4bitArgs& args, void* stream);
Status linear_4bit_dx(const Linear4bitArgs& args, void* stream);
// On the path vector, mma or tiled. Offsets may hold anything: an end counts as the nearest number
// from the end before to the rows of x.
Status grouped_linear_4bit(const GroupedLinear4bitArgs& args, void* stream);
Status grouped_linear_4bit_dx(const GroupedLinear4bitArgs& args, void* stream);
Status grouped_matmul_into(const GroupedMatmulIntoArgs& args, void* stream);

// What paths are chosen by, of the current device.
struct DeviceLimits {
  int capability = 0;  // major * 10 + minor
  int processors = 0;  // streaming multiprocessors
  std::int64_t l2_bytes = 0;
};
Status device_limits(DeviceLimits* limits);

// Makes `device` the calling thread's current one; `before` is what was. A failure changes nothing.
Status exchange_device(int device, int* before);

// CUDA's versions, major * 1000 + minor * 10: the newest that the driver takes (0: there is none),
// and that of the runtime in this library.
struct Versions {
  int driver = 0, runtime = 0;
};
Status versions(Versions* found);

// A path that can compute a matmul on the current device, and what it takes there.
struct MatmulPath {
  CudaPath path = CudaPath::kTiled;
  int parts = 1;  // of a contraction that is split
  std::int64_t workspace_bytes = 0;
};

// The paths of linear_4bit, or of linear_4bit_dx, in the order of their numbers. Of `args` this
// reads dtype, m, the weight's sizes and batch_invariant. `aligned`: whether x and the packed codes
// start at 16 bytes and a row of x is a multiple of 16 bytes from the next.
Status linear_4bit_paths(const Linear4bitArgs& args, bool input_gradient, bool aligned,
                         MatmulPath (&paths)[kCudaPaths], int* count);

}  // namespace cuda
}  // namespace qkern
