#pragma once

// Stands for <cuda_runtime.h> when a kernel file is compiled for the emulator; see README.md.
#include "cuda_emulator/async_proxy.h"
#include "cuda_emulator/float16.h"
#include "cuda_emulator/intrinsics.h"
#include "cuda_emulator/memory.h"
#include "cuda_emulator/scheduler.h"
#include "cuda_emulator/types.h"

#define __device__
#define __host__
#define __constant__

#define QKERN_DEVICE inline
#define QKERN_KERNEL(threads, blocks) void

// One variable for each block, found by the address of a static that each place of declaration has.
#define QKERN_SHARED(Type, name)       \
  static char qkern_key_of_##name = 0; \
  Type& name = *static_cast<Type*>(    \
      ::qkern::cuda::emulator::static_shared(&qkern_key_of_##name, sizeof(Type)))

#define QKERN_DYNAMIC_SHARED(name) unsigned char* name = ::qkern::cuda::emulator::dynamic_shared()
#define QKERN_DYNAMIC_SHARED_1024(name) \
  unsigned char* name = ::qkern::cuda::emulator::dynamic_shared_1024()
