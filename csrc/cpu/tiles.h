// The eight tile registers of AMX, which hold matrices of 16 rows of 64 bytes each, and the product of two of them.
// By name, so that no other code here may use the extension.
#pragma once
#include <cstdint>
#include <cstring>

namespace rlhf::RLHF_ISA {

constexpr int kTileSide = 16;  // rows of a tile, and 32-bit numbers in a row

// Sizes of the tiles of a block: sums c of rows[i] x lanes[j] are tile 2 i + j, a of rows[i] x units tile 4 + i, b of
// units x lanes[j] tile 6 + j.
struct TileShape {
  int rows[2], lanes[2], units;
  bool operator==(const TileShape& x) const { return std::memcmp(this, &x, sizeof x) == 0; }
};

#if defined(RLHF_EMULATED_TILES)
#include RLHF_EMULATED_TILES
#else
struct Tiles {
  static void set(const TileShape& shape) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto tile = [&](int i, int rows, int numbers) {
      if (rows == 0 || numbers == 0) return;
      config.rows[i] = uint8_t(rows);
      config.row_bytes[i] = uint16_t(4 * numbers);
    };
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) tile(2 * i + j, shape.rows[i], shape.lanes[j]);
      tile(4 + i, shape.rows[i], shape.units);
      tile(6 + i, shape.units, shape.lanes[i]);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // c += a b, pairs of bfloat16 multiplied and added up in float32.
  template <int kSum, int kLeft, int kRight>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};
#endif

// The tiles' configuration of this thread, kept from one product for the next: a new one takes as long as 15 products
// of tiles or more. Whoever multiplies holds a TilesInUse, so that nothing of it is left for the code after it.
class TilesInUse {
 public:
  TilesInUse() = default;
  TilesInUse(const TilesInUse&) = delete;
  ~TilesInUse() {
    if (shape_.units) Tiles::release();
    shape_ = {};
  }
  static void set(const TileShape& shape) {
    if (shape == shape_) return;
    Tiles::set(shape);
    shape_ = shape;
  }

 private:
  inline static thread_local TileShape shape_{};
};

}  // namespace rlhf::RLHF_ISA
