// y = x W^T + bias and dx = dy W over 4-bit weights. Included once per instruction set, after
// kernels_elementwise.h. Both decode a panel of W into cached scratch, use it for every row of
// the tile and drop it, so W never exists dequantised. A few rows of x take a path of their own
// that keeps the decoded weights in registers.
#pragma once

namespace qkern::cpu {
namespace {

constexpr int kLanes = Simd::kLanes;
constexpr int kTileCols = 2 * kLanes;
constexpr std::int64_t kDepth = 256;        // contraction steps a panel holds
constexpr std::int64_t kMaxTileRows = 240;  // rows of x a tile holds
constexpr std::int64_t kMaxTileCols = 256;
// A stride of a power of two would send the rows of x to the same cache sets.
constexpr std::int64_t kRowStride = kDepth + 16;
constexpr std::int64_t kWordCodes = 8;
constexpr std::int64_t kChunk = kWordCodes * kLanes;  // weights in one register of words
// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr std::int64_t kSerialWork = std::int64_t{1} << 16;

static_assert(kDepth % kChunk == 0, "a panel is made of whole registers of words");
static_assert(kMaxTileCols % kTileCols == 0, "a tile is made of whole panels");

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

// ---- Tiled path

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
  const std::int64_t even = ceil_div(share, per_thread);
  plan.tile_cols = ceil_div(even, kTileCols) * kTileCols;
  plan.col_tiles = ceil_div(cols, plan.tile_cols);
  return plan;
}

// Panels of W: [column / kTileCols][depth][kTileCols] floats, whole panels, zeros past the end.

// Forward: output columns are rows of W, so lanes run over rows. Words of kLanes rows are
// transposed in registers, after which each shift exposes one k for all of them.
inline void decode_panel_forward(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                                 std::int64_t k0, std::int64_t depth, float* panel) {
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::int64_t row_blocks = weight.cols / weight.block_size;
  const std::int64_t block0 = k0 / weight.block_size;
  const std::int64_t blocks = ceil_div(k0 + depth, weight.block_size) - block0;
  constexpr std::int64_t kMaxBlocks = kDepth / kMinBlockSize;
  const std::int64_t groups = ceil_div(rows, kTileCols) * 2;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint8_t* words[kLanes];
    float scales[kMaxBlocks * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      // Rows past the end repeat the last one; their results are never stored.
      const std::int64_t row = row0 + min64(g * kLanes + i, rows - 1);
      words[i] = weight.packed + row * row_bytes + k0 / 2;
      float row_scales[kMaxBlocks];
      load_scales(weight, row * row_blocks + block0, blocks, row_scales);
      for (std::int64_t b = 0; b < blocks; ++b) scales[b * kLanes + i] = row_scales[b];
    }
    float* out = panel + (g / 2) * kDepth * kTileCols + (g % 2) * kLanes;
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
        const std::int64_t at = k + w * kWordCodes;
        const std::int64_t b = (k0 + at) / weight.block_size - block0;
        const Simd::F scale = Simd::loadu(scales + b * kLanes);
        float* to = out + at * kTileCols;
        const Simd::I codes = chunk[w];
        // Element 2j is the high nibble of byte j, element 2j + 1 the low one.
        Simd::storeu(to, Simd::mul(Simd::lookup(lut, Simd::shift_right<4>(codes)), scale));
        Simd::storeu(to + kTileCols, Simd::mul(Simd::lookup(lut, codes), scale));
        Simd::storeu(to + 2 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<12>(codes)), scale));
        Simd::storeu(to + 3 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<8>(codes)), scale));
        Simd::storeu(to + 4 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<20>(codes)), scale));
        Simd::storeu(to + 5 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<16>(codes)), scale));
        Simd::storeu(to + 6 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<28>(codes)), scale));
        Simd::storeu(to + 7 * kTileCols,
                     Simd::mul(Simd::lookup(lut, Simd::shift_right<24>(codes)), scale));
      }
    }
  }
}

