"""SFT's loss from hidden states: cross-entropy of the logits hidden @ weight.T, which are computed in chunks and never
exist as a whole.

    loss = sum over labels that are not ignore_index of -log p(label) / normalizer

The gradient of the loss with respect to a chunk of logits is known as soon as the chunk is. So the forward computes all
gradients, with three matrix products in total, and the backward only scales them.
Specification: reference.linear_cross_entropy. The chunks are in _linear.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import as_rows, float_or, index_of_no_label, normalizer_tensor, wants_gradient
from ._layout import accumulation_dtype
from ._linear import (
    Gradients,
    check,
    chunk_statistics,
    compact,
    empty_gradients,
    factors_of,
    flops_of_loss,
    known_chunk_gradient,
    logits_buffer,
    rounded_in_float32,
    takes_known_gradient,
)


@torch.no_grad()  # it computes its gradients itself
def _forward(hidden, weight, bias, labels, mask, normalizer, softcap, rounds, *wanted):
    inputs = compact("linear_cross_entropy", hidden, weight, bias, labels, mask, softcap, rounds)
    rows = inputs.labels.shape[0]
    buffer = logits_buffer(inputs, any(wanted))
    gradients = Gradients(inputs, wanted)
    logprobs = hidden.new_empty(rows, dtype=accumulation_dtype(hidden))
    grad_logprobs = (-1 / normalizer).to(logprobs.dtype).expand(rows).contiguous()
    for part in inputs.parts:
        if any(wanted) and takes_known_gradient(inputs):
            z, logprobs[part], _ = known_chunk_gradient(buffer, inputs, part, 1.0, -grad_logprobs[part], None)
            gradients.multiply(z, part)
            continue
        z, logprobs[part], _, saved = chunk_statistics(buffer, inputs, part, 1.0, False)
        if any(wanted):
            gradients.add(z, part, 1.0, saved, None, grad_logprobs[part], None)
    nll = -logprobs.sum()
    # If no label counts the loss is 0, even for a normalizer of 0.
    return (nll / normalizer).to(nll.dtype) if rows else nll, *gradients.results()


def _fake(hidden, weight, bias, labels, mask, normalizer, softcap, rounds, *wanted):
    return hidden.new_empty((), dtype=accumulation_dtype(hidden)), *empty_gradients(hidden, weight, bias, wanted)


_op = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor mask, Tensor normalizer, "
    "float? softcap, bool rounds, bool grad_hidden, bool grad_weight, bool grad_bias) "
    "-> (Tensor loss, Tensor, Tensor, Tensor)",
    kernels={("cpu", "native"): _forward, ("cuda", "native"): _forward, ("cuda", "triton"): _forward},
    fake=_fake,
    gradients={0: 1, 1: 2, 2: 3},
    waits=True,  # compact, in _linear.py
    flops=flops_of_loss,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """(..., D) hidden, (V, D) weight, (...) labels -> scalar: the mean of -log p(label) over the labels that count.

    The logits are hidden @ weight.T + bias with an optional bias (V,). softcap c changes them to c tanh(logits / c)
    (Gemma 2). Labels equal to ignore_index do not count; their rows are dropped before anything is computed. If no
    label counts, the loss is 0. normalizer replaces the number of labels as the divisor: under gradient accumulation or
    data parallelism pass the global number.
    hidden, weight and bias are float32, bfloat16, float16 or float64 and receive gradients; the op is differentiable
    once. A weight that needs no gradient costs no product for it. The loss is float32 (float64 for float64 hidden).
    Autocast in bfloat16 rounds the factors, as those of an nn.Linear; the gradient of a float32 weight is not rounded.
    On a GPU, if hidden and weight are bfloat16 the logits are too, as with any lm_head; dropping the ignored rows
    synchronises with the device once.
    Raises ValueError or TypeError if a shape or dtype does not fit, IndexError for a label outside the vocabulary (on a
    GPU the kernel stops at it).
    """
    check("linear_cross_entropy", hidden, weight, labels, bias, None, softcap)
    hidden, weight, bias, rounds = factors_of(hidden, weight, bias)
    if not isinstance(ignore_index, int):
        ignore_index = index_of_no_label("linear_cross_entropy", ignore_index)
    if _op.backend(hidden) == "reference":
        return reference.linear_cross_entropy(
            hidden, rounded_in_float32(weight, rounds), labels, bias=bias, softcap=softcap, ignore_index=ignore_index,
            normalizer=normalizer,
        )  # fmt: skip
    labels = labels.reshape(-1).long()
    mask = labels != ignore_index
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return _op(
        as_rows(hidden), weight, bias, labels, mask,
        normalizer_tensor("linear_cross_entropy", count, hidden), float_or(softcap, None), rounds,
        *map(wants_gradient, (hidden, weight, bias)),
    )[0]  # fmt: skip
