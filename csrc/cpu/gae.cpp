// gae on the CPU. With u_t = gamma (V_{t+1} + lam A_{t+1}) the recurrence is linear and carries one number per row:
//     A_t = r_t - V_t + u_t;  u_{t-1} = gamma V_t + gamma lam (r_t - V_t) + gamma lam u_t
// A masked token has r = V = 0; across a gap u is carried as it is, or decays by gamma lam. A step is u' = add + keep
// u, and two steps are one of the same form: a vector of steps is joined in log2(lanes) rounds (Hillis and Steele
// 1986), so that only one multiply-add a vector waits for its predecessor.
#include <initializer_list>

#include "simd.h"
#include "tile.h"

namespace rlhf::RLHF_ISA {
namespace {

template <class T>
struct Steps {
  static constexpr int kLanes = 4 * kWidth / sizeof(T);
  typedef T Vector __attribute__((vector_size(4 * kWidth)));  // `using` loses the attribute of a dependent type
  using Index = decltype(Vector{} != Vector{});               // integers of the same size
  Vector add, keep;

  // Lane t becomes t + by; beyond the last come those of `then`.
  template <int by>
  static Vector later(Vector x, Vector then) {
    Index from;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) from[j] = j + by;
    return shuffle(x, then, from);
  }

  // Lane t becomes what its step and all later ones of the vector do together.
  template <int by = 1>
  void join() {
    add += keep * later<by>(add, Vector{});
    keep *= later<by>(keep, 1 - Vector{});
    if constexpr (2 * by < kLanes) join<2 * by>();
  }
};

template <class T>
void gae_row(const Grid& rewards, const Grid& values, const Grid& mask, int64_t row, int64_t cols, T gamma, T decay,
             bool carry, T* advantages, T* returns) {
  using Vector = typename Steps<T>::Vector;
  constexpr int kLanes = Steps<T>::kLanes;
  static_assert(kTile % kLanes == 0);
  const Vector zero{}, in_mask = decay - zero, in_gap = carry ? 1 - zero : in_mask;
  alignas(64) T counts[kTile], reward[kTile], value[kTile], u[kTile];
  Vector carried{};
  for (int64_t begin = (cols - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
    const int n = int(cols - begin < kTile ? cols - begin : kTile);
    load(counts, mask, row, begin, n);
    load_masked(reward, rewards, counts, row, begin, n);
    load_masked(value, values, counts, row, begin, n);
    // What lies behind the end of the row is a gap without reward, where nothing has been carried yet.
    for (int j = n; j % kLanes != 0; ++j) counts[j] = reward[j] = value[j] = 0;
    for (int t = (n - 1) / kLanes * kLanes; t >= 0; t -= kLanes) {
      // What comes next is asked for little by little: 0.44 of the time where no cache has it; all at once, 0.9.
      for (const Grid* x : {&rewards, &values, &mask}) {
        __builtin_prefetch((const char*)x->data + offset(*x, row, begin - kTile + t));
      }
      const Vector v = load_vector<Vector>(value + t), excess = load_vector<Vector>(reward + t) - v;
      Steps<T> steps{gamma * v + decay * excess, load_vector<Vector>(counts + t) != 0 ? in_mask : in_gap};
      steps.join();
      const Vector before = steps.add + steps.keep * carried;  // lane t: u_{t-1}
      const Vector here = Steps<T>::template later<1>(before, carried);
      std::memcpy(u + t, &here, sizeof here);
      carried = shuffle(before, before, typename Steps<T>::Index{});
    }
    T *a = advantages + row * cols + begin, *r = returns + row * cols + begin;
    for (int j = 0; j < n; ++j) {
      a[j] = counts[j] != 0 ? reward[j] - value[j] + u[j] : T(0);
      r[j] = counts[j] != 0 ? reward[j] + u[j] : T(0);  // A + V
    }
  }
}

}  // namespace

int64_t gae(Grid rewards, Grid values, Grid mask, int64_t rows, int64_t cols, double gamma, double lam, int carry,
            int dtype, void* advantages, void* returns, int threads) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    // A token takes a quarter of the time of one of ppo_loss, for which kWorth was measured.
    for_each(rows, worth_threads(threads, rows * cols / 4), [&](int64_t i) {
      const int64_t row = rows - 1 - i;  // from the end too, so that memory is walked through in one direction
      gae_row(rewards, values, mask, row, cols, T(gamma), T(gamma * lam), carry != 0, (T*)advantages, (T*)returns);
    });
  };
  dtype == kFloat64 ? call(0.0) : call(0.f);
  return -1;
}

}  // namespace rlhf::RLHF_ISA
