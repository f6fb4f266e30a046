// All kernels of one instruction set; see isa_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "kernel_table.h"
#include "parallel.h"
#include "qkern/codes.h"
#include "qkern/ops.h"
#include "scratch.h"

#include "kernels_elementwise.h"
#include "kernels_matmul.h"

namespace qkern::cpu {
namespace {

constexpr KernelTable kKernels = {
    Simd::kName,
    {quantize_4bit<float>, quantize_4bit<BFloat16>, quantize_4bit<Float16>},
    {dequantize_4bit<float>, dequantize_4bit<BFloat16>, dequantize_4bit<Float16>},
    {quantize_8bit<float>, quantize_8bit<BFloat16>, quantize_8bit<Float16>},
    {dequantize_8bit<float>, dequantize_8bit<BFloat16>, dequantize_8bit<Float16>},
    {linear_4bit<float>, linear_4bit<BFloat16>, linear_4bit<Float16>},
    {linear_4bit_dx<float>, linear_4bit_dx<BFloat16>, linear_4bit_dx<Float16>},
};

}  // namespace
}  // namespace qkern::cpu
