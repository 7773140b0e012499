// The contract of every native op. The kernels in csrc/cpu and csrc/cuda see pointers, never tensors, and nothing in
// csrc/ includes a header of torch. The bindings read the tensors that Python passes, by DLPack (tensor.h). Python
// checks shapes and dtypes (the usual case by `alike` and `labelled` of tensor.h), allocates the outputs, and keeps the
// tensors alive. Only for token_logprobs (rows.h) and the losses (loss.h) on the CPU do the bindings also check the
// layout and allocate the outputs (memory.h), because in Python that takes longer than the kernel on tiny tensors.
// Python passes
//   tensors       as they are, or None; the bindings turn them into pointers and Grids
//   strides       in elements
//   dtype         a DType code: the type that the void pointers point at
//   threads       the number of OpenMP threads to use, torch.get_num_threads()
// To add an op: declare a member here and document it, add its name to the list below, and define it in
// csrc/cpu/<op>.cpp or csrc/cuda/<op>.cu. The bindings and the tables follow from the list.
#pragma once

#include <cstdint>

namespace rlhf {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBool = 4 };
enum Aggregation : int { kTokenMean = 0, kSeqMeanTokenSum = 1, kSeqMeanTokenMean = 2, kSeqMeanTokenSumNorm = 3 };

// A (rows, cols) input of a small op, or a (cols,) one as a single row. data is null where an optional one is absent.
struct Grid {
  const void* data;
  int dtype;
  int64_t row_stride, col_stride;
};

// A matrix of rows may lie in memory as outer groups of inner rows, so that logits[:, :-1] needs no copy:
// row i starts at data + (i / inner) * outer_stride + (i % inner) * inner_stride.

struct Matrix {  // (outputs, inputs), contiguous
  const void* data;
  int dtype;  // kFloat32 or kBFloat16
};

// Of a llama layer, contiguous; what may be null is marked. The matrices have one dtype.
struct LayerWeights {
  const float* norm;
  Matrix q, k, v;
  const float *q_bias, *k_bias, *v_bias;  // may be null, each
  const float *q_norm, *k_norm;           // may be null, both
  Matrix output;
  const float *output_bias, *mlp_norm;  // the bias may be null
  Matrix gate, up, down;
};

// CPU ops. Each returns -1, or the index of the first row that it refuses (a label out of range).
// "accum" is float, or double where dtype is kFloat64.
struct CpuOps {
  // logprobs[i] = z[label] - logsumexp(z) and entropy[i] (may be null), z = logits[i] / temperature, all accum.
  // saved (rows, 2) accum: the row's maximum logit and log sum exp(z - max z), for the backward.
  // mask (rows) bytes, may be null: a 0 row is not read and gives 0.
  int64_t (*token_logprobs_forward)(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                                    int64_t outer_stride, int64_t inner_stride, const int64_t* labels,
                                    const uint8_t* mask, double temperature, void* logprobs, void* entropy, void* saved,
                                    int threads);

  // grad_logits (its own strides; may be logits itself) of sum(grad_logprobs * logprobs) + sum(grad_entropy * entropy).
  // Either gradient (rows accum) may be null; entropy is what the forward returned, read only with grad_entropy.
  int64_t (*token_logprobs_backward)(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                                     int64_t outer_stride, int64_t inner_stride, const int64_t* labels,
                                     const uint8_t* mask, double temperature, const void* saved, const void* entropy,
                                     const void* grad_logprobs, const void* grad_entropy, void* grad_logits,
                                     int64_t grad_outer_stride, int64_t grad_inner_stride, int threads);

  // logits = softcap tanh((hidden @ weight.T + bias) / softcap), and of logits / temperature what
  // token_logprobs_forward gives, in float32. dtype kFloat32 or kBFloat16, of hidden and weight; bias (vocab) may be
  // null; softcap 0: none. The logits are kept for the backward where logits is not null: (vocab, rows padded to a
  // multiple of 16), transposed. A row's results do not depend on the other rows. Labels are in range.
  int64_t (*linear_forward)(const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride,
                            int dtype, int64_t rows, int64_t vocab, int64_t width, const float* bias, double softcap,
                            const int64_t* labels, double temperature, float* logits, float* logprobs, float* entropy,
                            float* saved, int threads);

