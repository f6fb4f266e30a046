// dequantize_4bit: packed codes and scales straight to float32, bfloat16 or float16.
#include "codec.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLaneCodes = 32;  // one 128-bit load; within one block, whose least size it is
constexpr int kWarpCodes = kLaneCodes * kWarp;

// A 4x4 transpose of words among four neighbouring lanes: afterwards words[s] is what was
// words[lane % 4] of the quad's lane s. It lets a quad write 64 neighbouring bytes at a time where
// each lane alone would write 16 bytes, 64 apart.
QKERN_DEVICE void transpose_quad(std::uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      std::uint32_t& first = words[i];
      std::uint32_t& second = words[i + step];
      const std::uint32_t received = __shfl_xor_sync(kAllLanes, upper ? first : second, step);
      first = upper ? received : first;
      second = upper ? second : received;
    }
  }
}

// Where a lane stores its part of a quad's words: 16-bit values are 16
// neighbouring bytes a word; of float32, two neighbours' words are 64 bytes, of which each lane
// takes two of the four 16-byte parts, such that one store writes the first two, the other the last
// two.
template <typename T>
QKERN_DEVICE int first_value(int lane) {
  const int position = lane & 3;
  return sizeof(T) == 2 ? 8 * position : 8 * (position & ~1) + 4 * (position & 1);
}

// Decodes a word and stores it at `out`, which is `first_value` past the quad's first.
template <typename T>
QKERN_DEVICE void store_word(const CodeTable& table, std::uint32_t word, float scale, int lane,
                             T* out) {
  if constexpr (sizeof(T) == 2) {
    const WordOffsets offsets(word);
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack_pair<T>(__fmul_rn(offsets.value(table, 2 * i), scale),
                              __fmul_rn(offsets.value(table, 2 * i + 1), scale));
    }
    store_global16(out, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  } else {
    // The first four codes of both words, or the last four.
    const std::uint32_t received = __shfl_xor_sync(kAllLanes, word, 1);
    const WordOffsets offsets(__byte_perm(word, received, (lane & 1) != 0 ? 0x3276 : 0x5410));
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      std::uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits[i] = __float_as_uint(__fmul_rn(offsets.value(table, 4 * part + i), scale));
      }
      store_global16(out + 8 * part, uint4{bits[0], bits[1], bits[2], bits[3]});
    }
  }
}

// The weight's element that is the region's element i.
QKERN_DEVICE std::int64_t element_of(const Region& region, std::int64_t i) {
  const std::int64_t element = region.first + i;
  if (region.row_skip == 0) return element;
  // 32-bit division costs a fraction of the 64-bit one.
  constexpr std::int64_t kMax32 = 0xffffffff;
  const std::int64_t row =
      i <= kMax32 && region.row_length <= kMax32
          ? static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(region.row_length)
          : i / region.row_length;
  return element + row * region.row_skip;
}

template <typename T>
QKERN_KERNEL(kThreads, 1)
dequantize_4bit_kernel(const std::uint8_t* __restrict__ packed, Scales scales, CodeSource source,
                       Region region, std::int64_t numel, T* __restrict__ out) {
  QKERN_SHARED(CodeTable, table);
  stage_codes(source, table);
  __syncthreads();
  const float nested_offset = load_nested_offset(scales);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (kThreads / kWarp);
  const std::int64_t first_warp =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  // A lane's codes are then 16 aligned bytes of one row and one block.
  const bool aligned = is_aligned16(packed) && is_aligned16(out) &&
                       region.first % kLaneCodes == 0 &&
                       (region.row_skip == 0 ||
                        (region.row_length % kLaneCodes == 0 && region.row_skip % kLaneCodes == 0));
  for (std::int64_t begin = first_warp * kWarpCodes; begin < numel; begin += warps * kWarpCodes) {
    if (aligned && begin + kWarpCodes <= numel) {
      const std::int64_t mine = element_of(region, begin + lane * kLaneCodes);
      const uint4 load = load_global16(packed + mine / 2);
      const float scale = load_scale(scales, nested_offset, mine >> scales.block_shift);
      std::uint32_t words[4] = {load.x, load.y, load.z, load.w};
      transpose_quad(words, lane);
      const int quad = lane & ~3;
      T* const quad_out = out + begin + quad * kLaneCodes + first_value<T>(lane);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const float owner_scale = __shfl_sync(kAllLanes, scale, quad + s);
        store_word(table, words[s], owner_scale, lane, quad_out + s * kLaneCodes);
      }
    } else {
      // Neighbouring lanes take neighbouring elements.
      const std::int64_t end = begin + kWarpCodes < numel ? begin + kWarpCodes : numel;
      for (std::int64_t i = begin + lane; i < end; i += kWarp) {
        const std::int64_t element = element_of(region, i);
        const float value = code_value(table, packed_code(packed, element));
        out[i] = from_float<T>(
            __fmul_rn(value, load_scale(scales, nested_offset, element >> scales.block_shift)));
      }
    }
  }
}

}  // namespace

Status dequantize_4bit_region(const Dequantize4bitArgs& args, const Region& region, void* stream) {
  const std::int64_t numel = args.weight.rows * args.weight.cols;
  if (numel == 0) return Status::success();
  constexpr std::int64_t kBlockCodes = kThreads / kWarp * kWarpCodes;
  const LaunchConfig config{strided_grid(ceil_div(numel, kBlockCodes)), kThreads, 0, stream};
  return with_dtype(args.out_dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch("dequantize_4bit_kernel", dequantize_4bit_kernel<T>, config, args.weight.packed,
                  scales_of(args.weight), code_source(args.weight.codes), region, numel,
                  static_cast<T*>(args.out));
  });
}

Status dequantize_4bit(const Dequantize4bitArgs& args, void* stream) {
  return dequantize_4bit_region(args, Region{}, stream);
}

}  // namespace qkern::cuda
