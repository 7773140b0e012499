// y = x @ weight.T for few rows of x, as in generation: one a sequence. A library packs the weight for every such
// product, which costs as much as the product itself. Here the weight is read as it lies, once, x is packed, and what
// comes out is transposed. A row of y depends on its row of x alone. For a weight in bfloat16 x is rounded to it too.
#pragma once
#include <type_traits>

#include "product.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {

// A thread that sleeps takes 40 us to wake (tile.h): one for every 80 us of work.
inline int threads_for_products(int threads, int64_t multiplications) {
  const int64_t worth = 1 + (multiplications >> 22);
  return worth < threads ? int(worth) : threads;
}

template <class Unit>
class FewRows {
 public:
  using type = typename Unit::type;

  FewRows(const float* x, int64_t rows, int64_t depth, int threads)
      : rows_(rows),
        depth_(depth),
        units_(units<Unit>(depth)),
        threads_(threads),
        packed_(whole_vectors(rows) * units_) {
    if constexpr (std::is_same_v<type, float>) {
      pack(x);
    } else {
      const Buffer<type> rounded(rows * depth);
      round_to_bfloat16(x, rows * depth, rounded.data);
      pack(rounded.data);
    }
  }

  struct Product {
    const void* weight;  // (width, depth)
    const float* bias;   // may be null
    int64_t width;
    float* y;  // (rows, width)
  };

  // y = or += x weight^T + bias of all of them, shared out between the threads together.
  template <int kCount>
  void times(const Product (&products)[kCount], bool add) const {
    int64_t tiles = 0, outputs = 0;
    for (const Product& p : products) tiles += tiles_of(p.width), outputs += p.width;
    for_each(tiles, threads_for_products(threads_, rows_ * outputs * depth_), [&](int64_t tile) {
      const Product* p = products;
      for (; tile >= tiles_of(p->width); ++p) tile -= tiles_of(p->width);
      times(*p, tile * kTileRows, add);
    });
  }

 private:
  // Of the weight: a multiple of Unit::kRows and kWidth. Their outputs, 8 or 12 KB, stay in L1 beside packed rows of x.
  static constexpr int64_t kTileRows = Unit::kTiles ? 32 : 48;

  static int64_t tiles_of(int64_t width) { return (width + kTileRows - 1) / kTileRows; }

  // The outputs of one tile.
  void times(const Product& p, int64_t first, bool add) const {
    const bool copies = !Unit::kAsItLies || depth_ % Unit::kSize != 0;
    const int64_t count = p.width - first < kTileRows ? p.width - first : kTileRows;
    const type* from = static_cast<const type*>(p.weight) + first * depth_;
    const Buffer<uint32_t> copy(copies ? count * units_ : 0);
    if (copies) copy_units<Unit>(from, depth_, count, depth_, copy.data);
    const Left rows{copies ? static_cast<const void*>(copy.data) : from, units_ * 4, 4, true};
    alignas(64) float z[kTileRows * kPanel];
    [[maybe_unused]] const InUse<Unit> in_use;
    for (int64_t lane = 0; lane < rows_; lane += kPanel) {
      multiply_tile(rows, count, packed_.data + lane * units_, lanes(lane), z);
      store(z, count, lane, p.bias ? p.bias + first : nullptr, p.y + lane * p.width + first, p.width, add);
    }
  }

  // z (count, panel) = the tile's rows of the weight, times the panel of x.
  void multiply_tile(Left rows, int64_t count, const uint32_t* x, int64_t panel, float* z) const {
    if constexpr (!Unit::kTiles) {
      if (count == kTileRows && panel == kWidth) return multiply_streams<Unit, kTileRows, 1>(rows, x, units_, z);
      if (count == kTileRows && panel == 2 * kWidth) return multiply_streams<Unit, kTileRows, 2>(rows, x, units_, z);
    }
    multiply<Unit>(rows, count, x, units_, z, panel, panel, false);
  }

  void pack(const type* x) const {
    for (int64_t lane = 0; lane < rows_; lane += kPanel) {
      const int64_t panel = lanes(lane), filled = rows_ - lane < panel ? rows_ - lane : panel;
      pack_rows<Unit>(x + lane * depth_, depth_, filled, depth_, panel, packed_.data + lane * units_);
    }
  }

  int64_t lanes(int64_t first) const {  // of the panel that begins there
    const int64_t left = whole_vectors(rows_) - first;
    return left < kPanel ? left : kPanel;
  }

  void store(const float* z, int64_t count, int64_t first, const float* bias, float* y, int64_t width, bool add) const {
    const int64_t panel = lanes(first), filled = rows_ - first < panel ? rows_ - first : panel;
    for (int64_t v = 0; v < count; v += kWidth) {
      const int64_t n = count - v < kWidth ? count - v : kWidth;
      vf shift{};
      if (bias) std::memcpy(&shift, bias + v, n * sizeof *bias);
      for (int64_t lane = 0; lane < filled; lane += kWidth) {
        vf square[kWidth];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) square[i] = i < n ? load_vector<vf>(z + (v + i) * panel + lane) : vf{};
        transpose(square);
        for (int64_t i = 0; i < kWidth && lane + i < filled; ++i) {
          float* out = y + (lane + i) * width + v;
          if (n == kWidth) {
            const vf sum = square[i] + shift + (add ? load_vector<vf>(out) : vf{});
            std::memcpy(out, &sum, sizeof sum);
          } else {
            for (int64_t j = 0; j < n; ++j) out[j] = square[i][j] + shift[j] + (add ? out[j] : 0.0f);
          }
        }
      }
    }
  }

  const int64_t rows_, depth_, units_;
  const int threads_;
  const Buffer<uint32_t> packed_;
};

}  // namespace rlhf::RLHF_ISA
