"""token_logprobs and its entropy beyond the common battery: large vocabularies, in place, 64-bit offsets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rlhf_fast
from rlhf_fast.ops import (
    _dispatch,
    _native,
    cross_entropy,
    kl_divergence,
    linear_token_logprobs,
    reference,
    token_logprobs,
    token_logprobs_and_entropy,
)

VOCABS = (1, 7, 640, 1100, 50257, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def results(function, logits, labels, g, h, **options):
    """Log-probabilities, entropies, and the gradient of g . logprobs + h . entropy."""
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits, labels, **options)
    torch.autograd.backward([logprobs, entropy], [g.to(logprobs), h.to(entropy)])
    return logprobs.detach(), entropy.detach(), logits.grad


def worst(got, truth):
    assert got.isfinite().equal(truth.isfinite())
    return torch.where(truth.isfinite(), got.double() - truth, 0.0).abs().max().item()


def test_two_way_softmax_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["ordinary", "around 170", "blocks of -inf", "sure"])
def test_error_against_float64_is_at_most_twice_that_of_eager(vocab, dtype, kind):
    generator = torch.Generator().manual_seed(vocab)
    rows = 6
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    if kind == "around 170":
        logits = logits + 170 * torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    elif kind == "sure":
        logits.scatter_(1, labels[:, None], 30.0)
    elif kind == "blocks of -inf" and vocab > 1:
        logits[:3, : vocab // 2] = -torch.inf
        logits[3:, vocab // 3 :: 2] = -torch.inf
        logits[:, -1] = 0.5
        labels[::2] = vocab - 1
    logits = logits.to(dtype)
    g, h = torch.randn(2, rows, generator=generator)
    truth = results(reference.token_logprobs_and_entropy, logits.double(), labels, g, h)
    eager = results(reference.token_logprobs_and_entropy, logits, labels, g, h)
    ours = results(token_logprobs_and_entropy, logits, labels, g, h)
    for name, a, b, t in zip(("logprobs", "entropy", "gradient"), ours, eager, truth, strict=True):
        slack = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(b.dtype).eps * t[t.isfinite()].abs().max().item()
        assert a.dtype == b.dtype
        assert worst(a, t) <= 2 * worst(b, t) + slack, name


def test_a_certain_token_has_log_probability_zero_and_no_gradient():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 3] = 170.1
    logprobs, entropy, grad = results(
        token_logprobs_and_entropy, logits, torch.tensor([3, 3]), torch.ones(2), torch.ones(2)
    )
    assert not logprobs.any() and not entropy.any() and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_row_is_bitwise_the_same_alone_in_a_batch_and_at_any_alignment(dtype):
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(33, 5001)).to(dtype), torch.randint(5001, (33,))
    weights = torch.randn(2, 33, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    whole = results(token_logprobs_and_entropy, logits, labels, *weights)
    for i in (0, 7, 32):  # with an odd number of columns, a row and its copy have different alignments
        row = slice(i, i + 1)
        alone = results(token_logprobs_and_entropy, logits[row].clone(), labels[row], *weights[:, row])
        assert all(torch.equal(a, b[row]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_backward_writes_the_same_gradient_over_the_logits(dtype):
    torch.manual_seed(0)
    data, labels, mask = torch.randn(4, 6, 333).to(dtype), torch.randint(333, (4, 6)), torch.rand(4, 6) < 0.7
    weights = torch.randn(4, 6)

    def gradient(inplace):
        leaf = data.clone().requires_grad_()
        logits = leaf * 1.0
        view = logits[:, :-1]
        out = token_logprobs(view, labels[:, :-1], mask=mask[:, :-1], inplace_backward=inplace)
        (grad,) = torch.autograd.grad((out * weights[:, :-1]).sum(), view)
        return grad, logits.detach()

    (fresh, _), (inplace, logits) = gradient(False), gradient(True)
    assert torch.equal(fresh, inplace)
    assert inplace.data_ptr() == logits.data_ptr()
    assert torch.equal(logits[:, -1], data[:, -1])  # between the rows nothing is touched


def test_inplace_backward_leaves_rows_that_share_memory_alone():
    """The windows of unfold overlap without an axis of stride 0."""
    data, labels = torch.randn(40), torch.tensor([3, 0, 7, 1])

    def gradient(inplace):
        leaf = data.clone().requires_grad_()
        token_logprobs((leaf * 1.0).unfold(0, 10, 10 // 2)[:4], labels, inplace_backward=inplace).sum().backward()
        return leaf.grad

    assert torch.equal(gradient(False), gradient(True))


def test_inplace_backward_of_batched_gradients_leaves_the_logits_alone():
    logits, labels = torch.randn(3, 5, requires_grad=True) * 1.0, torch.tensor([0, 1, 2])

    def gradients(inplace):
        out = token_logprobs(logits, labels, inplace_backward=inplace)
        return torch.autograd.grad(out, logits, torch.eye(3), is_grads_batched=True)[0]

    torch.testing.assert_close(gradients(True), gradients(False))
    assert logits._version == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_tangent_of_the_gradient_that_comes_in_is_refused(inplace):
    logits = torch.randn(3, 5, requires_grad=True) * 1.0
    out = token_logprobs(logits, torch.tensor([0, 1, 2]), inplace_backward=inplace)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.autograd.grad(out, logits, forward_ad.make_dual(torch.ones(3), torch.ones(3)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_give_the_same_bits(dtype, masked):
    """Contiguous rows take another path: one native call, which also allocates the results."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 33).to(dtype), torch.randint(33, (4, 5))
    mask = torch.rand(4, 5) < 0.7 if masked else None
    g, h = torch.randn(2, 4, 5)
    apart = torch.cat([logits, logits], -1)[..., :33]

    def of(x):
        x = x.detach().requires_grad_()
        outputs = token_logprobs_and_entropy(x, labels, mask=mask)
        torch.autograd.backward(outputs, [g.to(outputs[0]), h.to(outputs[1])])
        return *outputs, x.grad

    for a, b in zip(of(logits), of(apart), strict=True):
        assert torch.equal(a, b) and a.data_ptr() % 64 == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_backward_that_python_finishes_under_a_checkpoint(apart, inplace):
    """A checkpoint lets the saved tensors be read only once, and csrc/rows.h has already read them."""
    leaf, labels = torch.randn(3, 20, requires_grad=True), torch.tensor([0, 4, 2])

    def of(x):
        x = x * 1.0
        return token_logprobs(x[:, ::2] if apart else x, labels, inplace_backward=inplace)

    (expected,) = torch.autograd.grad(of(leaf).sum(), leaf)
    (found,) = torch.autograd.grad(checkpoint(of, leaf, use_reentrant=False).sum(), leaf)
    assert torch.equal(found, expected)