  // Gradients of sum(grad_logprobs * logprobs) + sum(grad_entropy * entropy): grad_hidden (rows, width), grad_weight
  // (vocab, width) and grad_bias (vocab), contiguous float32, each may be null; add adds to the last two. grad_weight
  // may be bfloat16, rounded to nearest even, where nothing is added. logits, the forward's, are lost.
  int64_t (*linear_backward)(const void* hidden, int64_t hidden_stride, const void* weight, int64_t weight_stride,
                             int dtype, int64_t rows, int64_t vocab, int64_t width, double softcap,
                             const int64_t* labels, double temperature, float* logits, const float* saved,
                             const float* entropy, const float* grad_logprobs, const float* grad_entropy,
                             float* grad_hidden, void* grad_weight, int grad_weight_dtype, float* grad_bias, int add,
                             int threads);

  // out (count) bfloat16 = x, rounded to nearest even. x is lost: if it is large, its pages are returned to the system
  // while out is written, so that both are never in memory as a whole.
  int64_t (*linear_narrow)(float* x, int64_t count, void* out, int threads);

  // reference.ppo_loss with its gradients. mask is kBool; ref_logprobs, entropy, importance_weights may be absent.
  // The ratio is clipped to [clip_low, clip_high]; dual_clip and log_ratio_clamp are infinite where there is none.
  // kl_estimator and aggregation are indices into reference.KL_ESTIMATORS' values and reference.AGGREGATIONS;
  // normalizer may be null. dtype (float32 or float64) is that of loss (1), stats (PPO_STATS) and the contiguous (rows,
  // cols) gradients, which may be null.
  int64_t (*ppo_loss)(Grid logprobs, Grid old_logprobs, Grid advantages, Grid mask, Grid ref_logprobs, Grid entropy,
                      Grid importance_weights, int64_t rows, int64_t cols, double clip_low, double clip_high,
                      double dual_clip, double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef,
                      int aggregation, const double* normalizer, int dtype, void* loss, void* stats,
                      void* grad_logprobs, void* grad_entropy, int threads);

  // kl[i] = KL(softmax(logits[i]) || softmax(ref_logits[i])), accum, both contiguous (rows, vocab); a 0 row of mask is
  // not read and gives 0. saved (rows, 4) accum: both maxima, both log sums, for the backward.
  int64_t (*kl_divergence_forward)(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                                   const uint8_t* mask, void* kl, void* saved, int threads);

  // Gradients of sum(grad_kl * kl) with respect to both; either may be null.
  int64_t (*kl_divergence_backward)(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                                    const uint8_t* mask, const void* kl, const void* saved, const void* grad_kl,
                                    void* grad_logits, void* grad_ref_logits, int threads);

  // reference.value_loss, in the manner of ppo_loss. cliprange is infinite where there is none.
  int64_t (*value_loss)(Grid values, Grid old_values, Grid returns, Grid mask, int64_t rows, int64_t cols,
                        double cliprange, int aggregation, const double* normalizer, int dtype, void* loss, void* stats,
                        void* grad, int threads);

  // reference.kl_penalty; the clamps are infinite where there are none. kl and its derivative by logprobs (may be null)
  // are contiguous.
  int64_t (*kl_penalty)(Grid logprobs, Grid ref_logprobs, int64_t rows, int64_t cols, int estimator, double input_clamp,
                        double output_clamp, int dtype, void* kl, void* slope, int threads);

  // reference.pairwise_loss of one row of pairs. If ref_chosen and ref_rejected are given, the rewards are
  // scale * (chosen - ref_chosen) and scale * (rejected - ref_rejected). margin_value and prob_value replace an absent
  // margin and target_prob.
  int64_t (*pairwise_loss)(Grid chosen, Grid rejected, Grid ref_chosen, Grid ref_rejected, Grid margin,
                           Grid target_prob, Grid weights, int64_t pairs, double scale, double margin_value,
                           double prob_value, double center_coef, int dtype, void* loss, void* stats, void* grad_chosen,
                           void* grad_rejected, int threads);

  // reference.ranking_loss; ranks and grad are contiguous (rows, k).
  int64_t (*ranking_loss)(Grid rewards, const int64_t* ranks, int64_t rows, int64_t k, int dtype, void* loss,
                          void* stats, void* grad, int threads);

  // reference.gae; carry is 0 for gap_mode "zero". advantages and returns are contiguous.
  int64_t (*gae)(Grid rewards, Grid values, Grid mask, int64_t rows, int64_t cols, double gamma, double lam, int carry,
                 int dtype, void* advantages, void* returns, int threads);

