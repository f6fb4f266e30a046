// Bounds and alignment.
#include "selftest.h"

#include <cstdint>

namespace selftest {
namespace {

std::string misaligned_load() {
  Buffer<float> in = iota(16);
  return run(1, [&] { cuda::load_global16(in.get() + 1); });
}

std::string misaligned_store() {
  Buffer<float> out(16);
  return run(1, [&] { cuda::store_global16(out.get() + 2, uint4{}); });
}

std::string misaligned_words() {
  Buffer<std::uint32_t> in(8);
  return run(1, [&] {
    std::uint32_t words[2];
    cuda::load_words(in.get() + 1, words);
  });
}

template <int kWords>
bool copies_words() {
  Buffer<std::uint32_t> in(8), out(8);
  for (unsigned i = 0; i < 8; ++i) in[i] = 10 + i;
  const char* failure = emulator::launch(dim3(1), dim3(1), 0, [&] {
    std::uint32_t words[kWords];
    cuda::load_words(in.get() + 4, words);
    cuda::store_words(out.get() + 4, words);
  });
  bool right = failure == nullptr;
  for (unsigned i = 0; i < 8; ++i) {
    right = right && out[i] == (i >= 4 && i < 4 + kWords ? 10 + i : 0);
  }
  return right;
}

std::string words() {
  return outcome(nullptr, copies_words<1>() && copies_words<2>() && copies_words<4>());
}

template <int kOffset, std::size_t kShared>
std::string copy_into_shared() {
  Buffer<float> in = iota(16);
  return run(
      1,
      [&] {
        QKERN_DYNAMIC_SHARED(shared);
        cuda::cp_async16(shared + kOffset, in.get(), true);
      },
      kShared);
}

std::string global_out_of_bounds() {
  Buffer<float> out(kThreads - 1);
  return run(kThreads, [&] { out.get()[threadIdx.x] = 1.0f; });
}

std::string static_shared_out_of_bounds() {
  return run(kThreads, [] {
    QKERN_SHARED(Line, line);
    static_cast<volatile float*>(line)[threadIdx.x + 1] = 1.0f;
  });
}

std::string dynamic_shared_out_of_bounds() {
  return run(
      kThreads,
      [] {
        QKERN_DYNAMIC_SHARED(shared);
        static_cast<volatile unsigned char*>(shared)[threadIdx.x] = 1;
      },
      kThreads - 1);
}

}  // namespace

Tests bounds() {
  return {
      {"misaligned_load", misaligned_load},
      {"misaligned_store", misaligned_store},
      {"misaligned_words", misaligned_words},
      {"misaligned_copy", copy_into_shared<8, 32>},
      {"copy_beyond_shared", copy_into_shared<16, 24>},
      {"global_out_of_bounds", global_out_of_bounds},
      {"static_shared_out_of_bounds", static_shared_out_of_bounds},
      {"dynamic_shared_out_of_bounds", dynamic_shared_out_of_bounds},
      {"words", words},
  };
}

}  // namespace selftest
