"""SFT's loss from logits: token_logprobs, summed over the labels that count. No (..., V) tensor but the gradient.

    loss = sum over labels that are not ignore_index of -log p(label) / normalizer

Specification: reference.cross_entropy.
"""

from __future__ import annotations

from torch import Tensor

from ._dispatch import check_tensors
from ._inputs import check_normalizer, index_of_no_label
from .reference import over
from .token_logprobs import check_logits, token_logprobs


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, normalizer: Tensor | float | None = None
) -> Tensor:
    """(..., V) logits, (...) labels -> scalar: the sum of -log p(label) over the number of labels. None gives 0.

    Labels equal to ignore_index do not count; their rows are not read and may be NaN. normalizer replaces the number of
    labels: give the global one under gradient accumulation and data parallelism. The loss is float32 (float64 for
    float64 logits) and differentiable once. Raises as token_logprobs does.
    """
    check_tensors("cross_entropy", labels=labels)
    if not isinstance(ignore_index, int):
        ignore_index = index_of_no_label("cross_entropy", ignore_index)
    mask = labels.long() != ignore_index  # an unsigned 156 would equal -100
    check_logits("cross_entropy", logits, labels, mask)
    try:
        nll = -token_logprobs(logits, labels, mask=mask).sum()
    except IndexError as error:  # of a label
        raise IndexError(str(error).replace("token_logprobs", "cross_entropy", 1)) from None
    if normalizer is None:
        return nll / mask.sum().clamp(min=1)
    check_normalizer("cross_entropy", normalizer, nll)
    return over(nll, normalizer, mask)