  // The mean of each row over its mask (may be absent), and the number it was divided by, at least 1.
  int64_t (*masked_mean)(Grid values, Grid mask, int64_t rows, int64_t cols, int dtype, void* means, void* counts,
                         int threads);

  // The gradient of the values, (rows, cols) contiguous, from that of the means (accum): 0 outside the mask.
  int64_t (*masked_mean_backward)(Grid mask, int64_t rows, int64_t cols, int dtype, const void* grad_means,
                                  const void* counts, void* grad, int threads);

  // reference.masked_whiten over all rows, contiguous. saved (3): mean, 1 / sqrt(var + eps), number of values.
  int64_t (*masked_whiten)(Grid values, Grid mask, int64_t rows, int64_t cols, int shift_mean, double eps, int dtype,
                           void* whitened, void* saved, int threads);

  // Parts of a llama layer, contiguous. What lies on a product's side, y or grad in the norm and everything in glu,
  // is in dtype, float32 or bfloat16; the rest is float32. y (rows, width) = x scale weight, scale (rows, may be null)
  // = 1 / sqrt(mean(x^2) + eps).
  int64_t (*rms_norm)(const float* x, const float* weight, int64_t rows, int64_t width, double eps, int dtype, void* y,
                      float* scale, int threads);
  int64_t (*rms_norm_backward)(const float* x, const float* weight, const float* scale, int dtype, const void* grad,
                               int64_t rows, int64_t width, float* grad_x, float* grad_weight, int threads);

  // y, contiguous = x (rows, heads, dim; rows row_stride apart) rotated by the angles of its position, row % positions.
  // cos and sin are (positions, dim), with each angle twice. direction is 1, or -1 for the gradient.
  int64_t (*rotary)(const float* x, int64_t row_stride, const float* cos, const float* sin, int64_t rows,
                    int64_t positions, int64_t heads, int64_t dim, double direction, float* y, int threads);

  // Attention of one query per row: y (rows, heads, dim) = softmax(scale q k^T + bias) v over the first `filled` of the
  // keys and values (rows, key_heads, capacity, dim). With a softcap > 0, x = scale q k^T becomes softcap tanh(x /
  // softcap). heads is a multiple of key_heads; bias (rows, capacity) may be null. Row i has the first `shared` columns
  // of row i - back[i], which are read in its place; back may be null.
  int64_t (*attend)(const float* q, int64_t row_stride, const float* keys, const float* values, const float* bias,
                    const int64_t* back, int64_t shared, int64_t rows, int64_t heads, int64_t key_heads, int64_t dim,
                    int64_t capacity, int64_t filled, double scale, double softcap, float* y, int threads);

  // Causal attention in a row of sequences, float32: y (queries, heads, dim) = softmax(scale q k^T) v, for q (queries,
  // heads, dim), k and v (tokens, key_heads, dim). softcap is as in attend. Their Grids are (queries, heads) and
  // (tokens, key_heads), of vectors that are contiguous. table has a row for each sequence: its first query, their
  // number, its first token, their number, the first token that it shares, their number. Its keys are the shared
  // tokens, which are own tokens of an earlier sequence of the family (or none), then its own. Query i sees keys
  // places[i] - window + 1 to places[i]; places ascend within a sequence. Family j of `count` has rows families[j] to
  // families[j + 1] of the table. dtype: of the factors of the products. saved (queries, heads, 2) is for the backward.
  int64_t (*packed_attention)(Grid q, Grid k, Grid v, const int64_t* places, const int64_t* table,
                              const int64_t* families, int64_t count, int64_t heads, int64_t key_heads, int64_t dim,
                              int64_t window, double scale, double softcap, int dtype, float* y, float* saved,
                              int threads);

  // grad_q (queries, heads, dim); grad_k and grad_v (tokens, key_heads, dim). by_head (2, tokens, heads, dim) is room
  // for the gradients by each head of queries, null if heads == key_heads.
  int64_t (*packed_attention_backward)(Grid q, Grid k, Grid v, const float* y, const float* saved, const float* grad,
                                       const int64_t* places, const int64_t* table, const int64_t* families,
                                       int64_t count, int64_t heads, int64_t key_heads, int64_t dim, int64_t window,
                                       double scale, double softcap, int dtype, int64_t tokens, float* by_head,
                                       float* grad_q, float* grad_k, float* grad_v, int threads);

