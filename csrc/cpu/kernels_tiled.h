// Matmuls over 4-bit weights by tiles: y = x W^T + bias and dx = dy W. A panel of W is decoded into
// cached scratch, used for every row of the tile and dropped, so W never exists dequantised.
// Included once per instruction set, after kernels_elementwise.h.
#pragma once

namespace qkern::cpu {
namespace {

constexpr int kLanes = Simd::kLanes;
constexpr int kTileCols = 2 * kLanes;  // columns of a panel
constexpr std::int64_t kMaxTileRows = 240;
constexpr std::int64_t kMaxTileCols = 256;
constexpr std::int64_t kWordCodes = 8;
constexpr std::int64_t kChunk = kWordCodes * kLanes;  // weights in one register of words

static_assert(kMaxTileCols % kTileCols == 0, "a tile is made of whole panels");
static_assert(kTileCols <= kMinBlockSize, "a panel's columns share one scale in a row of W");

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Collects the first failure of a parallel region.
struct SharedStatus {
  const char* message = nullptr;

  void fail(const char* what) { __atomic_store_n(&message, what, __ATOMIC_RELAXED); }
  Status get() const { return Status{message}; }
};

constexpr const char* kOutOfMemory = "out of memory for the kernel's scratch";

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

template <typename T>
void convert_row(const T* from, std::int64_t n, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Simd::storeu(to + i, Simd::load(from + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::store_partial(to + i, Simd::load_partial(from + i, rest), rest);
  }
}

// c[kRows][kTileCols] += a[kRows][depth] * panel[depth][kTileCols]. Sums start anew in each panel:
// short chains of additions lose less than one chain over the whole contraction.
template <int kRows, int kRowStride>
void multiply_tile(const float* a, const float* panel, std::int64_t depth, float* c,
                   std::int64_t c_stride) {
  Simd::F sum[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = Simd::zero();
    sum[i][1] = Simd::zero();
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const Simd::F w0 = Simd::loadu(panel + k * kTileCols);
    const Simd::F w1 = Simd::loadu(panel + k * kTileCols + kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Simd::F x = Simd::set1(a[i * kRowStride + k]);
      sum[i][0] = Simd::fma(x, w0, sum[i][0]);
      sum[i][1] = Simd::fma(x, w1, sum[i][1]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float* to = c + i * c_stride;
    Simd::storeu(to, Simd::add(Simd::loadu(to), sum[i][0]));
    Simd::storeu(to + kLanes, Simd::add(Simd::loadu(to + kLanes), sum[i][1]));
  }
}

using MultiplyFn = void (*)(const float*, const float*, std::int64_t, float*, std::int64_t);

template <int kRows, int kRowStride>
struct MultiplyTable {
  static void fill(MultiplyFn* table) {
    table[kRows] = multiply_tile<kRows, kRowStride>;
    MultiplyTable<kRows - 1, kRowStride>::fill(table);
  }
};
template <int kRowStride>
struct MultiplyTable<0, kRowStride> {
  static void fill(MultiplyFn*) {}
};

// How a tile is multiplied: this one in float32 with fused multiply-adds. An engine's panel is
// [column / kTileCols][step / kInterleave][kTileCols][kInterleave] elements, steps being those of
// the contraction; its copy of x is [row][kRowStride].
struct FloatEngine {
  using Element = float;
  static constexpr std::int64_t kDepth = 256;  // steps that a panel holds
  static constexpr int kInterleave = 1;
  static constexpr int kRowMultiple = 1;    // rows of a tile come in multiples of this
  static constexpr int kDepthMultiple = 1;  // so do steps; what lies past the end is zero
  // A stride of a power of two would send the rows of x to the same cache sets.
  static constexpr int kRowStride = kDepth + 16;

  MultiplyFn multiply[Simd::kTileRows + 1] = {};

  FloatEngine() { MultiplyTable<Simd::kTileRows, kRowStride>::fill(multiply); }

  static Element element(float value) { return value; }
  static void store_steps(Element* panel, Simd::F first, Simd::F second) {
    Simd::storeu(panel, first);
    Simd::storeu(panel + kTileCols, second);
  }
  template <typename T>
  static void copy_row(const T* from, std::int64_t n, Element* to) {
    convert_row(from, n, to);
  }

  void run(const Element* a, std::int64_t rows, const Element* panels, std::int64_t cols,
           std::int64_t depth, float* c, std::int64_t c_stride) const {
    // Registers are filled evenly: 16 rows go as 8 + 8, not as 14 + 2.
    const std::int64_t strips = ceil_div(rows, Simd::kTileRows);
    for (std::int64_t n = 0; n < cols; n += kTileCols) {
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t begin = s * rows / strips;
        const std::int64_t end = (s + 1) * rows / strips;
        multiply[end - begin](a + begin * kRowStride, panels + n * kDepth, depth,
                              c + begin * c_stride + n, c_stride);
      }
    }
  }
};

// Forward: output columns are rows of W, so lanes run over rows. Words of kLanes rows are
// transposed in registers, after which each shift exposes one step for all of them.
template <typename Engine>
void decode_panel_forward(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                          std::int64_t k0, std::int64_t depth, typename Engine::Element* panel) {
  static_assert(Engine::kDepth % kChunk == 0, "a panel is made of whole registers of words");
  constexpr std::int64_t kMaxBlocks = Engine::kDepth / kMinBlockSize;
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::int64_t row_blocks = weight.cols / weight.block_size;
  const std::int64_t block0 = k0 / weight.block_size;
  const std::int64_t blocks = ceil_div(k0 + depth, weight.block_size) - block0;
  const std::int64_t groups = ceil_div(rows, kTileCols) * 2;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint8_t* words[kLanes];
    float scales[kMaxBlocks * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      // Rows past the end repeat the last one; their results are never stored.
      const std::int64_t row = row0 + min64(g * kLanes + i, rows - 1);
      words[i] = weight.packed + row * row_bytes + k0 / 2;
      float row_scales[kMaxBlocks + kLanes];  // room for a whole register
      load_scales(weight, row * row_blocks + block0, blocks, row_scales);
      for (std::int64_t b = 0; b < blocks; ++b) scales[b * kLanes + i] = row_scales[b];
    }
    auto* out =
        panel + (g / 2) * Engine::kDepth * kTileCols + (g % 2) * kLanes * Engine::kInterleave;
    for (std::int64_t k = 0; k < depth; k += kChunk) {
      const std::int64_t left = (depth - k) / kWordCodes;
      Simd::I chunk[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        chunk[i] = left >= kLanes
                       ? Simd::load_words(words[i] + k / 2)
                       : Simd::load_words_partial(words[i] + k / 2, static_cast<int>(left));
      }
      Simd::transpose(chunk);
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      for (int w = 0; w < count; ++w) {
        const std::int64_t step = k + w * kWordCodes;
        const Simd::F scale =
            Simd::loadu(scales + ((k0 + step) / weight.block_size - block0) * kLanes);
        const Simd::I codes = chunk[w];
        const auto value = [&](Simd::I shifted) {
          return Simd::mul(Simd::lookup(lut, shifted), scale);
        };
        // Element 2j is the high nibble of byte j, element 2j + 1 the low one.
        auto* to = out + step * kTileCols;
        Engine::store_steps(to, value(Simd::shift_right<4>(codes)), value(codes));
        Engine::store_steps(to + 2 * kTileCols, value(Simd::shift_right<12>(codes)),
                            value(Simd::shift_right<8>(codes)));
        Engine::store_steps(to + 4 * kTileCols, value(Simd::shift_right<20>(codes)),
                            value(Simd::shift_right<16>(codes)));
        Engine::store_steps(to + 6 * kTileCols, value(Simd::shift_right<28>(codes)),
                            value(Simd::shift_right<24>(codes)));
      }
    }
  }
}

// Input gradient: output columns are columns of W, so lanes run along a row as it is packed, and
// rows are the steps, taken two at a time.
template <typename Engine>
void decode_panel_dx(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                     std::int64_t col0, std::int64_t cols, typename Engine::Element* panel) {
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::int64_t row_blocks = weight.cols / weight.block_size;
  const std::int64_t block0 = col0 / weight.block_size;
  const std::int64_t blocks = ceil_div(col0 + cols, weight.block_size) - block0;
  float scales[2][kMaxTileCols / kMinBlockSize + 1];
  for (std::int64_t r = 0; r < rows; r += 2) {
    const bool pair = r + 1 < rows;
    const std::uint8_t* packed[2];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t row = row0 + r + (pair ? i : 0);
      packed[i] = weight.packed + row * row_bytes + col0 / 2;
      load_scales(weight, row * row_blocks + block0, blocks, scales[i]);
    }
    for (std::int64_t c = 0; c < cols; c += kTileCols) {
      const std::int64_t block = (col0 + c) / weight.block_size - block0;
      const Simd::Lut first = Simd::scale_lut(lut, scales[0][block]);
      const Simd::Lut second = Simd::scale_lut(lut, scales[1][block]);
      auto* to = panel + (c / kTileCols) * Engine::kDepth * kTileCols + r * kTileCols;
      for (int half = 0; half < 2; ++half) {
        const std::int64_t byte = (c + half * kLanes) / 2;
        Engine::store_steps(to + half * kLanes * Engine::kInterleave,
                            Simd::natural(packed[0] + byte, first),
                            pair ? Simd::natural(packed[1] + byte, second) : Simd::zero());
      }
    }
  }
}

// Any layout: rows of W decoded one by one, then placed. Forward places a row of W as a column.
template <typename Engine, bool kForward>
void decode_panel_any(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                      std::int64_t col0, std::int64_t cols, typename Engine::Element* panel) {
  constexpr int kInterleave = Engine::kInterleave;
  float values[Engine::kDepth > kMaxTileCols ? Engine::kDepth : kMaxTileCols];
  for (std::int64_t r = 0; r < rows; ++r) {
    decode_flat(weight, (row0 + r) * weight.cols + col0, cols, values);
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::int64_t column = kForward ? r : c;
      const std::int64_t step = kForward ? c : r;
      panel[(column / kTileCols) * Engine::kDepth * kTileCols +
            (step / kInterleave * kTileCols + column % kTileCols) * kInterleave +
            step % kInterleave] = Engine::element(values[c]);
    }
  }
}

template <typename Engine, bool kForward>
void decode_panel(const Weight4bit& weight, std::int64_t col0, std::int64_t cols,
                  std::int64_t step0, std::int64_t depth, typename Engine::Element* panel) {
  const std::int64_t row0 = kForward ? col0 : step0;
  const std::int64_t rows = kForward ? cols : depth;
  const std::int64_t wcol0 = kForward ? step0 : col0;
  const std::int64_t wcols = kForward ? depth : cols;
  const bool fast = rows_are_blocks(weight);
  const std::int64_t padded = round_up(depth, Engine::kDepthMultiple);
  if (!fast || padded != depth) {
    for (std::int64_t c = 0; c < cols; c += kTileCols) {
      std::memset(panel + c * Engine::kDepth, 0,
                  static_cast<std::size_t>(padded * kTileCols) * sizeof(*panel));
    }
  }
  if (!fast) {
    decode_panel_any<Engine, kForward>(weight, row0, rows, wcol0, wcols, panel);
  } else if constexpr (kForward) {
    decode_panel_forward<Engine>(weight, row0, rows, wcol0, wcols, panel);
  } else {
    decode_panel_dx<Engine>(weight, row0, rows, wcol0, wcols, panel);
  }
}

struct TilePlan {
  std::int64_t m, cols, depth;  // output [m, cols], contraction over depth
  std::int64_t tile_rows, tile_cols;
  std::int64_t row_tiles, col_tiles;
};

inline TilePlan plan_tiles(std::int64_t m, std::int64_t cols, std::int64_t depth, int num_threads) {
  TilePlan plan{m, cols, depth, 0, 0, 0, 0};
  plan.row_tiles = ceil_div(m, kMaxTileRows);
  plan.tile_rows = ceil_div(m, plan.row_tiles);
  // As many column tiles as divide evenly among the threads.
  const std::int64_t share = ceil_div(cols, num_threads);
  const std::int64_t per_thread = ceil_div(share, kMaxTileCols);
  plan.tile_cols = round_up(ceil_div(share, per_thread), kTileCols);
  plan.col_tiles = ceil_div(cols, plan.tile_cols);
  return plan;
}

template <typename T>
void store_row(const float* from, const T* bias, std::int64_t n, T* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Simd::F value = Simd::loadu(from + i);
    if (bias != nullptr) value = Simd::add(value, Simd::load(bias + i));
    Simd::store(to + i, value);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::F value = Simd::load_partial(from + i, rest);
    if (bias != nullptr) value = Simd::add(value, Simd::load_partial(bias + i, rest));
    Simd::store_partial(to + i, value, rest);
  }
}

