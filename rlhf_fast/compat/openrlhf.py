"""OpenRLHF's losses, computed by our ops: `openrlhf.models.loss`, `openrlhf.models.utils`, the adaptive KL controller.

Signatures and results are those of release 0.11.0. Release 0.11.2 renamed the rollout-correction options of PolicyLoss,
added a fifth result to it, and made log_probs_old the third argument of compute_approx_kl; everything else matches
both releases.

All functions differ from OpenRLHF as follows. Results are float32 whatever the input dtype. -inf logits give finite
entropies (OpenRLHF: NaN). An empty mask gives 0 (OpenRLHF: NaN). NaN outside a mask reaches neither a loss nor a
gradient. An empty batch gives empty results (OpenRLHF's log_probs_from_logits raises for bf16). No input is changed.

Left out: ring attention in GPTLMLoss, which needs a process group (and OpenRLHF averages the means of ranks that have
different numbers of labels); helpers for packing and models, which contain no arithmetic to replace.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.reference import aggregate, as_accumulator
from ._shared import _adapted, _fitted

_CORRECTIONS = ("tis", "icepop", "seq-mask-tis")


def _mask(like: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _aggregation(token_level_loss, dp_size, batch_num_tokens, global_batch_size) -> dict:
    """OpenRLHF's arguments as ours: loss_agg_mode and normalizer. dp_size is used only with a global number."""
    mode, total = ("token-mean", batch_num_tokens) if token_level_loss else ("seq-mean-token-mean", global_batch_size)
    return {"loss_agg_mode": mode, "normalizer": None if total is None else total / dp_size}


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor | None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """(B, T) losses -> scalar: the mean over tokens, or over the token means of sequences that have a token.

    batch_num_tokens or global_batch_size replaces the local number. dp_size then undoes the averaging of gradients over
    the ranks.
    """
    options = _aggregation(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return aggregate(as_accumulator(loss), _mask(loss, loss_mask), options["loss_agg_mode"], options["normalizer"])


class GPTLMLoss(nn.Module):
    """Cross-entropy of the next token. The labels (B, T) are shifted here, and -100 does not count.

    If no label counts, the loss is 0 (OpenRLHF: NaN).
    """

    def __init__(self, ring_attn_group=None):
        super().__init__()
        if ring_attn_group is not None:
            raise ValueError("GPTLMLoss: ring_attn_group must be None; ring attention is not supported here")
        self.IGNORE_INDEX = -100

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, T, V) logits, (B, T) labels -> scalar."""
        return ops.cross_entropy(logits[..., :-1, :], labels[..., 1:], ignore_index=self.IGNORE_INDEX)


class SFTLoss(nn.Module):
    """aggregate_loss of the negative log-probabilities."""

    def __init__(self, token_level_loss: bool = True):
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """(B, T) log-probs and mask -> scalar."""
        return aggregate_loss(
            -per_token_logps, loss_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )


class PolicyLoss(nn.Module):
    """PPO's clipped surrogate, with the log-ratio clamped to +-20, or GSPO (arXiv 2507.18071), with one ratio per
    sequence.

    enable_vllm_is_correction multiplies the PPO loss by the weights exp(old_log_probs - rollout_log_probs).
    vllm_is_correction_type says what happens to weights outside vllm_is_truncated_threshold = [low, high]: "tis" clamps
    them, "icepop" drops the tokens, "seq-mask-tis" drops the sequences whose geometric mean lies outside. For the last,
    OpenRLHF's comment promises the clamp of "tis" but its code does not clamp. Ours follows the code: sequences that
    are kept have their exact weights.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: list | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"PolicyLoss: policy_loss_type {policy_loss_type!r} must be 'ppo' or 'gspo'")
        if vllm_is_correction_type not in _CORRECTIONS:
            raise ValueError(
                f"PolicyLoss: vllm_is_correction_type {vllm_is_correction_type!r} must be one of {_CORRECTIONS}"
            )
        if enable_vllm_is_correction and policy_loss_type == "ppo" and vllm_is_truncated_threshold is None:
            raise ValueError("PolicyLoss: enable_vllm_is_correction needs vllm_is_truncated_threshold=[low, high]")
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.enable_vllm_is_correction = enable_vllm_is_correction
        self.vllm_is_truncated_threshold = vllm_is_truncated_threshold
        self.vllm_is_correction_type = vllm_is_correction_type

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All (B, T), the new log-probs first (verl: second) -> (loss, clip_ratio, ppo_kl, vllm_kl or None), scalars.

        advantages may be (B, 1), one per response. An empty mask gives 0 (OpenRLHF: NaN).
        clip_ratio is the share of tokens that the clip changes, ppo_kl the mean of old - new log-probs.
        """
        mask = _mask(log_probs, action_mask)
        new, old, weights, vllm_kl, clamp = log_probs, old_log_probs, None, None, 20.0
        if self.policy_loss_type == "gspo":
            base = rollout_log_probs if self.enable_vllm_is_correction else old_log_probs
            mean = ops.masked_mean(as_accumulator(log_probs) - as_accumulator(base), mask, -1)
            new = mean[:, None].expand(mask.shape)
            old, clamp = torch.zeros_like(new), None
        elif self.enable_vllm_is_correction:
            weights = self._correction(old_log_probs, rollout_log_probs, mask)
            vllm_kl = ops.masked_mean(as_accumulator(rollout_log_probs) - old_log_probs, mask)
        loss, stats = ops.ppo_loss(
            new, old, _fitted(advantages, new), mask, cliprange=self.clip_eps_low, cliprange_high=self.clip_eps_high,
            dual_clip=self.dual_clip, log_ratio_clamp=clamp, importance_weights=weights,
            **_aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        )  # fmt: skip
        ppo_kl = stats["approx_kl_k1"]
        if self.policy_loss_type == "gspo":
            ppo_kl = ops.masked_mean(as_accumulator(old_log_probs) - log_probs.detach(), mask)
        return loss, stats["clipfrac_high"] + stats["clipfrac_low"], ppo_kl, vllm_kl

    @torch.no_grad()
    def _correction(self, old_log_probs, rollout_log_probs, mask) -> Tensor:
        """(B, T) weights exp(old - rollout), clamped or set to 0 where they are dropped."""
        low, high = self.vllm_is_truncated_threshold
        log_ratio = as_accumulator(old_log_probs) - as_accumulator(rollout_log_probs)
        ratio = log_ratio.exp()
        if self.vllm_is_correction_type == "tis":
            return ratio.clamp(low, high)
        gate = ratio
        if self.vllm_is_correction_type == "seq-mask-tis":
            gate = ops.masked_mean(log_ratio, mask, -1).exp()[:, None]
        return torch.where((gate >= low) & (gate <= high), ratio, 0.0)


class ValueLoss(nn.Module):
    """0.5 times the larger of the clipped and the plain squared error; clip_eps=None does not clip."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """New values, old values, returns (verl: returns second), all (B, T) -> scalar.

        An empty mask gives 0 (OpenRLHF: NaN).
        """
        options = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        mask = _mask(values, action_mask)
        old_values = values if self.clip_eps is None else _fitted(old_values, values)  # without a clip it is not read
        returns = _fitted(returns, values)
        return ops.value_loss(values, old_values, returns, mask, cliprange_value=self.clip_eps, **options)[0]


class PairWiseLoss(nn.Module):
    """Bradley-Terry: the mean of -log sigma(chosen - rejected - margin)."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """(B,) or (B, 1) rewards, and a margin of the same shape or a number -> scalar.

        An empty batch gives 0 (OpenRLHF: NaN).
        """
        chosen, rejected = chosen_reward.flatten(), reject_reward.flatten()
        margin = _fitted(margin.flatten(), chosen) if isinstance(margin, Tensor) else margin
        return ops.pairwise_loss(chosen, rejected, margin=margin)[0]


class LogExpLoss(PairWiseLoss):
    """log(1 + exp(rejected - chosen)), which is the same as PairWiseLoss.

    OpenRLHF's overflows at a difference of 89 and ignores the margin. Ours stays finite and subtracts the margin.
    """


class DPOLoss(nn.Module):
    """DPO, or IPO (arXiv 2310.12036, eq. 17). label_smoothing is the probability that a preference is flipped."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed log-probs (B,) or (B, 1) -> (loss, chosen_rewards, rejected_rewards).

        The rewards have the shape of the log-probs and no gradient.
        """
        given = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        shape, given = policy_chosen_logps.shape, [x.flatten() for x in given]
        chosen, rejected = (as_accumulator(given[i]) - given[i + 2] for i in (0, 1))
        if self.ipo:
            loss = ops.masked_mean((chosen - rejected - 1 / (2 * self.beta)).square())
        else:
            loss, _ = ops.dpo_loss(*given, beta=self.beta, label_smoothing=self.label_smoothing)
        return loss, (self.beta * chosen.detach()).view(shape), (self.beta * rejected.detach()).view(shape)


def compute_approx_kl(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """Per-token k1, k2 or k3 of log_probs against log_probs_base, in float32, clamped to +-10 as in OpenRLHF.

    The clamp biases the estimate and stops its gradient; rlhf_fast.kl_penalty does not clamp by default.
    If exp overflows, k3 is 10 with zero gradient (OpenRLHF: NaN gradient).
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"compute_approx_kl: kl_estimator {kl_estimator!r} must be 'k1', 'k2' or 'k3'")
    log_probs, log_probs_base = _fitted(log_probs, log_probs_base), _fitted(log_probs_base, log_probs)
    return ops.kl_penalty(log_probs, log_probs_base, estimator=kl_estimator, output_clamp=10.0)


