"""Changes between forward and backward that autograd does not notice: memory that was replaced or freed, for example
by .data, by a hook on saved tensors, or by FSDP. A backward that reads it by address refuses it, and never reads past
its end. test_errors.py has the labels that were overwritten."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops import _linear

N, V, D = 6, 5, 4
FLOAT = torch.float32
# On some CPUs the rows are padded to whole vectors (_linear.py).
KEPT_LOGITS = _linear.logits_shape(N, V, _linear.way_of(torch.ones(N, D), torch.ones(V, D), None, None))
REFUSED = "a tensor that its backward needs has another shape or dtype than in the forward"


def backward(outputs):
    """With a gradient of N numbers in memory. That of .sum() is one number, expanded, and takes another path."""
    outputs.backward(torch.rand(N))


def test_a_label_under_a_mask_that_was_lifted():
    logits, labels, mask = torch.randn(N, V, requires_grad=True), torch.full((N,), -100), torch.zeros(N).bool()
    logprobs = rf.token_logprobs(logits, labels, mask=mask)
    mask.data[3] = True
    with pytest.raises(IndexError, match="label -100 at row 3"):
        backward(logprobs)


def token_logprobs(x):
    return rf.token_logprobs(x["logits"], x["labels"], mask=x["mask"])


def apart(x):
    return rf.token_logprobs(x["logits"].repeat(1, 2)[:, :V], x["labels"], mask=x["mask"])


def linear(x):
    return rf.linear_token_logprobs(x["hidden"], x["weight"], x["labels"], mask=x["mask"])


def with_bias(x):
    return rf.linear_token_logprobs(x["hidden"], x["weight"], x["labels"], bias=x["bias"])


def divergence(x):
    return rf.kl_divergence(x["logits"], x["ref"], x["mask"])


LONG, SHORT = torch.zeros(N + 2, dtype=torch.int64), torch.ones(N - 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("op", "name", "other"),
    [
        (token_logprobs, "logits", torch.zeros(N - 1, V)),
        (token_logprobs, "labels", LONG),
        (token_logprobs, "labels", torch.zeros(N, dtype=torch.int32)),
        (token_logprobs, "mask", SHORT),
        (apart, "labels", LONG),
        (apart, "mask", SHORT),
        (linear, "weight", torch.zeros(V + 3, D)),
        (linear, "weight", torch.zeros(0)),  # what ZeRO-3 leaves of it
        (linear, "weight", torch.zeros(V, D, dtype=torch.bfloat16)),
        (with_bias, "bias", torch.zeros(V - 1)),
        (divergence, "logits", torch.zeros(N, V + 2)),
        (divergence, "ref", torch.zeros(N, V - 1)),
        (divergence, "ref", torch.zeros(N, V, dtype=torch.bfloat16)),
        (divergence, "mask", SHORT),
    ],
)
def test_data_of_another_shape_or_dtype(op, name, other):
    x = {
        "logits": torch.randn(N, V, requires_grad=True), "ref": torch.randn(N, V), "labels": torch.arange(N) % V,
        "mask": torch.ones(N, dtype=torch.bool), "hidden": torch.randn(N, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True), "bias": torch.zeros(V),
    }  # fmt: skip
    outputs = op(x)
    x[name].data = other
    with pytest.raises(RuntimeError, match=REFUSED):
        backward(outputs)


def test_a_mask_of_more_or_fewer_rows():
    values, mask = torch.randn(N, V, requires_grad=True), torch.ones(N, V, dtype=torch.bool)
    means, whitened = rf.masked_mean(values, mask, 1), rf.masked_whiten(values, mask)
    mask.data = torch.ones(N + 2, V, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=f"masked_mean: {REFUSED}"):
        backward(means)

    mask.data = torch.ones(1, V, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=f"masked_whiten: {REFUSED}"):
        whitened.sum().backward()


def linear_entropy(x, labels, mask):
    weight = torch.ones(V, D, dtype=x.dtype, requires_grad=True)
    return rf.linear_token_logprobs(x[:, :D], weight, labels, mask=mask[:, 0], with_entropy=True)[1]


def linear_frozen(x, labels, mask):
    return rf.linear_token_logprobs(x[:, :D].half(), torch.ones(V, D).half(), labels, mask=mask[:, 0])


@pytest.mark.parametrize(
    ("op", "dtype", "shape"),
    [
        (lambda x, y, m: rf.token_logprobs(x, y), FLOAT, (N, 2)),  # what the forward saves for each row
        (lambda x, y, m: rf.token_logprobs_and_entropy(x, y)[1], FLOAT, (N, 2)),
        (lambda x, y, m: rf.token_logprobs_and_entropy(x, y)[1], FLOAT, (N,)),
        (linear_entropy, FLOAT, (N, D)),
        (linear_entropy, FLOAT, (N,)),
        (linear_entropy, FLOAT, (N, 2)),
        (linear_entropy, torch.int64, (N,)),
        (linear_entropy, torch.bool, (N,)),
        (linear_entropy, FLOAT, KEPT_LOGITS),
        (linear_frozen, FLOAT, (N, D)),  # the slopes
        (lambda x, y, m: rf.kl_divergence(x, torch.zeros(N, V)), FLOAT, (N,)),
        (lambda x, y, m: rf.kl_divergence(x, torch.zeros(N, V)), FLOAT, (N, 4)),
        (lambda x, y, m: rf.masked_mean(x, m, 1), FLOAT, (N,)),
    ],
)
def test_a_hook_that_gives_back_less_than_it_was_given(op, dtype, shape):
    x, labels, mask = torch.randn(N, V, requires_grad=True), torch.arange(N) % V, torch.ones(N, V, dtype=torch.bool)

    def unpack(saved):
        return saved[:-1] if saved.shape == shape and saved.dtype == dtype else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        outputs = op(x, labels, mask)
    with pytest.raises(RuntimeError, match=REFUSED):
        backward(outputs)


@pytest.mark.parametrize("op", [apart, linear])
def test_a_hook_that_gives_back_half_of_each_row(op):
    x = {"logits": torch.randn(N, V, requires_grad=True), "hidden": torch.randn(N, D, requires_grad=True)}
    x |= {"labels": torch.arange(N) % V, "mask": None, "weight": torch.randn(V, D)}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s, lambda s: s[:, :1] if s.shape == (N, 2) else s):
        outputs = op(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        backward(outputs)


@pytest.mark.parametrize(
    "op",
    [
        lambda x, y, m: rf.token_logprobs(x, y, mask=m[:, 0]),
        lambda x, y, m: rf.token_logprobs_and_entropy(x.repeat(1, 2)[:, :V], y)[1],
        linear_entropy,
        lambda x, y, m: linear_entropy(x.double(), y, m),
        lambda x, y, m: rf.kl_divergence(x, torch.zeros(N, V)),
        lambda x, y, m: rf.masked_mean(x, m, 1),
    ],
)
def test_a_hook_that_gives_the_same_numbers_back_in_another_layout(op):
    x, labels = torch.randn(N, V, requires_grad=True), torch.arange(N) % V
    mask = torch.ones(N, V, dtype=torch.bool)
    mask[2], grad = False, torch.rand(N)

    def gradient(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            outputs = op(x, labels, mask)
        return torch.autograd.grad(outputs, x, grad.to(outputs.dtype))[0]

    spread = gradient(lambda saved: torch.stack([saved, torch.zeros_like(saved)], -1)[..., 0])
    assert torch.equal(spread, gradient(lambda saved: saved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_hook_that_gives_back_another_dtype_than_autocast_made(dtype):
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.to(dtype) if x.shape == (N, D) else x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        logprobs = rf.linear_token_logprobs(hidden, weight, torch.arange(N) % V)
    with pytest.raises(RuntimeError, match=REFUSED):
        backward(logprobs)


@pytest.mark.parametrize("shape", [(N,), (N, 4)])
def test_a_hook_that_gives_back_half_of_each_number_of_each_number(shape):
    logits = torch.randn(N, V, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.half() if x.shape == shape else x):
        divergence = rf.kl_divergence(logits, torch.zeros(N, V))
    with pytest.raises(RuntimeError, match=REFUSED):
        backward(divergence)


def test_a_storage_that_was_freed():
    def freed(*shape, after=0):
        x = torch.randn(after + shape[0], *shape[1:])[after:]
        x.untyped_storage().resize_(0)
        return x

    labels, tokens, mask = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    calls = [
        lambda: rf.token_logprobs(freed(2, V), labels),
        lambda: rf.ppo_loss(tokens, tokens, freed(2, 3), mask),
        lambda: rf.linear_cross_entropy(torch.zeros(2, D), freed(V, D), labels),
        lambda: rf.kl_divergence(torch.zeros(2, V), freed(2, V)),
        # FSDP's parameters are parts of one tensor, which it frees: their addresses are not 0.
        lambda: rf.token_logprobs(freed(2, V, after=1), labels),
        lambda: rf.ppo_loss(tokens, tokens, freed(2, 3, after=2), mask),
        lambda: rf.linear_cross_entropy(torch.zeros(2, D), freed(V, D, after=V), labels),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="its storage has been freed"):
            call()
    logits = torch.randn(2, V, requires_grad=True)
    loss = rf.token_logprobs(logits, labels).sum()
    logits.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage has been freed"):
        loss.backward()
