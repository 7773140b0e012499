"""compat.trl beside TRL 1.16.0 (log-probs, entropy, chunked head) and TRL 1.12.0 (PPO's helpers)."""

import math
from types import SimpleNamespace

import pytest
import torch
import trl
import trl.trainer.utils as peer
from agree import EMPTY, agree, deviates, has_nan, labels_for, masks, randn

import rlhf_fast.compat.trl as ours

new = pytest.mark.skipif(trl.__version__ != "1.16.0", reason="TRL 1.16's functions")
old = pytest.mark.skipif(trl.__version__ != "1.12.0", reason="TRL 1.12's functions")


@pytest.mark.parametrize("shape", [(2, 3, 11), (5, 7), (1, 1, 1), (2, 4, 1000)])
def test_selective_log_softmax(shape):
    logits = randn(*shape, scale=3)
    agree(ours.selective_log_softmax, peer.selective_log_softmax, logits, labels_for(logits), wrt=(0,))
    agree(ours.selective_log_softmax, peer.selective_log_softmax, logits, labels_for(logits, 3), wrt=(0,))


@new
def test_selective_log_softmax_with_temperature_and_row_mask():
    logits = randn(3, 6, 11)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    args = logits, labels_for(logits), 0.7, mask
    agree(ours.selective_log_softmax, peer.selective_log_softmax, *args, wrt=(0,))
    with pytest.raises(ValueError):
        peer.selective_log_softmax(*args[:2], temperature=0.0)
    with pytest.raises(ValueError):
        ours.selective_log_softmax(*args[:2], temperature=0.0)


def test_bf16_logprobs_are_rounded_by_trl():
    logits = randn(4, 300).bfloat16()
    index = labels_for(logits)
    got = deviates(
        ours.selective_log_softmax, peer.selective_log_softmax, logits, index, peer=lambda x: x.dtype == torch.bfloat16
    )
    want = logits.double().log_softmax(-1).gather(-1, index[:, None]).squeeze(-1)
    theirs = peer.selective_log_softmax(logits, index)
    assert (got - want).abs().max() < 1e-5 < (theirs - want).abs().max()


def test_an_empty_batch_raises_in_trl():
    args = torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)
    got = deviates(ours.selective_log_softmax, peer.selective_log_softmax, *args, peer=RuntimeError)
    assert got.shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 11), (300, 7), (4, 1)])
def test_entropy(shape):
    agree(ours.entropy_from_logits, peer.entropy_from_logits, randn(*shape, scale=3), wrt=(0,))


def test_entropy_of_impossible_tokens_is_nan_in_trl():
    logits = torch.tensor([[-math.inf, 0.0, 0.0]])
    got = deviates(ours.entropy_from_logits, peer.entropy_from_logits, logits, peer=has_nan)
    assert got.item() == pytest.approx(math.log(2))


@new
def test_both_in_one():
    logits = randn(3, 6, 11)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    for args in ([], [False], [True, 0.6], [True, 0.6, mask]):
        agree(
            ours.selective_log_softmax_and_entropy, peer.selective_log_softmax_and_entropy, logits, labels_for(logits),
            *args, wrt=(0,),
        )  # fmt: skip


@new
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_logprobs(softcap, scale, with_bias):
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight = randn(9, 5), randn(23, 5, seed=1)
    bias = randn(23, seed=2) if with_bias else None
    args = hidden, weight, bias, labels_for(randn(9, 23)), 0.7, 8, softcap, scale
    agree(
        ours.ChunkedLogProbFunction.apply, ChunkedLogProbFunction.apply, *args, wrt=(0, 1, 2) if with_bias else (0, 1)
    )
    agree(ours.ChunkedLogProbFunction.apply, ChunkedLogProbFunction.apply, *args, ("is_top1",), wrt=(0,))


