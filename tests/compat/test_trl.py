"""compat.trl: TRL's signatures, numbers worked by hand, and the edges where TRL gives NaN."""

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.compat import trl

INF, NAN = math.inf, math.nan

SIGNATURES = {
    "selective_log_softmax": "logits index temperature row_mask",
    "entropy_from_logits": "logits chunk_size",
    "selective_log_softmax_and_entropy": "logits index entropy_requires_grad temperature row_mask",
    "ChunkedLogProbFunction.apply": "hidden weight bias targets temperature chunk_size final_logit_softcapping "
    "logit_scale outputs",
    "_ChunkedLogProbFunction.apply": "last_hidden weight targets temperature chunk_size final_logit_softcapping "
    "logit_scale",
    "dft_loss": "outputs labels num_items_in_batch",
    "nanstd": "tensor dim keepdim",
    "nanmin": "tensor",
    "nanmax": "tensor",
    "masked_mean": "values mask axis",
    "masked_var": "values mask unbiased",
    "masked_whiten": "values mask shift_mean",
    "first_true_indices": "bools dtype",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_trls_in_its_order(name):
    function = trl
    for part in name.split("."):
        function = getattr(function, part)
    assert list(inspect.signature(function).parameters) == SIGNATURES[name].split()


def test_the_installed_trl_has_what_the_docstring_says_and_in_the_same_form():
    peer = pytest.importorskip("trl")
    if peer.__version__ != "1.16.0":
        pytest.skip(f"TRL {peer.__version__}")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import sft_trainer, utils

    gone = []
    for name in SIGNATURES:
        if name == "ChunkedLogProbFunction.apply":
            ours, theirs = trl.ChunkedLogProbFunction.apply, ChunkedLogProbFunction.forward
        else:
            ours, theirs = getattr(trl, name.split(".")[0]), getattr(utils, name.split(".")[0], None)
        if theirs is None or name.startswith("_"):
            gone.append(name.split(".")[0])
            continue
        ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs if p.name != "ctx"], name
    assert gone and not any(hasattr(sft_trainer, name) for name in gone if not name.startswith("_"))
    of_1_12 = trl.__doc__.split("Of release 1.12")[1].split("\n\n")[0]
    assert all(re.search(rf"\b{name}\b", of_1_12) for name in gone)


def test_under_autocast_all_outputs_from_hidden_states_are_of_rounded_factors():
    torch.manual_seed(0)
    factors, args = (torch.randn(9, 5), torch.randn(23, 5), torch.randn(23)), (torch.randint(0, 23, (9,)), 0.7, 8)
    plain = trl.ChunkedLogProbFunction.apply(*(x.bfloat16() for x in factors), *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = trl.ChunkedLogProbFunction.apply(*factors, *args)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_log_softmax_of_a_two_way_choice():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # 1/4 and 3/4
    torch.testing.assert_close(trl.selective_log_softmax(logits, torch.tensor([1])), torch.tensor([math.log(0.75)]))
    both = trl.selective_log_softmax(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(both, torch.tensor([[math.log(0.75), math.log(0.25)]]))


def test_k_labels_with_mask_temperature_and_gradient_are_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, requires_grad=True)
    index = torch.randint(0, 7, (2, 3, 4))
    mask = torch.rand(2, 3, 4) > 0.4
    grad = torch.randn(2, 3, 4)
    got = trl.selective_log_softmax(logits, index.masked_fill(~mask, -100), temperature=0.7, row_mask=mask)
    want = (logits / 0.7).log_softmax(-1).gather(-1, index).masked_fill(~mask, 0.0)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, logits, grad), torch.autograd.grad(want, logits, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_without_any_label_that_counts_is_not_read():
    logits = torch.tensor([[1.0, 2.0], [NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 0]])
    got = trl.selective_log_softmax(logits, torch.tensor([[0, 1], [0, 1]]), row_mask=mask)
    assert got[1].tolist() == [0, 0]
    got.sum().backward()
    assert logits.grad[1].tolist() == [0, 0] and logits.grad[0].all()


def test_k_labels_survive_impossible_ones():
    logits = torch.tensor([[-INF, 0.0, 0.0]])
    got = trl.selective_log_softmax(logits, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(got, torch.tensor([[-INF, math.log(0.5), math.log(0.5)]]))


def test_bf16_logits_give_float32_logprobs():
    logits = torch.randn(4, 50, dtype=torch.bfloat16)
    index = torch.randint(0, 50, (4,))
    got = trl.selective_log_softmax(logits, index)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float().log_softmax(-1).gather(-1, index[:, None]).squeeze(-1))


def test_entropy_of_impossible_tokens_is_finite_and_so_is_its_gradient():
    logits = torch.tensor([[-INF, 0.0, 0.0], [-INF, -INF, 2.0]], requires_grad=True)
    entropy = trl.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([math.log(2.0), 0.0]))
    entropy.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3))


def test_entropy_without_gradient_on_request():
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs, entropy = trl.selective_log_softmax_and_entropy(logits, torch.tensor([0, 1]), entropy_requires_grad=False)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_the_temperature_of_trl_kernels_in_third_place_is_not_taken_for_a_flag():
    """`trl.kernels` has a function of this name without entropy_requires_grad: its third argument is the temperature,
    which would silently have become 1."""
    with pytest.raises(TypeError, match="temperature="):
        trl.selective_log_softmax_and_entropy(torch.randn(2, 5), torch.tensor([0, 1]), 0.7)