  // y (rows, width) = x (rows, depth) weight^T + bias (may be null), for few rows. A weight in bfloat16 multiplies x
  // rounded to it; sums are float32. A row of y depends on its row of x alone.
  int64_t (*few_rows_product)(const float* x, Matrix weight, const float* bias, int64_t rows, int64_t depth,
                              int64_t width, float* y, int threads);

  // A whole layer for one token per row: x (rows, width) is replaced by the output, and the token's key and value are
  // written to column filled - 1. cos and sin (rows, dim) are those of its position; norms add eps; the rest is as in
  // attend.
  int64_t (*decode_layer)(LayerWeights weights, float* x, const float* cos, const float* sin, float* keys,
                          float* values, const float* bias, const int64_t* back, int64_t shared, int64_t rows,
                          int64_t width, int64_t intermediate, int64_t heads, int64_t key_heads, int64_t dim,
                          int64_t capacity, int64_t filled, double scale, double eps, int threads);

  // The token at which the cumulative softmax(logits / temperature) first exceeds uniform, in [0, 1), and its
  // log-probability, for each row of logits (rows, vocab), contiguous float32.
  int64_t (*sample_tokens)(const float* logits, const double* uniforms, int64_t rows, int64_t vocab, double temperature,
                           int64_t* tokens, float* logprobs, int threads);

  // y = silu(gate) * up, or with gelu, in the form with tanh, all (rows, width); gate and up have rows row_stride
  // apart, y is contiguous, as all below are.
  int64_t (*glu)(const void* gate, const void* up, bool gelu, int dtype, int64_t row_stride, int64_t rows,
                 int64_t width, void* y, int threads);
  int64_t (*glu_backward)(const void* gate, const void* up, const void* grad, bool gelu, int dtype, int64_t rows,
                          int64_t width, void* grad_gate, void* grad_up, int threads);

  // y (width, rows) = x^T, both contiguous, of numbers of 16 bits.
  int64_t (*transpose)(const void* x, int64_t rows, int64_t width, void* y, int threads);
};

#define RLHF_CPU_OPS(X)        \
  X(token_logprobs_forward)    \
  X(token_logprobs_backward)   \
  X(linear_forward)            \
  X(linear_backward)           \
  X(linear_narrow)             \
  X(kl_divergence_forward)     \
  X(kl_divergence_backward)    \
  X(ppo_loss)                  \
  X(value_loss)                \
  X(kl_penalty)                \
  X(pairwise_loss)             \
  X(ranking_loss)              \
  X(gae)                       \
  X(masked_mean)               \
  X(masked_mean_backward)      \
  X(masked_whiten)             \
  X(rms_norm)                  \
  X(rms_norm_backward)         \
  X(rotary)                    \
  X(attend)                    \
  X(packed_attention)          \
  X(packed_attention_backward) \
  X(few_rows_product)          \
  X(decode_layer)              \
  X(sample_tokens)             \
  X(glu)                       \
  X(glu_backward)              \
  X(transpose)

// The instruction sets compiled into this module, best first; cpu_isa() is the one in use.
struct CpuIsa {
  const char* name;  // "amx", "avx512", "avx2", "portable"
  CpuOps ops;
  bool supported;      // by this CPU
  bool tiles = false;  // whether products of bfloat16 are AMX's, if this process may_use_tiles
};
const CpuIsa* cpu_isas(int* count);
const CpuIsa& cpu_isa();
// Whether this process has AMX's tiles, with the instruction set in use. Linux gives them to a process that asks,
// unless a thread's stack for signals is too small. The first call asks, so that an import changes nothing.
bool may_use_tiles();
bool use_cpu_isa(const char* name);  // false where it is not compiled in or not supported

// CUDA ops. Each launches on stream, which belongs to the current device, and returns the cudaError_t of the launch
// (0 is success); nothing synchronises. A label out of range prints its row and stops the kernel, as a device-side
// assert of PyTorch does. The small ops are those of CpuOps, with scratch instead of threads: kCudaScratch + rows
// uninitialised doubles (rows: those of the op, or 0) that only this call uses.
constexpr int64_t kCudaScratch = 1 << 15;

