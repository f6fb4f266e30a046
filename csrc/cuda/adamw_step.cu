// adamw_step: a step of AdamW, in place, on as many parameters as a launch's arguments have room
// for. A block of threads takes 1024 neighbouring elements of one of them at a time, a warp 256:
// those that share 8-bit moments' scales.
#include "moments.cuh"
#include "qkern/optim_math.h"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = kWarps * kStateBlockSize;
constexpr int kResidentBlocks = 5;  // of a processor
static_assert(kLaneValues * kWarp == kStateBlockSize, "a warp takes a block of moments");

struct DeviceMath {
  QKERN_DEVICE static float add(float a, float b) { return __fadd_rn(a, b); }
  QKERN_DEVICE static float sub(float a, float b) { return __fsub_rn(a, b); }
  QKERN_DEVICE static float mul(float a, float b) { return __fmul_rn(a, b); }
  QKERN_DEVICE static float div(float a, float b) { return __fdiv_rn(a, b); }
  QKERN_DEVICE static float sqrt(float a) { return __fsqrt_rn(a); }
};

struct Piece {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_absmax;
  float* exp_avg_sq_absmax;
  const AdamWFactors* factors;
  std::int64_t numel;
  std::int64_t first_chunk;  // among those of the launch
  std::int64_t first_block;  // among those of its parameter
  std::uint32_t index;
};

// What a launch takes: 4 KB, which every driver allows.
struct Pieces {
#ifdef QKERN_CODEC_SELECT
  static constexpr int kMost = 2;
#else
  static constexpr int kMost = 46;
#endif

  std::int64_t chunks;
  std::uint64_t seed;
  int count;
  bool stochastic_rounding;
  Piece piece[kMost];
};
static_assert(sizeof(Pieces) <= 4096, "arguments of a launch");

// Piece number i. With QKERN_CODEC_SELECT all are read and one is kept: see look_up.
QKERN_DEVICE Piece piece_at(const Pieces& pieces, int i) {
#ifdef QKERN_CODEC_SELECT
  const Piece& a = pieces.piece[0];
  const Piece& b = pieces.piece[1];
  const bool first = i == 0;
  return {first ? a.param : b.param,
          first ? a.grad : b.grad,
          first ? a.exp_avg : b.exp_avg,
          first ? a.exp_avg_sq : b.exp_avg_sq,
          first ? a.exp_avg_absmax : b.exp_avg_absmax,
          first ? a.exp_avg_sq_absmax : b.exp_avg_sq_absmax,
          first ? a.factors : b.factors,
          first ? a.numel : b.numel,
          first ? a.first_chunk : b.first_chunk,
          first ? a.first_block : b.first_block,
          first ? a.index : b.index};
#else
  return pieces.piece[i];
#endif
}

// The number of the piece that a chunk is of: the last that begins with it or before.
QKERN_DEVICE int piece_of(const Pieces& pieces, std::int64_t chunk) {
  static_assert(Pieces::kMost <= 64, "the steps find one of 64");
  int found = 0;
#pragma unroll
  for (int step = 32; step > 0; step /= 2) {
    const int next = found + step;
    if (next < pieces.count && piece_at(pieces, next).first_chunk <= chunk) found = next;
  }
  return found;
}

QKERN_DEVICE AdamWFactors load_factors(const AdamWFactors* from) {
  float values[kAdamWFactors];
#pragma unroll
  for (int i = 0; i < kAdamWFactors; ++i) {
    values[i] = __ldg(reinterpret_cast<const float*>(from) + i);
  }
  AdamWFactors factors;
  std::memcpy(&factors, values, sizeof(factors));
  return factors;
}

// What a lane holds of a T in memory: its value, or the code that a byte is.
template <typename T>
using Held = std::conditional_t<std::is_same_v<T, std::uint8_t>, unsigned, float>;

template <typename T>
QKERN_DEVICE Held<T> held(T stored) {
  if constexpr (sizeof(T) == 1) {
    return stored;
  } else {
    return to_float<T>(stored);
  }
}

template <typename T>
QKERN_DEVICE T stored(Held<T> value) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<T>(value);
  } else {
    return from_float<T>(value);
  }
}

template <typename T>
QKERN_DEVICE void unpack_word(std::uint32_t word, Held<T>* out) {
  if constexpr (sizeof(T) == 4) {
    out[0] = __uint_as_float(word);
  } else if constexpr (sizeof(T) == 2) {
    unpack_pair<T>(word, out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = word >> (8 * i) & 255u;
  }
}

template <typename T>
QKERN_DEVICE std::uint32_t pack_word(const Held<T>* values) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(values[0]);
  } else if constexpr (sizeof(T) == 2) {
    return pack_pair<T>(values[0], values[1]);
  } else {
    const std::uint32_t low = __byte_perm(values[0], values[1], 0x0040);
    return __byte_perm(low, __byte_perm(values[2], values[3], 0x0040), 0x5410);
  }
}

// Where in a warp's 256 elements a lane has its value i: in runs of kRun, and those of neighbouring
// lanes side by side.
template <int kRun>
QKERN_DEVICE constexpr int place_of(int lane, int i) {
  return i / kRun * (kRun * kWarp) + lane * kRun + i % kRun;
}