// Input gradient: output columns are columns of W, so lanes run along a row as it is packed.
inline void decode_panel_dx(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                            std::int64_t col0, std::int64_t cols, float* panel) {
  const Simd::Lut lut = Simd::make_lut(code_values(weight.codes));
  const std::int64_t row_bytes = weight.cols / 2;
  const std::int64_t row_blocks = weight.cols / weight.block_size;
  const std::int64_t block0 = col0 / weight.block_size;
  const std::int64_t blocks = ceil_div(col0 + cols, weight.block_size) - block0;
  float scales[kMaxTileCols / kMinBlockSize + 1];
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = row0 + r;
    const std::uint8_t* packed = weight.packed + row * row_bytes + col0 / 2;
    load_scales(weight, row * row_blocks + block0, blocks, scales);
    for (std::int64_t c = 0; c < cols; c += kTileCols) {
      // A panel is no wider than the smallest block, and both start on multiples of it.
      const std::int64_t b = (col0 + c) / weight.block_size - block0;
      const Simd::Lut scaled = Simd::scale_lut(lut, scales[b]);
      float* to = panel + (c / kTileCols) * kDepth * kTileCols + r * kTileCols;
      Simd::storeu(to, Simd::natural(packed + c / 2, scaled));
      Simd::storeu(to + kLanes, Simd::natural(packed + (c + kLanes) / 2, scaled));
    }
  }
}
static_assert(kTileCols <= kMinBlockSize, "a panel's columns share one scale");

// Any layout: rows of W decoded one by one, then placed. kForward places a row of W as a column.
template <bool kForward>
void decode_panel_any(const Weight4bit& weight, std::int64_t row0, std::int64_t rows,
                      std::int64_t col0, std::int64_t cols, float* panel) {
  float values[kDepth > kMaxTileCols ? kDepth : kMaxTileCols];
  const std::int64_t width = kForward ? rows : cols;
  const std::int64_t depth = kForward ? cols : rows;
  if (width % kTileCols != 0) {
    float* last = panel + (width / kTileCols) * kDepth * kTileCols;
    std::memset(last, 0, static_cast<std::size_t>(depth * kTileCols) * sizeof(float));
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    decode_flat(weight, (row0 + r) * weight.cols + col0, cols, values);
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::int64_t column = kForward ? r : c;
      const std::int64_t step = kForward ? c : r;
      panel[(column / kTileCols) * kDepth * kTileCols + step * kTileCols + column % kTileCols] =
          values[c];
    }
  }
}

template <bool kForward>
void decode_panel(const Weight4bit& weight, std::int64_t col0, std::int64_t cols,
                  std::int64_t depth0, std::int64_t depth, float* panel) {
  const std::int64_t row0 = kForward ? col0 : depth0;
  const std::int64_t rows = kForward ? cols : depth;
  const std::int64_t wcol0 = kForward ? depth0 : col0;
  const std::int64_t wcols = kForward ? depth : cols;
  if (!rows_are_blocks(weight)) {
    decode_panel_any<kForward>(weight, row0, rows, wcol0, wcols, panel);
  } else if (kForward) {
    decode_panel_forward(weight, row0, rows, wcol0, wcols, panel);
  } else {
    decode_panel_dx(weight, row0, rows, wcol0, wcols, panel);
  }
}

// c[kRows][kTileCols] += a[kRows][depth] * panel[depth][kTileCols]. Sums start anew in each panel:
// short chains of additions lose less than one chain over the whole contraction.
template <int kRows>
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

template <int kRows>
struct MultiplyTable {
  static void fill(MultiplyFn* table) {
    table[kRows] = multiply_tile<kRows>;
    MultiplyTable<kRows - 1>::fill(table);
  }
};
template <>
struct MultiplyTable<0> {
  static void fill(MultiplyFn*) {}
};

