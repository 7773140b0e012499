// gae on the CPU. With u_t = gamma (V_{t+1} + lam A_{t+1}) the recurrence is linear and carries one number per row:
//     A_t = r_t - V_t + u_t;  u_{t-1} = gamma V_t + gamma lam (r_t - V_t) + gamma lam u_t
// A masked token has r = V = 0; across a gap u is carried as it is, or decays by gamma lam. All but the multiply-add of
// u is independent of t and vectorises. That one waits for its predecessor, so eight rows advance together.
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int kRows = 8;
constexpr int kCols = 128;

template <class T>
struct Block {
  T mask[kRows][kCols], reward[kRows][kCols], excess[kRows][kCols];  // excess: r - V
  T add[kRows][kCols], keep[kRows][kCols];                           // u' = add + keep u
};

template <class T>
void scan(Block<T>& b, T (&u)[kRows], int n) {
  for (int t = n - 1; t >= 0; --t) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const T before = u[i];
      u[i] = b.add[i][t] + b.keep[i][t] * before;
      b.add[i][t] = before;  // what A_t needs
    }
  }
}

template <class T>
void rows_from(const Grid& rewards, const Grid& values, const Grid& mask, int64_t first, int rows, int64_t cols,
               T gamma, T lam, bool carry, T* advantages, T* returns) {
  Block<T> b = {};
  T u[kRows] = {}, v[kCols];
  const T decay = gamma * lam, across = carry ? T(1) : decay;
  for (int64_t end = cols; end > 0; end -= kCols) {
    const int64_t begin = end > kCols ? end - kCols : 0;
    const int n = int(end - begin);
    for (int i = 0; i < rows; ++i) {
      load(b.mask[i], mask, first + i, begin, n);
      load_masked(b.reward[i], rewards, b.mask[i], first + i, begin, n);
      load_masked(v, values, b.mask[i], first + i, begin, n);
      for (int j = 0; j < n; ++j) {
        b.excess[i][j] = b.reward[i][j] - v[j];
        b.add[i][j] = gamma * v[j] + decay * b.excess[i][j];
        b.keep[i][j] = b.mask[i][j] != 0 ? decay : across;
      }
    }
    scan(b, u, n);
    for (int i = 0; i < rows; ++i) {
      T *a = advantages + (first + i) * cols + begin, *r = returns + (first + i) * cols + begin;
      for (int j = 0; j < n; ++j) {
        a[j] = b.mask[i][j] != 0 ? b.excess[i][j] + b.add[i][j] : T(0);
        r[j] = b.mask[i][j] != 0 ? b.reward[i][j] + b.add[i][j] : T(0);  // A + V
      }
    }
  }
}

}  // namespace

int64_t gae(Grid rewards, Grid values, Grid mask, int64_t rows, int64_t cols, double gamma, double lam, int carry,
            int dtype, void* advantages, void* returns, int threads) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    // A token takes half as long as one of ppo_loss, for which kWorth was measured.
    for_each((rows + kRows - 1) / kRows, worth_threads(threads, rows * cols / 2), [&](int64_t block) {
      const int64_t first = block * kRows;
      const int n = int(rows - first < kRows ? rows - first : kRows);
      rows_from(rewards, values, mask, first, n, cols, T(gamma), T(lam), carry != 0, (T*)advantages, (T*)returns);
    });
  };
  dtype == kFloat64 ? call(0.0) : call(0.f);
  return -1;
}

}  // namespace rlhf::RLHF_ISA