// A lane's values: a run at a time, or with kRun 1 singly, and `none` from element `count` on.
template <int kRun, typename T>
QKERN_DEVICE void load(const T* from, int count, int lane, Held<T> none,
                       Held<T> (&out)[kLaneValues]) {
  const T* const mine = from + lane * kRun;
#pragma unroll
  for (int i = 0; i < kLaneValues; i += kRun) {
    if constexpr (kRun == 1) {
      out[i] = lane + i * kWarp < count ? held(mine[i * kWarp]) : none;
    } else {
      constexpr int kWordValues = 4 / static_cast<int>(sizeof(T));
      std::uint32_t words[kRun / kWordValues];
      load_words(mine + i * kWarp, words);
#pragma unroll
      for (int w = 0; w < kRun / kWordValues; ++w) {
        unpack_word<T>(words[w], out + i + w * kWordValues);
      }
    }
  }
}

template <int kRun, typename T>
QKERN_DEVICE void store(T* to, int count, int lane, const Held<T> (&values)[kLaneValues]) {
  T* const mine = to + lane * kRun;
#pragma unroll
  for (int i = 0; i < kLaneValues; i += kRun) {
    if constexpr (kRun == 1) {
      if (lane + i * kWarp < count) mine[i * kWarp] = stored<T>(values[i]);
    } else {
      constexpr int kWordValues = 4 / static_cast<int>(sizeof(T));
      std::uint32_t words[kRun / kWordValues];
#pragma unroll
      for (int w = 0; w < kRun / kWordValues; ++w) {
        words[w] = pack_word<T>(values + i + w * kWordValues);
      }
      store_words(mine + i * kWarp, words);
    }
  }
}

// The `count` elements of a piece, at most 256, that a warp takes, from element `begin` on; all of
// it calls this. S is how moments are stored: float, or codes of a byte.
template <int kRun, typename T, typename S>
QKERN_DEVICE void update(const Piece& piece, const AdamWFactors& factors, const Pieces& pieces,
                         const MomentTables* tables, std::int64_t begin, int count) {
  constexpr bool kCodes = sizeof(S) == 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* const params = static_cast<T*>(piece.param) + begin;
  const T* const grads = static_cast<const T*>(piece.grad) + begin;
  S* const exp_avg = static_cast<S*>(piece.exp_avg) + begin;
  S* const exp_avg_sq = static_cast<S*>(piece.exp_avg_sq) + begin;
  const std::int64_t block = begin / kStateBlockSize;
  float* const exp_avg_absmax = piece.exp_avg_absmax + block;
  float* const exp_avg_sq_absmax = piece.exp_avg_sq_absmax + block;
  float param[kLaneValues], grad[kLaneValues], m[kLaneValues], v[kLaneValues];
  [[maybe_unused]] unsigned m_codes[kLaneValues], v_codes[kLaneValues];
  [[maybe_unused]] float m_scale, v_scale;
  if constexpr (kCodes) {
    // Moments that do not exist are zeros and stay so, and do not show in their block's scale.
    // A NaN factor makes the whole block NaN anyway.
    load<kRun>(exp_avg, count, lane, unsigned{MomentTables::Signed::kZero}, m_codes);
    load<kRun>(exp_avg_sq, count, lane, unsigned{MomentTables::Unsigned::kZero}, v_codes);
    m_scale = *exp_avg_absmax;
    v_scale = *exp_avg_sq_absmax;
  } else {
    load<kRun>(exp_avg, count, lane, 0.0f, m);
    load<kRun>(exp_avg_sq, count, lane, 0.0f, v);
  }
  load<kRun>(params, count, lane, 0.0f, param);
  load<kRun>(grads, count, lane, 0.0f, grad);
  // Every lane has read the scales before one replaces them.
  if constexpr (kCodes) __syncwarp();
  // Test `skip` after issuing all loads, so one wait covers them.
  if (factors.skip == 0.0f) {
    if constexpr (kCodes) {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        m[i] = __fmul_rn(tables->exp_avg.values[m_codes[i]], m_scale);
        v[i] = __fmul_rn(tables->exp_avg_sq.values[v_codes[i]], v_scale);
      }
    }
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      grad[i] = DeviceMath::mul(grad[i], factors.grad_scale);
      if constexpr (kCodes) beyond = beyond || fabsf(grad[i]) > kMaxGradient;
    }
    // Rare, so that usual gradients cost a comparison each.
    if (beyond) {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) grad[i] = bounded_gradient(grad[i]);
    }
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      adamw_element<DeviceMath, kCodes>(factors, grad[i], param + i, m + i, v + i);
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (pieces.stochastic_rounding) {
        const std::uint32_t seed = block_seed(step_seed(pieces.seed, factors.step), piece.index,
                                              piece.first_block + block);
#pragma unroll
        for (int i = 0; i < kLaneValues; ++i) {
          // A bfloat16 already: the store does not round it again.
          const std::uint32_t random =
              hash_bits(seed + static_cast<std::uint32_t>(place_of<kRun>(lane, i)));
          param[i] = to_float<T>(T{round_stochastically(param[i], random)});
        }
      }
    }
    store<kRun>(params, count, lane, param);
    if constexpr (kCodes) {
      m_scale = encode_block(tables->exp_avg, m, m_codes);
      store<kRun>(exp_avg, count, lane, m_codes);
      v_scale = encode_block(tables->exp_avg_sq, v, v_codes);
      store<kRun>(exp_avg_sq, count, lane, v_codes);
    } else {
      store<kRun>(exp_avg, count, lane, m);
      store<kRun>(exp_avg_sq, count, lane, v);
    }
  }
  if constexpr (kCodes) {
    if (lane == 0) {
      *exp_avg_absmax = m_scale;
      *exp_avg_sq_absmax = v_scale;
    }
  }
}

