// Runs what csrc/cpu computes in AMX tiles (emulated_tiles.h) beside what it computes without them, which the tests of
// every other instruction set compare with PyTorch. Built with AddressSanitizer, over blocks of memory that end where
// the data ends.
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/attention.cpp"
#include "../../csrc/cpu/few_rows.h"
#include "../../csrc/cpu/linear.cpp"

namespace rlhf {

bool may_use_tiles() { return true; }  // the public functions choose by it

namespace RLHF_ISA {
namespace {

std::mt19937 random_bits(1);

template <class T>
struct Exact {  // an allocation of its own size
  std::unique_ptr<T[]> data;
  int64_t count;
  explicit Exact(int64_t count) : data(new T[count]), count(count) {}
  operator T*() const { return data.get(); }
};

Exact<float> random_floats(int64_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  Exact<float> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = normal(random_bits);
  return x;
}

Exact<uint16_t> random_halves(int64_t count, float scale = 1) {
  const auto x = random_floats(count, scale);
  Exact<uint16_t> y(count);
  round_to_bfloat16(x, count, y);
  return y;
}

int failures = 0;

void compare(const std::string& what, const float* got, const float* want, int64_t count, double tolerance) {
  double error = 0, size = 1e-30;
  for (int64_t i = 0; i < count; ++i) {
    error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
    size += double(want[i]) * want[i];
  }
  if (error <= tolerance * tolerance * size) return;
  ++failures;
  std::printf("%s: relative error %g\n", what.c_str(), std::sqrt(error / size));
}

// One panel: every number of rows and lanes up to more than a block, any depth, and rows of a and c that lie apart.
void products() {
  for (const int64_t depth : {0, 1, 5, 16, 21, 48, 300}) {
    for (const int64_t rows : {1, 15, 16, 17, 32, 33, 70}) {
      for (const int64_t lanes : {1, 15, 16, 17, 31, 32, 33, 48, 50, 64}) {
        for (const bool add : {false, true}) {
          const int64_t a_row = depth + depth % 3, c_row = lanes + rows % 3;
          const auto a = random_halves(2 * ((rows - 1) * a_row + depth)), b = random_halves(2 * depth * lanes);
          const Exact<uint32_t> packed(depth * whole_vectors(lanes));
          pack_columns<UnitBF16>(b, lanes, 2 * depth, lanes, packed);
          const auto c = random_floats((rows - 1) * c_row + lanes);
          const Exact<float> want(c.count);
          std::memcpy(want, c, c.count * sizeof(float));
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < lanes; ++j) {
              double sum = add ? c[i * c_row + j] : 0;
              for (int64_t k = 0; k < 2 * depth; ++k) {
                sum += double(bits<float>(uint32_t(a[2 * i * a_row + k]) << 16)) *
                       bits<float>(uint32_t(b[k * lanes + j]) << 16);
              }
              want[i * c_row + j] = float(sum);
            }
          }
          {
            const InUse<UnitTiles> in_use;
            multiply<UnitTiles>(Left{a, a_row * 4, 4}, rows, packed, depth, c, c_row, lanes, add);
          }
          compare("product " + std::to_string(rows) + " x " + std::to_string(depth) + " x " + std::to_string(lanes), c,
                  want, c.count, 1e-6);
        }
      }
    }
  }
}

struct Results {
  Exact<float> logits, logprobs, entropy, saved, grad_hidden, grad_weight, grad_bias;
  Exact<uint16_t> rounded_weight;
};

template <class Unit>
Results linear(int64_t rows, int64_t vocab, int64_t width, bool rounds, int threads) {
  random_bits.seed(unsigned(rows + vocab + width));
  const int64_t hidden_stride = width + rows % 2, weight_stride = width + vocab % 2;
  const auto hidden = random_halves((rows - 1) * hidden_stride + width);
  const auto weight = random_halves((vocab - 1) * weight_stride + width, 1 / std::sqrt(float(width)));
  const auto bias = random_floats(vocab), grad_logprobs = random_floats(rows), grad_entropy = random_floats(rows);
  const Exact<int64_t> labels(rows);
  for (int64_t i = 0; i < rows; ++i) labels[i] = int64_t(random_bits() % vocab);
  const Problem<Unit> p{hidden, hidden_stride, weight, weight_stride, rows, vocab, width};
  Results r{Exact<float>(vocab * p.lanes()),
            Exact<float>(rows),
            Exact<float>(rows),
            Exact<float>(2 * rows),
            Exact<float>(rows * width),
            random_floats(vocab * width),
            random_floats(vocab),
            Exact<uint16_t>(vocab * width)};
  forward(p, bias, 0.0, labels, 0.7, r.logits, r.logprobs, r.entropy, r.saved, threads);
  backward(p, 0.0, labels, 0.7, r.logits, r.saved, r.entropy, grad_logprobs, grad_entropy, r.grad_hidden,
           rounds ? nullptr : r.grad_weight.data.get(), rounds ? r.rounded_weight.data.get() : nullptr, r.grad_bias,
           !rounds, threads);
  if (rounds) {
    for (int64_t i = 0; i < r.grad_weight.count; ++i) {
      r.grad_weight[i] = bits<float>(uint32_t(r.rounded_weight[i]) << 16);
    }
  }
  return r;
}

void losses() {
  const int64_t shapes[][3] = {{1, 1, 1},       {3, 7, 16},    {17, 191, 33},  {64, 192, 64}, {65, 193, 65},
                               {130, 577, 100}, {350, 400, 7}, {20, 250, 121}, {9, 2047, 17}, {33, 2403, 65}};
  for (const auto& [rows, vocab, width] : shapes) {
    for (const bool rounds : {false, true}) {
      const std::string name = std::to_string(rows) + " x " + std::to_string(width) + " x " + std::to_string(vocab);
      const Results got = linear<UnitTiles>(rows, vocab, width, rounds, 2);
      const Results want = linear<UnitWidened>(rows, vocab, width, rounds, 2);
      compare("logprobs " + name, got.logprobs, want.logprobs, rows, 1e-6);
      compare("entropy " + name, got.entropy, want.entropy, rows, 1e-5);
      compare("grad_hidden " + name, got.grad_hidden, want.grad_hidden, rows * width, 4e-3);  // dz is rounded
      compare("grad_weight " + name, got.grad_weight, want.grad_weight, vocab * width, rounds ? 6e-3 : 4e-3);
      compare("grad_bias " + name, got.grad_bias, want.grad_bias, vocab, 1e-5);
    }
  }
}

// Rows of generation; a row must not depend on the others.
void few_rows() {
  for (const int64_t rows : {1, 3, 16, 33, 100}) {
    for (const int64_t depth : {1, 30, 64, 77}) {
      const int64_t width = 113;
      const auto x = random_floats(rows * depth), bias = random_floats(width);
      const auto weight = random_halves(width * depth);
      const Exact<float> got(rows * width), want(rows * width), alone(width);
      FewRows<UnitTiles>(x, rows, depth, 2).times({{weight, bias, width, got}}, false);
      FewRows<UnitWidened>(x, rows, depth, 2).times({{weight, bias, width, want}}, false);
      compare("few rows", got, want, rows * width, 1e-6);
      FewRows<UnitTiles>(x + (rows - 1) * depth, 1, depth, 1).times({{weight, bias, width, alone}}, false);
      compare("a row alone", got + (rows - 1) * width, alone, width, 0);
    }
  }
}

// A family whose second sequence shares the first `shared` keys of the first, and one with a few queries only.
template <class Unit>
std::vector<Exact<float>> attended(int64_t own, int64_t shared, int64_t dim, int64_t window, double softcap) {
  random_bits.seed(unsigned(own + shared + dim));
  const int64_t heads = 2, rest = 5, few = std::min<int64_t>(own, 3), tokens = own + rest + own;
  const int64_t queries = own + rest + few;
  const Exact<int64_t> places(queries), table(18), families(3);
  for (int64_t i = 0; i < own; ++i) places[i] = i;
  for (int64_t i = 0; i < rest; ++i) places[own + i] = shared + i;
  for (int64_t i = 0; i < few; ++i) places[own + rest + i] = own - few + i;
  const int64_t rows[] = {0,    own, 0,      own,        0,   0,          own, rest, own,
                          rest, 0,   shared, own + rest, few, own + rest, own, 0,    0};
  std::copy_n(rows, 18, table.data.get());
  families[0] = 0, families[1] = 2, families[2] = 3;
  const auto factors = [&](int64_t count) {  // which bfloat16 has
    const Exact<uint16_t> narrow = random_halves(count * dim);
    Exact<float> wide(count * dim);
    for (int64_t i = 0; i < count * dim; ++i) wide[i] = bits<float>(uint32_t(narrow[i]) << 16);
    return wide;
  };
  const auto q = factors(queries * heads), k = factors(tokens), v = factors(tokens), grad = factors(queries * heads);
  const Grid all_q{q, kFloat32, heads * dim, dim}, all_k{k, kFloat32, dim, dim}, all_v{v, kFloat32, dim, dim};
  std::vector<Exact<float>> r;
  for (const int64_t count : {queries * heads, queries * heads, tokens * heads, tokens * heads}) {
    r.push_back(Exact<float>(count * dim));
  }
  const Exact<float> saved(queries * heads * 2);
  const double scale = 1 / std::sqrt(double(dim));
  forward<Unit>(all_q, all_k, all_v, places, table, families, 2, heads, 1, dim, window, scale, softcap, r[0], saved, 2);
  backward<Unit>(all_q, all_k, all_v, r[0], saved, grad, places, table, families, 2, heads, 1, dim, window, scale,
                 softcap, r[1], r[2], r[3], 2);
  return r;
}

void attention() {
  const int64_t shapes[][4] = {{1, 1, 1, 1},       {7, 3, 20, 7},    {64, 64, 64, 64},    {65, 33, 5, 200},
                               {130, 66, 80, 130}, {300, 1, 160, 7}, {300, 270, 160, 140}};
  for (const auto& [own, shared, dim, window] : shapes) {
    for (const double softcap : {0.0, 2.0}) {
      const auto got = attended<UnitTiles>(own, shared, dim, window, softcap);
      const auto want = attended<UnitF32>(own, shared, dim, window, softcap);
      const std::string name = " of " + std::to_string(own) + " x " + std::to_string(dim);
      const char* what[] = {"attention", "its gradient of q", "its gradients of k", "its gradients of v"};
      for (int i = 0; i < 4; ++i) compare(what[i] + name, got[i], want[i], want[i].count, 6e-3);  // weights are rounded
    }
  }
}

}  // namespace
}  // namespace RLHF_ISA
}  // namespace rlhf

int main() {
  rlhf::RLHF_ISA::products();
  rlhf::RLHF_ISA::losses();
  rlhf::RLHF_ISA::few_rows();
  rlhf::RLHF_ISA::attention();
  if (rlhf::RLHF_ISA::failures == 0) std::puts("all equal");
  return rlhf::RLHF_ISA::failures != 0;
}
