#pragma once

#include <arm_neon.h>

#include "simd_base.h"

namespace qkern::cpu {
namespace {

// 4 float lanes: Advanced SIMD of Armv8.0-A.
//
// A code's float32 is looked up byte by byte: each of four 16-byte tables holds one byte of the 16
// values, and one `tbl` per table serves 16 codes at once; eight two-register transposes then join
// the bytes. That is 12 instructions for 16 weights. One `tbl` over the whole 64-byte table would
// give four weights, but needs its byte indices made, and has been modelled as three operations
// where the one over 16 bytes is one (LLVM, Neoverse N1).
struct Simd {
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  // Register tile of the matmul: 8 x 2 sums, 8 registers of x and two of the panel are 26 of 32.
  static constexpr int kTileRows = 8;
  // A register holds four steps of a row of x, which the multiply-adds take by lane: a broadcasting
  // load would cost the arithmetic units as much as a multiply-add does.
  static constexpr int kTileSteps = 4;
  static constexpr int kVectorAccumulators = 8;
  static constexpr int kVectorFactors = 4;
  static constexpr int kFactorRows = 2;  // of W at most
  // The look-up serves 16 codes: half of a register of words.
  static constexpr bool kByteTables = true;
  static constexpr int kExposed = 4;
  static constexpr bool kOwnOrder = false;

