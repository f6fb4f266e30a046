#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 intrinsics read an undefined register on purpose (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "simd_base.h"
#include "simd_x86.h"

namespace qkern::cpu {
namespace {

// 16 float lanes: AVX-512 F, BW, DQ, VL.
struct Simd : SimdBase {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  // Register tile of the matmul: 14 x 2 accumulators leave room for two columns and a broadcast.
  static constexpr int kTileRows = 14;
  static constexpr int kVectorAccumulators = 24;
  static constexpr int kVectorFactors = 16;

  using F = __m512;
  using I = __m512i;
  using Lut = __m512;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F loadu(const float* p) { return _mm512_loadu_ps(p); }
  static void storeu(float* p, F v) { _mm512_storeu_ps(p, v); }
  // kStream: to aligned memory, past the caches; others see it after fence().
  template <bool kStream>
  static void put(float* p, F v) {
    kStream ? _mm512_stream_ps(p, v) : _mm512_storeu_ps(p, v);
  }
  static void fence() { _mm_sfence(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Zeros but for the first n lanes.
  static F first_lanes(F v, int n) { return _mm512_maskz_mov_ps(first(n), v); }
  static float reduce(F v) { return _mm512_reduce_add_ps(v); }

  static F load(const float* p) { return loadu(p); }
  static F load(const BFloat16* p) {
    return bf16_to_f32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static F load_partial(const BFloat16* p, int n) {
    return bf16_to_f32(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static F load_partial(const Float16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  static void store(float* p, F v) { storeu(p, v); }
  static void store(BFloat16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f32_to_bf16(v));
  }
  static void store(Float16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f32_to_f16(v));
  }
  static void store_partial(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void store_partial(BFloat16* p, F v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), f32_to_bf16(v));
  }
  static void store_partial(Float16* p, F v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), f32_to_f16(v));
  }

  // Table lookup: only the low four bits of each lane of `index` count.
  static Lut make_lut(const float* table) { return _mm512_loadu_ps(table); }
  static F lookup(Lut lut, I index) { return _mm512_permutexvar_ps(index, lut); }
  static Lut scale_lut(Lut lut, float scale) { return _mm512_mul_ps(lut, _mm512_set1_ps(scale)); }

  // Packed words of eight codes each.
  static I load_words(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load_words_partial(const std::uint8_t* p, int n) {
    return _mm512_maskz_loadu_epi32(first(n), p);
  }
  template <int kShift>
  static I shift_right(I v) {
    return kShift == 0 ? v : _mm512_srli_epi32(v, kShift);
  }

  // The weights that step kStep exposes; see kSteps.
  template <int kStep>
  static void expose(Lut lut, I words, F (&w)[kExposed]) {
    w[0] = lookup(lut, shift_right<4 * kStep>(words));
  }

  // 16 weights in their own order from 8 bytes. Each half takes its word by a broadcasting load,
  // which keeps the shuffle port for the lookup.
  static F natural(const std::uint8_t* p, Lut lut) {
    std::int32_t words[2];
    std::memcpy(words, p, sizeof(words));
    const I both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
    return lookup(lut, _mm512_srlv_epi32(both, natural_shifts()));
  }

  // Lane i takes scales[i / lanes_per_scale]; reads 16 floats.
  static I scale_pattern(int lanes_per_scale) {
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srli_epi32(lane, static_cast<unsigned>(__builtin_ctz(lanes_per_scale)));
  }
  static F expand_scales(const float* scales, I pattern) {
    return _mm512_permutexvar_ps(pattern, _mm512_loadu_ps(scales));
  }

  // Lane i takes p[8 * i].
  static F gather_stride8(const float* p) {
    const I index =
        _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    return _mm512_i32gather_ps(index, p, 4);
  }

  static void transpose(I (&r)[16]) {
    I t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
      r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
      r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
  }

  // Codes of t = x / absmax, one a lane. With bins, |t| must not exceed 1 by more than rounding.
  struct Encoder {
    const EncodeTable& table;
    F bin_threshold[2];
    I bin_rank[2];
    I codes;
    F scale, offset;

    explicit Encoder(const EncodeTable& from) : table(from) {
      for (int i = 0; i < 2; ++i) {
        bin_threshold[i] = _mm512_loadu_ps(from.bin_threshold + 16 * i);
        bin_rank[i] = _mm512_loadu_si512(from.bin_rank + 16 * i);
      }
      codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from.codes)));
      scale = set1(from.bin_scale);
      offset = set1(from.bin_offset);
    }

