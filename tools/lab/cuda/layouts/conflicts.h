// How many passes the banks of shared memory need for one access of a warp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <set>

namespace layouts {

constexpr int kLanes = 32;
constexpr int kBanks = 32;  // of four bytes

// Passes over the banks that an access takes where `bytes(lane)` is the address of a lane's
// `width` bytes. 128-bit accesses go by quarters of a warp, 64-bit ones by halves; equal words are
// one access.
template <typename Address>
int passes(int width, const Address& bytes) {
  const int group = width == 16 ? 8 : width == 8 ? 16 : 32;
  int worst = 0;
  for (int first = 0; first < kLanes; first += group) {
    std::array<std::set<std::int64_t>, kBanks> words;
    for (int lane = first; lane < first + group; ++lane) {
      const std::int64_t begin = bytes(lane) / 4;
      for (std::int64_t word = begin; word < begin + std::max(width / 4, 1); ++word) {
        words[word % kBanks].insert(word);
      }
    }
    for (const auto& bank : words) worst = std::max(worst, static_cast<int>(bank.size()));
  }
  return worst;
}

inline int failures = 0;

template <typename Address>
void check(const char* what, int width, const Address& bytes) {
  const int count = passes(width, bytes);
  if (count == 1) {
    std::printf("%s: conflict-free\n", what);
  } else {
    std::printf("%s: %d passes\n", what, count);
    ++failures;
  }
}

}  // namespace layouts
