// linear_4bit and linear_4bit_dx: the paths behind one call, and the sum over a split contraction.
#include "linear.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
QKERN_KERNEL(kThreads, 1)
sum_splits_kernel(const float* __restrict__ parts, int count, std::int64_t m, std::int64_t columns,
                  Epilogue<T> epilogue, T* __restrict__ y) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < m * columns; i += stride) {
    float sum = parts[i];
    for (int part = 1; part < count; ++part) sum = __fadd_rn(sum, parts[part * m * columns + i]);
    y[i] = from_float<T>(epilogue(sum, i / columns, i % columns));
  }
}

constexpr const char* kTakesTensorCores =
    "path mma: takes float16 from sm_75 and bfloat16 from sm_80 on";
constexpr const char* kTakesHopper =
    "path wgmma: takes float16 and bfloat16 on compute capability 9.0, by code for sm_90a";
constexpr const char* kTakesExperts =
    "path: takes vector, mma or tiled by experts, and a contraction that needs no split";
constexpr const char* kTakesFewer =
    "x and offsets: take fewer than 2^31 rows and 128 for each expert";
constexpr const char* kTakesPieces =
    "path mma or wgmma: takes K % 32 == 0, rows of x in multiples of 8, 16-aligned";

// The kernels of tensor cores read x and W in 16-byte pieces, each within a row and a block.
bool takes_pieces(const Linear4bitArgs& args, bool input_gradient, bool aligned) {
  const std::int64_t depth = input_gradient ? args.weight.rows : args.weight.cols;
  const bool whole_pieces =
      args.weight.cols % 32 == 0 && args.weight.cols <= kLongestRow && depth % 8 == 0;
  return whole_pieces && aligned;
}

// Why args.path cannot compute the matmul, or nullptr where it can.
const char* refusal(const Linear4bitArgs& args, bool input_gradient, bool aligned, int capability) {
  switch (args.path) {
    case CudaPath::kVector:
      return input_gradient ? "path vector: takes the forward only" : nullptr;
    case CudaPath::kMma: {
      const int least = args.dtype == DType::kBFloat16 ? 80 : 75;
      if (args.dtype == DType::kFloat32 || capability < least) return kTakesTensorCores;
      return takes_pieces(args, input_gradient, aligned) ? nullptr : kTakesPieces;
    }
    case CudaPath::kWgmma:
      if (args.dtype == DType::kFloat32 || capability != 90 || !kHasWgmma) return kTakesHopper;
      return takes_pieces(args, input_gradient, aligned) ? nullptr : kTakesPieces;
    default:
      return nullptr;
  }
}

bool is_empty(const Linear4bitArgs& args) {
  return args.m == 0 || args.weight.rows == 0 || args.weight.cols == 0;
}

// The split of args.path.
Split split_of(const Linear4bitArgs& args, bool input_gradient, const DeviceLimits& limits) {
  if (is_empty(args) || args.path == CudaPath::kTiled) return {1, 0};
  if (args.path == CudaPath::kVector) return linear_vector_split(args);
  if constexpr (kHasWgmma) {
    if (args.path == CudaPath::kWgmma) {
      return input_gradient ? linear_dx_wgmma_split(args, limits.processors)
                            : linear_wgmma_split(args, limits.processors);
    }
  }
  return input_gradient ? linear_dx_mma_split(args, limits.capability)
                        : linear_mma_split(args, limits.capability);
}

std::int64_t workspace_bytes(const Linear4bitArgs& args, bool input_gradient, const Split& split) {
  if (split.count == 1) return 0;
  const bool few = args.path == CudaPath::kVector && args.m > kVectorLaunchRows;
  const std::int64_t rows = few ? kVectorLaunchRows : args.m;
  const std::int64_t columns = input_gradient ? args.weight.cols : args.weight.rows;
  return split.count * rows * columns * static_cast<std::int64_t>(sizeof(float));
}

bool aligned16(const void* p) { return (reinterpret_cast<std::uintptr_t>(p) & 15u) == 0; }

bool is_aligned(const Linear4bitArgs& args) {
  return args.x_row_stride % 8 == 0 && aligned16(args.x) && aligned16(args.weight.packed);
}

// A matmul on args.path, checked: whoever chose it may be wrong.
Status run(const Linear4bitArgs& args, bool input_gradient, void* stream) {
  DeviceLimits limits;
  if (args.path == CudaPath::kMma || args.path == CudaPath::kWgmma) {
    const Status status = device_limits(&limits);
    if (!status.ok()) return status;
  }
  const char* const why_not = refusal(args, input_gradient, is_aligned(args), limits.capability);
  if (why_not != nullptr) return Status::error(why_not);
  const Split split = split_of(args, input_gradient, limits);
  if (workspace_bytes(args, input_gradient, split) > 0 && args.workspace == nullptr) {
    return Status::error("workspace: absent; takes as many bytes as linear_4bit_paths says");
  }
  // Sums without terms have a bias, and no tile for the other paths to fetch.
  if (is_empty(args) || args.path == CudaPath::kTiled) {
    return linear_tiled(args, input_gradient, stream);
  }
  if (args.path == CudaPath::kVector) return linear_vector(args, split, stream);
  if constexpr (kHasWgmma) {
    if (args.path == CudaPath::kWgmma) {
      return input_gradient ? linear_dx_wgmma(args, split, stream)
                            : linear_wgmma(args, split, stream);
    }
  }
  return input_gradient ? linear_dx_mma(args, split, limits.capability, stream)
                        : linear_mma(args, split, limits.capability, stream);
}