    template <Lookup kLookup>
    I encode(F t, F x) const {
      const bool sign_magnitude = compares_magnitudes<kLookup>(table);
      const F key = sign_magnitude ? _mm512_abs_ps(t) : t;
      const I one = _mm512_set1_epi32(1);
      I rank;  // thresholds below the key
      if (kLookup != Lookup::kCount) {
        const I bin = _mm512_cvttps_epi32(_mm512_fmadd_ps(key, scale, offset));
        const F threshold = _mm512_permutex2var_ps(bin_threshold[0], bin, bin_threshold[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(key, threshold, _CMP_GT_OQ);
        rank = _mm512_permutex2var_epi32(bin_rank[0], bin, bin_rank[1]);
        rank = _mm512_mask_add_epi32(rank, above, rank, one);
      } else {
        rank = _mm512_setzero_si512();
        for (int i = 0; i < table.num_thresholds; ++i) {
          const __mmask16 above = _mm512_cmp_ps_mask(key, set1(table.thresholds[i]), _CMP_GT_OQ);
          rank = _mm512_mask_add_epi32(rank, above, rank, one);
        }
      }
      I code = kLookup == Lookup::kBins ? rank : _mm512_permutexvar_epi32(rank, codes);
      if (sign_magnitude) {
        const __mmask16 negative = _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ);
        code = _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
      }
      return code;
    }
  };

  // The largest of 32 magnitudes.
  static std::uint16_t largest(const std::uint16_t (&v)[32]) {
    const __m512i all = _mm512_loadu_si512(v);
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return largest_word(half);
  }
  static std::uint32_t largest(const std::uint32_t (&v)[32]) {
    return _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_loadu_si512(v), _mm512_loadu_si512(v + 16)));
  }

