// Prints what each intrinsic that csrc/cpu uses gives on the same random and special inputs. Built
// with the compiler's <immintrin.h> and with the twins beside this file, it must print the same.
// NaNs print alike, and lanes that an instruction leaves undefined do not print.
//
// The argument `tiles` prints AMX's, for which the system has to be asked.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

std::mt19937 generator(1);

// Of every kind: signed zeros, subnormals, ties of bfloat16 and float16, large ones, infinities,
// NaNs.
constexpr std::uint32_t kSpecial[] = {
    0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000, 0x80800001, 0x3f800000, 0xbf808000,
    0x3f818000, 0x3f808001, 0x477fefff, 0x477ff000, 0x33000000, 0x33000001, 0x38801000, 0x7f7fffff,
    0xff7f8000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffc12345, 0x4b000001, 0xcf000000,
    0x4effffff, 0x00010000, 0x80400000, 0x007f0000, 0x3effffff, 0x3f000000, 0x40200000, 0xc0600000};

// Bits of floats; `kind` says which.
enum Kind { kAnyBits, kModerate, kSpecials };
constexpr int kKinds = 3;

struct alignas(64) Bytes {
  std::uint32_t words[16];

  explicit Bytes(Kind kind) {
    for (std::uint32_t& word : words) {
      word = generator();
      if (kind == kModerate) word = (word & 0x807fffffu) | (117u + generator() % 20u) << 23;
      if (kind == kSpecials && generator() % 4u != 0) word = kSpecial[generator() % 32u];
    }
  }
  template <typename V>
  V as() const {
    V v;
    std::memcpy(&v, words, sizeof(v));
    return v;
  }
};

template <typename V>
void show(const char* name, const V& value) {
  unsigned char bytes[sizeof(V)];
  std::memcpy(bytes, &value, sizeof(V));
  std::printf("%s ", name);
  for (const unsigned char byte : bytes) std::printf("%02x", byte);
  std::printf("\n");
}
void show_floats(const char* name, __m512 value) {
  std::uint32_t bits[16];
  std::memcpy(bits, &value, sizeof(bits));
  for (std::uint32_t& word : bits) {
    if ((word & 0x7fffffffu) > 0x7f800000u) word = 0x7fc00000u;
  }
  show(name, bits);
}
void show_float(const char* name, float value) { show_floats(name, _mm512_set1_ps(value)); }

#define SHOW(intrinsic, ...) show(#intrinsic, intrinsic(__VA_ARGS__))
#define SHOW_FLOATS(intrinsic, ...) show_floats(#intrinsic, intrinsic(__VA_ARGS__))

void show_arithmetic(Kind kind) {
  const Bytes x(kind), y(kind), z(kind);
  const auto a = x.as<__m512>(), b = y.as<__m512>(), c = z.as<__m512>();
  const auto i = x.as<__m512i>(), j = y.as<__m512i>(), k = z.as<__m512i>();
  const auto mask = static_cast<__mmask16>(generator());
  SHOW_FLOATS(_mm512_add_ps, a, b);
  SHOW_FLOATS(_mm512_sub_ps, a, b);
  SHOW_FLOATS(_mm512_mul_ps, a, b);
  SHOW_FLOATS(_mm512_fmadd_ps, a, b, c);
  SHOW_FLOATS(_mm512_maskz_div_ps, mask, a, b);
  SHOW_FLOATS(_mm512_max_ps, a, b);
  SHOW_FLOATS(_mm512_abs_ps, a);
  SHOW(_mm512_reduce_max_epu32, i);
  SHOW(_mm512_max_epu32, i, j);
  SHOW(_mm512_add_epi32, i, j);
  SHOW(_mm512_sub_epi32, i, j);
  SHOW(_mm512_dpwssd_epi32, i, j, k);
  SHOW(_mm512_dpbusd_epi32, i, j, k);
  SHOW(_mm512_madd_epi16, i, j);
  SHOW(_mm512_maddubs_epi16, i, j);
  SHOW(_mm512_abs_epi8, i);
  SHOW_FLOATS(_mm512_dpbf16_ps, a, y.as<__m512bh>(), z.as<__m512bh>());
  if (kind != kSpecials) show_float("_mm512_reduce_add_ps", _mm512_reduce_add_ps(a));
}