// By experts, likewise.
Status run_grouped(const GroupedLinear4bitArgs& args, bool input_gradient, void* stream) {
  if (args.all.path == CudaPath::kWgmma) return Status::error(kTakesExperts);
  Linear4bitArgs all = args.all;
  // Only where a contraction is too long for one sum does a batch-invariant call split it.
  all.batch_invariant = true;
  DeviceLimits limits;
  if (all.path == CudaPath::kMma) {
    const Status status = device_limits(&limits);
    if (!status.ok()) return status;
  }
  const char* const why_not = refusal(all, input_gradient, is_aligned(all), limits.capability);
  if (why_not != nullptr) return Status::error(why_not);
  if (split_of(all, input_gradient, limits).count > 1) return Status::error(kTakesExperts);
  // Tiles and the rows in them are counted in 32 bits.
  constexpr std::int64_t kLargestTile = 128;
  if (all.m + kLargestTile * (args.groups.experts + 1) >= std::int64_t{1} << 31) {
    return Status::error(kTakesFewer);
  }
  if (is_empty(all) || all.path == CudaPath::kTiled) {
    return grouped_linear_tiled(args, input_gradient, stream);
  }
  if (all.path == CudaPath::kVector) return grouped_linear_vector(args, stream);
  return input_gradient ? grouped_linear_dx_mma(args, limits.capability, stream)
                        : grouped_linear_mma(args, limits.capability, stream);
}

}  // namespace

Status sum_splits(const Linear4bitArgs& args, int parts, std::int64_t columns, void* stream) {
  const LaunchConfig config{strided_grid(ceil_div(args.m * columns, kThreads)), kThreads, 0,
                            stream};
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch("sum_splits_kernel", sum_splits_kernel<T>, config,
                  static_cast<const float*>(args.workspace), parts, args.m, columns,
                  Epilogue<T>{static_cast<const T*>(args.bias)}, static_cast<T*>(args.y));
  });
}

Status device_limits(DeviceLimits* limits) {
#ifdef QKERN_CUDA_EMULATED
  // An A100's, but for the capability that is under test.
  *limits = {emulator::capability(), 108, 40 << 20};
#else
  int device = 0, major = 0, minor = 0, l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&limits->processors, cudaDevAttrMultiProcessorCount);
  get(&l2_bytes, cudaDevAttrL2CacheSize);
  if (error != cudaSuccess) return Status::error("CUDA device", cudaGetErrorString(error));
  limits->capability = major * 10 + minor;
  limits->l2_bytes = l2_bytes;
#endif
  return Status::success();
}

Status exchange_device(int device, int* before) {
#ifdef QKERN_CUDA_EMULATED
  *before = emulator::launches().current_device;
  emulator::launches().current_device = device;
#else
  cudaError_t error = cudaGetDevice(before);
  if (error == cudaSuccess && *before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be taken for the failure
    return Status::error("CUDA device", cudaGetErrorString(error));
  }
#endif
  return Status::success();
}

#ifndef QKERN_CUDA_EMULATED
Status versions(Versions* found) {
  cudaError_t error = cudaDriverGetVersion(&found->driver);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&found->runtime);
  return error == cudaSuccess ? Status::success()
                              : Status::error("CUDA versions", cudaGetErrorString(error));
}
#endif

Status linear_4bit_paths(const Linear4bitArgs& args, bool input_gradient, bool aligned,
                         MatmulPath (&paths)[kCudaPaths], int* count) {
  *count = 0;
  DeviceLimits limits;
  const Status status = device_limits(&limits);
  if (!status.ok()) return status;
  Linear4bitArgs on_path = args;
  for (int path = 0; path < kCudaPaths; ++path) {
    on_path.path = static_cast<CudaPath>(path);
    if (refusal(on_path, input_gradient, aligned, limits.capability) != nullptr) continue;
    const Split split = split_of(on_path, input_gradient, limits);
    paths[(*count)++] = {on_path.path, split.count,
                         workspace_bytes(on_path, input_gradient, split)};
  }
  return Status::success();
}

Status linear_4bit(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  return run(args, false, stream);
}

Status linear_4bit_dx(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.cols == 0) return Status::success();
  return run(args, true, stream);
}

Status grouped_linear_4bit(const GroupedLinear4bitArgs& args, void* stream) {
  if (args.all.m == 0 || args.all.weight.rows == 0) return Status::success();
  return run_grouped(args, false, stream);
}

Status grouped_linear_4bit_dx(const GroupedLinear4bitArgs& args, void* stream) {
  if (args.all.m == 0 || args.all.weight.cols == 0) return Status::success();
  return run_grouped(args, true, stream);
}

}  // namespace qkern::cuda
