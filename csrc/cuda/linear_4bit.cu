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

struct Plan {
  Split split;
  std::int64_t workspace_bytes;
};

bool aligned16(const void* p) { return (reinterpret_cast<std::uintptr_t>(p) & 15u) == 0; }

// The tensor-core kernels read x and W in 16-byte pieces, each within a row and a block.
Status check_mma(const Linear4bitArgs& args, std::int64_t depth) {
  DeviceLimits limits;
  const Status status = device_limits(&limits);
  if (!status.ok()) return status;
  const int least = args.dtype == DType::kBFloat16 ? 80 : 75;
  if (args.dtype == DType::kFloat32 || limits.capability < least) {
    return Status::error("path mma: takes float16 from sm_75 and bfloat16 from sm_80 on");
  }
  if (args.weight.cols % 32 != 0 || args.weight.cols > kLongestRow || depth % 8 != 0 ||
      args.x_row_stride % 8 != 0 || !aligned16(args.x) || !aligned16(args.weight.packed)) {
    return Status::error("path mma: takes K % 32 == 0, rows of x in multiples of 8, 16-aligned");
  }
  return Status::success();
}

std::int64_t parts_bytes(const Split& split, std::int64_t m, std::int64_t columns) {
  return split.count == 1 ? 0
                          : split.count * m * columns * static_cast<std::int64_t>(sizeof(float));
}

Plan forward_plan(const Linear4bitArgs& args) {
  if (args.path == CudaPath::kVector) {
    const Split split = linear_vector_split(args);
    const std::int64_t rows = args.m < kVectorLaunchRows ? args.m : kVectorLaunchRows;
    return {split, parts_bytes(split, rows, args.weight.rows)};
  }
  if (args.path == CudaPath::kTiled) return {{1, args.weight.cols}, 0};
  const Split split = linear_mma_split(args);
  return {split, parts_bytes(split, args.m, args.weight.rows)};
}

Plan input_gradient_plan(const Linear4bitArgs& args) {
  if (args.path == CudaPath::kTiled) return {{1, args.weight.rows}, 0};
  const Split split = linear_dx_mma_split(args);
  return {split, parts_bytes(split, args.m, args.weight.cols)};
}

Status check_workspace(const Linear4bitArgs& args, const Plan& plan) {
  return plan.workspace_bytes > 0 && args.workspace == nullptr
             ? Status::error("workspace: absent; takes as many bytes as the op's _workspace says")
             : Status::success();
}

bool is_empty(const Linear4bitArgs& args) {
  return args.m == 0 || args.weight.rows == 0 || args.weight.cols == 0;
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

Status linear_4bit_workspace(const Linear4bitArgs& args, std::int64_t* bytes) {
  *bytes = is_empty(args) ? 0 : forward_plan(args).workspace_bytes;
  return Status::success();
}

Status linear_4bit_dx_workspace(const Linear4bitArgs& args, std::int64_t* bytes) {
  *bytes = is_empty(args) ? 0 : input_gradient_plan(args).workspace_bytes;
  return Status::success();
}

Status linear_4bit(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  const Plan plan = forward_plan(args);
  Status status = check_workspace(args, plan);
  if (!status.ok()) return status;
  if (args.path == CudaPath::kVector) return linear_vector(args, plan.split, stream);
  if (args.path == CudaPath::kTiled) return linear_tiled(args, false, stream);
  status = check_mma(args, args.weight.cols);
  return status.ok() ? linear_mma(args, plan.split, stream) : status;
}

Status linear_4bit_dx(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.cols == 0) return Status::success();
  const Plan plan = input_gradient_plan(args);
  Status status = check_workspace(args, plan);
  if (!status.ok()) return status;
  if (args.path == CudaPath::kVector) return Status::error("path vector: takes the forward only");
  if (args.path == CudaPath::kTiled) return linear_tiled(args, true, stream);
  status = check_mma(args, args.weight.rows);
  return status.ok() ? linear_dx_mma(args, plan.split, stream) : status;
}

}  // namespace qkern::cuda