  using F = float32x4_t;
  using I = uint32x4_t;
  // Byte p of each of the 16 values, and a factor for what decodes in natural order.
  struct Lut {
    uint8x16_t bytes[4];
    F scale;
  };

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F loadu(const float* p) { return vld1q_f32(p); }
  static void storeu(float* p, F v) { vst1q_f32(p, v); }
  // Plain stores: no intrinsic goes past the caches.
  template <bool>
  static void put(float* p, F v) {
    vst1q_f32(p, v);
  }
  static void fence() {}
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  template <int kLane>
  static F fma_lane(F a, F b, F c) {
    return vfmaq_laneq_f32(c, a, b, kLane);
  }
  // Zeros but for the first n lanes.
  static F first_lanes(F v, int n) {
    const std::uint32_t lanes[4] = {0, 1, 2, 3};
    const uint32x4_t kept = vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<unsigned>(n)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), kept));
  }
  static float reduce(F v) { return vaddvq_f32(v); }

  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
  }
  static F load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  template <typename T>
  static F load_partial(const T* p, int n) {
    return load_padded<Simd>(p, n);
  }

  static void store(float* p, F v) { vst1q_f32(p, v); }
  static void store(BFloat16* p, F v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(v, v);
    vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(kFloatQuietNan)), 16));
  }
  static void store(Float16* p, F v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <typename T>
  static void store_partial(T* p, F v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(T));
  }

  // The largest of 32 magnitudes.
  static std::uint16_t largest(const std::uint16_t (&v)[32]) {
    return vmaxvq_u16(vmaxq_u16(vmaxq_u16(vld1q_u16(v), vld1q_u16(v + 8)),
                                vmaxq_u16(vld1q_u16(v + 16), vld1q_u16(v + 24))));
  }
  static std::uint32_t largest(const std::uint32_t (&v)[32]) {
    uint32x4_t found = vld1q_u32(v);
    for (int i = 4; i < 32; i += 4) found = vmaxq_u32(found, vld1q_u32(v + i));
    return vmaxvq_u32(found);
  }

  template <typename T>
  static void load_group(const T* p, F (&values)[8]) {
    for (int i = 0; i < 8; ++i) values[i] = load(p + i * kLanes);
  }

  static Lut make_lut(const float* table) {
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const std::uint8_t*>(table));
    return {{bytes.val[0], bytes.val[1], bytes.val[2], bytes.val[3]}, set1(1.0f)};
  }
  static Lut scale_lut(Lut lut, float scale) {
    lut.scale = vmulq_n_f32(lut.scale, scale);
    return lut;
  }

  // Packed words of eight codes each.
  static I load_words(const std::uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
  static I load_words_partial(const std::uint8_t* p, int n) {
    std::uint8_t lanes[4 * kLanes] = {};
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * 4);
    return load_words(lanes);
  }

  // The weights of one nibble of every byte, the low one for kStep 0: of the first byte of each
  // word, of the second, and so on.
  template <int kStep>
  static void expose(const Lut& lut, I words, F (&w)[kExposed]) {
    const uint8x16_t bytes = vreinterpretq_u8_u32(words);
    const uint8x16_t codes = kStep == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
    const uint8x16_t b0 = vqtbl1q_u8(lut.bytes[0], codes);
    const uint8x16_t b1 = vqtbl1q_u8(lut.bytes[1], codes);
    const uint8x16_t b2 = vqtbl1q_u8(lut.bytes[2], codes);
    const uint8x16_t b3 = vqtbl1q_u8(lut.bytes[3], codes);
    // 4 x 4 bytes are transposed within each word.
    const uint16x8_t even_low = vreinterpretq_u16_u8(vtrn1q_u8(b0, b1));
    const uint16x8_t even_high = vreinterpretq_u16_u8(vtrn1q_u8(b2, b3));
    const uint16x8_t odd_low = vreinterpretq_u16_u8(vtrn2q_u8(b0, b1));
    const uint16x8_t odd_high = vreinterpretq_u16_u8(vtrn2q_u8(b2, b3));
    w[0] = vreinterpretq_f32_u16(vtrn1q_u16(even_low, even_high));
    w[1] = vreinterpretq_f32_u16(vtrn1q_u16(odd_low, odd_high));
    w[2] = vreinterpretq_f32_u16(vtrn2q_u16(even_low, even_high));
    w[3] = vreinterpretq_f32_u16(vtrn2q_u16(odd_low, odd_high));
  }

  // 4 weights in their own order from 2 bytes, times the table's factor.
  static F natural(const std::uint8_t* p, const Lut& lut) {
    std::uint16_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    F w[4];
    decode16(natural_codes(vreinterpretq_u8_u16(vdupq_n_u16(bytes))).val[0], lut, w);
    return vmulq_f32(w[0], lut.scale);
  }
  // 32 weights in their own order from 16 bytes, times the table's factor.
  template <bool>
  static void decode32(const std::uint8_t* p, const Lut& lut, float* out) {
    const uint8x16x2_t codes = natural_codes(vld1q_u8(p));
    for (int half = 0; half < 2; ++half) {
      F w[4];
      decode16(codes.val[half], lut, w);
      for (int i = 0; i < 4; ++i) vst1q_f32(out + 16 * half + 4 * i, vmulq_f32(w[i], lut.scale));
    }
  }
  // 8 weights of one row, then 8 of another, each from 4 bytes and times its scale.
  static void decode_two_rows(const std::uint8_t* first, const std::uint8_t* second, const Lut& lut,
                              float first_scale, float second_scale, float* out) {
    std::uint32_t words[2];
    std::memcpy(&words[0], first, 4);
    std::memcpy(&words[1], second, 4);
    const uint32x4_t bytes = vsetq_lane_u32(words[1], vdupq_n_u32(words[0]), 1);
    F w[4];
    decode16(natural_codes(vreinterpretq_u8_u32(bytes)).val[0], lut, w);
    vst1q_f32(out, vmulq_n_f32(w[0], first_scale));
    vst1q_f32(out + 4, vmulq_n_f32(w[1], first_scale));
    vst1q_f32(out + 8, vmulq_n_f32(w[2], second_scale));
    vst1q_f32(out + 12, vmulq_n_f32(w[3], second_scale));
  }

  // A word spans 8 codes and a block at least 32, so four words always share one scale.
  static I scale_pattern(int) { return vdupq_n_u32(0); }
  static F expand_scales(const float* scales, I) { return vld1q_dup_f32(scales); }

  // Weights of 8 bits, and their products with x in 8 bits: see kernels_int8.h.
  static constexpr bool kByteSums = false;
  struct Bytes {
    int8x16_t value[2];
  };
  using ByteLut = int8x16_t;
  static ByteLut make_byte_lut(const std::int8_t* table) { return vld1q_s8(table); }
  static Bytes decode_bytes(ByteLut lut, I words) {
    const uint8x16_t bytes = vreinterpretq_u8_u32(words);
    return {
        {vqtbl1q_s8(lut, vandq_u8(bytes, vdupq_n_u8(15))), vqtbl1q_s8(lut, vshrq_n_u8(bytes, 4))}};
  }
  // Sums of two products fit 16 bits.
  static F dot_bytes(const Bytes& w, const float* x) {
    const auto* q = reinterpret_cast<const std::int8_t*>(x);
    const int8x16_t low = vld1q_s8(q), high = vld1q_s8(q + 16);
    int16x8_t first = vmull_s8(vget_low_s8(w.value[0]), vget_low_s8(low));
    int16x8_t second = vmull_s8(vget_high_s8(w.value[0]), vget_high_s8(low));
    first = vmlal_s8(first, vget_low_s8(w.value[1]), vget_low_s8(high));
    second = vmlal_s8(second, vget_high_s8(w.value[1]), vget_high_s8(high));
    return vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second)));
  }

  // Lane i takes p[8 * i].
  static F gather_stride8(const float* p) {
    const float lanes[4] = {p[0], p[8], p[16], p[24]};
    return vld1q_f32(lanes);
  }

  static void transpose(I (&r)[4]) {
    const uint64x2_t even_low = vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1]));
    const uint64x2_t odd_low = vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]));
    const uint64x2_t even_high = vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3]));
    const uint64x2_t odd_high = vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]));
    r[0] = vreinterpretq_u32_u64(vtrn1q_u64(even_low, even_high));
    r[1] = vreinterpretq_u32_u64(vtrn1q_u64(odd_low, odd_high));
    r[2] = vreinterpretq_u32_u64(vtrn2q_u64(even_low, even_high));
    r[3] = vreinterpretq_u32_u64(vtrn2q_u64(odd_low, odd_high));
  }

  // Codes of t = x / absmax. With bins, |t| must not exceed 1 by more than rounding.
  struct Encoder {
    const EncodeTable& table;
    uint8x16x2_t bin_threshold[4];  // byte p of each bin's threshold
    uint8x16x2_t bin_rank;
    uint8x16_t codes;

    explicit Encoder(const EncodeTable& from) : table(from) {
      std::uint8_t rank[EncodeTable::kBins];
      for (int i = 0; i < EncodeTable::kBins; ++i) {
        rank[i] = static_cast<std::uint8_t>(from.bin_rank[i]);
      }
      bin_rank = {{vld1q_u8(rank), vld1q_u8(rank + 16)}};
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(from.bin_threshold);
      const uint8x16x4_t first = vld4q_u8(bytes), second = vld4q_u8(bytes + 64);
      for (int p = 0; p < 4; ++p) bin_threshold[p] = {{first.val[p], second.val[p]}};
      codes = vld1q_u8(from.codes);
    }

    // 32 codes of x, with t = x * scale, to 16 bytes, even elements in the high nibbles.
    template <Lookup kLookup>
    void encode32(const F (&x)[8], F scale, std::uint8_t* out) const {
      const uint8x16_t first = encode16<kLookup>(x, scale);
      const uint8x16_t second = encode16<kLookup>(x + 4, scale);
      const uint8x16_t even = vuzp1q_u8(first, second);
      const uint8x16_t odd = vuzp2q_u8(first, second);
      vst1q_u8(out, vsliq_n_u8(odd, even, 4));
    }

   private:
    template <Lookup kLookup>
    uint8x16_t encode16(const F* x, F scale) const {
      const bool sign_magnitude = compares_magnitudes<kLookup>(table);
      F key[4];
      for (int i = 0; i < 4; ++i) {
        const F t = vmulq_f32(x[i], scale);
        key[i] = sign_magnitude ? vabsq_f32(t) : t;
      }
      const uint8x16_t count = kLookup == Lookup::kCount ? by_count(key) : by_bins(key);
      if (kLookup == Lookup::kBins) return count;
      uint8x16_t code = vqtbl1q_u8(codes, count);
      if (sign_magnitude) {
        uint32x4_t negative[4];
        for (int i = 0; i < 4; ++i) negative[i] = vcltzq_f32(x[i]);
        code = vorrq_u8(code, vandq_u8(narrow(negative), vdupq_n_u8(8)));
      }
      return code;
    }

    // The number of thresholds below each key.
    uint8x16_t by_bins(const F (&key)[4]) const {
      uint32x4_t bin[4];
      for (int i = 0; i < 4; ++i) {
        const F position = vfmaq_f32(set1(table.bin_offset), key[i], set1(table.bin_scale));
        bin[i] = vreinterpretq_u32_s32(vcvtq_s32_f32(position));
      }
      const uint8x16_t bins = narrow(bin);
      uint8x16_t bytes[4];
      for (int p = 0; p < 4; ++p) bytes[p] = vqtbl2q_u8(bin_threshold[p], bins);
      F threshold[4];
      join(bytes, threshold);
      uint32x4_t above[4];
      for (int i = 0; i < 4; ++i) above[i] = vcgtq_f32(key[i], threshold[i]);
      return vsubq_u8(vqtbl2q_u8(bin_rank, bins), narrow(above));
    }

    uint8x16_t by_count(const F (&key)[4]) const {
      uint32x4_t count[4];
      for (int i = 0; i < 4; ++i) count[i] = vdupq_n_u32(0);
      for (int k = 0; k < table.num_thresholds; ++k) {
        const F threshold = set1(table.thresholds[k]);
        for (int i = 0; i < 4; ++i) count[i] = vsubq_u32(count[i], vcgtq_f32(key[i], threshold));
      }
      return narrow(count);
    }
  };

  // 32 weights of 16 bits from 16 bytes: the ready values' low and high bytes are looked up apart.
  using Lut16 = uint8x16x2_t;
  static Lut16 make_lut16(const std::uint16_t* table) {
    return vld2q_u8(reinterpret_cast<const std::uint8_t*>(table));
  }
  template <bool>
  static void decode32(const std::uint8_t* p, const Lut16& lut, std::uint16_t* out) {
    const uint8x16x2_t codes = natural_codes(vld1q_u8(p));
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t low = vqtbl1q_u8(lut.val[0], codes.val[half]);
      const uint8x16_t high = vqtbl1q_u8(lut.val[1], codes.val[half]);
      vst1q_u16(out + 16 * half, vreinterpretq_u16_u8(vzip1q_u8(low, high)));
      vst1q_u16(out + 16 * half + 8, vreinterpretq_u16_u8(vzip2q_u8(low, high)));
    }
  }

  // 8-bit codes: number of the 255 ascending thresholds below t, by bisection.
  using Thresholds = const float*;
  static I count_below(F t, Thresholds thresholds) {
    float lanes[kLanes];
    std::uint32_t count[kLanes] = {};
    vst1q_f32(lanes, t);
    for (std::uint32_t step = 128; step > 0; step /= 2) {
      for (int i = 0; i < kLanes; ++i) {
        count[i] += lanes[i] > thresholds[count[i] + step - 1] ? step : 0u;
      }
    }
    return vld1q_u32(count);
  }
  static void store_bytes(std::uint8_t* out, I codes) {
    const uint16x4_t halves = vmovn_u32(codes);
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
    const std::uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    std::memcpy(out, &word, sizeof(word));
  }
  // out[i] = table[index[i]], for as many as a register holds.
  static void gather_words(const std::uint32_t* table, const std::uint32_t* index,
                           std::uint32_t* out) {
    for (int i = 0; i < kLanes; ++i) out[i] = table[index[i]];
  }
  // table[p[i]] of 256 floats.
  static F gather_bytes(const float* table, const std::uint8_t* p) {
    const float lanes[4] = {table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
    return vld1q_f32(lanes);
  }

 private:
  // The low bytes of 16 lanes.
  static uint8x16_t narrow(const uint32x4_t (&v)[4]) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(v[0]), vreinterpretq_u16_u32(v[1]));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(v[2]), vreinterpretq_u16_u32(v[3]));
    return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
  }
  // 16 floats in order from their bytes, one register for each of the four.
  static void join(const uint8x16_t (&bytes)[4], F (&out)[4]) {
    const uint16x8_t low[2] = {vreinterpretq_u16_u8(vzip1q_u8(bytes[0], bytes[1])),
                               vreinterpretq_u16_u8(vzip2q_u8(bytes[0], bytes[1]))};
    const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(bytes[2], bytes[3])),
                                vreinterpretq_u16_u8(vzip2q_u8(bytes[2], bytes[3]))};
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(low[i], high[i]));
      out[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[i], high[i]));
    }
  }
  // 32 codes in their own order: the high nibble comes first.
  static uint8x16x2_t natural_codes(uint8x16_t bytes) {
    return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
  }
  static void decode16(uint8x16_t codes, const Lut& lut, F (&w)[4]) {
    uint8x16_t bytes[4];
    for (int p = 0; p < 4; ++p) bytes[p] = vqtbl1q_u8(lut.bytes[p], codes);
    join(bytes, w);
  }
};

}  // namespace
}  // namespace qkern::cpu
