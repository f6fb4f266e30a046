// cp.async.
#include "selftest.h"

namespace selftest {
namespace {

// Sums rows of a matrix that is copied to shared memory, kStages rows ahead.
template <int kPending, bool kWait>
void sum_rows_kernel(const float* in, int rows, float* out) {
  constexpr int kStages = 3;
  QKERN_DYNAMIC_SHARED(bytes);
  auto* stages = reinterpret_cast<float*>(bytes);
  const unsigned i = threadIdx.x;
  const auto fetch = [&](int row) {
    if (row < rows && i < kThreads / 4) {
      cuda::cp_async16(stages + row % kStages * kThreads + 4 * i, in + row * kThreads + 4 * i,
                       true);
    }
    cuda::cp_async_commit();
  };
  for (int row = 0; row < kStages - 1; ++row) fetch(row);
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    if (kWait) cuda::cp_async_wait<kPending>();
    __syncthreads();
    fetch(row + kStages - 1);
    sum += stages[row % kStages * kThreads + (kThreads - 1 - i)];
  }
  out[i] = sum;
}

template <int kPending, bool kWait>
std::string sum_rows() {
  constexpr int kRows = 9;
  Buffer<float> in = iota(kRows * kThreads);
  Buffer<float> out(kThreads);
  const char* failure =
      emulator::launch(dim3(1), dim3(kThreads), 3 * kThreads * sizeof(float),
                       [&] { sum_rows_kernel<kPending, kWait>(in.get(), kRows, out.get()); });
  bool right = true;
  for (unsigned i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (int row = 0; row < kRows; ++row) sum += in[row * kThreads + kThreads - 1 - i];
    right = right && out[i] == sum;
  }
  return outcome(failure, right);
}

// One stage only: the next row's copy starts while other threads still read this one.
std::string copy_over_what_is_read() {
  Buffer<float> in = iota(2 * kThreads);
  Buffer<float> out(kThreads);
  const char* failure = emulator::launch(dim3(1), dim3(kThreads), kThreads * sizeof(float), [&] {
    QKERN_DYNAMIC_SHARED(bytes);
    auto* stage = reinterpret_cast<float*>(bytes);
    const unsigned i = threadIdx.x;
    float sum = 0;
    for (int row = 0; row < 2; ++row) {
      if (i < kThreads / 4) {
        cuda::cp_async16(stage + 4 * i, in.get() + row * kThreads + 4 * i, true);
      }
      cuda::cp_async_commit();
      cuda::cp_async_wait<0>();
      __syncthreads();
      sum += stage[kThreads - 1 - i];
    }
    out[i] = sum;
  });
  bool right = true;
  for (unsigned i = 0; i < kThreads; ++i) {
    right = right && out[i] == in[kThreads - 1 - i] + in[2 * kThreads - 1 - i];
  }
  return outcome(failure, right);
}

std::string copy_zero_fill() {
  Buffer<float> out(4, 1.0f);
  const char* failure = emulator::launch(dim3(1), dim3(1), 16, [&] {
    QKERN_DYNAMIC_SHARED(shared);
    cuda::cp_async16(shared, nullptr, false);
    cuda::cp_async_commit();
    cuda::cp_async_wait<0>();
    cuda::store_global16(out.get(), cuda::load_global16(shared));
  });
  return outcome(failure, out[0] == 0 && out[1] == 0 && out[2] == 0 && out[3] == 0);
}

}  // namespace

Tests copies() {
  return {
      {"sum_rows", sum_rows<1, true>},
      {"sum_rows_waiting_too_little", sum_rows<2, true>},
      {"sum_rows_without_wait", sum_rows<0, false>},
      {"copy_over_what_is_read", copy_over_what_is_read},
      {"copy_zero_fill", copy_zero_fill},
  };
}

}  // namespace selftest