@pytest.mark.parametrize("masked", [False, True])
def test_k_labels_and_the_entropy_of_their_row(masked):
    torch.manual_seed(0)
    logits, index = torch.randn(2, 3, 7, requires_grad=True), torch.randint(0, 7, (2, 3, 4))
    mask = torch.rand(2, 3, 4) > 0.4 if masked else None
    if masked:
        mask[0, 1] = False
    logprobs, entropy = trl.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
    torch.testing.assert_close(logprobs, trl.selective_log_softmax(logits, index, 0.7, mask))
    want = trl.entropy_from_logits(logits / 0.7)
    want = want.masked_fill(~mask.any(-1), 0.0) if masked else want
    torch.testing.assert_close(entropy, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (entropy, want)))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_logprobs_scale_cap_and_temper(softcap):
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randn(9)
    targets = torch.randint(0, 9, (6,))
    logprobs, entropy, sum_sq, mean, top = trl.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 0.8, 128, softcap, 0.25
    )
    z = (hidden @ weight.T + bias) * 0.25
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.8
    logp = z.log_softmax(-1)
    torch.testing.assert_close(logprobs, logp.gather(-1, targets[:, None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(sum_sq, logp.exp().square().sum(-1).log())
    torch.testing.assert_close(mean, z.mean(-1))
    assert top.tolist() == (z.argmax(-1) == targets).tolist()
    got = torch.autograd.grad((logprobs + 0.3 * entropy).sum(), hidden)[0]
    want = torch.autograd.grad((logp.gather(-1, targets[:, None]).sum() - 0.3 * (logp.exp() * logp).sum()), hidden)[0]
    torch.testing.assert_close(got, want)


def test_chunked_logprobs_compute_only_what_is_named():
    args = torch.randn(2, 3), torch.randn(5, 3), None, torch.tensor([0, 4]), 1.0, 64
    assert [x is None for x in trl.ChunkedLogProbFunction.apply(*args, outputs=())] == [False, *[True] * 4]
    assert [x is None for x in trl.ChunkedLogProbFunction.apply(*args, outputs=("is_top1",))][-1] is False
    with pytest.raises(ValueError, match="logit_scale"):
        trl.ChunkedLogProbFunction.apply(*args, logit_scale=0.0)


def test_the_old_chunked_function_keeps_the_entropys_gradient():
    hidden = torch.randn(3, 4, requires_grad=True)
    _, entropy = trl._ChunkedLogProbFunction.apply(hidden, torch.randn(6, 4), torch.tensor([0, 1, 2]), 1.0, 64)
    entropy.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_dft_loss_weights_the_next_token_by_its_probability():
    logits = torch.tensor([[[0.0, math.log(3.0)], [NAN, NAN]]])  # predicts label[1]; the last row predicts nothing
    loss = trl.dft_loss(SimpleNamespace(logits=logits.requires_grad_()), torch.tensor([[-100, 1]]))
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75))
    loss.backward()  # the probability in front is a constant
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.75 * 0.25, -0.75 * 0.25], [0.0, 0.0]]]))
    assert trl.dft_loss(SimpleNamespace(logits=logits), torch.tensor([[0, -100]])).item() == 0


def test_mask_statistics_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[1, 1, 0]])
    assert trl.masked_mean(values, mask).item() == 2
    assert trl.masked_var(values, mask).item() == 2  # Bessel: (1 + 1) / 1
    assert trl.masked_var(values, mask, unbiased=False).item() == 1
    root = 1 / math.sqrt(2)
    torch.testing.assert_close(trl.masked_whiten(values, mask), torch.tensor([[-root, root, 0.0]]))
    torch.testing.assert_close(
        trl.masked_whiten(values, mask, shift_mean=False), torch.tensor([[2 - root, 2 + root, 0.0]])
    )


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0]])
def test_no_value_or_one_has_no_variance(mask):
    values, mask = torch.tensor([NAN, 5.0, NAN]), torch.tensor(mask)
    assert trl.masked_mean(values, mask).item() == 5 * mask.sum().item()
    assert trl.masked_var(values, mask).item() == 0
    assert trl.masked_whiten(values, mask).tolist() == [0, 0, 0]


def test_nan_statistics():
    x = torch.tensor([NAN, 1.0, 3.0])
    assert (trl.nanmin(x).item(), trl.nanmax(x).item()) == (1, 3)
    assert trl.nanstd(x).item() == pytest.approx(math.sqrt(2))
    assert trl.nanstd(torch.tensor([[1.0, NAN], [3.0, 2.0]]), dim=0, keepdim=True).shape == (1, 2)
    assert trl.nanmin(torch.tensor([NAN, NAN])).isnan() and trl.nanstd(torch.tensor([1.0, NAN])).isnan()
    assert trl.nanstd(torch.tensor([1.0, INF, 2.0])).item() == INF
    assert trl.nanstd(torch.tensor([INF, INF, NAN])).isnan() and trl.nanstd(torch.tensor([INF, -INF, 1.0])).isnan()
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(trl.nanstd(x), x)[0], torch.tensor([0, -0.5, 0.5]) * math.sqrt(2))


def test_first_true_or_the_length():
    bools = torch.tensor([[False, True, True], [False, False, False]])
    assert trl.first_true_indices(bools).tolist() == [1, 3]


def test_an_empty_batch_gives_empty_results():
    logits, labels = torch.zeros(0, 3, 7, dtype=torch.bfloat16), torch.zeros(0, 3, dtype=torch.long)
    assert trl.selective_log_softmax(logits, labels).shape == trl.entropy_from_logits(logits).shape == (0, 3)
