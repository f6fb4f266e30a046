// The table of an instruction set that has every kernel of its own.
#pragma once

#include "kernels.h"

namespace qkern::cpu {
namespace {

constexpr KernelTable kKernels = {
    Simd::kName,
    {quantize_4bit<float>, quantize_4bit<BFloat16>, quantize_4bit<Float16>},
    {dequantize_4bit<float>, dequantize_4bit<BFloat16>, dequantize_4bit<Float16>},
    {quantize_8bit<float>, quantize_8bit<BFloat16>, quantize_8bit<Float16>},
    {dequantize_8bit<float>, dequantize_8bit<BFloat16>, dequantize_8bit<Float16>},
    {linear_4bit<FloatEngine, float>, linear_4bit<FloatEngine, BFloat16>,
     linear_4bit<FloatEngine, Float16>},
    {linear_4bit_dx<FloatEngine, float>, linear_4bit_dx<FloatEngine, BFloat16>,
     linear_4bit_dx<FloatEngine, Float16>},
    {linear_4bit_int8<float>, linear_4bit_int8<BFloat16>, linear_4bit_int8<Float16>},
    {rows_in_8_bits<float>, rows_in_8_bits<BFloat16>, rows_in_8_bits<Float16>},
    {adamw_step<float>, adamw_step<BFloat16>, adamw_step<Float16>},
    dense_matmul,
};

}  // namespace
}  // namespace qkern::cpu
