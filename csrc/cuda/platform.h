// The one header between the kernels and what runs them: the CUDA toolkit, or the emulator in
// tools/lab/cuda/emulator that runs the same sources on a CPU.
//
// A kernel file uses, besides CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, ...):
//   QKERN_DEVICE                  a device function, inlined
//   QKERN_KERNEL(threads, blocks) a kernel with its launch bounds
//   QKERN_SHARED(Type, name)      `name` is a Type& in shared memory, uninitialised, 16-aligned
//   QKERN_DYNAMIC_SHARED(name)    `name` is an unsigned char* to the launch's dynamic shared
//   memory,
//                                 16-aligned; QKERN_DYNAMIC_SHARED_1024: aligned to 1024 bytes
//   launch(what, kernel, config, args...)
#pragma once

#include <cstddef>
#include <cstdint>

#include "qkern/status.h"

#ifdef QKERN_CUDA_EMULATED
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define QKERN_DEVICE __device__ __forceinline__
#define QKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define QKERN_SHARED(Type, name) __shared__ __align__(16) Type name
#define QKERN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define QKERN_DYNAMIC_SHARED_1024(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace qkern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct LaunchConfig {
  dim3 grid;
  int threads = 0;
  std::size_t shared_bytes = 0;
  void* stream = nullptr;
};

// Starts `kernel`; `what` is the name that an error carries.
template <typename... Parameters, typename... Args>
Status launch(const char* what, void (*kernel)(Parameters...), const LaunchConfig& config,
              const Args&... args) {
#ifdef QKERN_CUDA_EMULATED
  const char* error = emulator::launch(
      config.grid, dim3(static_cast<unsigned>(config.threads)), config.shared_bytes,
      [&] { kernel(args...); }, config.stream);
  return error == nullptr ? Status::success() : Status::error(what, error);
#else
  // A kernel's first launch loads its code, which a stream under capture forbids a thread that does
  // not ask for leave.
  struct Leave {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Leave() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Leave() { cudaThreadExchangeStreamCaptureMode(&mode); }
    Leave(const Leave&) = delete;
    Leave& operator=(const Leave&) = delete;
  };
  const Leave leave;
  // A kernel takes more than this much shared memory only when told to.
  constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
  if (config.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) return Status::error(what, cudaGetErrorString(error));
  }
  kernel<<<config.grid, static_cast<unsigned>(config.threads), config.shared_bytes,
           static_cast<cudaStream_t>(config.stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status::success() : Status::error(what, cudaGetErrorString(error));
#endif
}

}  // namespace qkern::cuda
