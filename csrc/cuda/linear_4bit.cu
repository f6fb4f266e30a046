// linear_4bit and linear_4bit_dx: which path a shape takes, and the sum over a split contraction.
#include "linear.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
QKERN_KERNEL(kThreads, 1)
sum_splits_kernel(const float* __restrict__ parts, int count, std::int64_t m, std::int64_t columns,
                  const T* __restrict__ bias, T* __restrict__ y) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < m * columns; i += stride) {
    float sum = parts[i];
    for (int part = 1; part < count; ++part) sum = __fadd_rn(sum, parts[part * m * columns + i]);
    if (bias != nullptr) sum = __fadd_rn(sum, to_float(bias[i % columns]));
    y[i] = from_float<T>(sum);
  }
}

enum class Path { kVector, kMma, kTiled };

struct Plan {
  Path path;
  Split split;
  std::int64_t workspace_bytes;
};

// Rows up to which dot products beat a tensor-core tile, most of which would be idle...
constexpr std::int64_t kVectorRows = 4;
// ... and where there is no tensor core to use.
constexpr std::int64_t kVectorRowsWithoutMma = 16;

bool aligned16(const void* p) { return (reinterpret_cast<std::uintptr_t>(p) & 15u) == 0; }

// What the tensor-core kernels ask of x and W: 16-byte pieces, each within a row and a block.
bool mma_takes(const Linear4bitArgs& args, std::int64_t depth, int capability) {
  const int least = args.dtype == DType::kBFloat16 ? 80 : 75;
  return args.dtype != DType::kFloat32 && capability >= least && args.weight.cols % 32 == 0 &&
         depth % 8 == 0 && args.x_row_stride % 8 == 0 && aligned16(args.x) &&
         aligned16(args.weight.packed);
}

std::int64_t parts_bytes(const Split& split, std::int64_t m, std::int64_t columns) {
  return split.count == 1 ? 0
                          : split.count * m * columns * static_cast<std::int64_t>(sizeof(float));
}

Plan forward_plan(const Linear4bitArgs& args, int capability) {
  const bool mma = mma_takes(args, args.weight.cols, capability);
  if (args.batch_invariant || args.m <= (mma ? kVectorRows : kVectorRowsWithoutMma)) {
    const Split split = linear_vector_split(args);
    const std::int64_t rows = args.m < kVectorLaunchRows ? args.m : kVectorLaunchRows;
    return {Path::kVector, split, parts_bytes(split, rows, args.weight.rows)};
  }
  if (!mma) return {Path::kTiled, {1, args.weight.cols}, 0};
  const Split split = linear_mma_split(args);
  return {Path::kMma, split, parts_bytes(split, args.m, args.weight.rows)};
}

Plan input_gradient_plan(const Linear4bitArgs& args, int capability) {
  if (!mma_takes(args, args.weight.rows, capability)) {
    return {Path::kTiled, {1, args.weight.rows}, 0};
  }
  const Split split = linear_dx_mma_split(args);
  return {Path::kMma, split, parts_bytes(split, args.m, args.weight.cols)};
}

// Runs a plan and checks what it needs.
template <typename MakePlan, typename Run>
Status run_plan(const Linear4bitArgs& args, const MakePlan& make_plan, const Run& run) {
  int capability = 0;
  const Status status = device_capability(&capability);
  if (!status.ok()) return status;
  const Plan plan = make_plan(args, capability);
  if (plan.workspace_bytes > 0 && args.workspace == nullptr) {
    return Status::error("workspace: absent; takes as many bytes as the op's _workspace says");
  }
  return run(plan);
}

template <typename MakePlan>
Status workspace_of(const Linear4bitArgs& args, const MakePlan& make_plan, std::int64_t* bytes) {
  *bytes = 0;
  if (args.m == 0 || args.weight.rows == 0 || args.weight.cols == 0) return Status::success();
  int capability = 0;
  const Status status = device_capability(&capability);
  if (status.ok()) *bytes = make_plan(args, capability).workspace_bytes;
  return status;
}

}  // namespace

Status sum_splits(const Linear4bitArgs& args, int parts, std::int64_t columns, void* stream) {
  const LaunchConfig config{strided_grid(ceil_div(args.m * columns, kThreads)), kThreads, 0,
                            stream};
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch("sum_splits_kernel", sum_splits_kernel<T>, config,
                  static_cast<const float*>(args.workspace), parts, args.m, columns,
                  static_cast<const T*>(args.bias), static_cast<T*>(args.y));
  });
}

Status linear_4bit_workspace(const Linear4bitArgs& args, std::int64_t* bytes) {
  return workspace_of(args, forward_plan, bytes);
}

Status linear_4bit_dx_workspace(const Linear4bitArgs& args, std::int64_t* bytes) {
  return workspace_of(args, input_gradient_plan, bytes);
}

Status linear_4bit(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  return run_plan(args, forward_plan, [&](const Plan& plan) {
    switch (plan.path) {
      case Path::kVector:
        return linear_vector(args, plan.split, stream);
      case Path::kMma:
        return linear_mma(args, plan.split, stream);
      default:
        return linear_tiled(args, false, stream);
    }
  });
}

Status linear_4bit_dx(const Linear4bitArgs& args, void* stream) {
  if (args.m == 0 || args.weight.cols == 0) return Status::success();
  return run_plan(args, input_gradient_plan, [&](const Plan& plan) {
    return plan.path == Path::kMma ? linear_dx_mma(args, plan.split, stream)
                                   : linear_tiled(args, true, stream);
  });
}

}  // namespace qkern::cuda