def compute_reward(
    r: Tensor | float,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """(B,) scores r and (B, T) kl -> (B, T) rewards: -kl_coef kl per token, plus r at the last action of each row.

    r is first clamped to reward_clip_range. A negative kl_coef is treated as 0. Outside the mask the result is 0
    (OpenRLHF leaves -kl_coef kl there, and puts the score of a row without any action into the last column).
    """
    mask = _mask(kl, action_mask)
    dtype = r.dtype if isinstance(r, Tensor) else as_accumulator(kl).dtype  # a number would get the default dtype
    r = as_accumulator(torch.as_tensor(r, dtype=dtype, device=kl.device)).expand(kl.shape[0])
    if reward_clip_range:
        r = r.clamp(reward_clip_range[0], reward_clip_range[1])
    remaining = mask.flip(1).cumsum(1).flip(1)  # number of actions from here on: 1 at the last one
    last = mask & (remaining == 1)
    return torch.where(mask, -max(kl_coef, 0.0) * as_accumulator(kl), 0.0) + torch.where(last, r[:, None], 0.0)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., V) logits, (...) labels -> float32 log-probs (OpenRLHF: bf16 for bf16 logits).

    OpenRLHF divides the logits in place; ours leaves them unchanged.
    """
    return ops.token_logprobs(logits, labels, temperature=temperature)


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of tensor where mask is True (None: everywhere), over dim (default: all axes).

    If the mask is empty, the mean is 0 (OpenRLHF: NaN).
    """
    return ops.masked_mean(tensor, mask, dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """(tensor - mean) / sqrt(max(var, eps)) over the mask along dim, var without Bessel's correction; 0 outside it."""
    mask = mask.bool().expand_as(tensor)
    centered = torch.where(mask, as_accumulator(tensor) - ops.masked_mean(tensor, mask, dim).unsqueeze(dim), 0.0)
    var = ops.masked_mean(centered.square(), mask, dim).unsqueeze(dim)
    return centered * var.clamp(min=eps).rsqrt()


def compute_entropy(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...) entropies in nats.

    The caller divides the logits by the temperature. -inf logits contribute 0 (OpenRLHF: NaN).
    """
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ops.token_logprobs_and_entropy(logits, labels)[1]


class AdaptiveKLController:
    """Moves the KL coefficient `value` towards a target KL (arXiv 1909.08593).

    update: value *= 1 + clip(current / target - 1, +-0.2) * n_steps / horizon
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """current: the measured KL, in the unit of target; n_steps: episodes since the last update."""
        self.value = _adapted(self.value, current, self.target, n_steps, self.horizon)
