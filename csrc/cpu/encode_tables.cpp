#include "encode_tables.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "qkern/codes.h"

namespace qkern::cpu {
namespace {

float midpoint(float a, float b) { return (a + b) * 0.5f; }

// One threshold at most in each bin makes one comparison enough. Bins are a monotone function of
// the key, so a key in a lower bin is below the threshold and one in a higher bin above it.
void add_bins(EncodeTable* table) {
  constexpr int kLast = EncodeTable::kBins - 1;
  // Keys lie in [-1, 1], or [0, 1] for magnitudes; the margin keeps 1 + rounding in the last bin.
  const float margin = 0.999f;
  table->bin_scale = (table->sign_magnitude ? 32.0f : 16.0f) * margin;
  table->bin_offset = table->sign_magnitude ? 0.0f : 16.0f;
  int next = 0;
  for (int bin = 0; bin < EncodeTable::kBins; ++bin) {
    table->bin_threshold[bin] = std::numeric_limits<float>::infinity();
    table->bin_rank[bin] = next;
    int inside = 0;
    while (next < table->num_thresholds) {
      // The very arithmetic of the kernels: one fused multiply-add, truncated.
      const float position = std::fma(table->thresholds[next], table->bin_scale, table->bin_offset);
      const int owner = std::clamp(static_cast<int>(position), 0, kLast);
      if (owner != bin) break;
      if (++inside > 1) return;
      table->bin_threshold[bin] = table->thresholds[next++];
    }
  }
  if (next < table->num_thresholds) return;
  table->lookup = table->sign_magnitude                             ? Lookup::kBinsMagnitude
                  : std::is_sorted(table->codes, table->codes + 16) ? Lookup::kBins
                                                                    : Lookup::kBinsPermuted;
}

// Every bucket of the dynamic maps' thresholds has one at most; a test compares all codes.
BucketTable make_bucket_table(const float* map, const float* thresholds, int shift) {
  BucketTable table{};
  table.map = map;
  table.thresholds = thresholds;
  table.shift = shift;
  table.first = BucketTable::kFirstExponent << (23 - shift);
  const std::uint32_t low_bits = (1u << shift) - 1u;
  for (std::uint32_t i = 0; i < 2u * BucketTable::kBuckets; ++i) {
    const bool negative = i >= BucketTable::kBuckets;
    const std::uint32_t bucket = table.first + (negative ? i - BucketTable::kBuckets : i);
    const std::uint32_t smallest_bits = bucket << shift | (negative ? 0x80000000u : 0u);
    float smallest;
    std::memcpy(&smallest, &smallest_bits, sizeof(smallest));
    std::uint32_t code = 0;
    std::uint32_t last = low_bits;
    for (int k = 0; k < 255; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, &thresholds[k], sizeof(bits));
      if (thresholds[k] < smallest) ++code;
      if (bits >> shift == smallest_bits >> shift) {
        // t > threshold: for t < 0, only below its magnitude.
        const std::uint32_t low = bits & low_bits;
        if (!negative) last = low;
        if (negative && low > 0) last = low - 1;
      }
    }
    // The first bucket of a sign also stands for all below: none of them has the next code.
    if (bucket == table.first) last = low_bits;
    table.words[i] = code << 24 | last;
  }
  return table;
}

}  // namespace

EncodeTable make_encode_table(const Codebook& codes) {
  EncodeTable table{};
  if (codes.format == kFormatFp4) {
    table.sign_magnitude = true;
    table.num_thresholds = 7;
    std::copy_n(kFp4MagnitudeMidpoints, 7, table.thresholds);
    std::copy_n(kFp4MagnitudeCodes, 8, table.codes);
    add_bins(&table);
    return table;
  }
  const float* values = codes.format == kFormatNf4 ? kNf4Codes : codes.codebook;
  int order[16];
  for (int i = 0; i < 16; ++i) order[i] = i;
  std::stable_sort(order, order + 16, [&](int a, int b) { return values[a] < values[b]; });
  for (int i = 0; i < 16; ++i) table.codes[i] = static_cast<std::uint8_t>(order[i]);
  bool within_range = true;
  for (int i = 0; i < 15; ++i) {
    table.thresholds[i] = midpoint(values[order[i]], values[order[i + 1]]);
    within_range = within_range && std::abs(table.thresholds[i]) <= 1.0f;
  }
  if (within_range) add_bins(&table);
  return table;
}

void map_thresholds(const float* map, float* thresholds) {
  for (int i = 0; i < 255; ++i) {
    const double exact = (static_cast<double>(map[i]) + static_cast<double>(map[i + 1])) / 2;
    float rounded = static_cast<float>(exact);
    if (static_cast<double>(rounded) > exact) {
      rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
    }
    thresholds[i] = rounded;
  }
}

// At the largest shifts that leave one threshold a bucket.
const BucketTable* bucket_tables() {
  static const BucketTable tables[2] = {
      make_bucket_table(kDynamicMapSigned, kDynamicThresholdsSigned, 17),
      make_bucket_table(kDynamicMapUnsigned, kDynamicThresholdsUnsigned, 16)};
  return tables;
}

}  // namespace qkern::cpu
