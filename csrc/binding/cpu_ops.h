// The ops of the CPU: after an op's own arguments comes the number of threads.
#pragma once

#include "arguments.h"

namespace qkern::binding {

template <auto kRead, auto kKernel>
Status run_on_cpu(Arguments& from) {
  const auto args = kRead(from);
  const int num_threads = from.num_threads();
  from.end();
  return kKernel(args, num_threads);
}

inline constexpr Op kCpuOps[] = {
    {"quantize_4bit", run_on_cpu<read_args<Quantize4bitArgs>, cpu::quantize_4bit>},
    {"dequantize_4bit", run_on_cpu<read_args<Dequantize4bitArgs>, cpu::dequantize_4bit>},
    {"quantize_8bit", run_on_cpu<read_args<Quantize8bitArgs>, cpu::quantize_8bit>},
    {"dequantize_8bit", run_on_cpu<read_args<Dequantize8bitArgs>, cpu::dequantize_8bit>},
    {"quantize_absmax", run_on_cpu<read_args<QuantizeAbsmaxArgs>, cpu::quantize_absmax>},
    {"linear_4bit", run_on_cpu<read_matmul<true>, cpu::linear_4bit>},
    {"linear_4bit_int8", run_on_cpu<read_matmul<true>, cpu::linear_4bit_int8>},
    {"linear_4bit_dx", run_on_cpu<read_matmul<false>, cpu::linear_4bit_dx>},
    {"grouped_linear_4bit", run_on_cpu<read_grouped_matmul<true>, cpu::grouped_linear_4bit>},
    {"grouped_linear_4bit_dx", run_on_cpu<read_grouped_matmul<false>, cpu::grouped_linear_4bit_dx>},
    {"grouped_linear_4bit_add",
     run_on_cpu<read_grouped_matmul_add<true>, cpu::grouped_linear_4bit>},
    {"grouped_linear_4bit_dx_add",
     run_on_cpu<read_grouped_matmul_add<false>, cpu::grouped_linear_4bit_dx>},
    {"grouped_matmul_into", run_on_cpu<read_args<GroupedMatmulIntoArgs>, cpu::grouped_matmul_into>},
    {"linear_4bit_add", run_on_cpu<read_matmul_add<true>, cpu::linear_4bit>},
    {"linear_4bit_dx_add", run_on_cpu<read_matmul_add<false>, cpu::linear_4bit_dx>},
    {"matmul_into", run_on_cpu<read_args<MatmulIntoArgs>, cpu::matmul_into>},
    {"adamw_step", run_on_cpu<read_adamw_step, cpu::adamw_step>},
};

}  // namespace qkern::binding
