"""Every op in plain PyTorch: the specification, the oracle of the tests, and the last-resort backend.

Written to be read, not to be fast. Shapes: B sequences or pairs, T tokens, V vocabulary, D hidden, K ranked
responses, `...` any leading axes. Outputs are float32 whatever the input dtype, except that float64 stays float64. A
mask is bool (or 0/1) and True counts; values outside it, including NaN, never reach a result or a gradient. Inputs that
are data and not predictions (old log-probs, advantages, returns, margins, weights, normalizers) receive no gradient.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

PPO_STATS = (
    "policy_loss",  # the clipped surrogate alone, aggregated like the loss
    "kl",  # the KL term before kl_coef, aggregated like the loss
    "entropy",  # the entropy term before entropy_coef, aggregated like the loss
    "approx_kl_k1",  # k1, k2, k3: means over the mask of -d, d^2/2, exp(d) - 1 - d, with d = logprobs - old_logprobs
    "approx_kl_k2",
    "approx_kl_k3",
    "clipfrac_high",  # share of tokens clipped because the ratio is too high (A > 0) or too low (A < 0)
    "clipfrac_low",
    "dual_clipfrac",  # share of tokens that the dual clip changes
    "ratio_mean",
    "ratio_var",  # population variance
    "ratio_min",
    "ratio_max",
    "max_abs_log_ratio",  # exactly 0 on the first minibatch of a rollout
    "num_tokens",
)
VALUE_STATS = (
    "value_loss",
    "clipfrac",
    "values_mean",
    "returns_mean",
    "returns_var",
    "error_mean",
    "error_var",
    "num_tokens",
)
PAIRWISE_STATS = ("accuracy", "margin", "chosen_mean", "rejected_mean", "reward_mean", "reward_std", "num_pairs")
RANKING_STATS = ("accuracy", "margin", "num_pairs")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = {"k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "abs": "abs"}


def as_accumulator(x: Tensor) -> Tensor:
    """float32, or float64 where the input already is."""
    return x if x.dtype == torch.float64 else x.float()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.bool(), x, 0.0)


def _limited(x: Tensor, most: float) -> Tensor:
    """x clamped to +-most, with gradient 0 where that changes x.

    Not torch.clamp, whose gradient at the bound itself is 1 up to torch 2.13, and 0 after that.
    """
    return torch.where(x.abs() <= most, x, x.detach().clamp(-most, most))


def _data(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return _masked(as_accumulator(x.detach()), mask)


def token_logprobs_and_entropy(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(..., V) logits, (...) labels -> log-softmax(logits / temperature) at the label, and its entropy in nats."""
    z, labels = as_accumulator(logits) / temperature, labels.long()
    if mask is not None:
        z = torch.where(mask.bool()[..., None], z, 0.0)
        labels = labels.masked_fill(~mask.bool(), 0)
    logp = z.log_softmax(-1)
    logprobs = logp.gather(-1, labels[..., None]).squeeze(-1)
    # An impossible token has no entropy: 0 * (-inf) must be 0. The inner where keeps the gradient finite too.
    finite = torch.where(logp == -torch.inf, torch.zeros((), dtype=logp.dtype, device=logp.device), logp)
    entropy = -(finite.exp() * finite).masked_fill(logp == -torch.inf, 0.0).sum(-1)
    return _masked(logprobs, mask), _masked(entropy, mask)


