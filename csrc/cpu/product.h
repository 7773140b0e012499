// Matrix products  c (rows, lanes) = or += a (rows, depth) b (depth, lanes)  in float32, from one block of registers.
//
// Everything is counted in units of 32 bits along depth: one float32, or two neighbouring bfloat16, which
// vdpbf16ps multiplies and adds up at once. a lies anywhere (a unit is broadcast from memory), b is packed in panels of
// kPanel lanes, c has rows of any stride. An element of c is a sum over pieces of depth, each a chain in its order: it
// does not depend on the other rows and lanes.
#pragma once
#include <cstdint>
#include <type_traits>
#include <variant>

#include "../ops.h"
#include "simd.h"
#include "tiles.h"

namespace rlhf::RLHF_ISA {

// 24 sums, 4 vectors of b and one of a in 32 registers; 10 loads feed 24 multiplications. Or half of it in 16.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVectors = 4;
#else
constexpr int kBlockRows = 6, kBlockVectors = 2;
#endif
constexpr int kPanel = kBlockVectors * kWidth;  // lanes
constexpr int kTileBlock = 2 * kTileSide;       // rows and lanes of a block in AMX tiles

// The part of b that one multiplication reads, 39 KB with AVX-512, stays in an L1 of 48 KB beside what it reads of a.
// In the products of linear.cpp shorter pieces write c more often (120: 3 % slower at a depth of 256 or 304, which are
// two pieces here and three there), longer ones read b from L2 (256: 4 %; Ice Lake, in turns). A block that has
// everything in L1 or L2 reaches 140 to 160 of a core's 170 GFLOP/s on a quiet host, and 110 to 130 beside neighbours.
// With an L1 of 32 KB (EPYC 9004, in turns) 96 is 3 to 12 % slower, 176 to 304 are within 3 %. There such a block has
// 110 GFLOP/s a core in float32 and 221 in bfloat16.
constexpr int64_t kPieceDepth = 152;  // units

struct UnitF32 {
  using type = float;
  static constexpr int kSize = 1;           // elements
  static constexpr int kRows = kBlockRows;  // of a block
  static constexpr bool kAsItLies = true, kTiles = false;
  static vu load(const float* x) { return load_vector<vu>(x); }
  static uint32_t load_one(float x) { return bits<uint32_t>(x); }
  static vf dot(vu a, vu b, vf c) { return fma(bits<vf>(a), bits<vf>(b), c); }
};

struct UnitWidened : UnitF32 {  // bfloat16 in memory, float32 when packed
  using type = uint16_t;
  static constexpr bool kAsItLies = false;
  static vu load(const uint16_t* x) { return __builtin_convertvector(load_vector<vh>(x), vu) << 16; }
  static uint32_t load_one(uint16_t x) { return uint32_t(x) << 16; }
};

#if defined(__AVX512F__)
struct UnitBF16 {  // CPUs with avx512_bf16; by name, so that no other code here may use the extension
  using type = uint16_t;
  static constexpr int kSize = 2, kRows = kBlockRows;
  static constexpr bool kAsItLies = true, kTiles = false;
  static vu load(const uint16_t* x) { return load_vector<vu>(x); }
  static vf dot(vu a, vu b, vf c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};

struct UnitTiles : UnitBF16 {  // CPUs with AMX
  static constexpr int kRows = kTileBlock;
  static constexpr bool kTiles = true;
};
#endif

// f(Unit{}) for the dtypes of ops.h that have one.
template <class F>
void with_unit(int dtype, F f) {
  if (dtype == kFloat32) return f(UnitF32{});
#if defined(__AVX512F__)
  if (may_use_tiles()) return f(UnitTiles{});
  if (__builtin_cpu_supports("avx512bf16")) return f(UnitBF16{});
#endif
  f(UnitWidened{});
}

// Whoever multiplies holds one, in each thread.
template <class Unit>
using InUse = std::conditional_t<Unit::kTiles, TilesInUse, std::monostate>;

template <class Unit>
constexpr int64_t units(int64_t elements) {
  return (elements + Unit::kSize - 1) / Unit::kSize;
}

struct Left {  // a: unit k of row i lies at data + i * row + k * step, in bytes
  const void* data;
  int64_t row, step;
  bool streams = false;  // from memory, each row in one go: the rows below are fetched ahead
  Left skip(int64_t rows, int64_t k = 0) const {
    return {static_cast<const char*>(data) + rows * row + k * step, row, step, streams};
  }
};

// kAhead: bytes, with a.streams, if the rows below are not what comes next.
template <class Unit, int kRows, int kVectors, int64_t kAhead = 0>
[[gnu::noinline]] void multiply_block(Left left, const uint32_t* b, int64_t depth, float* c, int64_t c_row, bool add) {
  const int64_t below = kAhead ? kAhead : left.streams ? kRows * left.row : 0, step = below ? kWidth : depth;
  vf sum[kRows][kVectors];
  for (auto& row : sum) {
    for (auto& x : row) x = vf{};
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(c + i * c_row + j * kWidth, 1);  // may lie far away
  }
  const char* a = static_cast<const char*>(left.data);
  for (int64_t k = 0; k < depth;) {
    const int64_t end = k + step < depth ? k + step : depth;
    if (below) {
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(a + below + i * left.row);
    }
    for (; k < end; ++k, a += left.step, b += kVectors * kWidth) {
      vu right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = load_vector<vu>(b + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const vu x = load_vector<uint32_t>(a + i * left.row) - vu{};
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Unit::dot(x, right[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + i * c_row + j * kWidth;
      const vf x = add ? load_vector<vf>(out) + sum[i][j] : sum[i][j];
      std::memcpy(out, &x, sizeof x);
    }
  }
}

// kRows rows, fewer where there are no more.
template <class Unit, int kRows, int kVectors>
inline void multiply_rows(int rows, Left a, const uint32_t* b, int64_t depth, float* c, int64_t c_row, bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Unit, kRows - 1, kVectors>(rows, a, b, depth, c, c_row, add);
  }
  multiply_block<Unit, kRows, kVectors>(a, b, depth, c, c_row, add);
}

inline int64_t whole_vectors(int64_t lanes) { return (lanes + kWidth - 1) / kWidth * kWidth; }

// One piece of depth.
template <class Unit, int kVectors>
void multiply_piece(Left a, int64_t rows, const uint32_t* b, int64_t depth, float* c, int64_t c_row, int64_t lanes,
                    bool add) {
  constexpr int kLanes = kVectors * kWidth;
  for (int64_t i = 0; i < rows; i += kBlockRows) {
    const int count = rows - i < kBlockRows ? int(rows - i) : kBlockRows;
    float* out = c + i * c_row;
    if (lanes == kLanes) {
      multiply_rows<Unit, kBlockRows, kVectors>(count, a.skip(i), b, depth, out, c_row, add);
      continue;
    }
    float whole[kBlockRows * kLanes];  // c has no room for the padding
    multiply_rows<Unit, kBlockRows, kVectors>(count, a.skip(i), b, depth, whole, kLanes, false);
    for (int r = 0; r < count; ++r) {
      for (int64_t j = 0; j < lanes; ++j) {
        out[r * c_row + j] = (add ? out[r * c_row + j] : 0.0f) + whole[r * kLanes + j];
      }
    }
  }
}

#if defined(__AVX512F__)
// A block of up to two tiles by two, one piece of depth. The sums at `next` (may be null), which may lie in memory, are
// fetched meanwhile: a weight's gradient then takes 0.8 of the time.
template <int kRowTiles, int kLaneTiles>
void multiply_tile_block(const char* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, float* c,
                         int64_t c_row, bool add, const float* next) {
  const auto each_sum = [&](auto f) {
    f(std::integral_constant<int, 0>{}, c);
    if constexpr (kLaneTiles == 2) f(std::integral_constant<int, 1>{}, c + kTileSide);
    if constexpr (kRowTiles == 2) f(std::integral_constant<int, 2>{}, c + kTileSide * c_row);
    if constexpr (kRowTiles * kLaneTiles == 4) f(std::integral_constant<int, 3>{}, c + kTileSide * c_row + kTileSide);
  };
  if (add) {
    each_sum([&](auto tile, const float* from) { Tiles::load<tile>(from, c_row * 4); });
  } else {
    each_sum([&](auto tile, const float*) { Tiles::zero<tile>(); });
  }
  const int64_t fetches = next && steps ? (kTileBlock + steps - 1) / steps : 0;
  for (int64_t step = 0; step < steps; ++step, a += kTileSide * 4, b += kTileSide * b_row) {
    for (int64_t i = 0; i < fetches; ++i, next += c_row) {
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + kTileSide, 1);
    }
    Tiles::load<6>(b, b_row * 4);
    if constexpr (kLaneTiles == 2) Tiles::load<7>(b + kTileSide, b_row * 4);
    Tiles::load<4>(a, a_row);
    Tiles::multiply<0, 4, 6>();
    if constexpr (kLaneTiles == 2) Tiles::multiply<1, 4, 7>();
    if constexpr (kRowTiles == 2) {
      Tiles::load<5>(a + kTileSide * a_row, a_row);
      Tiles::multiply<2, 5, 6>();
      if constexpr (kLaneTiles == 2) Tiles::multiply<3, 5, 7>();
    }
  }
  each_sum([&](auto tile, float* to) { Tiles::store<tile>(to, c_row * 4); });
}

// One panel, half of it at a time: a piece of that, 32 KB, stays in L1 while all rows pass. Depth that does not fill a
// tile is a piece of its own.
inline void multiply_tiles(Left a, int64_t rows, const uint32_t* b, int64_t depth, float* c, int64_t c_row,
                           int64_t lanes, bool add) {
  constexpr int64_t kMostSteps = 16;
  const int64_t b_row = whole_vectors(lanes), all_steps = depth / kTileSide;
  const int64_t pieces = (all_steps + kMostSteps - 1) / kMostSteps;
  const int64_t size = pieces ? (all_steps + pieces - 1) / pieces * kTileSide : 0, whole = all_steps * kTileSide;
  const auto side = [](int64_t left) { return int(left < 0 ? 0 : left < kTileSide ? left : kTileSide); };
  for (int64_t lane = 0; lane < lanes; lane += kTileBlock) {
    int64_t k = 0;
    do {
      const int64_t end = k == whole ? depth : k + size < whole ? k + size : whole;
      const int units = side(end - k);
      for (int64_t row = 0; row < rows; row += kTileBlock) {
        // A depth of 0 has no steps, but tiles of zeros.
        const TileShape shape{{side(rows - row), side(rows - row - kTileSide)},
                              {side(lanes - lane), side(lanes - lane - kTileSide)},
                              units ? units : kTileSide};
        TilesInUse::set(shape);
        float* sums = c + row * c_row + lane;
        const auto run = [&](auto block) {
          block(static_cast<const char*>(a.data) + row * a.row + k * 4, a.row, b + k * b_row + lane, b_row,
                units ? (end - k) / units : 0, sums, c_row, add || k > 0,
                row + kTileBlock < rows ? sums + kTileBlock * c_row : nullptr);
        };
        if (shape.rows[1]) {
          shape.lanes[1] ? run(multiply_tile_block<2, 2>) : run(multiply_tile_block<2, 1>);
        } else {
          shape.lanes[1] ? run(multiply_tile_block<1, 2>) : run(multiply_tile_block<1, 1>);
        }
      }
      k = end;
    } while (k < depth);
  }
}
#endif

// One panel of at most kPanel lanes of b, padded to whole vectors, with as many rows as there are.
template <class Unit, int kVectors = kBlockVectors>
void multiply(Left a, int64_t rows, const uint32_t* b, int64_t depth, float* c, int64_t c_row, int64_t lanes,
              bool add) {
#if defined(__AVX512F__)
  if constexpr (Unit::kTiles) return multiply_tiles(a, rows, b, depth, c, c_row, lanes, add);
#endif
  if constexpr (kVectors > 1) {
    if (lanes <= (kVectors - 1) * kWidth) {
      return multiply<Unit, kVectors - 1>(a, rows, b, depth, c, c_row, lanes, add);
    }
  }
  const int64_t pieces = a.streams || depth == 0 ? 1 : (depth + kPieceDepth - 1) / kPieceDepth;
  const int64_t size = (depth + pieces - 1) / pieces;
  for (int64_t piece = 0, k = 0; piece < pieces; ++piece, k += size) {
    multiply_piece<Unit, kVectors>(a.skip(0, k), rows, b + k * kVectors * kWidth, k + size < depth ? size : depth - k,
                                   c, c_row, lanes, add || k > 0);
  }
}

// kCount rows that come from memory, with one vector of lanes or two, which take less time to multiply than to fetch.
// The rows of a block lie apart, and the next block has the rows behind them: so there are a few long streams, which
// the hardware follows. Neighbouring rows would be many short ones (Ice Lake: 5.7 GB/s of 10, this way 8.0).
template <class Unit, int64_t kCount, int kVectors>
void multiply_streams(Left a, const uint32_t* b, int64_t depth, float* c) {
  constexpr int kMost = kBlockRows * kBlockVectors / kVectors, kRows = kMost < 12 ? kMost : 12,
                kLanes = kVectors * kWidth;
  constexpr int64_t kApart = kCount / kRows;
  static_assert(kCount % kRows == 0);
  for (int64_t i = 0; i < kApart; ++i) {
    multiply_block<Unit, kRows, kVectors, 256>({a.skip(i).data, a.row * kApart, 4, true}, b, depth, c + i * kLanes,
                                               kApart * kLanes, false);
  }
}

// ---- packing: a panel of lanes, (depth in units, lanes padded to whole vectors), 0 where there is nothing --------

// Row i, lane j -> row j, lane i, of kWidth rows: each round of interleaving rows i and i + kWidth / 2 makes the
// highest bit of the row's number the lowest of the lane's.
template <class V>
[[gnu::always_inline]] inline void transpose(V (&rows)[kWidth]) {
  constexpr int kHalf = kWidth / 2;
  vi low, high;
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; ++j) {
    low[j] = j / 2 + j % 2 * kWidth;
    high[j] = low[j] + kHalf;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
    V next[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = shuffle(rows[i], rows[i + kHalf], low);
      next[2 * i + 1] = shuffle(rows[i], rows[i + kHalf], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// kWidth columns of 2 kWidth rows of x, numbers of 16 bits -> as rows of y.
inline void transpose_block(const uint16_t* x, int64_t x_row, uint16_t* y, int64_t y_row) {
  vu square[kWidth];  // two neighbouring rows in each vector, then a column
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    const auto wide = [](const uint16_t* row) { return __builtin_convertvector(load_vector<vh>(row), vu); };
    square[i] = wide(x + 2 * i * x_row) | wide(x + (2 * i + 1) * x_row) << 16;
  }
  transpose(square);
  for (int j = 0; j < kWidth; ++j) std::memcpy(y + j * y_row, &square[j], sizeof square[j]);
}

// b = x.T: lane i is row i of x, units lie along the row.
template <class Unit>
void pack_rows(const typename Unit::type* x, int64_t stride, int64_t rows, int64_t elements, int64_t lanes,
               uint32_t* b) {
  const int64_t padded = whole_vectors(lanes);
  for (int64_t lane = 0; lane < padded; lane += kWidth) {
    for (int64_t k = 0; k < units<Unit>(elements); k += kWidth) {
      const int64_t first = k * Unit::kSize, left = elements - first, whole = kWidth * Unit::kSize;
      const int64_t count = left < whole ? left : whole;  // elements
      vu square[kWidth] = {};
      for (int64_t i = 0; i < kWidth && lane + i < rows; ++i) {
        const auto* from = x + (lane + i) * stride + first;
        if (count == whole) {
          square[i] = Unit::load(from);
        } else {
          typename Unit::type last[kWidth * Unit::kSize] = {};
          std::memcpy(last, from, count * sizeof *x);
          square[i] = Unit::load(last);
        }
      }
      transpose(square);
      for (int64_t j = 0; j < units<Unit>(count); ++j) {
        std::memcpy(b + (k + j) * padded + lane, &square[j], sizeof square[j]);
      }
    }
  }
}

// n elements that are a unit each.
template <class Unit>
void load_units(const typename Unit::type* x, int64_t n, uint32_t* out) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const vu v = Unit::load(x + j);
    std::memcpy(out + j, &v, sizeof v);
  }
  for (; j < n; ++j) out[j] = Unit::load_one(x[j]);
}

// b = x: lane j is column j of x, a unit joins neighbouring rows.
template <class Unit>
void pack_columns(const typename Unit::type* x, int64_t stride, int64_t rows, int64_t lanes, uint32_t* b) {
  const int64_t padded = whole_vectors(lanes);
  for (int64_t k = 0; k < units<Unit>(rows); ++k, b += padded) {
    const auto* low = x + k * Unit::kSize * stride;
    if constexpr (Unit::kSize == 1) {
      load_units<Unit>(low, lanes, b);
    } else {
      const int64_t vectors = lanes / kWidth * kWidth;
      const bool both = 2 * k + 1 < rows;
      const auto* high = low + stride;
      for (int64_t j = 0; j < vectors; j += kWidth) {
        vu pair = __builtin_convertvector(load_vector<vh>(low + j), vu);
        if (both) pair |= __builtin_convertvector(load_vector<vh>(high + j), vu) << 16;
        std::memcpy(b + j, &pair, sizeof pair);
      }
      for (int64_t j = vectors; j < lanes; ++j) b[j] = low[j] | (both ? uint32_t(high[j]) << 16 : 0);
    }
    for (int64_t j = lanes; j < padded; ++j) b[j] = 0;
  }
}

// Rows of the weight in whole units, where memory does not have them so: widened, or of an odd number of bfloat16.
template <class Unit>
void copy_units(const typename Unit::type* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out) {
  const int64_t depth = units<Unit>(width);
  for (int64_t v = 0; v < rows; ++v, x += stride, out += depth) {
    if constexpr (Unit::kAsItLies) {
      std::memcpy(out, x, width * sizeof *x);  // what is beyond stays 0
    } else {
      load_units<Unit>(x, width, out);
    }
  }
}

inline void round_to_bfloat16(const float* x, int64_t count, uint16_t* out) {  // to nearest even
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = bits<uint32_t>(x[i]), rounded = u + 0x7fffu + (u >> 16 & 1);
    out[i] = uint16_t(((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded) >> 16);  // a NaN stays one
  }
}

}  // namespace rlhf::RLHF_ISA