template <typename T, typename S>
QKERN_KERNEL(kThreads, kResidentBlocks)
adamw_step_kernel(const Pieces pieces) {
  const MomentTables* tables = nullptr;
  if constexpr (sizeof(S) == 1) {
    QKERN_SHARED(MomentTables, shared);
    stage_tables<kThreads>(shared);
    __syncthreads();
    tables = &shared;
  }
  // 16 bytes of parameters, or of moments where those are wider.
  constexpr int kRun = sizeof(T) == 2 && sizeof(S) == 1 ? 8 : 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int found = 0;
  AdamWFactors factors{};
  std::int64_t end = 0;  // of the piece's chunks
  for (std::int64_t chunk = blockIdx.x; chunk < pieces.chunks; chunk += gridDim.x) {
    if (chunk >= end) {
      found = piece_of(pieces, chunk);
      factors = load_factors(piece_at(pieces, found).factors);
      end = found + 1 < pieces.count ? piece_at(pieces, found + 1).first_chunk : pieces.chunks;
    }
    // Read anew for each chunk, from the cache of arguments: registers are for elements.
    const Piece piece = piece_at(pieces, found);
    const bool aligned = are_aligned16(piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq);
    const std::int64_t begin = (chunk - piece.first_chunk) * kChunk + warp * kStateBlockSize;
    const std::int64_t left = piece.numel - begin;
    if (left <= 0) continue;
    if (aligned && left >= kStateBlockSize) {
      update<kRun, T, S>(piece, factors, pieces, tables, begin, kStateBlockSize);
    } else {
      update<1, T, S>(piece, factors, pieces, tables, begin,
                      left < kStateBlockSize ? static_cast<int>(left) : kStateBlockSize);
    }
  }
}

// The next pieces of one kind, from tensor `*next` on: as many as a launch has room for.
Pieces gather(const AdamWArgs& args, DType dtype, bool codes, std::int64_t* next) {
  Pieces pieces{0, args.seed, 0, args.stochastic_rounding, {}};
  for (; *next < args.count && pieces.count < Pieces::kMost; ++*next) {
    const AdamWTensor& from = args.tensors[*next];
    if (from.dtype != dtype || (from.exp_avg_absmax != nullptr) != codes || from.numel == 0) {
      continue;
    }
    Piece& piece = pieces.piece[pieces.count++];
    piece.param = from.param;
    piece.grad = from.grad;
    piece.exp_avg = from.exp_avg;
    piece.exp_avg_sq = from.exp_avg_sq;
    piece.exp_avg_absmax = from.exp_avg_absmax;
    piece.exp_avg_sq_absmax = from.exp_avg_sq_absmax;
    piece.factors = from.factors;
    piece.numel = from.numel;
    piece.first_chunk = pieces.chunks;
    piece.first_block = from.first / kStateBlockSize;
    piece.index = static_cast<std::uint32_t>(from.index);
    pieces.chunks += ceil_div(from.numel, kChunk);
  }
  return pieces;
}

template <typename T, typename S>
Status start(const AdamWArgs& args, DType dtype, int processors, void* stream) {
  for (std::int64_t next = 0;;) {
    const Pieces pieces = gather(args, dtype, sizeof(S) == 1, &next);
    if (pieces.count == 0) return Status::success();
    // As many blocks as run at once.
    const std::int64_t resident = static_cast<std::int64_t>(kResidentBlocks) * processors;
    const std::int64_t blocks = pieces.chunks < resident ? pieces.chunks : resident;
    const LaunchConfig config{strided_grid(blocks), kThreads, 0, stream};
    const Status status = launch("adamw_step_kernel", adamw_step_kernel<T, S>, config, pieces);
    if (!status.ok()) return status;
  }
}

}  // namespace

Status adamw_step(const AdamWArgs& args, void* stream) {
  DeviceLimits limits;
  Status status = device_limits(&limits);
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const DType dtype : kTypes) {
    if (!status.ok()) break;
    status = with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      const Status started = start<T, float>(args, dtype, limits.processors, stream);
      if (!started.ok()) return started;
      return start<T, std::uint8_t>(args, dtype, limits.processors, stream);
    });
  }
  return status;
}

}  // namespace qkern::cuda