def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """(..., V) logits, (...) labels -> (...) log-probability of each label."""
    return token_logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)[0]


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """(..., D) hidden, (V, D) weight -> (..., V) logits, optionally softcap * tanh(logits / softcap) (Gemma 2)."""
    result = as_accumulator(hidden)
    dtype = torch.promote_types(result.dtype, as_accumulator(weight).dtype)
    device = hidden.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        logits = (result.to(dtype) @ weight.to(dtype).T).to(result.dtype)
    if bias is not None:
        logits = logits + bias.to(result.dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    softcap: float | None = None, mask: Tensor | None = None, with_entropy: bool = False,
):  # fmt: skip
    """token_logprobs of hidden @ weight.T + bias; with_entropy returns (logprobs, entropy)."""
    if mask is not None:
        hidden = _masked(hidden, mask[..., None])
    logits = linear_logits(hidden, weight, bias, softcap)
    logprobs, entropy = token_logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)
    return (logprobs, entropy) if with_entropy else logprobs


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, normalizer: Tensor | float | None = None
) -> Tensor:
    """The sum of -log p(label) over labels that are not ignore_index, divided by their number (or normalizer).

    0 if there are none.
    """
    labels = labels.long()  # a uint8 label of 156 would equal -100
    mask = labels != ignore_index
    nll = -token_logprobs(logits, labels, mask=mask).sum()
    return nll / mask.sum().clamp(min=1) if normalizer is None else over(nll, normalizer, mask)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, softcap: float | None = None,
    ignore_index: int = -100, normalizer: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """cross_entropy of hidden @ weight.T + bias."""
    labels = labels.long()
    mask = labels != ignore_index
    nll = -linear_token_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, mask=mask).sum()
    return nll / mask.sum().clamp(min=1) if normalizer is None else over(nll, normalizer, mask)


def kl_divergence(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., V) both -> (...) exact KL(softmax(logits) || softmax(ref_logits)) over the vocabulary, in nats."""
    p, q = as_accumulator(logits), as_accumulator(ref_logits)
    if mask is not None:
        p, q = _masked(p, mask[..., None]), _masked(q, mask[..., None])
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    impossible = logp.exp() == 0  # the term is 0, whatever q says
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    term = torch.where(impossible, zero, logp).exp() * (
        torch.where(impossible, zero, logp) - torch.where(impossible, zero, logq)
    )
    return _masked(term.masked_fill(impossible, 0.0).sum(-1), mask)


def _statistics(names: tuple[str, ...], values: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in zip(names, values, strict=True)}


def aggregate(loss: Tensor, mask: Tensor, mode: str = "token-mean", normalizer: Tensor | float | None = None) -> Tensor:
    """(B, T) per-token losses -> scalar, by one of AGGREGATIONS. An empty mask gives 0.

    token-mean: sum over tokens / number of tokens. seq-mean-token-sum: mean over sequences of token sums.
    seq-mean-token-mean: mean over sequences of token means. seq-mean-token-sum-norm: sum / T.
    Sequences without a token do not count. normalizer replaces the last divisor (the number of tokens; of sequences; of
    sequences; T): under gradient accumulation or data parallelism pass the global number.
    """
    mask = mask.bool()
    loss = _masked(loss, mask)
    if mode == "token-mean":
        total, count = loss.sum(), mask.sum().clamp(min=1)
    elif mode == "seq-mean-token-sum":
        total, count = loss.sum(), mask.any(-1).sum().clamp(min=1)
    elif mode == "seq-mean-token-mean":
        total, count = (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), mask.any(-1).sum().clamp(min=1)
    elif mode == "seq-mean-token-sum-norm":
        total, count = loss.sum(), max(loss.shape[-1], 1)
    else:
        raise ValueError(f"loss_agg_mode {mode!r} must be one of {', '.join(AGGREGATIONS)}")
    return total / count if normalizer is None else over(total, normalizer, mask)


def over(total: Tensor, normalizer: Tensor | float, mask: Tensor) -> Tensor:
    """total / normalizer, in the dtype of total. An empty mask gives 0, even for a normalizer of 0."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().reshape(()).to(total.dtype)
    return torch.where(mask.any(), total / normalizer, 0.0)


