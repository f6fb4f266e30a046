// What products of warpgroups must find at their call: a descriptor, shared memory they can read,
// and registers that were fenced.
#include <algorithm>
#include <cstring>
#include <string>

#include "cuda_emulator/sanitizers.h"
#include "cuda_emulator/wgmma.h"
#include "messages.h"
#include "products.h"
#include "thread.h"

namespace qkern::cuda::emulator {
namespace {

constexpr std::uint32_t kPiece = 1024;  // eight lines of 128 bytes, the unit of the swizzle
constexpr std::uint32_t kLine = 128;
constexpr std::uint32_t kStep = 32;  // 16 values of a line
constexpr unsigned kWarpgroup = 4 * kWarpSize;

// A field of 14 bits that counts units of 16 bytes.
std::uint32_t bytes_at(std::uint64_t descriptor, int bit) {
  return static_cast<std::uint32_t>(descriptor >> bit & 0x3fffu) << 4;
}

std::string descriptor_error(std::uint64_t descriptor, const ProductOperand& b) {
  constexpr std::uint64_t kUnused = std::uint64_t{3} << 14 | std::uint64_t{3} << 30 |
                                    std::uint64_t{7} << 46 | std::uint64_t{0x3ff} << 52;
  if ((descriptor & kUnused) != 0) return "sets unused bits";
  if ((descriptor >> 49 & 7) != 0) return "has a base offset";
  if (descriptor >> 62 != 1) return "has another layout than the 128-byte swizzle";
  if (b.stride % kPiece != 0) return "has a stride that is no multiple of 1024 bytes";
  if (!b.transposed) {
    const std::uint32_t in_piece = b.start % kPiece;
    if (in_piece < kLine && in_piece % kStep == 0) return {};
    return "starts at no multiple of 1024 bytes, or of 32 in the first line from there";
  }
  if (b.leading % kPiece != 0) return "has a leading offset that is no multiple of 1024 bytes";
  return b.start % kPiece == 0 ? "" : "starts at no multiple of 1024 bytes";
}

}  // namespace

ProductOperand product_operand(MmaType type, bool transposed, int columns, std::uint64_t descriptor,
                               const Site& site) {
  const TsanIgnores ignores;
  const ProductOperand b{type,
                         transposed,
                         columns,
                         bytes_at(descriptor, 0),
                         bytes_at(descriptor, 16),
                         bytes_at(descriptor, 32),
                         dynamic_shared_address()};
  const std::string error = descriptor_error(descriptor, b);
  if (!error.empty()) {
    fail(site, text("the descriptor 0x%016llx ", static_cast<unsigned long long>(descriptor))
                   .append(error)
                   .c_str());
  }
  for (int i = static_cast<int>(running_thread().lane()); i < b.granules(); i += kWarpSize) {
    const std::uint32_t offset = b.offset(i);
    if (!in_dynamic_shared(offset)) fail(site, "b is outside dynamic shared memory");
  }
  return b;
}

void require_visible(const ProductOperand& b, const Site& site) {
  const TsanIgnores ignores;
  for (int i = static_cast<int>(running_thread().lane()); i < b.granules(); i += kWarpSize) {
    const std::uint32_t offset = b.offset(i);
    if (visible_to_products(offset)) continue;
    fail(site, text("reads what was written without fence_async_proxy, at byte %u of dynamic "
                    "shared memory",
                    offset)
                   .c_str());
  }
}

void note_fenced(const std::uint32_t* words, std::size_t count) {
  const TsanIgnores ignores;
  auto& fenced = running_thread().fenced;
  // Where arrays overlap, an earlier one is of a scope that has ended.
  const auto overlaps = [&](const FencedArray& array) {
    return array.begin < words + count && words < array.begin + array.words.size();
  };
  fenced.erase(std::remove_if(fenced.begin(), fenced.end(), overlaps), fenced.end());
  fenced.push_back({words, {words, words + count}});
}

void require_fenced(const std::uint32_t* a, const Site& site) {
  constexpr std::size_t kWords = 4;
  const TsanIgnores ignores;
  for (const FencedArray& array : running_thread().fenced) {
    if (a < array.begin || a + kWords > array.begin + array.words.size()) continue;
    if (std::memcmp(a, array.words.data() + (a - array.begin), kWords * sizeof *a) != 0) {
      fail(site, "a was written after wgmma_fence");
    }
    return;
  }
  fail(site, "without wgmma_fence of a");
}

void require_warpgroups(const Site& site) {
  require_hopper(site);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads % kWarpgroup != 0) {
    fail(site, text("needs whole warpgroups; the block has %u threads", threads).c_str());
  }
}

}  // namespace qkern::cuda::emulator