void show_bits(Kind kind) {
  const Bytes x(kind), y(kind), z(kind);
  const auto i = x.as<__m512i>(), j = y.as<__m512i>(), k = z.as<__m512i>();
  const auto small32 = _mm512_and_si512(j, _mm512_set1_epi32(0x3f));
  const auto small16 = _mm512_and_si512(j, _mm512_set1_epi32(0x001f001f));
  SHOW(_mm512_and_si512, i, j);
  SHOW(_mm512_or_si512, i, j);
  SHOW(_mm512_ternarylogic_epi32, i, j, k, 0xea);
  SHOW(_mm512_ternarylogic_epi32, i, j, k, 0x36);
  SHOW(_mm512_slli_epi32, i, 3);
  SHOW(_mm512_slli_epi32, i, 16);
  SHOW(_mm512_srli_epi32, i, 12);
  SHOW(_mm512_srli_epi32, i, 32);
  SHOW(_mm512_srli_epi16, i, 4);
  SHOW(_mm512_srli_epi16, i, 16);
  SHOW(_mm512_srlv_epi32, i, small32);
  SHOW(_mm512_srlv_epi16, i, small16);
}

void show_masks(Kind kind) {
  const Bytes x(kind), y(kind), z(kind);
  const auto a = x.as<__m512>();
  // Some lanes are equal.
  const auto b = _mm512_castsi512_ps(
      _mm512_mask_mov_epi32(y.as<__m512i>(), static_cast<__mmask16>(generator()), x.as<__m512i>()));
  const auto i = x.as<__m512i>(), j = y.as<__m512i>(), k = z.as<__m512i>();
  const auto mask = static_cast<__mmask16>(generator());
  SHOW(_mm512_cmp_ps_mask, a, b, _CMP_LT_OQ);
  SHOW(_mm512_cmp_ps_mask, a, b, _CMP_GT_OQ);
  SHOW(_mm512_cmp_ps_mask, a, b, _CMP_GE_OQ);
  SHOW(_mm512_cmp_ps_mask, a, b, _CMP_NEQ_UQ);
  SHOW(_mm512_cmp_ps_mask, a, b, _CMP_UNORD_Q);
  SHOW(_mm512_mask_mov_epi32, i, mask, j);
  SHOW(_mm512_maskz_mov_ps, mask, a);
  SHOW(_mm512_mask_set1_epi32, i, mask, 77);
  SHOW(_mm512_movepi8_mask, i);
  SHOW(_mm512_mask_sub_epi8, i, _mm512_movepi8_mask(k), j, k);
  SHOW(_mm512_set1_epi8, 77);
  SHOW(_mm512_set1_epi16, -777);
  SHOW(_mm512_mask_add_epi32, i, mask, j, k);
  SHOW(_mm512_mask_or_epi32, i, mask, j, k);
}

void show_lookups(Kind kind) {
  const Bytes x(kind), y(kAnyBits), z(kind);
  const auto a = x.as<__m512>(), b = z.as<__m512>();
  const auto i = x.as<__m512i>(), at = y.as<__m512i>(), k = z.as<__m512i>();
  SHOW(_mm512_permutexvar_epi32, at, i);
  SHOW(_mm512_permutexvar_ps, at, a);
  SHOW(_mm512_permutexvar_epi16, at, i);
  SHOW(_mm512_permutexvar_epi8, at, i);
  SHOW(_mm512_permutex2var_epi32, i, at, k);
  SHOW(_mm512_permutex2var_ps, a, at, b);
  SHOW(_mm512_shuffle_epi8, i, at);
  SHOW(_mm512_unpacklo_epi32, i, k);
  SHOW(_mm512_unpackhi_epi32, i, k);
  SHOW(_mm512_unpacklo_epi64, i, k);
  SHOW(_mm512_unpackhi_epi64, i, k);
  SHOW(_mm512_shuffle_i32x4, i, k, 0x88);
  SHOW(_mm512_shuffle_i32x4, i, k, 0xdd);
  SHOW(_mm512_shuffle_i32x4, i, k, 0x1b);
  SHOW(_mm512_broadcast_i64x4, x.as<__m256i>());
  SHOW(_mm512_broadcast_i32x4, x.as<__m128i>());
  SHOW(_mm512_extracti64x4_epi64, i, 0);
  SHOW(_mm512_extracti64x4_epi64, i, 1);
  SHOW(_mm512_castsi512_si256, i);
  show("_mm512_castsi256_si512", _mm512_castsi512_si256(_mm512_castsi256_si512(x.as<__m256i>())));
  show("_mm512_castsi512_ps", _mm512_castps_si512(_mm512_castsi512_ps(i)));
}

