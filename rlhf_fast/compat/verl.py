"""verl's tensor functions, computed by our ops: core_algos, torch_functional, linear cross-entropy, apply_kl_penalty.

Signatures are those of release 0.9.1, which only adds trailing options to 0.8. Our functions are not in verl's
registries; add one with `core_algos.register_policy_loss("vanilla")(compute_policy_loss_vanilla)`.

All functions differ from verl as follows. Results are float32 whatever the input dtype (verl: bf16 log-probs for bf16
logits). -inf logits give finite entropies (verl: NaN). An empty mask gives 0 (verl: NaN, or an error in masked_var and
the functions that whiten). NaN outside a mask reaches neither a loss, an advantage nor a gradient. An empty batch gives
empty results (verl's logprobs_from_logits raises). Masks are bool or 0/1. The outcome advantages add up all rewards of
a response, including those outside the mask, as verl's do; NaN and infinities outside the mask count as 0 (verl: NaN
for the whole group).

Left out: gdpo and the optimal token baselines (they read verl's batch object or loop over trajectories), the rmpad
log-probs (they use flash-attn's padding), dppo and dro (newer than the functions this module covers), the
vocabulary-parallel linear_cross_entropy (needs a process group).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.reference import as_accumulator
from ._shared import _adapted, _fitted, _masked_var
from ._verl_advantages import (  # noqa: F401 - public here
    compute_gae_advantage_return,
    compute_gpg_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_grpo_passk_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_opo_outcome_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
)
from ._verl_bypass import compute_policy_loss_bypass_mode  # noqa: F401 - public here
from ._verl_losses import (  # noqa: F401 - public here
    _aggregation,
    agg_loss,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_reinforce,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """(..., V) logits, (...) labels -> (...) float32 log-probs (verl's naive and v2: bf16 for bf16 logits).

    inplace_backward (on by default, as in verl) lets the backward write the gradient over the logits. Autograd then
    raises if anything else uses them in the backward. verl overwrites them only with flash-attn, and without an error.
    """
    return ops.token_logprobs(logits, labels, inplace_backward=inplace_backward)


def logprobs_from_logits_flash_attn(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """The same as logprobs_from_logits; flash-attn is not needed."""
    return ops.token_logprobs(logits, labels, inplace_backward=inplace_backward)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """logprobs_from_logits with inplace_backward=False."""
    return ops.token_logprobs(logits, labels)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """logprobs_from_logits with inplace_backward=False."""
    return ops.token_logprobs(logits, labels)


def log_probs_from_logits_response(input_ids: Tensor, logits: Tensor, response_length: int) -> Tensor:
    """(B, S) ids, (B, S, V) logits -> (B, response_length) log-probs of the last response_length tokens."""
    return ops.token_logprobs(logits[:, -response_length - 1 : -1], input_ids[:, -response_length:])


def entropy_from_logits(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...) entropies in nats. -inf logits contribute 0 (verl: NaN)."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ops.token_logprobs_and_entropy(logits, labels)[1]


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same as entropy_from_logits. chunk_size is ignored: nothing of the size of the logits is allocated."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...) sum over the vocabulary of the squared probabilities."""
    best = logits.detach().argmax(-1)
    # log p at temperature 1/2 is 2 z - lse(2 z); twice log p at temperature 1 is 2 z - 2 lse(z).
    return (2 * ops.token_logprobs(logits, best) - ops.token_logprobs(logits, best, temperature=0.5)).exp()


def masked_sum(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of values where mask is True, over axis (default: all axes)."""
    axes = tuple(range(values.ndim)) if axis is None else axis
    return torch.where(mask.bool(), as_accumulator(values), 0.0).sum(axes)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of values where mask is True, over axis (default: all axes). An empty mask gives 0."""
    return ops.masked_mean(values, mask, axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of values over the mask, with Bessel's correction unless unbiased=False.

    If one value or none counts, the variance is 0 (verl raises).
    """
    return _masked_var(values, mask, unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over the mask; shift_mean=False adds the mean back. 0 outside the mask."""
    return ops.masked_whiten(values, mask, shift_mean=shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """x clamped to [tensor_min, tensor_max], which are tensors."""
    return torch.clamp(x, tensor_min, tensor_max)


class AdaptiveKLController:
    """Moves the KL coefficient `value` towards a target KL (arXiv 1909.08593).

    update: value *= 1 + clip(current_kl / target_kl - 1, +-0.2) * n_steps / horizon
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: int):
        self.value = init_kl_coef
        self.target = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """current_kl: the measured KL, in the unit of target_kl; n_steps: episodes since the last update."""
        self.value = _adapted(self.value, current_kl, self.target, n_steps, self.horizon)


def compute_rewards(token_level_scores: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, kl_ratio: float) -> Tensor:
    """(B, T) scores - kl_ratio (old - ref log-probs)."""
    return token_level_scores - kl_ratio * ops.kl_penalty(old_log_prob, ref_log_prob, estimator="k1")


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL estimate: "kl"/"k1", "abs", "mse"/"k2", "low_var_kl"/"k3" (input within +-20, result within +-10).

    The limits of k3 are verl's. They bias the estimate and stop its gradient; rlhf_fast.kl_penalty has no limits by
    default. A trailing "+" keeps the value and takes the gradient of k2, which is unbiased (older verl raises for all
    but k2). "full" is the exact KL of (..., V) logits over the vocabulary, which verl documents but does not implement.
    """
    if kl_penalty == "full":
        return ops.kl_divergence(logprob, ref_logprob)
    name = kl_penalty.removesuffix("+")
    clamps = {"input_clamp": 20.0, "output_clamp": 10.0} if name in ("k3", "low_var_kl") else {}
    value = ops.kl_penalty(logprob, ref_logprob, estimator=name, **clamps)
    if name == kl_penalty:
        return value
    unbiased = ops.kl_penalty(logprob, ref_logprob, estimator="k2")
    # unbiased - unbiased.detach() is exactly 0 if it is finite, and carries the gradient of k2.
    return value.detach() + torch.where(unbiased.isfinite(), unbiased - unbiased.detach(), 0.0)


def apply_kl_penalty(data, kl_ctrl, kl_penalty: str = "kl"):
    """Writes data.batch["token_level_rewards"] = token_level_scores - kl_ctrl.value * KL, and updates kl_ctrl.

    data is verl's DataProto or any object with a mapping `batch` of (B, T) tensors: response_mask, token_level_scores,
    old_log_probs, ref_log_prob. Returns (data, metrics). The controller gets the mean over the batch of each response's
    mean KL per token. For an empty batch that is 0 (verl: NaN, and kl_ctrl stays NaN from then on).
    """
    mask, beta = data.batch["response_mask"].bool(), kl_ctrl.value
    kl = _kl_penalty(data.batch["old_log_probs"], data.batch["ref_log_prob"], kl_penalty)
    kl = torch.where(mask, kl, 0.0)
    current = ops.masked_mean(ops.masked_mean(kl, mask, -1)).item()
    kl_ctrl.update(current_kl=current, n_steps=mask.shape[0])
    data.batch["token_level_rewards"] = data.batch["token_level_scores"] - beta * kl
    return data, {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": beta}


_kl_penalty = kl_penalty  # in apply_kl_penalty an argument hides the function


def compute_entropy_loss(logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean") -> Tensor:
    """(B, T, V) logits -> aggregated entropy. Rows outside the mask are not read.

    -inf logits contribute 0 (verl: NaN).
    """
    labels = torch.zeros_like(response_mask, dtype=torch.long)
    entropy = ops.token_logprobs_and_entropy(logits, labels, mask=response_mask)[1]
    return agg_loss(entropy, response_mask, loss_agg_mode)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """New values, returns, old values (in this order), all (B, T) -> (loss, clipfrac).

    The loss is 0.5 times the larger of the clipped and the plain squared error.
    """
    options = _aggregation(
        response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    values, returns = _fitted(values, vpreds), _fitted(returns, vpreds)
    loss, stats = ops.value_loss(vpreds, values, returns, response_mask, cliprange_value=cliprange_value, **options)
    return loss, stats["clipfrac"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """(..., D) hidden, (V, D) weight, (...) labels -> (N,) log-probs (or their sum or mean) and (N,) entropies."""
    if dist_process_group is not None:
        raise ValueError("linear_cross_entropy: dist_process_group must be None; the vocabulary is not split here")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} must be 'none', 'sum' or 'mean'")
    *rows, width = hidden.shape
    hidden, labels = hidden.reshape(math.prod(rows), width), labels.reshape(-1)
    logprobs, entropy = ops.linear_token_logprobs(hidden, weight, labels, temperature=temperature, with_entropy=True)
    if reduction == "sum":
        logprobs = logprobs.sum()
    elif reduction == "mean":
        logprobs = ops.masked_mean(logprobs)
    return logprobs, entropy


class FusedLinearForPPO(nn.Module):
    """Log-probs and entropies from hidden_states @ vocab_weights.T / temperature, without materialising these logits.

    Both are float32, and gradients accumulate in float32 (verl rounds the logits, the entropies and the gradient of the
    weights to bf16). chunk_size and impl_backend are accepted and ignored.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(..., D) hidden, (V, D) weights, (...) ids -> (...) log-probs, (...) entropies."""
        return ops.linear_token_logprobs(
            hidden_states, vocab_weights, input_ids, temperature=temperature, with_entropy=True
        )