def _exp_minus_1_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, which is infinite for x = +-inf. torch.expm1(x) - x would be NaN for x = inf."""
    return torch.where(x == torch.inf, torch.inf, torch.expm1(x) - x)


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1", input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:  # fmt: skip
    """Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens.

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman 2020, "Approximating KL
    Divergence"), abs = |d|.
    input_clamp limits d, output_clamp limits the result, both symmetrically. The gradient is 0 where a clamp changes
    the value.
    """
    kind = KL_ESTIMATORS.get(estimator)
    if kind is None:
        raise ValueError(f"kl_penalty: estimator {estimator!r} must be one of {', '.join(KL_ESTIMATORS)}")
    formula = {
        "k1": lambda d: d,
        "k2": lambda d: 0.5 * d * d,
        "k3": lambda d: _exp_minus_1_minus(-d),
        "abs": lambda d: d.abs(),
    }[kind]
    d = (as_accumulator(logprobs) - as_accumulator(ref_logprobs)).to(as_accumulator(logprobs).dtype)
    if input_clamp is not None:
        d = _limited(d, input_clamp)
    if output_clamp is None:
        return formula(d)
    limited = formula(d.detach()).clamp(-output_clamp, output_clamp)
    held = limited != formula(d.detach())  # no gradient there, not even 0 * inf
    return torch.where(held, limited, formula(torch.where(held, 0.0, d)))


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of values where mask is True, over dim (all axes by default); 0 where the mask is empty."""
    values = as_accumulator(values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool().expand_as(values)
    axes = tuple(range(values.ndim)) if dim is None else dim
    return _masked(values, mask).sum(axes) / mask.sum(axes).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(var + eps) over the mask, var with Bessel's correction; 0 outside the mask. eps > 0.

    shift_mean=False adds the mean back, so that only the scale changes (as in TRL). One token or none has no variance:
    var = 0.
    """
    values = as_accumulator(values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool().expand_as(values)
    mean = masked_mean(values, mask)
    centered = _masked(values - mean, mask)
    var = centered.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centered * torch.rsqrt(var + eps)
    return whitened if shift_mean else _masked(whitened + mean, mask)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor, *, cliprange: float = 0.2,
    cliprange_high: float | None = None, dual_clip: float | None = None, log_ratio_clamp: float | None = None,
    ref_logprobs: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", entropy: Tensor | None = None,
    entropy_coef: float = 0.0, importance_weights: Tensor | None = None, loss_agg_mode: str = "token-mean",
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), all (B, T) -> (scalar loss, statistics: PPO_STATS).

    r = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp));
    loss = -min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A);
    a dual_clip c > 1 bounds it by -c A where A < 0 (Ye et al. 2020); times importance_weights (already truncated);
    plus kl_coef * kl_penalty(logprobs, ref_logprobs) minus entropy_coef * entropy, aggregated by `aggregate`.
    A term whose coefficient is 0 is only a statistic. logprobs and entropy receive gradients, the other inputs do not.
    """
    mask = mask.bool()
    logp = _masked(as_accumulator(logprobs), mask)
    a = _data(advantages, mask)
    log_ratio = logp - _data(logprobs if old_logprobs is None else old_logprobs, mask)
    d = log_ratio if log_ratio_clamp is None else _limited(log_ratio, log_ratio_clamp)
    ratio = d.detach().exp()
    low, high = 1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high)
    clip_high, clip_low = (a > 0) & (ratio > high), (a < 0) & (ratio < low)
    dual = (a < 0) & (ratio > dual_clip) if dual_clip is not None else torch.zeros_like(mask)
    # A held ratio is a constant. Selecting it before exp keeps 0 * inf (from A = 0, or from an overflow that is
    # clipped) out of the loss and its gradient.
    held = clip_high | clip_low | dual | (a == 0)
    bound = ratio.clamp(low, high)
    if dual_clip is not None:
        bound = torch.where(dual, dual_clip, bound)
    surrogate = -a * torch.where(held, bound, torch.where(held, 0.0, d).exp())
    if importance_weights is not None:
        surrogate = surrogate * _data(importance_weights, mask)
    policy_loss = aggregate(surrogate, mask, loss_agg_mode, normalizer)
    loss, zero = policy_loss, torch.zeros_like(policy_loss)
    kl, bonus = zero, zero
    if ref_logprobs is not None:
        kl = kl_penalty(logp, _data(ref_logprobs, mask), estimator=kl_estimator)
        kl = aggregate(kl, mask, loss_agg_mode, normalizer)
        loss = loss + kl_coef * kl if kl_coef else loss
    if entropy is not None:
        bonus = aggregate(as_accumulator(entropy), mask, loss_agg_mode, normalizer)
        loss = loss - entropy_coef * bonus if entropy_coef else loss

    with torch.no_grad():
        ratio_mean = masked_mean(ratio, mask)
        some = mask.any()
        stats = (
            policy_loss,
            kl,
            bonus,
            masked_mean(-log_ratio, mask),
            masked_mean(0.5 * log_ratio**2, mask),
            masked_mean(_exp_minus_1_minus(log_ratio), mask),
            masked_mean(clip_high.to(loss.dtype), mask),
            masked_mean(clip_low.to(loss.dtype), mask),
            masked_mean(dual.to(loss.dtype), mask),
            ratio_mean,
            masked_mean((ratio - ratio_mean) ** 2, mask),
            torch.where(some, torch.where(mask, ratio, torch.inf).amin() if ratio.numel() else zero, zero),
            torch.where(some, torch.where(mask, ratio, -torch.inf).amax() if ratio.numel() else zero, zero),
            log_ratio.abs().amax() if log_ratio.numel() else zero,
            mask.sum(),
        )
    return loss.to(logp.dtype), _statistics(PPO_STATS, stats, logp.dtype)


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor, *,
    bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None, entropy_coef: float = 0.0,
    with_logprobs: bool = False, **options,
):  # fmt: skip
    """ppo_loss of linear_token_logprobs: hidden (B, T, D), weight (V, D), the rest (B, T). with_logprobs adds these."""
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, mask=mask, with_entropy=True
    )
    results = ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, entropy_coef=entropy_coef, **options)
    return (*results, logprobs.detach()) if with_logprobs else results


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float | None = 0.2,
    loss_agg_mode: str = "token-mean", normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """0.5 max((v - R)^2, (clip(v, v_old +- cliprange_value) - R)^2): all (B, T) -> (scalar loss, VALUE_STATS).

    cliprange_value=None does not clip. values receives the gradient, old_values and returns do not.
    """
    mask = mask.bool()
    v, old, target = _masked(as_accumulator(values), mask), _data(old_values, mask), _data(returns, mask)
    error = (v - target) ** 2
    clipped = torch.zeros_like(mask)
    if cliprange_value is not None:
        low, high = old - cliprange_value, old + cliprange_value
        # Not clamp(v) alone: what its gradient is beside a bound that is NaN depends on the version of PyTorch.
        v_clipped = torch.where((v >= low) & (v <= high), v, torch.clamp(v.detach(), low, high))
        clipped_error = (v_clipped - target) ** 2
        clipped = ~(clipped_error <= error) & ~error.isnan()  # an old value that is NaN shows in the loss
        error = torch.where(clipped, clipped_error, error)
    loss = aggregate(0.5 * error, mask, loss_agg_mode, normalizer)
    with torch.no_grad():
        returns_mean, error_mean = masked_mean(target, mask), masked_mean(target - v, mask)
        stats = (
            loss,
            masked_mean(clipped.to(loss.dtype), mask),
            masked_mean(v, mask),
            returns_mean,
            masked_mean((target - returns_mean) ** 2, mask),
            error_mean,
            masked_mean((target - v - error_mean) ** 2, mask),
            mask.sum(),
        )
    return loss.to(v.dtype), _statistics(VALUE_STATS, stats, v.dtype)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, gap_mode: str = "carry"
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): all (B, T) -> (advantages, returns).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V. Past the end V and A are 0.
    Masked positions inside a sequence: "carry" skips them (t + 1 is the next token of the mask, as in verl); "zero"
    counts them as steps with r = V = 0 (as in OpenRLHF), so A decays by gamma lam at each one. Both results are 0
    outside the mask and, being targets, carry no gradient.
    """
    if gap_mode not in ("carry", "zero"):
        raise ValueError(f"gae: gap_mode {gap_mode!r} must be 'carry' or 'zero'")
    mask = mask.bool()
    r, v = _data(rewards, mask), _data(values, mask)
    advantage = torch.zeros_like(r[:, 0]) if r.shape[1] else r.sum(1)
    next_value = torch.zeros_like(advantage)
    columns = []
    for t in reversed(range(r.shape[1])):
        new = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * advantage
        keep = mask[:, t] if gap_mode == "carry" else torch.ones_like(mask[:, t])
        advantage = torch.where(keep, new, advantage)
        next_value = torch.where(keep, v[:, t], next_value)
        columns.append(advantage)
    advantages = _masked(torch.stack(columns[::-1], 1), mask) if columns else torch.zeros_like(r)
    return advantages.to(r.dtype), _masked(advantages + v, mask).to(r.dtype)


def _won(d: Tensor) -> Tensor:
    """1 where d > 0, one half for a tie, NaN where d is NaN (whose torch.sign is 0)."""
    return torch.where(d.isnan(), d, 0.5 * (torch.sign(d) + 1))


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None,
    target_prob: Tensor | float | None = None, center_coef: float = 0.0, weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Bradley-Terry loss of (B,) rewards -> (scalar loss, statistics: PAIRWISE_STATS). An empty batch gives 0.

    d = chosen - rejected - margin; loss = -p log sigma(d) - (1 - p) log sigma(-d), where p = target_prob (1 by default;
    in RLAIF the judge's probability), plus center_coef (chosen + rejected)^2 (Eisenstein et al. 2023). The result is
    the weighted mean over the pairs. accuracy counts chosen > rejected, and a tie as one half.
    """
    c, r = as_accumulator(chosen), as_accumulator(rejected)
    d = c - r
    if margin is not None:
        d = d - (_data(margin) if isinstance(margin, Tensor) else margin)
    loss = -torch.nn.functional.logsigmoid(d)
    if target_prob is not None:
        p = _data(target_prob) if isinstance(target_prob, Tensor) else target_prob
        loss = p * loss - (1 - p) * torch.nn.functional.logsigmoid(-d)
    if center_coef:
        loss = loss + center_coef * (c + r) ** 2
    w = torch.ones_like(d) if weights is None else _data(weights)
    total = w.sum()
    share = w / torch.where(total > 0, total, 1.0)
    with torch.no_grad():
        both = torch.cat([c, r])
        center = masked_mean(both)
        stats = (
            (share * _won(c - r)).sum(),
            (share * (c - r)).sum(),
            (share * c).sum(),
            (share * r).sum(),
            center,
            masked_mean((both - center) ** 2).sqrt(),
            torch.full_like(total, d.numel()),
        )
    return (share * loss).sum().to(c.dtype), _statistics(PAIRWISE_STATS, stats, c.dtype)


