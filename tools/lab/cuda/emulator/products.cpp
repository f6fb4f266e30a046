// Products of warpgroups: what is in flight and who called what. Compiled without ThreadSanitizer's
// instrumentation, for it reads and writes other lanes' registers.
#include "products.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <vector>

#include "cuda_emulator/float16.h"
#include "cuda_emulator/sanitizers.h"
#include "cuda_emulator/wgmma.h"
#include "messages.h"
#include "thread.h"

namespace qkern::cuda::emulator {
namespace {

constexpr int kRows = 16;  // of a warp
constexpr int kDepth = 16;
constexpr unsigned kWarpsOfGroup = 4;

// A warp's part of d while products add to it.
struct Sums {
  float* lanes[kWarpSize];
  int columns;
  int unfinished;
  std::vector<float> values;  // [kRows][columns]
};

struct Product {
  ProductOperand b;
  const std::uint32_t* a[kWarpSize];
  std::list<Sums>::iterator d;
};

struct Call {
  Site site;
  std::uint64_t descriptor = 0;
  std::size_t pending = 0;
  MmaType type = MmaType::kFloat16;
  bool transposed = false;
  int columns = 0;

  bool operator==(const Call& other) const {
    return same_site(site, other.site) && descriptor == other.descriptor &&
           pending == other.pending && type == other.type && transposed == other.transposed &&
           columns == other.columns;
  }
};

struct WarpState {
  std::deque<Product> products;    // not done; oldest first
  std::deque<std::size_t> groups;  // sizes of the committed groups, oldest first
  std::size_t uncommitted = 0;     // products after the last commit
  std::list<Sums> sums;            // what `products` add to
  std::size_t calls = 0;
};

struct Block {
  std::vector<WarpState> warps;
  std::vector<std::vector<Call>> calls;  // of each warpgroup's warp that has made most
};

Block& block() {
  static Block instance;
  return instance;
}

WarpState& running_warp() { return block().warps[running_thread().warp()]; }

// Notes a call of the running warp, which must be what others of its warpgroup called in its place.
void note_call(const Call& call) {
  const unsigned warp = running_thread().warp();
  std::vector<Call>& calls = block().calls[warp / kWarpsOfGroup];
  const std::size_t i = block().warps[warp].calls++;
  if (i == calls.size()) {
    calls.push_back(call);
    return;
  }
  const Call& other = calls[i];
  if (call == other) return;
  if (!same_site(call.site, other.site)) {
    fail(call.site, ("another warp of the warpgroup called " + where(other.site)).c_str());
  }
  if (call.descriptor != other.descriptor) {
    fail(call.site, text("descriptor 0x%016llx, in another warp of the warpgroup 0x%016llx",
                         static_cast<unsigned long long>(call.descriptor),
                         static_cast<unsigned long long>(other.descriptor))
                        .c_str());
  }
  fail(call.site, "another warp of the warpgroup called it for another type, shape or wait");
}

// Calls visit(value in lane, value in sums).
template <typename Visit>
void for_each_value(Sums& sums, const Visit& visit) {
  for (int l = 0; l < kWarpSize; ++l) {
    for (int i = 0; i < sums.columns / 2; ++i) {
      const int row = l / 4 + 8 * (i >> 1 & 1);
      const int column = 8 * (i >> 2) + l % 4 * 2 + (i & 1);
      visit(sums.lanes[l][i], sums.values[static_cast<std::size_t>(row * sums.columns + column)]);
    }
  }
}

// The sums in flight for the lanes' d, or new ones with its values.
std::list<Sums>::iterator open_sums(std::list<Sums>& all, void* const* lanes, int columns) {
  Sums sums{};
  for (int l = 0; l < kWarpSize; ++l) sums.lanes[l] = static_cast<ProductLane*>(lanes[l])->d;
  const auto found = std::find_if(all.begin(), all.end(), [&](const Sums& other) {
    return other.columns == columns && std::equal(sums.lanes, sums.lanes + kWarpSize, other.lanes);
  });
  if (found != all.end()) return found;
  sums.columns = columns;
  sums.values.resize(static_cast<std::size_t>(kRows * columns));
  for_each_value(sums, [](float& lane, float& value) {
    value = lane;
    std::memset(&lane, kPoisonByte, sizeof lane);
  });
  all.push_back(std::move(sums));
  return std::prev(all.end());
}

// Gives the lanes their d back when nothing in flight adds to it.
void close_sums(std::list<Sums>& all, std::list<Sums>::iterator sums) {
  if (sums->unfinished > 0) return;
  for_each_value(*sums, [](float& lane, float& value) { lane = value; });
  all.erase(sums);
}

// As __half2float, without branches.
inline float half_value(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = bits & 0x7c00u;
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
  const float subnormal = static_cast<float>(static_cast<int>(bits & 0x3ffu)) * 0x1p-24f;
  constexpr std::uint32_t kBias = (127u - 15u) << 23;
  const std::uint32_t normal = magnitude + (exponent == 0x7c00u ? 2 * kBias : kBias);
  return __uint_as_float(sign | (exponent == 0 ? __float_as_uint(subnormal) : normal));
}

inline float value_of(MmaType type, std::uint32_t bits) {
  return type == MmaType::kFloat16 ? half_value(bits) : __uint_as_float(bits << 16);
}

template <MmaType kType, int kColumns>
void multiply(const Product& product) {
  const unsigned char* shared = dynamic_shared();
  std::uint16_t bits[kDepth][kColumns];
  for (int i = 0; i < 2 * kColumns; ++i) {
    std::uint16_t granule[8];
    std::memcpy(granule, shared + product.b.offset(i), sizeof granule);
    if (product.b.transposed) {
      constexpr int kChunks = kColumns / 8;
      std::memcpy(&bits[i / kChunks][i % kChunks * 8], granule, sizeof granule);
    } else {
      for (int r = 0; r < 8; ++r) bits[i % 2 * 8 + r][i / 2] = granule[r];
    }
  }
  float b[kDepth][kColumns];
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < kColumns; ++column) {
      b[k][column] = value_of(kType, bits[k][column]);
    }
  }
  float a[kRows][kDepth];
  for (int l = 0; l < kWarpSize; ++l) {
    for (int i = 0; i < 4; ++i) {
      float* const pair = &a[l / 4 + 8 * (i & 1)][l % 4 * 2 + 8 * (i >> 1)];
      pair[0] = value_of(kType, product.a[l][i] & 0xffffu);
      pair[1] = value_of(kType, product.a[l][i] >> 16);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    float* __restrict d = product.d->values.data() + row * kColumns;
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) d[column] += a[row][k] * b[k][column];
    }
  }
}