template <typename T>
void convert_row(const T* from, std::int64_t n, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Simd::storeu(to + i, Simd::load(from + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::store_partial(to + i, Simd::load_partial(from + i, rest), rest);
  }
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

template <typename T, bool kForward>
void compute_tile(const Linear4bitArgs& args, const TilePlan& plan, const MultiplyFn* multiply,
                  std::int64_t tile, float* scratch) {
  const std::int64_t row0 = (tile % plan.row_tiles) * plan.tile_rows;
  const std::int64_t col0 = (tile / plan.row_tiles) * plan.tile_cols;
  const std::int64_t rows = min64(plan.tile_rows, plan.m - row0);
  const std::int64_t cols = min64(plan.tile_cols, plan.cols - col0);
  const std::int64_t c_stride = plan.tile_cols;
  float* c = scratch;
  float* panel = c + plan.tile_rows * plan.tile_cols;
  float* a = panel + plan.tile_cols * kDepth;
  const T* x = static_cast<const T*>(args.x) + row0 * args.x_row_stride;

  std::memset(c, 0, static_cast<std::size_t>(rows * c_stride) * sizeof(float));
  // Registers are filled evenly: 16 rows go as 8 + 8, not as 14 + 2.
  const std::int64_t strips = ceil_div(rows, Simd::kTileRows);
  for (std::int64_t k = 0; k < plan.depth; k += kDepth) {
    const std::int64_t depth = min64(kDepth, plan.depth - k);
    decode_panel<kForward>(args.weight, col0, cols, k, depth, panel);
    for (std::int64_t r = 0; r < rows; ++r) {
      convert_row(x + r * args.x_row_stride + k, depth, a + r * kRowStride);
    }
    for (std::int64_t n = 0; n < cols; n += kTileCols) {
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t begin = s * rows / strips;
        const std::int64_t end = (s + 1) * rows / strips;
        multiply[end - begin](a + begin * kRowStride, panel + n * kDepth, depth,
                              c + begin * c_stride + n, c_stride);
      }
    }
  }
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y) + row0 * plan.cols + col0;
  for (std::int64_t r = 0; r < rows; ++r) {
    store_row(c + r * c_stride, bias != nullptr ? bias + col0 : nullptr, cols, y + r * plan.cols);
  }
}

// Collects the first failure of a parallel region.
struct SharedStatus {
  const char* message = nullptr;

  void fail(const char* what) { __atomic_store_n(&message, what, __ATOMIC_RELAXED); }
  Status get() const { return Status{message}; }
};

constexpr const char* kOutOfMemory = "out of memory for the kernel's scratch";

template <typename T, bool kForward>
Status linear_tiled(const Linear4bitArgs& args, int num_threads) {
  const std::int64_t cols = kForward ? args.weight.rows : args.weight.cols;
  const std::int64_t depth = kForward ? args.weight.cols : args.weight.rows;
  const TilePlan plan = plan_tiles(args.m, cols, depth, num_threads);
  const std::int64_t floats =
      plan.tile_rows * plan.tile_cols + plan.tile_cols * kDepth + plan.tile_rows * kRowStride;
  static_assert((kMaxTileRows * kMaxTileCols + kMaxTileCols * kDepth + kMaxTileRows * kRowStride) *
                        sizeof(float) <=
                    kScratchLimit,
                "the largest tile fits in the scratch");
  MultiplyFn multiply[Simd::kTileRows + 1] = {};
  MultiplyTable<Simd::kTileRows>::fill(multiply);
  WorkQueue queue(plan.row_tiles * plan.col_tiles, 1);
  SharedStatus status;
  auto body = [&] {
    void* scratch = thread_scratch(static_cast<std::size_t>(floats) * sizeof(float));
    if (scratch == nullptr) return status.fail(kOutOfMemory);
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) {
      compute_tile<T, kForward>(args, plan, multiply, begin, static_cast<float*>(scratch));
    }
  };
  parallel(num_threads, body);
  return status.get();
}

// ---- Few rows of x, forward

constexpr int kMaxVectorRows = 8;
constexpr std::int64_t kMaxStreams = 4;  // rows of W read side by side
constexpr std::int64_t kVectorPanelFloats = std::int64_t{1} << 17;
// Registers of words summed in one chain of additions; see multiply_tile.
constexpr std::int64_t kChainChunks = 32;
// expand_scales reads a whole register from any scale.
constexpr std::int64_t kScalePadding = kLanes;

