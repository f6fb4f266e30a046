#pragma once

#include <immintrin.h>

#include "simd_base.h"
#include "simd_x86.h"

namespace qkern::cpu {
namespace {

// 8 float lanes: AVX2, FMA, F16C.
struct Simd : SimdBase {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;
  static constexpr int kVectorAccumulators = 6;  // beside four tables and four registers of weights
  static constexpr int kVectorFactors = 6;

  using F = __m256;
  using I = __m256i;
  // A 16-entry table in two registers: the permute indexes eight lanes.
  struct Lut {
    __m256 low, high;
  };

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F loadu(const float* p) { return _mm256_loadu_ps(p); }
  static void storeu(float* p, F v) { _mm256_storeu_ps(p, v); }
  // kStream: to aligned memory, past the caches; others see it after fence().
  template <bool kStream>
  static void put(float* p, F v) {
    kStream ? _mm256_stream_ps(p, v) : _mm256_storeu_ps(p, v);
  }
  template <bool kStream>
  static void put(std::uint16_t* p, I v) {
    I* to = reinterpret_cast<I*>(p);
    kStream ? _mm256_stream_si256(to, v) : _mm256_storeu_si256(to, v);
  }
  static void fence() { _mm_sfence(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // Zeros but for the first n lanes.
  static F first_lanes(F v, int n) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
  }
  static float reduce(F v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static F load(const float* p) { return loadu(p); }
  static F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static F load_partial(const T* p, int n) {
    return load_padded<Simd>(p, n);
  }

  static void store(float* p, F v) { storeu(p, v); }
  static void store(BFloat16* p, F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I safe =
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(static_cast<int>(kFloatQuietNan)), nan);
    const I halves = _mm256_srli_epi32(safe, 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <typename T>
  static void store_partial(T* p, F v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(T));
  }

  // The largest of 32 magnitudes.
  static std::uint16_t largest(const std::uint16_t (&v)[32]) {
    const I half = _mm256_max_epu16(_mm256_loadu_si256(reinterpret_cast<const I*>(v)),
                                    _mm256_loadu_si256(reinterpret_cast<const I*>(v + 16)));
    return largest_word(half);
  }
  static std::uint32_t largest(const std::uint32_t (&v)[32]) {
    const I* from = reinterpret_cast<const I*>(v);
    const I half = _mm256_max_epu32(
        _mm256_max_epu32(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)),
        _mm256_max_epu32(_mm256_loadu_si256(from + 2), _mm256_loadu_si256(from + 3)));
    __m128i rest = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    rest = _mm_max_epu32(rest, _mm_shuffle_epi32(rest, 0x4e));
    rest = _mm_max_epu32(rest, _mm_shuffle_epi32(rest, 0xb1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(rest));
  }

  // 32 values and, in the same order, their codes to 16 bytes, even elements in the high nibbles.
  template <typename T>
  static void load_group(const T* p, F (&values)[4]) {
    for (int i = 0; i < 4; ++i) values[i] = load(p + i * kLanes);
  }

  // Table lookup: only the low four bits of each lane of `index` count.
  static Lut make_lut(const float* table) {
    return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)};
  }
  static F lookup(const Lut& lut, I index) {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lut.low, index),
                            _mm256_permutevar8x32_ps(lut.high, index), bit3);
  }
  static Lut scale_lut(const Lut& lut, float scale) {
    return {_mm256_mul_ps(lut.low, set1(scale)), _mm256_mul_ps(lut.high, set1(scale))};
  }

  // Packed words of eight codes each.
  static I load_words(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static I load_words_partial(const std::uint8_t* p, int n) {
    std::uint8_t lanes[4 * kLanes] = {};
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * 4);
    return load_words(lanes);
  }
  template <int kShift>
  static I shift_right(I v) {
    return kShift == 0 ? v : _mm256_srli_epi32(v, kShift);
  }

  // The weights that step kStep exposes; see kSteps.
  template <int kStep>
  static void expose(const Lut& lut, I words, F (&w)[kExposed]) {
    w[0] = lookup(lut, shift_right<4 * kStep>(words));
  }