void multiply(const Product& product) {
  if (product.b.type == MmaType::kFloat16) {
    product.b.columns == 128 ? multiply<MmaType::kFloat16, 128>(product)
                             : multiply<MmaType::kFloat16, 256>(product);
  } else {
    product.b.columns == 128 ? multiply<MmaType::kBFloat16, 128>(product)
                             : multiply<MmaType::kBFloat16, 256>(product);
  }
}

}  // namespace

void start_products(unsigned num_threads) {
  const TsanIgnores ignores;
  const unsigned warps = capability() == 90 ? (num_threads + kWarpSize - 1) / kWarpSize : 0;
  block().warps.assign(warps, WarpState{});
  block().calls.assign((warps + kWarpsOfGroup - 1) / kWarpsOfGroup, {});
}

std::string end_products() {
  const TsanIgnores ignores;
  for (std::size_t warp = 0; warp < block().warps.size(); ++warp) {
    const std::vector<Call>& calls = block().calls[warp / kWarpsOfGroup];
    const std::size_t own = block().warps[warp].calls;
    if (own < calls.size()) {
      return text(
                 "warp %zu left the kernel without a call that another warp of its warpgroup made "
                 "(",
                 warp) +
             where(calls[own].site) + text(", block %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
    }
  }
  return {};
}

void combine_product(void* const* lanes, unsigned) {
  const TsanIgnores ignores;
  const auto& first = *static_cast<const ProductLane*>(lanes[0]);
  Product product{*first.b, {}, {}};
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& lane = *static_cast<const ProductLane*>(lanes[l]);
    if (lane.descriptor != first.descriptor) fail(lane.site, "lanes have different descriptors");
    product.a[l] = lane.a;
  }
  note_call(
      {first.site, first.descriptor, 0, product.b.type, product.b.transposed, product.b.columns});
  WarpState& warp = running_warp();
  product.d = open_sums(warp.sums, lanes, product.b.columns);
  if (settings().cp_async == CpAsync::kEarly) {
    multiply(product);
    close_sums(warp.sums, product.d);
    return;
  }
  ++product.d->unfinished;
  ++warp.uncommitted;
  warp.products.push_back(product);
}

void combine_product_fence(void* const* lanes, unsigned) {
  const TsanIgnores ignores;
  note_call({static_cast<const ProductCallLane*>(lanes[0])->site});
}

void combine_product_commit(void* const* lanes, unsigned) {
  const TsanIgnores ignores;
  note_call({static_cast<const ProductCallLane*>(lanes[0])->site});
  WarpState& warp = running_warp();
  warp.groups.push_back(warp.uncommitted);
  warp.uncommitted = 0;
}

bool awaited_product(std::size_t pending, std::size_t i, ProductOperand& b) {
  const TsanIgnores ignores;
  const WarpState& warp = running_warp();
  std::size_t awaited = 0;
  for (std::size_t group = 0; group + pending < warp.groups.size(); ++group) {
    awaited += warp.groups[group];
  }
  if (i >= awaited) return false;
  b = warp.products[i].b;
  return true;
}

void combine_product_wait(void* const* lanes, unsigned) {
  const TsanIgnores ignores;
  const auto& lane = *static_cast<const ProductCallLane*>(lanes[0]);
  note_call({lane.site, 0, lane.pending});
  WarpState& warp = running_warp();
  for (; warp.groups.size() > lane.pending; warp.groups.pop_front()) {
    for (std::size_t i = 0; i < warp.groups.front(); ++i) {
      const Product product = warp.products.front();
      warp.products.pop_front();
      multiply(product);
      --product.d->unfinished;
      close_sums(warp.sums, product.d);
    }
  }
}

}  // namespace qkern::cuda::emulator
