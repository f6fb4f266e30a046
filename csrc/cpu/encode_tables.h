// The tables that quantising kernels look codes up in.
#pragma once

#include "kernel_table.h"
#include "qkern/ops.h"

namespace qkern::cpu {

EncodeTable make_encode_table(const Codebook& codes);

// Thresholds [255] between neighbours of an ascending map [256], rounded down: t > threshold is
// then exactly t > midpoint for every float t.
void map_thresholds(const float* map, float* thresholds);

// Of the signed and the unsigned dynamic map.
const BucketTable* bucket_tables();

}  // namespace qkern::cpu
