// dequantize_4bit: packed codes and scales straight to float32, bfloat16 or float16.
#include "codec.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLaneCodes = 32;  // one 128-bit load; within one block, whose least size it is
constexpr int kWarpCodes = kLaneCodes * kWarp;
constexpr std::int64_t kBlockCodes = kWarps * kWarpCodes;
constexpr int kResidentBlocks = 4;  // of a processor, at least
constexpr int kLaneChunks = 4;      // of 16 bytes of results, that a lane hands on at a time

// Where chunk c of a lane lies in its warp's part of shared memory. A gap after every other lane's
// chunks, so that eight neighbouring lanes that write their chunks c, or read neighbouring chunks,
// meet eight different groups of banks.
QKERN_DEVICE constexpr int chunk_position(int lane, int c) {
  return lane * kLaneChunks + lane / 2 + c;
}

// A lane decodes 32 neighbouring codes, so that they share a scale and its table; stored as they
// come, each lane's results would lie apart from the next one's. The lanes of a warp exchange them
// here, such that neighbouring lanes store neighbouring chunks.
struct DequantizeShared {
  CodeTable table;
  uint4 chunks[kWarps][chunk_position(kWarp, 0)];
};

// The 16-byte chunks of a lane's results, from codes word by word.
template <typename T>
struct LaneDecoder {
  ScaledTable<T> scaled;

  QKERN_DEVICE void start(const CodeTable& table, float scale) { scaled.fill(table, scale); }
  QKERN_DEVICE uint4 chunk(const CodeTable& table, const std::uint32_t (&words)[4], int i) const {
    (void)table;
    std::uint32_t pairs[4];
    scaled.decode8(words[i], pairs);
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
};
template <>
struct LaneDecoder<float> {
  float scale;

  QKERN_DEVICE void start(const CodeTable& table, float block_scale) {
    (void)table;
    scale = block_scale;
  }
  QKERN_DEVICE uint4 chunk(const CodeTable& table, const std::uint32_t (&words)[4], int i) const {
    const WordCodes word(words[i / 2]);
    std::uint32_t bits[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      bits[v] = __float_as_uint(__fmul_rn(word.value(table, 4 * (i % 2) + v), scale));
    }
    return {bits[0], bits[1], bits[2], bits[3]};
  }
};

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

// Decodes the warp's 1024 codes from the region's element `begin` on.
template <typename T>
QKERN_DEVICE void dequantize_warp(const std::uint8_t* __restrict__ packed, const Scales& scales,
                                  float nested_offset, const Region& region, const CodeTable& table,
                                  uint4* chunks, std::int64_t begin, int lane, T* out) {
  constexpr int kChunkCodes = 16 / static_cast<int>(sizeof(T));
  constexpr int kPassCodes = kLaneChunks * kChunkCodes;  // of a lane
  constexpr int kQuads = kWarp / kLaneChunks;
  const std::int64_t mine = element_of(region, begin + lane * kLaneCodes);
  const uint4 load = load_global16(packed + (mine >> 1));
  const std::uint32_t words[4] = {load.x, load.y, load.z, load.w};
  LaneDecoder<T> decoder;
  decoder.start(table, load_scale(scales, nested_offset, mine));
  uint4* const own = chunks + chunk_position(lane, 0);
  // Chunk i * 32 + lane of the warp is one of lane i * 8 + lane / 4.
  const uint4* const from = chunks + chunk_position(lane / kLaneChunks, lane % kLaneChunks);
  T* const to = out + begin + lane / kLaneChunks * kLaneCodes + lane % kLaneChunks * kChunkCodes;
#pragma unroll
  for (int pass = 0; pass < kLaneCodes / kPassCodes; ++pass) {
    uint4 values[kLaneChunks];
#pragma unroll
    for (int c = 0; c < kLaneChunks; ++c) {
      values[c] = decoder.chunk(table, words, pass * kLaneChunks + c);
    }
#pragma unroll
    for (int c = 0; c < kLaneChunks; ++c) own[c] = values[c];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLaneChunks; ++i) {
      store_global16(to + i * kQuads * kLaneCodes + pass * kPassCodes,
                     from[chunk_position(i * kQuads, 0)]);
    }
    __syncwarp();
  }
}

template <typename T>
QKERN_KERNEL(kThreads, kResidentBlocks)
dequantize_4bit_kernel(const std::uint8_t* __restrict__ packed, Scales scales, CodeSource source,
                       Region region, std::int64_t numel, T* __restrict__ out) {
  QKERN_SHARED(DequantizeShared, shared);
  stage_codes(source, shared.table);
  __syncthreads();
  const float nested_offset = load_nested_offset(scales);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kBlockCodes;
  std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockCodes;
  // A lane's codes are then 16 aligned bytes of one row and one block.
  const bool aligned = is_aligned16(packed) && is_aligned16(out) &&
                       region.first % kLaneCodes == 0 &&
                       (region.row_skip == 0 ||
                        (region.row_length % kLaneCodes == 0 && region.row_skip % kLaneCodes == 0));
  const auto decode = [&](std::int64_t begin) {
    dequantize_warp(packed, scales, nested_offset, region, shared.table, shared.chunks[warp], begin,
                    lane, out);
  };
  if (aligned) {
    for (; first + kBlockCodes <= numel; first += stride) decode(first + warp * kWarpCodes);
  }
  for (; first < numel; first += stride) {
    const std::int64_t begin = first + warp * kWarpCodes;
    if (aligned && begin + kWarpCodes <= numel) {
      decode(begin);
      continue;
    }
    // Neighbouring lanes take neighbouring elements.
    const std::int64_t end = begin + kWarpCodes < numel ? begin + kWarpCodes : numel;
    for (std::int64_t i = begin + lane; i < end; i += kWarp) {
      const std::int64_t element = element_of(region, i);
      const float value = code_value(shared.table, packed_code(packed, element));
      out[i] = from_float<T>(__fmul_rn(value, load_scale(scales, nested_offset, element)));
    }
  }
}

}  // namespace

Status dequantize_4bit_region(const Dequantize4bitArgs& args, const Region& region, void* stream) {
  const std::int64_t numel = args.weight.rows * args.weight.cols;
  if (numel == 0) return Status::success();
  DeviceLimits limits;
  const Status status = device_limits(&limits);
  if (!status.ok()) return status;
  // As many as run at once: what a block does before its loop is done once a processor, not once
  // every 8192 codes.
  const std::int64_t resident = kResidentBlocks * limits.processors;
  const std::int64_t blocks = ceil_div(numel, kBlockCodes);
  const LaunchConfig config{strided_grid(blocks < resident ? blocks : resident), kThreads, 0,
                            stream};
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