def test_a_gradient_of_logits_that_were_detached_since_is_not_differentiable_twice():
    leaf = torch.randn(3, 5, requires_grad=True)
    logits = leaf * 1.0
    out = token_logprobs(logits, torch.tensor([0, 1, 2]))
    logits.detach_()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@pytest.mark.skipif(_native._C is None, reason="needs the native build")
def test_the_engine_calls_what_the_forced_backend_is():
    """The native forward and backward do not look at the table of kernels."""
    function = _dispatch._OPS["token_logprobs_forward"].function

    def called():
        return function.forward, vars(function._backward_cls)["apply"]

    native = _native._C.token_logprobs_and_save, _native._C.token_logprobs_gradient
    assert called() == native
    with rlhf_fast.use_backend("triton"):
        assert called() == (function.forward_in_python, function.backward)
    with rlhf_fast.use_backend("reference"):  # for a backward whose forward was native
        assert called() == native


def test_a_gradient_of_another_dtype_is_refused():
    """A kernel would read its bytes as another dtype."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    _, _, saved = torch.ops.rlhf_fast.token_logprobs_forward(logits, labels, None, 1.0, False, False)
    with pytest.raises(TypeError, match="gradients of the outputs' dtype"):
        torch.ops.rlhf_fast.token_logprobs_backward(
            logits, labels, None, 1.0, saved, None, torch.ones(3).double(), None
        )


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell of hooks"
)
@pytest.mark.parametrize("keep", ["checkpoint", "save_on_cpu"])
def test_inplace_backward_leaves_the_logits_alone_where_autograd_would_not_see_it(keep):
    """Autograd does not look at the version of what a hook on saved tensors returns."""
    labels, weight = torch.tensor([0, 1, 2]), torch.randn(3, 5)

    def gradient(inplace):
        leaf = weight.clone().requires_grad_()

        def loss():
            logits = leaf * 1.0
            square = logits.square().sum()  # its backward comes after that of the next line
            return square + token_logprobs(logits, labels, inplace_backward=inplace).sum()

        if keep == "checkpoint":
            checkpoint(loss, use_reentrant=False).backward()
        else:
            with torch.autograd.graph.save_on_cpu():
                total = loss()
            total.backward()
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_inplace_backward_is_ignored_under_vmap():
    """There the rows are slices of one tensor, and its version would change with the first of them."""
    labels, leaf = torch.tensor([[0, 1, 2], [4, 3, 0]]), torch.randn(2, 3, 5, requires_grad=True)

    def gradient(inplace):
        one = lambda logits, labels: token_logprobs(logits * 1.0, labels, inplace_backward=inplace)  # noqa: E731
        return torch.autograd.grad(torch.vmap(one)(leaf, labels).sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_inplace_backward_makes_a_second_use_of_the_logits_an_error():
    logits = torch.randn(3, 5, requires_grad=True) * 1.0
    labels = torch.tensor([0, 1, 2])
    other = logits.square().sum()
    token_logprobs(logits, labels, inplace_backward=True).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("label", [-1, -100, 11, 2**40])
def test_a_label_out_of_range_is_an_error_that_names_it(label):
    logits, labels = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 1] = label
    for x in (logits, logits.clone().requires_grad_()):
        with pytest.raises(IndexError, match=f"label {label} at row 4 .* vocabulary of 11"):
            token_logprobs(x, labels)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 1] = False
    assert token_logprobs(logits, labels, mask=mask)[1, 1] == 0


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 700)
    logits[1, 650] = torch.nan
    out = results(token_logprobs_and_entropy, logits, torch.tensor([0, 1, 2]), torch.ones(3), torch.ones(3))
    for t in out:
        assert t[1].isnan().all() and t[[0, 2]].isfinite().all()


def test_offsets_past_2_to_the_31():
    rows, vocab, stride = 4, 1000, 2**30 - 7  # untouched zero pages cost no memory
    logits = torch.zeros(3 * stride + vocab, dtype=torch.bfloat16).as_strided((rows, vocab), (stride, 1))
    torch.manual_seed(0)
    small = torch.randn(rows, vocab).bfloat16()
    logits.copy_(small)
    labels = torch.randint(vocab, (rows,))
    for inplace in (False, True):
        a, b = logits.detach().requires_grad_(), small.clone().requires_grad_()
        far = token_logprobs(a.view_as(a), labels, inplace_backward=inplace)
        near = token_logprobs(b * 1, labels, inplace_backward=inplace)
        assert torch.equal(far, near)
        assert torch.equal(torch.autograd.grad(far.sum(), a)[0], torch.autograd.grad(near.sum(), b)[0])


def test_more_than_2_to_the_31_elements():
    vocab = 151936
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = 2**31 // vocab + 2
    labels = torch.full((rows,), 12345)
    out = token_logprobs(row.expand(rows, vocab), labels)
    assert torch.equal(out, token_logprobs(row, labels[:1]).expand(rows))
    loss = cross_entropy(row.expand(rows, vocab), labels)
    torch.testing.assert_close(loss, cross_entropy(row, labels[:1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["token_logprobs", "kl_divergence"])
def test_a_gradient_too_large_for_the_caches_has_the_bits_of_a_small_one(op, dtype, isa):
    # From 32 MiB on it is written past the caches, starting at the first aligned element of each row. Here the rows
    # start at every alignment.
    vocab = 5003
    rows = (32 << 20) // (vocab * dtype.itemsize) + 1
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    others = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    g, h = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)
    g[::7] = h[::7] = 0

    def gradients(some):
        a, b = logits[some].clone().requires_grad_(), others[some].clone().requires_grad_()
        if op == "kl_divergence":
            out, leaves = [kl_divergence(a, b)], [a, b]
        else:
            out, leaves = token_logprobs_and_entropy(a, labels[some]), [a]
        return torch.autograd.grad(out, leaves, [x[some].to(y) for x, y in zip((g, h), out, strict=False)])

    large = gradients(slice(None))
    for first in range(0, rows, rows // 2):
        some = slice(first, first + rows // 2)
        for all_rows, half in zip(large, gradients(some), strict=True):
            assert half.numel() * half.element_size() < 32 << 20
            assert torch.equal(all_rows[some], half)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_an_entropy_beside_it_changes_no_bit_of_a_log_probability(dtype, isa):
    """Code for AVX2 rounded a row's sum in another way where the entropy was wanted too, as linear_ppo_loss wants it
    and scoring does not: the ratio of PPO's first minibatch was not 1."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(999, 8, generator=generator), torch.randn(302, 8, generator=generator)
    labels, logits = torch.randint(302, (999,), generator=generator), (hidden @ weight.T).to(dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    assert torch.equal(token_logprobs(logits, labels), token_logprobs_and_entropy(logits, labels)[0])
    with_entropy, _ = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    assert torch.equal(linear_token_logprobs(hidden, weight, labels), with_entropy)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_divergence_of_a_distribution_from_itself_is_0(dtype, isa):
    logits = torch.randn(999, 302, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not kl_divergence(logits, logits).any()