// A segment of the contraction, short enough that all rows of x fit in the scratch.
struct Segment {
  std::int64_t k0, length;
  std::int64_t chunks;  // whole and partial
};

// x in the order in which shifts expose the codes: [chunk][shift][lane], zeros past the end, so
// that the weights need no shuffling beyond the lookup.
template <typename T>
void permute_row(const T* x, const Segment& segment, float* out) {
  float values[kChunk];
  for (std::int64_t c = 0; c < segment.chunks; ++c) {
    const std::int64_t n = min64(kChunk, segment.length - c * kChunk);
    convert_row(x + c * kChunk, n, values);
    for (std::int64_t i = n; i < kChunk; ++i) values[i] = 0.0f;
    for (int j = 0; j < kWordCodes; ++j) {
      // Shift 4j exposes the low nibble of byte j / 2 for even j: the byte's second element.
      Simd::storeu(out + c * kChunk + j * kLanes, Simd::gather_stride8(values + (j ^ 1)));
    }
  }
}

// Partial sums of kStreams rows of W with kRows rows of x. One register of words is eight
// registers of weights, one per shift. With few rows of x the scale enters once a chunk, on the
// sums; with more it is cheaper on the weights, which all rows share.
template <int kRows, int kStreams>
struct VectorKernel {
  static constexpr bool kScaleWeights = kRows >= 4;

  Simd::F total[kStreams][kRows];

  template <int kShift>
  static void step(const Simd::I (&words)[kStreams], const Simd::Lut& lut, const float* x,
                   std::int64_t x_stride, const Simd::F (&scale)[kStreams],
                   Simd::F (&sum)[kStreams][kRows]) {
    Simd::F w[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      w[s] = Simd::lookup(lut, Simd::shift_right<4 * kShift>(words[s]));
      if (kScaleWeights) w[s] = Simd::mul(w[s], scale[s]);
    }
    for (int r = 0; r < kRows; ++r) {
      const Simd::F value = Simd::loadu(x + r * x_stride + kShift * kLanes);
      for (int s = 0; s < kStreams; ++s) sum[s][r] = Simd::fma(w[s], value, sum[s][r]);
    }
  }

  void chunk(const Simd::I (&words)[kStreams], const Simd::Lut& lut, const float* x,
             std::int64_t x_stride, const Simd::F (&scale)[kStreams]) {
    if constexpr (kScaleWeights) {
      step<0>(words, lut, x, x_stride, scale, total);
      step<1>(words, lut, x, x_stride, scale, total);
      step<2>(words, lut, x, x_stride, scale, total);
      step<3>(words, lut, x, x_stride, scale, total);
      step<4>(words, lut, x, x_stride, scale, total);
      step<5>(words, lut, x, x_stride, scale, total);
      step<6>(words, lut, x, x_stride, scale, total);
      step<7>(words, lut, x, x_stride, scale, total);
    } else {
      // Two chains a sum: one would wait for each multiply-add's latency.
      Simd::F even[kStreams][kRows], odd[kStreams][kRows];
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) even[s][r] = odd[s][r] = Simd::zero();
      }
      step<0>(words, lut, x, x_stride, scale, even);
      step<1>(words, lut, x, x_stride, scale, odd);
      step<2>(words, lut, x, x_stride, scale, even);
      step<3>(words, lut, x, x_stride, scale, odd);
      step<4>(words, lut, x, x_stride, scale, even);
      step<5>(words, lut, x, x_stride, scale, odd);
      step<6>(words, lut, x, x_stride, scale, even);
      step<7>(words, lut, x, x_stride, scale, odd);
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) {
          const Simd::F sum = Simd::add(even[s][r], odd[s][r]);
          total[s][r] = Simd::fma(sum, scale[s], total[s][r]);
        }
      }
    }
  }

  // out[s * kRows + r] += the sums over the segment.
  static void run(const std::uint8_t* const* rows, const float* const* scales,
                  std::int64_t block_size, const float* codes, const float* x,
                  const Segment& segment, float* out) {
    const Simd::Lut lut = Simd::make_lut(codes);
    const std::int64_t x_stride = segment.chunks * kChunk;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
    const int lanes_per_scale =
        block_size / kWordCodes < kLanes ? static_cast<int>(block_size / kWordCodes) : kLanes;
    const Simd::I pattern = Simd::scale_pattern(lanes_per_scale);
    const std::int64_t whole = segment.length / kChunk;
    for (std::int64_t begin = 0; begin < segment.chunks; begin += kChainChunks) {
      VectorKernel kernel;
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) kernel.total[s][r] = Simd::zero();
      }
      Simd::I words[kStreams];
      Simd::F scale[kStreams];
      const std::int64_t end = min64(begin + kChainChunks, segment.chunks);
      std::int64_t c = begin;
      for (; c < min64(end, whole); ++c) {
        for (int s = 0; s < kStreams; ++s) {
          words[s] = Simd::load_words(rows[s] + c * (kChunk / 2));
          scale[s] = Simd::expand_scales(scales[s] + ((c * kChunk) >> shift), pattern);
        }
        kernel.chunk(words, lut, x + c * kChunk, x_stride, scale);
      }
      if (c < end) {
        const int left = static_cast<int>((segment.length - c * kChunk) / kWordCodes);
        for (int s = 0; s < kStreams; ++s) {
          words[s] = Simd::load_words_partial(rows[s] + c * (kChunk / 2), left);
          scale[s] = Simd::expand_scales(scales[s] + ((c * kChunk) >> shift), pattern);
        }
        kernel.chunk(words, lut, x + c * kChunk, x_stride, scale);
      }
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) out[s * kRows + r] += Simd::reduce(kernel.total[s][r]);
      }
    }
  }
};