def ranks_of_counts(counts: Tensor, k: int) -> Tensor:
    """(B,) numbers of responses, which are ordered best first -> (B, k) ranks, -1 after the last response."""
    places = torch.arange(k, device=counts.device)
    return torch.where(places < counts[:, None], places, -1)


def ranking_loss(rewards: Tensor, ranks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """All pairs of K ranked responses (Ouyang et al. 2022, eq. 1): (B, K) rewards and ranks -> (loss, RANKING_STATS).

    Rank 0 is the best; equal ranks are ties (no pair); a negative rank marks padding. The loss of a prompt is the mean
    of -log sigma(r_i - r_j) over its pairs with rank_i < rank_j. The result is the mean over the prompts that have a
    pair. (B,) ranks are counts (see ranks_of_counts).
    """
    ranks = ranks_of_counts(ranks, rewards.shape[1]) if ranks.ndim == 1 else ranks
    real = ranks >= 0
    r = _masked(as_accumulator(rewards), real)
    better = (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None] & real[:, None, :]
    d = r[:, :, None] - r[:, None, :]
    pairs = better.sum((1, 2))
    losses = _masked(-torch.nn.functional.logsigmoid(d), better).sum((1, 2)) / pairs.clamp(min=1)
    with torch.no_grad():
        stats = (masked_mean(_won(d), better), masked_mean(d, better), pairs.sum())
    return losses.sum() / (pairs > 0).sum().clamp(min=1), _statistics(RANKING_STATS, stats, r.dtype)


def dpo_loss(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, *,
    beta: float = 0.1, label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """DPO (Rafailov et al. 2023, eq. 7): pairwise_loss of the implicit rewards beta (log pi - log pi_ref).

    All inputs are (B,): sums of log-probs over the response tokens. Those of the reference receive no gradient.
    label_smoothing is the probability that a preference is flipped (conservative DPO).
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"dpo_loss: label_smoothing {label_smoothing} must be a probability, in [0, 1]")
    dtype = as_accumulator(chosen_logprobs).dtype
    chosen = (beta * (as_accumulator(chosen_logprobs) - _data(ref_chosen_logprobs))).to(dtype)
    rejected = beta * (as_accumulator(rejected_logprobs) - _data(ref_rejected_logprobs))
    return pairwise_loss(chosen, rejected, target_prob=1.0 - label_smoothing)