// Where a thread's tile lives in its scratch: sums, a panel of W, the rows of x.
template <typename Engine>
struct TileScratch {
  std::int64_t c_floats, panel_elements, x_elements;

  constexpr TileScratch(std::int64_t tile_rows, std::int64_t tile_cols)
      : c_floats((tile_rows + Engine::kRowMultiple - 1) / Engine::kRowMultiple *
                 Engine::kRowMultiple * tile_cols),
        panel_elements(tile_cols * Engine::kDepth),
        x_elements((tile_rows + Engine::kRowMultiple - 1) / Engine::kRowMultiple *
                   Engine::kRowMultiple * Engine::kRowStride) {}

  constexpr std::size_t bytes() const {
    return static_cast<std::size_t>(c_floats) * sizeof(float) +
           static_cast<std::size_t>(panel_elements + x_elements) * sizeof(typename Engine::Element);
  }
};

template <typename Engine, typename T, bool kForward>
void compute_tile(const Linear4bitArgs& args, const TilePlan& plan, const Engine& engine,
                  std::int64_t tile, void* scratch) {
  using Element = typename Engine::Element;
  const std::int64_t row0 = (tile % plan.row_tiles) * plan.tile_rows;
  const std::int64_t col0 = (tile / plan.row_tiles) * plan.tile_cols;
  const std::int64_t rows = min64(plan.tile_rows, plan.m - row0);
  const std::int64_t cols = min64(plan.tile_cols, plan.cols - col0);
  const std::int64_t c_stride = plan.tile_cols;
  const TileScratch<Engine> layout(plan.tile_rows, plan.tile_cols);
  float* c = static_cast<float*>(scratch);
  Element* panel = reinterpret_cast<Element*>(c + layout.c_floats);
  Element* a = panel + layout.panel_elements;
  const T* x = static_cast<const T*>(args.x) + row0 * args.x_row_stride;

  std::memset(c, 0, static_cast<std::size_t>(layout.c_floats) * sizeof(float));
  for (std::int64_t k = 0; k < plan.depth; k += Engine::kDepth) {
    const std::int64_t depth = min64(Engine::kDepth, plan.depth - k);
    const std::int64_t padded = round_up(depth, Engine::kDepthMultiple);
    decode_panel<Engine, kForward>(args.weight, col0, cols, k, depth, panel);
    for (std::int64_t r = 0; r < rows; ++r) {
      Element* to = a + r * Engine::kRowStride;
      Engine::copy_row(x + r * args.x_row_stride + k, depth, to);
      for (std::int64_t i = depth; i < padded; ++i) to[i] = Engine::element(0.0f);
    }
    engine.run(a, rows, panel, cols, padded, c, c_stride);
  }
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y) + row0 * plan.cols + col0;
  for (std::int64_t r = 0; r < rows; ++r) {
    store_row(c + r * c_stride, bias != nullptr ? bias + col0 : nullptr, cols, y + r * plan.cols);
  }
}

template <typename Engine, typename T, bool kForward>
Status linear_tiled(const Linear4bitArgs& args, int num_threads) {
  static_assert(TileScratch<Engine>(kMaxTileRows, kMaxTileCols).bytes() <= kScratchLimit,
                "the largest tile fits in the scratch");
  const std::int64_t cols = kForward ? args.weight.rows : args.weight.cols;
  const std::int64_t depth = kForward ? args.weight.cols : args.weight.rows;
  const TilePlan plan = plan_tiles(args.m, cols, depth, num_threads);
  const std::size_t bytes = TileScratch<Engine>(plan.tile_rows, plan.tile_cols).bytes();
  WorkQueue queue(plan.row_tiles * plan.col_tiles, 1);
  SharedStatus status;
  auto body = [&] {
    void* scratch = thread_scratch(bytes);
    if (scratch == nullptr) return status.fail(kOutOfMemory);
    const Engine engine;
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) {
      compute_tile<Engine, T, kForward>(args, plan, engine, begin, scratch);
    }
  };
  parallel(num_threads, body);
  return status.get();
}

}  // namespace
}  // namespace qkern::cpu
