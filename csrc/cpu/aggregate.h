// From (rows, cols) token losses to one number: the weight of each token under a mode of reference.aggregate.
#pragma once

#include "tile.h"

namespace rlhf::RLHF_ISA {

inline int64_t count_row(const Grid& mask, int64_t row, int64_t cols) {
  const auto* m = (const tile::Bool*)mask.data + row * mask.row_stride;
  int64_t total = 0;
  for (int64_t begin = 0; begin < cols; begin += 1 << 16) {
    const int n = int(cols - begin < 1 << 16 ? cols - begin : 1 << 16);
    int32_t part = 0;
    if (mask.col_stride == 1) {
      for (int j = 0; j < n; ++j) part += m[begin + j];
    } else {
      for (int j = 0; j < n; ++j) part += m[(begin + j) * mask.col_stride];
    }
    total += part;
  }
  return total;
}

// Where, between begin and end, the padding after the last token of a row begins: nothing beyond needs to be read. In
// whole vectors, because a loop's scalar remainder costs more than the tokens it saves.
inline int64_t padding_begin(const Grid& mask, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 32;
  const uint8_t* m = (const uint8_t*)mask.data + row * mask.row_stride;
  int64_t stop = end;
  while (stop > begin) {
    const int64_t from = begin + (stop - begin - 1) / kStep * kStep;
    uint8_t any = 0;
    for (int64_t j = from; j < stop; ++j) any |= m[j * mask.col_stride];
    if (any) break;
    stop = from;
  }
  return stop;
}

struct TokenWeights {
  Buffer<double> of_row;
  double tokens = 0;

  // normalizer, where not null, replaces the last division. An empty mask gives weight 0 whatever it is.
  TokenWeights(const Grid& mask, int64_t rows, int64_t cols, int aggregation, const double* normalizer) : of_row(rows) {
    double sequences = 0;
    for (int64_t i = 0; i < rows; ++i) {
      of_row[i] = double(count_row(mask, i, cols));
      tokens += of_row[i];
      sequences += of_row[i] > 0;
    }
    double norm = aggregation == kTokenMean ? tokens : aggregation == kSeqMeanTokenSumNorm ? double(cols) : sequences;
    if (normalizer) norm = *normalizer;
    for (int64_t i = 0; i < rows; ++i) {
      const double n = of_row[i];
      of_row[i] = n == 0 ? 0 : aggregation == kSeqMeanTokenMean ? 1 / (norm * n) : 1 / norm;
    }
  }
};

}  // namespace rlhf::RLHF_ISA