struct CudaOps {
  int (*token_logprobs_forward)(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                                int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                                double temperature, void* logprobs, void* entropy, void* saved, void* stream);
  int (*token_logprobs_backward)(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner,
                                 int64_t outer_stride, int64_t inner_stride, const int64_t* labels, const uint8_t* mask,
                                 double temperature, const void* saved, const void* entropy, const void* grad_logprobs,
                                 const void* grad_entropy, void* grad_logits, int64_t grad_outer_stride,
                                 int64_t grad_inner_stride, void* stream);

  // Replaces each row of logits by the gradient of weights[i] * loss. The loss is that of ppo_loss for one token, given
  // its logprob and entropy, or -logprob if advantages is null. old_logprobs null stands for the logprobs themselves.
  // ref_logprobs and importance_weights may be null too. These inputs, and the outputs logprobs and entropy, are accum
  // (rows).
  int (*known_gradient)(void* logits, int dtype, int64_t rows, int64_t vocab, int64_t inner, int64_t outer_stride,
                        int64_t inner_stride, const int64_t* labels, const uint8_t* mask, double temperature,
                        const void* weights, const void* old_logprobs, const void* advantages, const void* ref_logprobs,
                        const void* importance_weights, double clip_low, double clip_high, double dual_clip,
                        double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef, void* logprobs,
                        void* entropy, void* stream);

  // x (count contiguous elements, aligned to 16 bytes) *= factor, one float32 or float64 number. If it is 1, x is
  // neither read nor written.
  int (*scale)(void* x, int dtype, int64_t count, const void* factor, int factor_dtype, void* stream);

  int (*ppo_loss)(Grid logprobs, Grid old_logprobs, Grid advantages, Grid mask, Grid ref_logprobs, Grid entropy,
                  Grid importance_weights, int64_t rows, int64_t cols, double clip_low, double clip_high,
                  double dual_clip, double log_ratio_clamp, double kl_coef, int kl_estimator, double entropy_coef,
                  int aggregation, const double* normalizer, int dtype, void* loss, void* stats, void* grad_logprobs,
                  void* grad_entropy, double* scratch, void* stream);
  int (*value_loss)(Grid values, Grid old_values, Grid returns, Grid mask, int64_t rows, int64_t cols, double cliprange,
                    int aggregation, const double* normalizer, int dtype, void* loss, void* stats, void* grad,
                    double* scratch, void* stream);
  int (*kl_penalty)(Grid logprobs, Grid ref_logprobs, int64_t rows, int64_t cols, int estimator, double input_clamp,
                    double output_clamp, int dtype, void* kl, void* slope, void* stream);
  int (*pairwise_loss)(Grid chosen, Grid rejected, Grid ref_chosen, Grid ref_rejected, Grid margin, Grid target_prob,
                       Grid weights, int64_t pairs, double scale, double margin_value, double prob_value,
                       double center_coef, int dtype, void* loss, void* stats, void* grad_chosen, void* grad_rejected,
                       double* scratch, void* stream);
  int (*ranking_loss)(Grid rewards, const int64_t* ranks, int64_t rows, int64_t k, int dtype, void* loss, void* stats,
                      void* grad, double* scratch, void* stream);
  int (*gae)(Grid rewards, Grid values, Grid mask, int64_t rows, int64_t cols, double gamma, double lam, int carry,
             int dtype, void* advantages, void* returns, void* stream);
  int (*masked_mean)(Grid values, Grid mask, int64_t rows, int64_t cols, int dtype, void* means, void* counts,
                     double* scratch, void* stream);
  int (*masked_whiten)(Grid values, Grid mask, int64_t rows, int64_t cols, int shift_mean, double eps, int dtype,
                       void* whitened, void* saved, double* scratch, void* stream);

  int (*kl_divergence_forward)(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                               const uint8_t* mask, void* kl, void* saved, void* stream);
  int (*kl_divergence_backward)(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t vocab,
                                const uint8_t* mask, const void* kl, const void* saved, const void* grad_kl,
                                void* grad_logits, void* grad_ref_logits, void* stream);
};

#define RLHF_CUDA_OPS(X)     \
  X(token_logprobs_forward)  \
  X(token_logprobs_backward) \
  X(known_gradient)          \
  X(scale)                   \
  X(ppo_loss)                \
  X(value_loss)              \
  X(kl_penalty)              \
  X(pairwise_loss)           \
  X(ranking_loss)            \
  X(gae)                     \
  X(masked_mean)             \
  X(masked_whiten)           \
  X(kl_divergence_forward)   \
  X(kl_divergence_backward)

}  // namespace rlhf
