"""TRL's tensor functions, computed by our ops.

They are those of `trl.trainer.utils` and the ChunkedLogProbFunction of `trl.kernels` (release 1.16). Of release 1.12,
and no longer in 1.16, are PPO's masked_mean, masked_var, masked_whiten and first_true_indices, the dft_loss of its SFT
trainer, and _ChunkedLogProbFunction.

All functions differ from TRL as follows. Results are float32 whatever the input dtype (TRL's eager path returns bf16
log-probs for bf16 logits). -inf logits give finite entropies (TRL: NaN). An empty mask gives 0 (TRL: NaN, or an error
in masked_var). NaN outside a mask reaches no result. An empty batch gives empty results (TRL's selective_log_softmax
raises).

Left out, because they contain no arithmetic to replace: pad, flush_left, truncate_response (they rearrange tokens),
get_reward (runs a model), create_reference_model (copies a model).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops._linear import factors_of, rounded
from ..ops.reference import as_accumulator, linear_logits
from ._shared import _masked_var

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS_ELEMENTS = 1 << 24  # logits in memory at a time for ChunkedLogProbFunction's statistics: 64 MiB of float32


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """(..., V) logits, index (...) or (..., K) -> log-probabilities of index's shape, float32 (TRL: bf16 for bf16).

    row_mask has index's shape. Where it is 0 the result and its gradient are 0, and a row without any 1 is not read.
    """
    if index.ndim == logits.ndim - 1:
        return ops.token_logprobs(logits, index, temperature=temperature, mask=row_mask)
    rows = None if row_mask is None else row_mask.bool().any(-1)
    # The log-probabilities of K labels in a row differ by their logits. That of the best token is finite, so the others
    # can be computed from it.
    best = logits.detach().argmax(-1)
    anchor = ops.token_logprobs(logits, best, temperature=temperature, mask=rows)
    if row_mask is not None:
        index = index.masked_fill(~row_mask.bool(), 0)
    chosen = as_accumulator(logits.gather(-1, index))
    logprobs = anchor[..., None] + (chosen - as_accumulator(logits.gather(-1, best[..., None]))) / temperature
    return logprobs if row_mask is None else torch.where(row_mask.bool(), logprobs, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """(..., V) logits -> (...) entropies in nats, differentiable. -inf logits contribute 0 (TRL: NaN).

    chunk_size is accepted and ignored: the op needs one pass and no chunks.
    """
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ops.token_logprobs_and_entropy(logits, labels)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(..., V) logits, index (...) or (..., K) -> log-probabilities of index's shape and (...) entropies, float32.

    With an index (...) the logits are read once. row_mask has index's shape. Where it is 0 the log-probability is 0,
    and the entropy of a row without any 1 is 0. -inf logits contribute 0 to the entropy (TRL: NaN).
    This is the function of trl.trainer.utils. That of trl.kernels has no entropy_requires_grad, so its third argument
    is the temperature; a number there is refused.
    """
    if not isinstance(entropy_requires_grad, bool):
        raise TypeError(
            f"selective_log_softmax_and_entropy: entropy_requires_grad = {entropy_requires_grad!r} must be True or "
            "False; a temperature in third place, as in trl.kernels, must be given as temperature=..."
        )
    if index.ndim == logits.ndim:
        logprobs = selective_log_softmax(logits, index, temperature, row_mask)
        index, row_mask = logits.detach().argmax(-1), None if row_mask is None else row_mask.bool().any(-1)
        entropy = ops.token_logprobs_and_entropy(logits, index, temperature=temperature, mask=row_mask)[1]
    else:
        logprobs, entropy = ops.token_logprobs_and_entropy(logits, index, temperature=temperature, mask=row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """TRL 1.16's log-probabilities from hidden states, which never materialise the logits; call its `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(N, D) hidden, (V, D) weight, (N,) targets -> logprobs and the four OPTIONAL_OUTPUTS, each (N,).

        An output that `outputs` does not name is None. The last three have no gradient and cost a second product over
        the vocabulary, so name only those you use. chunk_size is accepted and ignored: chunks are sized by bytes.
        Products accumulate in float32 whatever the dtype, so is_top1 may differ from TRL's if bf16 logits tie. Autocast
        in float16 changes nothing (TRL multiplies in its dtype).
        Raises IndexError for a target outside the vocabulary, including -100 (TRL returns minus the row's logsumexp).
        """
        if not logit_scale > 0:
            raise ValueError(f"ChunkedLogProbFunction: logit_scale {logit_scale} must be > 0")
        # cap tanh(scale x / cap) / T = (cap / scale) tanh(x / (cap / scale)) / (T / scale): hidden need not be scaled.
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        scaled = {"bias": bias, "softcap": softcap, "temperature": temperature / logit_scale}
        with_entropy = "entropy" in outputs
        result = ops.linear_token_logprobs(hidden, weight, targets, with_entropy=with_entropy, **scaled)
        logprobs, entropy = result if with_entropy else (result, None)
        statistics = {}
        if {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs):
            statistics = _logit_statistics(hidden, weight, targets, **scaled)
        return logprobs, entropy, *(statistics[name] if name in outputs else None for name in OPTIONAL_OUTPUTS[1:])


class _ChunkedLogProbFunction:
    """TRL 1.12's form of ChunkedLogProbFunction, under TRL's private name.

    TRL's backward drops the gradient of the entropy; ours includes it.
    """

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(N, D) hidden, (V, D) weight, (N,) targets -> logprobs and entropy, both (N,), float32."""
        return ChunkedLogProbFunction.apply(
            last_hidden, weight, None, targets, temperature, chunk_size, final_logit_softcapping, logit_scale,
            outputs=("entropy",),
        )[:2]  # fmt: skip


@torch.no_grad()
def _logit_statistics(hidden, weight, targets, bias, softcap, temperature) -> dict[str, Tensor]:
    """log sum_v p_v^2, the mean logit, and whether the target is the first of the largest logits; (N,) each."""
    hidden, weight, bias, rounds = factors_of(hidden, weight, bias)
    weight = rounded(weight, rounds)
    rows = max(1, _STATISTICS_ELEMENTS // max(1, weight.shape[0]))
    parts = []
    for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        z = linear_logits(h, weight, bias, softcap) / temperature
        parts.append(((2 * z.log_softmax(-1)).logsumexp(-1), z.mean(-1), z.argmax(-1) == target))
    names = ("log_sum_sq_probs", "mean_logits", "is_top1")
    return dict(zip(names, (torch.cat(column) for column in zip(*parts, strict=True)), strict=True))


def dft_loss(outputs, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): -p.detach() log p of the next token, averaged over the labels.

    outputs.logits is (B, T, V). The labels (B, T) are shifted here, and -100 does not count. num_items_in_batch
    replaces the number of labels as the divisor.
    """
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    mask = targets != -100
    logprobs = ops.token_logprobs(outputs.logits, targets, mask=mask)
    losses = -logprobs.exp().detach() * logprobs  # 0 outside the mask, because the log-probability is 0 there
    return losses.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of values where mask is True, over axis (default: all axes). An empty mask gives 0 (TRL: NaN)."""
    return ops.masked_mean(values, mask, axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of values over the mask, with Bessel's correction unless unbiased=False.

    If one value or none counts, the variance is 0 (TRL raises for an empty mask, and gives NaN for a single value).
    """
    return _masked_var(values, mask, unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over the mask; shift_mean=False adds the mean back.

    Outside the mask the result is 0. TRL whitens the padding too, and its trainer then overwrites it with 0.
    """
    return ops.masked_whiten(values, mask, shift_mean=shift_mean)


def first_true_indices(bools: Tensor, dtype: torch.dtype = torch.long) -> Tensor:
    """(..., T) bool -> (...) index of the first True, or T if there is none."""
    first = bools.to(torch.uint8).argmax(-1)
    return torch.where(bools.any(-1), first, bools.shape[-1]).to(dtype)


def nanstd(tensor: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Unbiased standard deviation of the values that are not NaN.

    As in TRL it is NaN for fewer than two values, and inf if one value is infinite and the others are finite. The
    gradient stays finite if some values are NaN (TRL's does not).
    """
    axes = tuple(range(tensor.ndim)) if dim is None else dim
    real = ~tensor.isnan()
    count = real.sum(axes, keepdim=True)
    mean = tensor.nansum(axes, keepdim=True) / count
    # An infinite value minus an infinite mean is NaN and does not count either.
    variance = torch.where(real, tensor - mean, torch.nan).square().nanmean(axes, keepdim=True)
    std = (variance * count / (count - 1)).sqrt()  # 0 / 0 for a single value
    return std if keepdim else std.squeeze(axes)


def nanmin(tensor: Tensor) -> Tensor:
    """Smallest value that is not NaN; NaN if there is none. An empty tensor gives NaN, as in TRL 1.16."""
    return -nanmax(-tensor)


def nanmax(tensor: Tensor) -> Tensor:
    """Largest value that is not NaN; NaN if there is none."""
    real = ~tensor.isnan()
    if tensor.numel() == 0:
        return tensor.new_tensor(torch.nan)
    return torch.where(real.any(), torch.where(real, tensor, -torch.inf).amax(), torch.nan)
