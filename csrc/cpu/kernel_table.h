#pragma once

#include <cstdint>

#include "qkern/ops.h"

namespace qkern::cpu {

// How codes are found; see EncodeTable.
enum class Lookup {
  kCount,          // the thresholds below t are counted: any table and any t
  kBins,           // by bins; a value's rank is its code
  kBinsPermuted,   // by bins; codes are in another order than values
  kBinsMagnitude,  // by bins of |t|; the sign is a bit of the code
};

// How one format encodes, prepared once per call.
struct EncodeTable {
  static constexpr int kBins = 32;

  // false: code = codes[number of thresholds below t] on the signed t.
  // true: the same on |t| with `num_thresholds` = 7, plus 8 where x < 0 (FP4).
  bool sign_magnitude = false;
  int num_thresholds = 15;
  float thresholds[16];
  std::uint8_t codes[16];

  // The same function by one lookup: t (or |t|) falls in bin int(t * bin_scale + bin_offset), and
  // each bin holds at most one threshold, so one comparison tells whether it is below t, and
  // `bin_rank` how many of the bins before are. Not where two thresholds share a bin, nor for a t
  // beyond [-1, 1] or a NaN: kCount then.
  Lookup lookup = Lookup::kCount;
  float bin_scale = 0;
  float bin_offset = 0;
  float bin_threshold[kBins];
  std::int32_t bin_rank[kBins];
};

// Whether thresholds are those of |t|, which the compiler knows where there are bins. Static: a
// copy that the linker shared among instruction sets might use one that the processor lacks.
template <Lookup kLookup>
static bool compares_magnitudes(const EncodeTable& table) {
  return kLookup == Lookup::kCount ? table.sign_magnitude : kLookup == Lookup::kBinsMagnitude;
}

// How a dynamic map encodes in 8 bits: by one lookup and one comparison, where counting the
// thresholds below t takes eight. Floats of one sign that agree in all but their `shift` lowest
// bits are a bucket, which holds one threshold at most. Its word has in the top eight bits the code
// of its smallest magnitude, and below them the lowest bits of the last magnitude that keeps it: a
// larger one has the next code, the one above for t > 0 and the one below for t < 0.
struct BucketTable {
  static constexpr int kBuckets = 3584;  // of a sign; [2^-27, 2) at the smaller shift
  static constexpr std::uint32_t kFirstExponent = 100;

  const float* map;
  const float* thresholds;
  int shift;
  std::uint32_t first;                // magnitudes below have the first bucket's code
  std::uint32_t words[2 * kBuckets];  // t >= 0, t < 0
};

// A range of blocks [begin, end) of a flat tensor of numel elements.
struct BlockRange {
  std::int64_t numel;
  std::int64_t block_size;
  std::int64_t begin;
  std::int64_t end;
};

// One instruction set's kernels. Entries of an array are for float32, bfloat16, float16.
struct KernelTable {
  const char* name;

  using QuantizeFn = void (*)(const void* x, BlockRange range, const EncodeTable& table,
                              std::uint8_t* packed, float* absmax);
  // past_caches: out is aligned to 64 bytes, and does not wait in a cache for its reader.
  using DequantizeFn = void (*)(const Weight4bit& weight, BlockRange range, void* out,
                                bool past_caches);
  using Quantize8bitFn = void (*)(const void* x, BlockRange range, const float* thresholds,
                                  std::uint8_t* codes, float* absmax);
  using Dequantize8bitFn = void (*)(const std::uint8_t* codes, const float* absmax,
                                    const float* map, BlockRange range, void* out);
  // Elements [begin, end) of one tensor; begin is a multiple of kStateBlockSize. The tables are
  // those of the signed and of the unsigned map.
  using AdamWFn = void (*)(const AdamWArgs& args, const BucketTable* tables,
                           const AdamWTensor& tensor, std::int64_t begin, std::int64_t end);
  using LinearFn = Status (*)(const Linear4bitArgs& args, int num_threads);
  using MatmulIntoFn = Status (*)(const MatmulIntoArgs& args, int num_threads);

  QuantizeFn quantize_4bit[3];
  DequantizeFn dequantize_4bit[3];
  Quantize8bitFn quantize_8bit[3];
  Dequantize8bitFn dequantize_8bit[3];
  LinearFn linear_4bit[3];
  LinearFn linear_4bit_dx[3];
  LinearFn linear_4bit_int8[3];  // of as many rows as rows_in_8_bits says, if any
  std::int64_t (*rows_in_8_bits[3])(const Linear4bitArgs& args);
  AdamWFn adamw_step[3];
  MatmulIntoFn matmul_into;
};

// About how long one thread takes for a matmul.
std::int64_t linear_nanoseconds(const Linear4bitArgs& args);
std::int64_t matmul_nanoseconds(const MatmulIntoArgs& args);

// Those that the build has: see QKERN_HAVE_* in dispatch.cpp.
const KernelTable& kernels_scalar();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512vnni();
const KernelTable& kernels_avx512bf16();
const KernelTable& kernels_amx();
const KernelTable& kernels_neon();

// The table in force: the best that the processor runs (of bfloat16 products a probe decides, at
// the first call), or what QKERN_CPU_ISA, set_isa or a ThreadIsa names.
// nullptr where that name is unknown or the processor lacks it.
const KernelTable* active_kernels();

}  // namespace qkern::cpu