void show_conversions(Kind kind) {
  const Bytes x(kind), y(kind);
  const auto a = x.as<__m512>(), b = y.as<__m512>();
  const auto i = x.as<__m512i>();
  SHOW(_mm512_cvtps_epi32, a);
  SHOW(_mm512_cvttps_epi32, a);
  SHOW_FLOATS(_mm512_cvtepi32_ps, i);
  SHOW_FLOATS(_mm512_cvtph_ps, x.as<__m256i>());
  SHOW(_mm512_cvtps_ph, a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  SHOW(_mm512_cvtepu8_epi32, x.as<__m128i>());
  SHOW(_mm512_cvtepu16_epi32, x.as<__m256i>());
  SHOW(_mm512_cvtepi32_epi16, i);
  SHOW(_mm512_cvtepi32_epi8, i);
  SHOW(_mm512_cvtne2ps_pbh, a, b);
}

void show_memory() {
  const Bytes x(kAnyBits), y(kAnyBits);
  const auto mask = static_cast<__mmask16>(generator());
  Bytes to(kAnyBits);
  SHOW(_mm512_loadu_ps, x.words);
  SHOW(_mm512_loadu_si512, x.words);
  SHOW(_mm512_load_si512, x.words);
  SHOW(_mm512_maskz_loadu_ps, mask, x.words);
  SHOW(_mm512_maskz_loadu_epi32, mask, x.words);
  SHOW(_mm256_maskz_loadu_epi16, mask, x.words);
  _mm512_mask_storeu_ps(to.words, mask, y.as<__m512>());
  show("_mm512_mask_storeu_ps", to);
  _mm256_mask_storeu_epi16(to.words, mask, x.as<__m256i>());
  show("_mm256_mask_storeu_epi16", to);
  _mm512_storeu_ps(to.words, x.as<__m512>());
  show("_mm512_storeu_ps", to);
  _mm512_storeu_si512(to.words, y.as<__m512i>());
  show("_mm512_storeu_si512", to);
  _mm512_stream_ps(reinterpret_cast<float*>(to.words), x.as<__m512>());
  show("_mm512_stream_ps", to);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to.words), y.as<__m512i>());
  show("_mm512_stream_si512", to);
  const __m512i index = _mm512_and_si512(y.as<__m512i>(), _mm512_set1_epi32(15));
  SHOW(_mm512_i32gather_ps, index, x.words, 4);
  SHOW(_mm512_i32gather_epi32, index, x.words, 4);
}

void show_constants() {
  SHOW(_mm512_setzero_ps);
  SHOW(_mm512_setzero_si512);
  SHOW(_mm512_set1_ps, 1.5f);
  SHOW(_mm512_set1_epi32, -7);
  SHOW(_mm512_set1_epi64, 0x0008'000c'0000'0004);
  SHOW(_mm512_setr_epi32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  SHOW(_mm512_set_epi16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
       22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32);
  SHOW(_mm512_set_epi8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
       22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44,
       45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64);
}

#if defined(__AMX_BF16__) || defined(QKERN_TWINS)
struct alignas(64) TileBytes {
  std::uint32_t words[16][16];

  explicit TileBytes(Kind kind) {
    for (auto& row : words) std::memcpy(row, Bytes(kind).words, sizeof(row));
  }
};

void show_tiles(Kind kind) {
  alignas(64) struct {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 32, 64, 32};
    std::uint8_t rows[16] = {16, 16, 16, 9, 9, 16};
  } config;
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  TileBytes sums(kind), x(kind), w(kind);
  _tile_loadd(0, sums.words, 64);
  _tile_loadd(1, x.words, 64);
  _tile_loadd(2, w.words, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums.words, 64);
  for (const auto& row : sums.words) {
    __m512 values;
    std::memcpy(&values, row, sizeof(values));
    show_floats("_tile_dpbf16ps", values);
  }
  // Smaller ones: 9 x 32 by 32 x 8.
  TileBytes small(kModerate);
  _tile_zero(3);
  _tile_loadd(4, x.words, 64);
  _tile_loadd(5, w.words, 64);
  _tile_dpbf16ps(3, 4, 5);
  _tile_stored(3, small.words, 64);
  for (const auto& row : small.words) {
    __m512 values;
    std::memcpy(&values, row, sizeof(values));
    show_floats("_tile_zero", values);
  }
  _tile_release();
}
#endif

}  // namespace

int main(int count, char**) {
  if (count > 1) {
#if defined(__AMX_BF16__) || defined(QKERN_TWINS)
#if !defined(QKERN_TWINS)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
    for (int round = 0; round < 20; ++round) {
      show_tiles(kModerate);
      show_tiles(kSpecials);
    }
#endif
    return 0;
  }
  show_constants();
  for (int round = 0; round < 200; ++round) {
    for (int kind = 0; kind < kKinds; ++kind) {
      show_arithmetic(static_cast<Kind>(kind));
      show_bits(static_cast<Kind>(kind));
      show_masks(static_cast<Kind>(kind));
      show_lookups(static_cast<Kind>(kind));
      show_conversions(static_cast<Kind>(kind));
    }
    show_memory();
  }
  return 0;
}