@old
def test_old_chunked_logprobs_lose_the_entropys_gradient_in_trl():
    hidden, weight, targets = randn(9, 5), randn(23, 5, seed=1), labels_for(randn(9, 23))
    args = hidden, weight, targets, 0.7, 8, None, 0.5

    def first(function):
        return lambda *a: function.apply(*a)[0]

    agree(first(ours._ChunkedLogProbFunction), first(peer._ChunkedLogProbFunction), *args, wrt=(0, 1))
    grads = []
    for function in (ours._ChunkedLogProbFunction, peer._ChunkedLogProbFunction):
        h = hidden.clone().requires_grad_()
        logprobs, entropy = function.apply(h, *args[1:])
        torch.testing.assert_close(entropy.detach(), ours._ChunkedLogProbFunction.apply(*args)[1])
        grads.append(torch.autograd.grad((0 * logprobs + entropy).sum(), h)[0].abs().sum().item())
    assert grads[0] > 0.1 and grads[1] == 0


@old
def test_dft_loss():
    from trl.trainer.sft_trainer import dft_loss

    labels = labels_for(randn(2, 6, 11)).index_fill(1, torch.tensor([0, 1]), -100)

    def wrapped(function):
        return lambda logits, *rest: function(SimpleNamespace(logits=logits), *rest)

    agree(wrapped(ours.dft_loss), wrapped(dft_loss), randn(2, 6, 11), labels, wrt=(0,))
    agree(wrapped(ours.dft_loss), wrapped(dft_loss), randn(2, 6, 11), labels, 5, wrt=(0,))
    nothing = torch.full((2, 6), -100)
    assert deviates(wrapped(ours.dft_loss), wrapped(dft_loss), randn(2, 6, 11), nothing, peer=has_nan).item() == 0


@old
@masks
def test_mask_statistics(mask):
    import trl.experimental.ppo.ppo_trainer as ppo

    values = randn(3, 6) + 2
    agree(ours.masked_mean, ppo.masked_mean, values, mask, wrt=(0,))
    if mask.any(1).all():
        agree(ours.masked_mean, ppo.masked_mean, values, mask, 1, wrt=(0,))
    for unbiased in (True, False):
        agree(ours.masked_var, ppo.masked_var, values, mask, unbiased, wrt=(0,))
    for shift in (True, False):
        agree(ours.masked_whiten, ppo.masked_whiten, values, mask, shift, inside=mask)


@old
def test_empty_masks_are_nan_or_an_error_in_trl():
    import trl.experimental.ppo.ppo_trainer as ppo

    values, one = randn(3, 6), EMPTY.clone().index_fill_(1, torch.tensor([0]), 1)
    one[1:] = 0
    assert deviates(ours.masked_mean, ppo.masked_mean, values, EMPTY, peer=has_nan).item() == 0
    assert deviates(ours.masked_var, ppo.masked_var, values, EMPTY, peer=ValueError).item() == 0
    assert deviates(ours.masked_var, ppo.masked_var, values, one, peer=has_nan).item() == 0
    assert not deviates(ours.masked_whiten, ppo.masked_whiten, values, EMPTY, peer=ValueError).any()
    poisoned = values.masked_fill(one == 0, math.nan)
    assert deviates(ours.masked_mean, ppo.masked_mean, poisoned, one, peer=has_nan).item() == values[0, 0].item()


@old
def test_first_true_indices():
    from trl.experimental.utils import first_true_indices

    bools = randn(20, 5) > 0.8
    agree(ours.first_true_indices, first_true_indices, bools)
    agree(ours.first_true_indices, first_true_indices, bools[:, :1], torch.int32)


def test_nan_statistics():
    x = randn(4, 5).masked_fill(randn(4, 5, seed=3) > 0.5, math.nan)
    for name in ("nanmin", "nanmax"):
        agree(getattr(ours, name), getattr(peer, name), x[0])
        for values in (torch.full((3,), math.nan), torch.zeros(0)):
            assert getattr(peer, name)(values).isnan() and getattr(ours, name)(values).isnan()
    if hasattr(peer, "nanstd"):
        assert ours.nanstd(x).item() == pytest.approx(peer.nanstd(x).item())
