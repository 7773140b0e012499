// AMX's tile registers in plain C++, for csrc/cpu/tiles.h: what the instructions do, in their order of summation,
// except that numbers too small for a normal one stay what they are. An instruction that the configuration does not
// allow stops the program, as the CPU would.
#include <cstdlib>

struct Tile {
  int rows, numbers;
  uint32_t data[kTileSide][kTileSide];
};

struct Tiles {
  inline static thread_local Tile tiles[8];

  static void set(const TileShape& shape) {
    for (Tile& tile : tiles) tile = {};
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) resize(tiles[2 * i + j], shape.rows[i], shape.lanes[j]);
      resize(tiles[4 + i], shape.rows[i], shape.units);
      resize(tiles[6 + i], shape.units, shape.lanes[i]);
    }
  }
  static void release() {
    for (Tile& tile : tiles) tile = {};
  }
  template <int kTile>
  static void zero() {
    std::memset(configured(kTile).data, 0, sizeof(Tile::data));
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    Tile& tile = configured(kTile);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int i = 0; i < tile.rows; ++i) {
      std::memcpy(tile.data[i], static_cast<const char*>(from) + i * row_bytes, 4 * tile.numbers);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    const Tile& tile = configured(kTile);
    for (int i = 0; i < tile.rows; ++i) {
      std::memcpy(static_cast<char*>(to) + i * row_bytes, tile.data[i], 4 * tile.numbers);
    }
  }
  template <int kSum, int kLeft, int kRight>
  static void multiply() {
    Tile& c = configured(kSum);
    const Tile &a = configured(kLeft), &b = configured(kRight);
    if (a.rows != c.rows || b.numbers != c.numbers || a.numbers != b.rows) std::abort();
    for (int i = 0; i < c.rows; ++i) {
      for (int j = 0; j < c.numbers; ++j) {
        float even = 0, odd = 0;
        for (int k = 0; k < a.numbers; ++k) {
          even = __builtin_fmaf(widened(a.data[i][k] << 16), widened(b.data[k][j] << 16), even);
          odd = __builtin_fmaf(widened(a.data[i][k] & 0xffff0000u), widened(b.data[k][j] & 0xffff0000u), odd);
        }
        const float sum = widened(c.data[i][j]) + (even + odd);
        std::memcpy(&c.data[i][j], &sum, sizeof sum);
      }
    }
  }

 private:
  static void resize(Tile& tile, int rows, int numbers) {
    if (rows < 0 || numbers < 0 || rows > kTileSide || numbers > kTileSide) std::abort();
    if (rows > 0 && numbers > 0) tile.rows = rows, tile.numbers = numbers;
  }
  static Tile& configured(int i) {
    if (tiles[i].rows == 0) std::abort();
    return tiles[i];
  }
  static float widened(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};
