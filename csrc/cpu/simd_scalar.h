#pragma once

#include "simd_base.h"

namespace qkern::cpu {
namespace {

// Plain C++ in groups of four lanes, which compilers turn into SSE2 or NEON where they can. No
// fused multiply-add: without the instruction it is a library call.
struct Simd : SimdBase {
  static constexpr const char* kName = "scalar";
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kVectorAccumulators = 6;
  static constexpr int kVectorFactors = 4;

  struct F {
    float lane[kLanes];
  };
  struct I {
    std::uint32_t lane[kLanes];
  };
  struct Lut {
    float value[16];
  };

  template <typename Fn>
  static F map(Fn fn) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = fn(i);
    return out;
  }
  template <typename Fn>
  static I map_int(Fn fn) {
    I out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = fn(i);
    return out;
  }

  static F zero() { return set1(0.0f); }
  static F set1(float v) {
    return map([&](int) { return v; });
  }
  static F loadu(const float* p) { return load(p); }
  static void storeu(float* p, F v) { store(p, v); }
  template <bool>
  static void put(float* p, F v) {
    storeu(p, v);
  }
  static void fence() {}
  static F add(F a, F b) {
    return map([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F mul(F a, F b) {
    return map([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F fma(F a, F b, F c) {
    return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // Zeros but for the first n lanes.
  static F first_lanes(F v, int n) {
    return map([&](int i) { return i < n ? v.lane[i] : 0.0f; });
  }
  static float reduce(F v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }

  template <typename T>
  static F load(const T* p) {
    return map([&](int i) { return to_float(p[i]); });
  }
  template <typename T>
  static F load_partial(const T* p, int n) {
    return map([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
  }
  template <typename T>
  static void store(T* p, F v) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v.lane[i]);
  }
  template <typename T>
  static void store_partial(T* p, F v, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v.lane[i]);
  }

  // The largest of 32 magnitudes.
  template <typename Bits>
  static Bits largest(const Bits (&v)[32]) {
    Bits found = v[0];
    for (const Bits bits : v) found = bits > found ? bits : found;
    return found;
  }

  // 32 values and, in the same order, their codes to 16 bytes, even elements in the high nibbles.
  template <typename T>
  static void load_group(const T* p, F (&values)[8]) {
    for (int i = 0; i < 8; ++i) values[i] = load(p + i * kLanes);
  }

  // Table lookup: only the low four bits of each lane of `index` count.
  static Lut make_lut(const float* table) {
    Lut out;
    std::memcpy(out.value, table, sizeof(out.value));
    return out;
  }
  static F lookup(const Lut& lut, I index) {
    return map([&](int i) { return lut.value[index.lane[i] & 15u]; });
  }
  static Lut scale_lut(const Lut& lut, float scale) {
    Lut out;
    for (int i = 0; i < 16; ++i) out.value[i] = lut.value[i] * scale;
    return out;
  }

  // Packed words of eight codes each; the first byte comes lowest.
  static std::uint32_t word(const std::uint8_t* p) {
    return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8 |
           static_cast<std::uint32_t>(p[2]) << 16 | static_cast<std::uint32_t>(p[3]) << 24;
  }
  static I load_words(const std::uint8_t* p) {
    return map_int([&](int i) { return word(p + 4 * i); });
  }
  static I load_words_partial(const std::uint8_t* p, int n) {
    return map_int([&](int i) { return i < n ? word(p + 4 * i) : 0u; });
  }
  template <int kShift>
  static I shift_right(I v) {
    return map_int([&](int i) { return v.lane[i] >> kShift; });
  }

  // The weights that step kStep exposes; see kSteps.
  template <int kStep>
  static void expose(const Lut& lut, I words, F (&w)[kExposed]) {
    w[0] = lookup(lut, shift_right<4 * kStep>(words));
  }

  // 4 weights in their own order from 2 bytes.
  static F natural(const std::uint8_t* p, const Lut& lut) {
    return F{
        {lut.value[p[0] >> 4], lut.value[p[0] & 15], lut.value[p[1] >> 4], lut.value[p[1] & 15]}};
  }

  // A word spans 8 codes and a block at least 32, so four words always share one scale.
  static I scale_pattern(int) {
    return map_int([](int) { return 0u; });
  }
  static F expand_scales(const float* scales, I) { return set1(scales[0]); }

  // Lane i takes p[8 * i].
  static F gather_stride8(const float* p) {
    return map([&](int i) { return p[8 * i]; });
  }

  static void transpose(I (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        const std::uint32_t kept = r[i].lane[j];
        r[i].lane[j] = r[j].lane[i];
        r[j].lane[i] = kept;
      }
    }
  }

  // Codes of t = x / absmax, one a lane, by counting thresholds.
  struct Encoder {
    const EncodeTable& table;

    explicit Encoder(const EncodeTable& from) : table(from) {}

    template <Lookup>
    I encode(F t, F x) const {
      return map_int([&](int i) {
        const float key =
            table.sign_magnitude ? float_from_bits(float_bits(t.lane[i]) & 0x7fffffffu) : t.lane[i];
        int count = 0;
        for (int k = 0; k < table.num_thresholds; ++k) count += key > table.thresholds[k] ? 1 : 0;
        std::uint32_t code = table.codes[count];
        if (table.sign_magnitude && x.lane[i] < 0.0f) code |= 8u;
        return code;
      });
    }
  };

  // 32 codes in eight groups to 16 bytes, even elements in the high nibbles.
  static void pack_group(const I (&codes)[8], std::uint8_t* out) {
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t* c = codes[i].lane;
      out[2 * i] = static_cast<std::uint8_t>(c[0] << 4 | c[1]);
      out[2 * i + 1] = static_cast<std::uint8_t>(c[2] << 4 | c[3]);
    }
  }

  struct Lut16 {
    std::uint16_t value[16];
  };
  static Lut16 make_lut16(const std::uint16_t* table) {
    Lut16 out;
    std::memcpy(out.value, table, sizeof(out.value));
    return out;
  }
  template <bool>
  static void decode32(const std::uint8_t* p, const Lut16& lut, std::uint16_t* out) {
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = lut.value[p[i] >> 4];
      out[2 * i + 1] = lut.value[p[i] & 15];
    }
  }

  // Weights of 8 bits, and their products with x in 8 bits: see kernels_int8.h.
  static constexpr bool kByteSums = false;
  struct Bytes {
    std::int8_t value[2][4 * kLanes];
  };
  struct ByteLut {
    std::int8_t value[16];
  };
  static ByteLut make_byte_lut(const std::int8_t* table) {
    ByteLut out;
    std::memcpy(out.value, table, sizeof(out.value));
    return out;
  }
  static Bytes decode_bytes(const ByteLut& lut, I words) {
    Bytes out;
    for (int i = 0; i < 4 * kLanes; ++i) {
      const std::uint32_t byte = words.lane[i / 4] >> (8 * (i % 4));
      out.value[0][i] = lut.value[byte & 15u];
      out.value[1][i] = lut.value[byte >> 4 & 15u];
    }
    return out;
  }
  static F dot_bytes(const Bytes& w, const float* x) {
    const auto* q = reinterpret_cast<const signed char*>(x);
    return map([&](int lane) {
      int sum = 0;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) {
        sum += w.value[0][i] * q[i] + w.value[1][i] * q[4 * kLanes + i];
      }
      return static_cast<float>(sum);
    });
  }

  // 8-bit codes: number of the 255 ascending thresholds below t, by bisection.
  using Thresholds = const float*;
  static I count_below(F t, Thresholds thresholds) {
    return map_int([&](int i) {
      std::uint32_t count = 0;
      for (std::uint32_t step = 128; step > 0; step /= 2) {
        count += t.lane[i] > thresholds[count + step - 1] ? step : 0u;
      }
      return count;
    });
  }
  static void store_bytes(std::uint8_t* out, I codes) {
    for (int i = 0; i < kLanes; ++i) out[i] = static_cast<std::uint8_t>(codes.lane[i]);
  }
  // out[i] = table[index[i]], for as many as a register holds.
  static void gather_words(const std::uint32_t* table, const std::uint32_t* index,
                           std::uint32_t* out) {
    for (int i = 0; i < kLanes; ++i) out[i] = table[index[i]];
  }
  // table[p[i]] of 256 floats.
  static F gather_bytes(const float* table, const std::uint8_t* p) {
    return map([&](int i) { return table[p[i]]; });
  }
};

}  // namespace
}  // namespace qkern::cpu