  // For sums, where any order of the weights serves: the bytes of 32 values are looked up, 32 codes
  // an instruction, and joined. That is 12 instructions for four registers, which two units share,
  // where the permutes above take eight and as many shifts and blends, and one unit has them.
  struct Order {
    static constexpr int kExposed = 4;
    struct Lut {
      I bytes[4];
    };
    static Lut make_lut(const float* table) {
      Lut out;
      for (int b = 0; b < 4; ++b) {
        std::uint8_t bytes[16];
        for (int i = 0; i < 16; ++i) {
          bytes[i] = static_cast<std::uint8_t>(float_bits(table[i]) >> (8 * b));
        }
        out.bytes[b] =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      }
      return out;
    }
    // Step 0: the low nibble of each byte. Register i has four bytes' of each 16, from 4i on.
    template <int kStep>
    static void expose(const Lut& lut, I words, F (&w)[kExposed]) {
      const I codes = _mm256_and_si256(shift_right<4 * kStep>(words), _mm256_set1_epi8(15));
      I b[4];
      for (int i = 0; i < 4; ++i) b[i] = _mm256_shuffle_epi8(lut.bytes[i], codes);
      const I low[2] = {_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[0], b[1])};
      const I high[2] = {_mm256_unpacklo_epi8(b[2], b[3]), _mm256_unpackhi_epi8(b[2], b[3])};
      for (int i = 0; i < 2; ++i) {
        w[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
        w[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
      }
    }
    // The elements of a chunk that register i of a step multiplies.
    static F gather(const float* chunk, int step, int i) {
      return _mm256_i32gather_ps(chunk + 8 * i + 1 - step,
                                 _mm256_setr_epi32(0, 2, 4, 6, 32, 34, 36, 38), 4);
    }
  };
  static constexpr bool kOwnOrder = true;

