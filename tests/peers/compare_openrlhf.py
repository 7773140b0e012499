"""compat.openrlhf beside OpenRLHF 0.11.0; run.py installs it without its dependencies."""

import importlib
import math
import sys
import types

import pytest
import torch
from agree import EMPTY, agree, deviates, has_nan, labels_for, masks, randn

import rlhf_fast.compat.openrlhf as ours


def _load():
    """models/loss.py and models/utils.py without the package around them, which imports vLLM, Ray and DeepSpeed.

    DeepSpeed is imported by utils.py for a function that is not compared; an empty module stands for it.
    """
    root = next(p for p in sys.path if p.endswith("openrlhf-0.11.0"))
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [f"{root}/openrlhf/models"]
    controller = types.ModuleType("openrlhf_ppo_utils")
    controller.__path__ = [f"{root}/openrlhf/trainer/ppo_utils"]
    sys.modules.update(deepspeed=types.ModuleType("deepspeed"), openrlhf_models=package, openrlhf_ppo_utils=controller)
    try:
        names = ("openrlhf_models.loss", "openrlhf_models.utils", "openrlhf_ppo_utils.kl_controller")
        return [importlib.import_module(name) for name in names]
    finally:
        del sys.modules["deepspeed"]


loss, utils, kl_controller = _load()
token_level = pytest.mark.parametrize("token_level", [True, False])
TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 12.0}]


@masks
@token_level
@pytest.mark.parametrize("totals", TOTALS)
def test_aggregation_and_sft(mask, token_level, totals):
    x = randn(3, 6)
    agree(ours.aggregate_loss, loss.aggregate_loss, x, mask, token_level, wrt=(0,), **totals)
    agree(ours.SFTLoss(token_level), loss.SFTLoss(token_level), x, mask, wrt=(0,), **totals)


@masks
@token_level
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("totals", TOTALS)
def test_policy_loss(mask, token_level, dual_clip, kind, totals):
    options = {"token_level_loss": token_level, "dual_clip": dual_clip, "policy_loss_type": kind}
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), mask
    agree(ours.PolicyLoss(0.1, 0.3, **options), loss.PolicyLoss(0.1, 0.3, **options), *args, wrt=(0,), **totals)


@masks
@pytest.mark.parametrize("kind", ["tis", "icepop", "seq-mask-tis"])
@pytest.mark.parametrize("policy_loss_type", ["ppo", "gspo"])
def test_rollout_correction(mask, kind, policy_loss_type):
    options = {
        "enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.8, 1.6], "vllm_is_correction_type": kind,
        "policy_loss_type": policy_loss_type,
    }  # fmt: skip
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), mask, randn(3, 6, seed=3)
    agree(ours.PolicyLoss(**options), loss.PolicyLoss(**options), *args, wrt=(0,))


def test_extreme_log_ratios_stop_at_20_in_both():
    for ratio in (50.0, -50.0, 19.9):
        for advantage in (1.0, -1.0):
            args = torch.full((1, 1), ratio), torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1)
            agree(ours.PolicyLoss(), loss.PolicyLoss(), *args, wrt=(0,))


@masks
@token_level
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("totals", TOTALS)
def test_value_loss(mask, token_level, clip, totals):
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), mask
    agree(ours.ValueLoss(clip, token_level), loss.ValueLoss(clip, token_level), *args, wrt=(0,), **totals)


def test_empty_masks_are_nan_in_openrlhf():
    x = randn(3, 6)
    assert deviates(ours.aggregate_loss, loss.aggregate_loss, x, EMPTY, peer=has_nan).item() == 0
    assert deviates(ours.aggregate_loss, loss.aggregate_loss, x, EMPTY, False, peer=has_nan).item() == 0
    assert deviates(ours.PolicyLoss(), loss.PolicyLoss(), x, x, x, EMPTY, peer=has_nan)[0].item() == 0
    assert deviates(ours.ValueLoss(0.2), loss.ValueLoss(0.2), x, x, x, EMPTY, peer=has_nan).item() == 0
    assert deviates(ours.masked_mean, utils.masked_mean, x, EMPTY, peer=has_nan).item() == 0
    assert deviates(ours.PairWiseLoss(), loss.PairWiseLoss(), x[0, :0], x[0, :0], peer=has_nan).item() == 0


def test_nan_outside_the_mask_reaches_openrlhfs_loss():
    x, mask = randn(3, 6), torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)
    poisoned = x.masked_fill(mask == 0, math.nan)
    got = deviates(ours.aggregate_loss, loss.aggregate_loss, poisoned, mask, peer=has_nan)
    torch.testing.assert_close(got, loss.aggregate_loss(x, mask))


def test_preference_losses():
    c, r, margin = randn(8), randn(8, seed=1), randn(8, seed=2).abs()
    agree(ours.PairWiseLoss(), loss.PairWiseLoss(), c, r, wrt=(0, 1))
    agree(ours.PairWiseLoss(), loss.PairWiseLoss(), c, r, margin, wrt=(0, 1))
    agree(ours.LogExpLoss(), loss.LogExpLoss(), c, r, wrt=(0, 1))
    ref = randn(8, seed=3), randn(8, seed=4)
    for options in ({}, {"label_smoothing": 0.2}, {"ipo": True}):
        agree(ours.DPOLoss(0.3, **options), loss.DPOLoss(0.3, **options), c, r, *ref, wrt=(0, 1))