  // 32 values, even elements apart from odd ones, and their codes to 16 bytes.
  static void load_group(const float* p, F (&values)[2]) {
    const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const I odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const F low = loadu(p), high = loadu(p + 16);
    values[0] = _mm512_permutex2var_ps(low, even, high);
    values[1] = _mm512_permutex2var_ps(low, odd, high);
  }
  static void load_group(const BFloat16* p, F (&values)[2]) {
    const I pairs = _mm512_loadu_si512(p);
    values[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    values[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  static void load_group(const Float16* p, F (&values)[2]) {
    const I pairs = _mm512_loadu_si512(p);
    values[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    values[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
  static void pack_group(const I (&codes)[2], std::uint8_t* out) {
    const I bytes = _mm512_or_si512(_mm512_slli_epi32(codes[0], 4), codes[1]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(bytes));
  }

  // 32 weights of 16 bits from 16 bytes, by lookup of the ready 16-bit values.
  using Lut16 = __m512i;
  static Lut16 make_lut16(const std::uint16_t* table) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  }
  template <bool kStream>
  static void decode32(const std::uint8_t* p, Lut16 lut, std::uint16_t* out) {
    // Lane i needs the 16-bit word i / 4, shifted so that its nibble comes to the low four bits;
    // the lookup takes five bits, and the table stands in both halves.
    const I words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I spread = _mm512_shuffle_epi8(
        words,
        _mm512_set_epi8(15, 14, 15, 14, 15, 14, 15, 14, 13, 12, 13, 12, 13, 12, 13, 12, 11, 10, 11,
                        10, 11, 10, 11, 10, 9, 8, 9, 8, 9, 8, 9, 8, 7, 6, 7, 6, 7, 6, 7, 6, 5, 4, 5,
                        4, 5, 4, 5, 4, 3, 2, 3, 2, 3, 2, 3, 2, 1, 0, 1, 0, 1, 0, 1, 0));
    const I index = _mm512_srlv_epi16(spread, _mm512_set1_epi64(0x0008'000c'0000'0004));
    const I values = _mm512_permutexvar_epi16(index, lut);
    kStream ? _mm512_stream_si512(reinterpret_cast<I*>(out), values)
            : _mm512_storeu_si512(out, values);
  }

  // Weights of 8 bits, and their products with x in 8 bits: see kernels_int8.h.
  using ByteLut = __m512i;
  static ByteLut make_byte_lut(const std::int8_t* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
#if defined(__AVX512VNNI__)
  // The product of bytes takes one side unsigned: weights are 128 too large, which the sums that
  // come with x make up for.
  static constexpr bool kByteSums = true;
  struct Bytes {
    I value[2];
  };
  static Bytes decode_bytes(ByteLut lut, I words) {
    const I mask = _mm512_set1_epi8(15);
    return {
        { _mm512_shuffle_epi8(lut, _mm512_and_si512(words, mask)),
          _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(words, 4), mask)) }};
  }
  static F dot_bytes(const Bytes& w, const float* x) {
    I sum = _mm512_loadu_si512(x + 2 * kLanes);
    sum = _mm512_dpbusd_epi32(sum, w.value[0], _mm512_loadu_si512(x));
    sum = _mm512_dpbusd_epi32(sum, w.value[1], _mm512_loadu_si512(x + kLanes));
    return _mm512_cvtepi32_ps(sum);
  }
#else
  static constexpr bool kByteSums = false;
  struct Bytes {
    I magnitude[2];
    __mmask64 negative[2];
  };
  static Bytes decode_bytes(ByteLut lut, I words) {
    const I mask = _mm512_set1_epi8(15);
    const I value[2] = {
        _mm512_shuffle_epi8(lut, _mm512_and_si512(words, mask)),
        _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(words, 4), mask))};
    return {{_mm512_abs_epi8(value[0]), _mm512_abs_epi8(value[1])},
            {_mm512_movepi8_mask(value[0]), _mm512_movepi8_mask(value[1])}};
  }
  // The product of bytes takes one side unsigned: |w|, and x with w's sign. Sums of two fit 16
  // bits.
  static F dot_bytes(const Bytes& w, const float* x) {
    const I ones = _mm512_set1_epi16(1);
    I sum[2];
    for (int i = 0; i < 2; ++i) {
      const I q = _mm512_loadu_si512(x + i * kLanes);
      const I turned = _mm512_mask_sub_epi8(q, w.negative[i], _mm512_setzero_si512(), q);
      sum[i] = _mm512_madd_epi16(_mm512_maddubs_epi16(w.magnitude[i], turned), ones);
    }
    return _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], sum[1]));
  }
#endif

  // 255 ascending thresholds. The first five steps of a bisection choose among 31 of them, which
  // registers hold as a tree: node n's children are 2n and 2n + 1.
  struct Thresholds {
    const float* all;
    F top[2];

    explicit Thresholds(const float* from) : all(from) {
      const I nodes = _mm512_setr_epi32(127, 127, 63, 191, 31, 95, 159, 223, 15, 47, 79, 111, 143,
                                        175, 207, 239);
      const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      top[0] = _mm512_i32gather_ps(nodes, from, 4);
      top[1] = _mm512_i32gather_ps(_mm512_slli_epi32(lane, 4), from + 7, 4);
    }
  };
  // 8-bit codes: number of the thresholds below t, by bisection.
  static I count_below(F t, const Thresholds& thresholds) {
    const I one = _mm512_set1_epi32(1);
    I node = one;
    for (int level = 0; level < 5; ++level) {
      // Of the index, four bits count.
      const F probe = _mm512_permutexvar_ps(node, thresholds.top[level / 4]);
      const __mmask16 above = _mm512_cmp_ps_mask(t, probe, _CMP_GT_OQ);
      node = _mm512_add_epi32(node, node);
      node = _mm512_mask_add_epi32(node, above, node, one);
    }
    I count = _mm512_slli_epi32(_mm512_sub_epi32(node, _mm512_set1_epi32(32)), 3);
    for (int step = 4; step > 0; step /= 2) {
      const F probe = _mm512_i32gather_ps(count, thresholds.all + step - 1, 4);
      const __mmask16 above = _mm512_cmp_ps_mask(t, probe, _CMP_GT_OQ);
      count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
    }
    return count;
  }
  static void store_bytes(std::uint8_t* out, I codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(codes));
  }
  // out[i] = table[index[i]], for as many as a register holds.
  static void gather_words(const std::uint32_t* table, const std::uint32_t* index,
                           std::uint32_t* out) {
    _mm512_storeu_si512(out, _mm512_i32gather_epi32(_mm512_loadu_si512(index), table, 4));
  }
  // table[p[i]] of 256 floats.
  static F gather_bytes(const float* table, const std::uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), table, 4);
  }

 private:
  static I natural_shifts() {
    return _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  }
  static F bf16_to_f32(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m256i f32_to_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const I safe =
        _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(static_cast<int>(kFloatQuietNan)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
  }
  static __m256i f32_to_f16(F v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace
}  // namespace qkern::cpu