  // 8 weights in their own order from 4 bytes.
  static F natural(const std::uint8_t* p, const Lut& lut) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof(word));
    const I shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    return lookup(lut, _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts));
  }

  // Lane i takes scales[i / lanes_per_scale]; reads 8 floats.
  static I scale_pattern(int lanes_per_scale) {
    return _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                             __builtin_ctz(static_cast<unsigned>(lanes_per_scale)));
  }
  static F expand_scales(const float* scales, I pattern) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), pattern);
  }

  // Lane i takes p[8 * i].
  static F gather_stride8(const float* p) {
    return _mm256_i32gather_ps(p, _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56), 4);
  }

  static void transpose(I (&r)[8]) {
    I t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
      t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  // Codes of t = x / absmax, one a lane, by counting thresholds.
  struct Encoder {
    const EncodeTable& table;
    I codes[2];

    explicit Encoder(const EncodeTable& from) : table(from) {
      for (int i = 0; i < 2; ++i) {
        codes[i] = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from.codes + 8 * i)));
      }
    }

    template <Lookup kLookup>
    I encode(F t, F x) const {
      // Known for a table with bins, so that the loop unrolls.
      const bool sign_magnitude = compares_magnitudes<kLookup>(table);
      const int num_thresholds = kLookup == Lookup::kCount ? table.num_thresholds
                                 : sign_magnitude          ? 7
                                                           : 15;
      const F sign_bit = set1(-0.0f);
      const F key = sign_magnitude ? _mm256_andnot_ps(sign_bit, t) : t;
      I count = _mm256_setzero_si256();
      for (int i = 0; i < num_thresholds; ++i) {
        const F above = _mm256_cmp_ps(key, set1(table.thresholds[i]), _CMP_GT_OQ);
        count = _mm256_sub_epi32(count, _mm256_castps_si256(above));
      }
      if (kLookup == Lookup::kBins) return count;
      const F high = _mm256_castsi256_ps(_mm256_slli_epi32(count, 28));
      I code = _mm256_castps_si256(_mm256_blendv_ps(
          _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(codes[0], count)),
          _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(codes[1], count)), high));
      if (sign_magnitude) {
        const I negative = _mm256_castps_si256(_mm256_cmp_ps(x, zero(), _CMP_LT_OQ));
        code = _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
      }
      return code;
    }
  };

  // 32 codes in four registers to 16 bytes, even elements in the high nibbles.
  static void pack_group(const I (&codes)[4], std::uint8_t* out) {
    const I low = _mm256_packs_epi32(codes[0], codes[1]);
    const I high = _mm256_packs_epi32(codes[2], codes[3]);
    // Packing works within 128-bit halves; one permute of 4-byte groups restores the order.
    const I bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high),
                                                _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }

  // 32 weights of 16 bits from 16 bytes: the ready values' low and high bytes are looked up apart.
  struct Lut16 {
    __m256i low, high;
  };
  static Lut16 make_lut16(const std::uint16_t* table) {
    std::uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = static_cast<std::uint8_t>(table[i] & 0xff);
      high[i] = static_cast<std::uint8_t>(table[i] >> 8);
    }
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<__m128i*>(low))),
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<__m128i*>(high)))};
  }
  template <bool kStream>
  static void decode32(const std::uint8_t* p, const Lut16& lut, std::uint16_t* out) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i odd = _mm_and_si128(bytes, mask);
    const I codes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)),
                                            _mm_unpackhi_epi8(even, odd), 1);
    const I low = _mm256_shuffle_epi8(lut.low, codes);
    const I high = _mm256_shuffle_epi8(lut.high, codes);
    const I first = _mm256_unpacklo_epi8(low, high);
    const I second = _mm256_unpackhi_epi8(low, high);
    put<kStream>(out, _mm256_permute2x128_si256(first, second, 0x20));
    put<kStream>(out + 16, _mm256_permute2x128_si256(first, second, 0x31));
  }

  // Weights of 8 bits, and their products with x in 8 bits: see kernels_int8.h.
  static constexpr bool kByteSums = false;
  struct Bytes {
    I value[2], magnitude[2];
  };
  using ByteLut = __m256i;
  static ByteLut make_byte_lut(const std::int8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static Bytes decode_bytes(ByteLut lut, I words) {
    const I mask = _mm256_set1_epi8(15);
    Bytes out;
    out.value[0] = _mm256_shuffle_epi8(lut, _mm256_and_si256(words, mask));
    out.value[1] = _mm256_shuffle_epi8(lut, _mm256_and_si256(_mm256_srli_epi16(words, 4), mask));
    for (int i = 0; i < 2; ++i) out.magnitude[i] = _mm256_abs_epi8(out.value[i]);
    return out;
  }
  // The product of bytes takes one side unsigned: |w|, and x with w's sign. Sums of two fit 16
  // bits.
  static F dot_bytes(const Bytes& w, const float* x) {
    const I ones = _mm256_set1_epi16(1);
    I sum[2];
    for (int i = 0; i < 2; ++i) {
      const I q = _mm256_loadu_si256(reinterpret_cast<const I*>(x) + i);
      const I pairs = _mm256_maddubs_epi16(w.magnitude[i], _mm256_sign_epi8(q, w.value[i]));
      sum[i] = _mm256_madd_epi16(pairs, ones);
    }
    return _mm256_cvtepi32_ps(_mm256_add_epi32(sum[0], sum[1]));
  }

  // 8-bit codes: number of the 255 ascending thresholds below t, by bisection.
  using Thresholds = const float*;
  static I count_below(F t, Thresholds thresholds) {
    I count = _mm256_setzero_si256();
    for (int step = 128; step > 0; step /= 2) {
      const F probe = _mm256_i32gather_ps(thresholds + step - 1, count, 4);
      const I above = _mm256_castps_si256(_mm256_cmp_ps(t, probe, _CMP_GT_OQ));
      count = _mm256_add_epi32(count, _mm256_and_si256(above, _mm256_set1_epi32(step)));
    }
    return count;
  }
  static void store_bytes(std::uint8_t* out, I codes) {
    const I halves = _mm256_packus_epi32(codes, codes);
    const I bytes = _mm256_packus_epi16(halves, halves);
    const std::int32_t low = _mm256_extract_epi32(bytes, 0);
    const std::int32_t high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(out, &low, 4);
    std::memcpy(out + 4, &high, 4);
  }
  // out[i] = table[index[i]], for as many as a register holds.
  static void gather_words(const std::uint32_t* table, const std::uint32_t* index,
                           std::uint32_t* out) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i found = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), at, 4);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), found);
  }
  // table[p[i]] of 256 floats.
  static F gather_bytes(const float* table, const std::uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(bytes), 4);
  }
};

}  // namespace
}  // namespace qkern::cpu
