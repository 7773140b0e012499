"""SFT's loss from logits: token_logprobs, summed over the labels that count. Allocates nothing of the logits' size
except their gradient.

    loss = sum over labels that are not ignore_index of -log p(label) / normalizer

Specification: reference.cross_entropy.
"""

from __future__ import annotations

from torch import Tensor

from ._inputs import check_normalizer, check_tensors, index_of_no_label
from .reference import over
from .token_logprobs import check_logits, token_logprobs


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, normalizer: Tensor | float | None = None
) -> Tensor:
    """(..., V) logits, (...) labels -> scalar: the mean of -log p(label) over the labels that count; 0 if none do.

    Labels equal to ignore_index do not count; their rows are not read and may be NaN. normalizer replaces the number of
    labels as the divisor: under gradient accumulation or data parallelism pass the global number. The loss is float32
    (float64 for float64 logits) and differentiable once. Raises the same errors as token_logprobs.
    """
    check_tensors("cross_entropy", labels=labels)
    if not isinstance(ignore_index, int):
        ignore_index = index_of_no_label("cross_entropy", ignore_index)
    mask = labels.long() != ignore_index  # long(), because a uint8 label of 156 would equal -100
    check_logits("cross_entropy", logits, labels, mask)
    try:
        nll = -token_logprobs(logits, labels, mask=mask).sum()
    except IndexError as error:  # a label outside the vocabulary
        raise IndexError(str(error).replace("token_logprobs", "cross_entropy", 1)) from None
    if normalizer is None:
        return nll / mask.sum().clamp(min=1)
    check_normalizer("cross_entropy", normalizer, nll)
    return over(nll, normalizer, mask)
