// Decoding panels of W for the tiled matmuls: kTileCols output columns by as many steps of the
// contraction as the engine's panel holds.
#pragma once

#include <cstdint>

#include "kernels_elementwise.h"
#include "simd.h"

namespace qkern::cpu {
namespace {

constexpr int kLanes = Simd::kLanes;
constexpr int kTileCols = 2 * kLanes;  // columns of a panel
constexpr std::int64_t kWordCodes = 8;
constexpr std::int64_t kChunk = kWordCodes * kLanes;  // weights in one register of words

static_assert(kTileCols <= kMinBlockSize, "a panel's columns share one scale in a row of W");

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Fetches what will be read soon. Rows of a panel are short, so the hardware, which follows a
// stream to the end of a page, comes too late. The address may lie past the end.
inline void prefetch(const std::uint8_t* p, std::int64_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) +
                                                   static_cast<std::uintptr_t>(offset)));
}

// Rows start on a whole block (and so on a whole byte and word): the fast paths need it.
inline bool rows_are_blocks(const Weight4bit& weight) {
  return weight.cols % weight.block_size == 0;
}

// Weights [start, start + n) of the flat tensor, wherever blocks and bytes begin.
inline void decode_flat(const Weight4bit& weight, std::int64_t start, std::int64_t n, float* out) {
  const float* codes = code_values(weight.codes);
  while (n > 0) {
    const std::int64_t block = start / weight.block_size;
    const std::int64_t take = min64(n, (block + 1) * weight.block_size - start);
    float scale;
    load_scales(weight, block, 1, &scale);
    std::int64_t done = 0;
    if (start % 2 != 0) {
      out[0] = codes[weight.packed[start / 2] & 15] * scale;
      done = 1;
    }
    decode_scaled(weight.packed + (start + done) / 2, take - done, codes, scale, out + done);
    start += take;
    out += take;
    n -= take;
  }
}

// A register of words is exposed in steps: register i of step k is what a shift of each word by
// 4 * (k + i * kSteps) bits exposes in its low four bits.
constexpr int kSteps = static_cast<int>(kWordCodes) / Simd::kExposed;

// value[j]: the weights that a shift by 4 * j exposes.
template <int kStep = 0>
__attribute__((always_inline)) inline void expose_all(const Simd::Lut& lut, Simd::I words,
                                                      Simd::F (&value)[kWordCodes]) {
  Simd::F w[Simd::kExposed];
  Simd::expose<kStep>(lut, words, w);
  for (int i = 0; i < Simd::kExposed; ++i) value[kStep + i * kSteps] = w[i];
  if constexpr (kStep + 1 < kSteps) expose_all<kStep + 1>(lut, words, value);
}

// Forward: output columns are rows of W, so lanes run over rows. Words of kLanes rows are
// transposed in registers, after which each shift exposes one step for all of them.
template <typename Engine>
void decode_panel_forward(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                          std::int64_t k0, std::int64_t depth, typename Engine::Element* panel) {
  constexpr std::int64_t kMaxBlocks = Engine::kDepth / kMinBlockSize + 1;
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::int64_t row_blocks = weight.cols / weight.block_size;
  const std::int64_t block0 = k0 / weight.block_size;
  const std::int64_t blocks = ceil_div(k0 + depth, weight.block_size) - block0;
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
  for (int half = 0; half < 2; ++half) {
    const std::uint8_t* words[kLanes];
    float scales[kMaxBlocks * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      // Rows past the end repeat the last one; their results are never stored.
      const std::int64_t row = row0 + min64(half * kLanes + i, rows - 1);
      words[i] = weight.packed + row * row_bytes + k0 / 2;
      float row_scales[kMaxBlocks + kLanes];  // room for a whole register
      load_scales(weight, row * row_blocks + block0, blocks, row_scales);
      for (std::int64_t b = 0; b < blocks; ++b) scales[b * kLanes + i] = row_scales[b];
    }
    auto* out = panel + half * kLanes * Engine::kInterleave;
    for (std::int64_t k = 0; k < depth; k += kChunk) {
      const std::int64_t left = (depth - k) / kWordCodes;
      Simd::I chunk[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const std::uint8_t* from = words[i] + k / 2;
        prefetch(from, kTileCols * row_bytes);  // the next panel's
        chunk[i] = left >= kLanes ? Simd::load_words(from)
                                  : Simd::load_words_partial(from, static_cast<int>(left));
      }
      Simd::transpose(chunk);
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      for (int w = 0; w < count; ++w) {
        const std::int64_t step = k + w * kWordCodes;
        // Not by a division, which takes as long as the look-ups of some processors' wide
        // registers.
        const Simd::F scale = Simd::loadu(scales + (((k0 + step) >> shift) - block0) * kLanes);
        Simd::F value[kWordCodes];
        expose_all(lut, chunk[w], value);
        // Element 2j is the high nibble of byte j, element 2j + 1 the low one.
        auto* to = out + step * Engine::kParts * kTileCols;
        for (int j = 0; j < kWordCodes; j += 2) {
          Engine::store_steps(to + j * Engine::kParts * kTileCols, Simd::mul(value[j + 1], scale),
                              Simd::mul(value[j], scale));
        }
      }
    }
  }
}

// Input gradient: output columns are columns of W, so lanes run along a row as it is packed, and
// rows are the steps, taken two at a time. `scales[r * scale_stride]` is that of row r.
template <typename Engine>
void decode_panel_dx(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                     std::int64_t col0, const float* scales, std::int64_t scale_stride,
                     typename Engine::Element* panel) {
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::uint8_t* packed = weight.packed + row0 * row_bytes + col0 / 2;
  constexpr std::int64_t kStep = Engine::kParts * kTileCols;
  std::int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const std::uint8_t* first = packed + r * row_bytes;
    prefetch(first, kTileCols / 2);  // the next panel's
    prefetch(first + row_bytes, kTileCols / 2);
    Engine::decode_rows(first, first + row_bytes, lut, scales[r * scale_stride],
                        scales[(r + 1) * scale_stride], panel + r * kStep);
  }
  if (r < rows) {
    const std::uint8_t* last = packed + r * row_bytes;
    Engine::decode_rows(last, last, lut, scales[r * scale_stride], 0.0f, panel + r * kStep);
  }
}

// Any layout: rows of W decoded one by one, then placed. Forward places a row of W as a column.
template <typename Engine, bool kForward>
void decode_panel_any(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                      std::int64_t col0, std::int64_t cols, typename Engine::Element* panel) {
  constexpr int kInterleave = Engine::kInterleave;
  float values[Engine::kDepth];
  for (std::int64_t r = 0; r < rows; ++r) {
    decode_flat(weight, (row0 + r) * weight.cols + col0, cols, values);
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::int64_t column = kForward ? r : c;
      const std::int64_t step = kForward ? c : r;
      const std::int64_t steps = step / kInterleave * Engine::kParts;
      for (int part = 0; part < Engine::kParts; ++part) {
        panel[((steps + part) * kTileCols + column) * kInterleave + step % kInterleave] =
            Engine::element(values[c], part);
      }
    }
  }
}

}  // namespace
}  // namespace qkern::cpu