def test_log_exp_overflows_and_ignores_the_margin_in_openrlhf():
    c, r = torch.tensor([0.0]), torch.tensor([100.0])
    assert deviates(ours.LogExpLoss(), loss.LogExpLoss(), c, r, peer=lambda x: x.isinf()).item() == 100
    margin, peer = torch.tensor([1.0]), loss.LogExpLoss()
    got = deviates(ours.LogExpLoss(), peer, c, c, margin, peer=lambda x: x == peer(c, c))
    assert got.item() == pytest.approx(math.log(1 + math.e))


def test_next_token_loss():
    logits = randn(2, 6, 11)
    labels = labels_for(logits).index_fill(1, torch.tensor([0, 1]), -100)
    agree(ours.GPTLMLoss(), loss.GPTLMLoss(), logits, labels, wrt=(0,))
    nothing = torch.full((2, 6), -100)
    assert deviates(ours.GPTLMLoss(), loss.GPTLMLoss(), logits, nothing, peer=has_nan).item() == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(estimator):
    agree(
        ours.compute_approx_kl, utils.compute_approx_kl, randn(3, 6, scale=3), randn(3, 6, seed=1), estimator, wrt=(0,)
    )
    far = torch.tensor([[-200.0]]), torch.zeros(1, 1), estimator
    torch.testing.assert_close(ours.compute_approx_kl(*far), utils.compute_approx_kl(*far))
    grads = []
    for module in (ours, utils):
        x = far[0].clone().requires_grad_()
        grads.append(torch.autograd.grad(module.compute_approx_kl(x, *far[1:]), x)[0])
    assert grads[0].item() == 0
    assert grads[1].isnan().item() is (estimator == "k3")  # 0 * inf behind the clamp


@masks
def test_reward(mask):
    if not mask.any(1).all():
        score = torch.ones(3)
        got = deviates(
            ours.compute_reward, utils.compute_reward, score, 0.1, torch.zeros(3, 6), mask, peer=lambda x: x[1, -1] == 1
        )
        assert not got[1].any()  # no action, no reward
        return
    args = randn(3, scale=9), 0.1, randn(3, 6), mask
    agree(ours.compute_reward, utils.compute_reward, *args, inside=mask)
    agree(ours.compute_reward, utils.compute_reward, *args, (-5.0, 5.0), inside=mask)
    agree(ours.compute_reward, utils.compute_reward, args[0], -1.0, *args[2:], inside=mask)


def test_log_probs():
    logits = randn(2, 6, 11)
    agree(ours.log_probs_from_logits, utils.log_probs_from_logits, logits, labels_for(logits))
    agree(ours.log_probs_from_logits, utils.log_probs_from_logits, logits, labels_for(logits), 0.7)
    theirs, mine = logits.clone(), logits.clone()
    utils.log_probs_from_logits(theirs, labels_for(logits), 0.7)
    ours.log_probs_from_logits(mine, labels_for(logits), 0.7)
    assert torch.equal(mine, logits) and not torch.equal(theirs, logits)
    half = logits.bfloat16(), labels_for(logits)
    got = deviates(
        ours.log_probs_from_logits, utils.log_probs_from_logits, *half, peer=lambda x: x.dtype == torch.bfloat16
    )
    assert got.dtype == torch.float32


def test_an_empty_batch_raises_in_openrlhf():
    args = torch.zeros(0, 7, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.long)
    got = deviates(ours.log_probs_from_logits, utils.log_probs_from_logits, *args, peer=RuntimeError)
    assert got.shape == (0,)


@masks
def test_mask_statistics(mask):
    x = randn(3, 6) + 2
    agree(ours.masked_mean, utils.masked_mean, x, mask, wrt=(0,))
    agree(ours.masked_mean, utils.masked_mean, x, None, 1, wrt=(0,))
    agree(ours.masked_normalize, utils.masked_normalize, x, mask, wrt=(0,))
    agree(ours.masked_normalize, utils.masked_normalize, x, mask, 0, wrt=(0,))


def test_entropy():
    with torch.compiler.set_stance("force_eager"):  # theirs is compiled on its first call
        agree(ours.compute_entropy, utils.compute_entropy, randn(2, 6, 11, scale=3), wrt=(0,))
        impossible = torch.tensor([[-math.inf, 0.0, 0.0]])
        got = deviates(ours.compute_entropy, utils.compute_entropy, impossible, peer=has_nan)
    assert got.item() == pytest.approx(math.log(2))


def test_adaptive_kl():
    pair = [module.AdaptiveKLController(0.1, 6.0, 100) for module in (ours, kl_controller)]
    for current in (20.0, 5.5, 0.0):
        for controller in pair:
            controller.update(current, 8)
        assert pair[0].value == pytest.approx(pair[1].value)