constexpr int vector_streams(int rows) {
  const int registers = rows >= 4 ? rows : 3 * rows;
  const int fit = Simd::kVectorAccumulators / registers;
  return fit < 1 ? 1 : fit > kMaxStreams ? static_cast<int>(kMaxStreams) : fit;
}

// The scales of up to kMaxStreams rows, one after the other, padded with zeros.
struct VectorScratch {
  float* x;        // [kRows][chunks * kChunk]
  float* scales;   // [kMaxStreams][scale_stride]
  float* partial;  // [run of W's rows][kRows], where the contraction has several segments
};

template <typename T, int kRows>
struct VectorTask {
  static constexpr int kStreams = vector_streams(kRows);
  static constexpr std::int64_t kRun = 256;  // rows of W between two passes over x

  const Linear4bitArgs& args;
  const float* codes;
  std::int64_t row_blocks, scale_stride, segment_length;
  VectorScratch scratch;

  template <int kCount>
  void streams(std::int64_t row, const Segment& segment, float* out) const {
    const Weight4bit& weight = args.weight;
    const std::uint8_t* rows[kCount];
    const float* scales[kCount];
    const std::int64_t block0 = segment.k0 / weight.block_size;
    const std::int64_t blocks = ceil_div(segment.length, weight.block_size);
    for (int s = 0; s < kCount; ++s) {
      rows[s] = weight.packed + (row + s) * (weight.cols / 2) + segment.k0 / 2;
      float* to = scratch.scales + s * scale_stride;
      load_scales(weight, (row + s) * row_blocks + block0, blocks, to);
      for (std::int64_t i = 0; i < kScalePadding; ++i) to[blocks + i] = 0.0f;
      scales[s] = to;
    }
    VectorKernel<kRows, kCount>::run(rows, scales, weight.block_size, codes, scratch.x, segment,
                                     out);
  }

  void permute_x(const Segment& segment) const {
    const T* x = static_cast<const T*>(args.x);
    for (int r = 0; r < kRows; ++r) {
      permute_row(x + r * args.x_row_stride + segment.k0, segment,
                  scratch.x + r * segment.chunks * kChunk);
    }
  }

  Segment segment_at(std::int64_t k0) const {
    const std::int64_t length = min64(segment_length, args.weight.cols - k0);
    return {k0, length, ceil_div(length, kChunk)};
  }

  void run_rows(std::int64_t begin, std::int64_t end) const {
    const bool single = segment_length >= args.weight.cols;
    for (std::int64_t row0 = begin; row0 < end; row0 += kRun) {
      const std::int64_t rows = min64(kRun, end - row0);
      for (std::int64_t i = 0; i < rows * kRows; ++i) scratch.partial[i] = 0.0f;
      for (std::int64_t k0 = 0; k0 < args.weight.cols; k0 += segment_length) {
        const Segment segment = segment_at(k0);
        if (!single) permute_x(segment);
        std::int64_t i = 0;
        for (; i + kStreams <= rows; i += kStreams) {
          streams<kStreams>(row0 + i, segment, scratch.partial + i * kRows);
        }
        for (; i < rows; ++i) streams<1>(row0 + i, segment, scratch.partial + i * kRows);
      }
      store(row0, rows);
    }
  }

  void store(std::int64_t row0, std::int64_t rows) const {
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.y);
    for (int r = 0; r < kRows; ++r) {
      for (std::int64_t i = 0; i < rows; ++i) {
        float value = scratch.partial[i * kRows + r];
        if (bias != nullptr) value += to_float(bias[row0 + i]);
        y[r * args.weight.rows + row0 + i] = from_float<T>(value);
      }
    }
  }
};

template <typename T, int kRows>
Status linear_vector(const Linear4bitArgs& args, int num_threads) {
  using Task = VectorTask<T, kRows>;
  const Weight4bit& weight = args.weight;
  // Segments start on whole blocks and whole registers of words.
  constexpr std::int64_t kSegment = kVectorPanelFloats / kRows / kMaxBlockSize * kMaxBlockSize;
  static_assert(kSegment >= kMaxBlockSize && kMaxBlockSize % kChunk == 0, "segments are whole");
  const std::int64_t segment_length = min64(kSegment, weight.cols);
  const std::int64_t x_floats = kRows * ceil_div(segment_length, kChunk) * kChunk;
  const std::int64_t scale_stride = ceil_div(segment_length, weight.block_size) + kScalePadding;
  const std::int64_t floats = x_floats + kMaxStreams * scale_stride + Task::kRun * kRows;

  const std::int64_t grain =
      ceil_div(ceil_div(weight.rows, std::int64_t{8} * num_threads), kMaxStreams) * kMaxStreams;
  WorkQueue queue(weight.rows, grain);
  SharedStatus status;
  auto body = [&] {
    float* scratch =
        static_cast<float*>(thread_scratch(static_cast<std::size_t>(floats) * sizeof(float)));
    if (scratch == nullptr) return status.fail(kOutOfMemory);
    const VectorScratch parts{scratch, scratch + x_floats,
                              scratch + x_floats + kMaxStreams * scale_stride};
    const Task task{args,
                    code_values(weight.codes),
                    weight.cols / weight.block_size,
                    scale_stride,
                    segment_length,
                    parts};
    if (segment_length >= weight.cols) task.permute_x(task.segment_at(0));
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) task.run_rows(begin, end);
  };
  parallel(num_threads, body);
  return status.get();
}

template <typename T, int kRows>
struct VectorTable {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    if (args.m == kRows) return linear_vector<T, kRows>(args, num_threads);
    return VectorTable<T, kRows - 1>::run(args, num_threads);
  }
};
template <typename T>
struct VectorTable<T, 1> {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    return linear_vector<T, 1>(args, num_threads);
  }
};

// ---- Entries

inline int useful_threads(const Linear4bitArgs& args, int num_threads) {
  const std::int64_t work = args.m * args.weight.rows * args.weight.cols;
  return work < kSerialWork ? 1 : num_threads;
}

template <typename T>
Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  num_threads = useful_threads(args, num_threads);
  // The tiled path sums in an order that does not depend on the number of rows.
  const bool vector =
      args.m <= kMaxVectorRows && !args.batch_invariant && rows_are_blocks(args.weight);
  return vector ? VectorTable<T, kMaxVectorRows>::run(args, num_threads)
                : linear_tiled<T, true>(args, num_threads);
}

template <typename T>
Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  return linear_tiled<T, false>(args, useful_threads(args, num_threads));
}

}  // namespace
}  // namespace qkern::cpu
