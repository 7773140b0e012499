"""compat.verl beside verl 0.9.1; run.py installs it without Ray, for which stand_ins puts an empty object."""

import math
from types import SimpleNamespace

import pytest
import stand_ins  # noqa: F401 - before verl
import torch
import verl.trainer.ppo.core_algos as core
import verl.utils.torch_functional as functional
from agree import EMPTY, agree, deviates, has_nan, labels_for, masks, randn
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

import rlhf_fast.compat.verl as ours

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 5}]
PROMPTS = ["q", "p", "q", "r", "p", "q"]
LOSSES = ["vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "reinforce"]
modes = pytest.mark.parametrize("mode", MODES)
totals = pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])


def config(totals, **changes):
    policy = PolicyLossConfig(clip_cov_ratio=0.5, clip_cov_lb=0.0, clip_cov_ub=5.0, kl_cov_ratio=0.3, ppo_kl_coef=0.5)
    fields = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "policy_loss": policy}
    result = ActorConfig(**{**fields, "clip_ratio_low": 0.1, "clip_ratio_high": 0.3, **changes})
    result.global_batch_info.update(totals)
    return result


@masks
@modes
@totals
def test_aggregation(mask, mode, totals):
    agree(ours.agg_loss, core.agg_loss, randn(3, 6), mask, mode, wrt=(0,), **totals)


@masks
@modes
@totals
def test_value_loss(mask, mode, totals):
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), mask, 0.5, mode
    agree(ours.compute_value_loss, core.compute_value_loss, *args, wrt=(0,), **totals)


@masks
@modes
def test_deprecated_policy_loss(mask, mode):
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), mask, 0.2, None, 0.3, 2.0, mode

    def theirs(*args):  # ppo_kl comes with its graph; ours is a statistic
        loss, *statistics = core.compute_policy_loss(*args)
        return loss, *(x.detach() for x in statistics)

    agree(ours.compute_policy_loss, theirs, *args, wrt=(1,))


@masks
@totals
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_policy_losses(mask, totals, name, weighted, mode):
    name = f"compute_policy_loss_{name}"
    weights = randn(3, 6, seed=4).exp() if weighted else None
    args = randn(3, 6, scale=0.4), randn(3, 6, seed=1, scale=0.4), randn(3, 6, seed=2), mask, mode, config(totals)
    agree(getattr(ours, name), getattr(core, name), *args, weights, wrt=(1,))


@masks
@totals
@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_is": "token"},
        {"rollout_is": "token", "rollout_is_threshold": "0.7_1.4", "rollout_is_batch_normalize": True},
        {"rollout_is": "sequence", "rollout_is_threshold": 1.3, "rollout_is_batch_normalize": True},
        {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.5"},
        {"rollout_rs": "token_k2,token_k3", "rollout_rs_threshold": "0.3,0.2"},
        {"rollout_rs": "seq_sum_k1,seq_sum_k2,seq_sum_k3", "rollout_rs_threshold": "3,0.9,0.9"},
        {"rollout_rs": "seq_mean_k1, seq_mean_k2, seq_mean_k3", "rollout_rs_threshold": "1.4,0.2,0.2"},
        {"rollout_rs": "seq_max_k2,seq_max_k3", "rollout_rs_threshold": "0.6,0.5", "rollout_is": "token"},
    ],
    ids=lambda options: "-".join(options.values()) if "rollout_rs" in options else str(options.get("rollout_is")),
)
def test_bypass_mode(mask, totals, loss_type, options):
    options = {"loss_type": loss_type, "rollout_is": None, "rollout_rs": None, **options}
    policy = PolicyLossConfig(rollout_correction=RolloutCorrectionConfig(**options))
    args = randn(3, 6, scale=0.4), randn(3, 6, seed=1, scale=0.4), randn(3, 6, seed=2), mask, "token-mean"
    function = ours.compute_policy_loss_bypass_mode

    def theirs(*args):  # of their metrics those that ours has
        loss, metrics = core.compute_policy_loss_bypass_mode(*args)
        return loss, {name: metrics[name] for name in function(*args)[1]}

    agree(function, theirs, *args, config(totals, policy_loss=policy), wrt=(1,))


def test_the_metric_of_extreme_log_ratios_is_not_clamped_by_ours():
    new, old, mask = torch.full((1, 1), 50.0), torch.zeros(1, 1), torch.ones(1, 1)
    args = old, new, -mask, mask, "token-mean", config({})
    loss, metrics = deviates(
        ours.compute_policy_loss_vanilla,
        core.compute_policy_loss_vanilla,
        *args,
        peer=lambda x: x[1]["actor/ppo_kl"] == -20,
    )
    assert metrics["actor/ppo_kl"] == -50
    assert loss.item() == 3 == core.compute_policy_loss_vanilla(*args)[0].item()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("geo_mean", "sapo")])
def test_empty_masks_are_nan_in_verl(name):
    name = f"compute_policy_loss_{name}"
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), EMPTY, "token-mean", config({})
    got = deviates(getattr(ours, name), getattr(core, name), *args, peer=has_nan)
    assert got[0].item() == 0


def test_bypass_mode_raises_on_an_empty_mask_in_verl():
    args = randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), EMPTY, "token-mean", config({})
    name = "compute_policy_loss_bypass_mode"
    assert deviates(getattr(ours, name), getattr(core, name), *args, peer=ValueError)[0].item() == 0


def test_empty_masks_elsewhere():
    x = randn(3, 6)
    assert deviates(ours.agg_loss, core.agg_loss, x, EMPTY, "token-mean", peer=has_nan).item() == 0
    assert deviates(ours.compute_value_loss, core.compute_value_loss, x, x, x, EMPTY, 0.5, peer=has_nan)[0].item() == 0
    assert deviates(ours.masked_var, functional.masked_var, x, EMPTY, peer=ValueError).item() == 0
    assert not deviates(ours.masked_whiten, functional.masked_whiten, x, EMPTY, peer=ValueError).any()
    gae = ours.compute_gae_advantage_return, core.compute_gae_advantage_return
    assert not deviates(*gae, x, x, EMPTY, 1.0, 0.95, peer=ValueError)[0].any()


@masks
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0)])
def test_gae(mask, gamma, lam):
    args = randn(3, 6), randn(3, 6, seed=1), mask, gamma, lam
    agree(ours.compute_gae_advantage_return, core.compute_gae_advantage_return, *args, inside=mask)


OUTCOMES = ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"]


@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("seed", range(4))
def test_outcome_advantages(name, seed):
    import numpy as np

    mask = (torch.arange(5) < torch.tensor([[1], [5], [3], [2], [4], [5]])).long()
    rewards = randn(6, 5, seed=seed) * mask
    name = f"compute_{name}_outcome_advantage"
    agree(getattr(ours, name), getattr(core, name), rewards, mask, np.array(PROMPTS, dtype=object))
    if "grpo" in name:
        args = rewards, mask, np.array(PROMPTS, dtype=object), 1e-6, False
        agree(getattr(ours, name), getattr(core, name), *args)


@pytest.mark.parametrize("scaled", [True, False])
def test_passk(scaled):
    import numpy as np

    rewards, mask, options = randn(6, 5), torch.ones(6, 5), {"norm_adv_by_std_in_grpo": scaled}
    prompts = np.array(["q", "p", "q", "r", "p", "r"], dtype=object)
    passk = ours.compute_grpo_passk_outcome_advantage, core.compute_grpo_passk_outcome_advantage
    agree(*passk, rewards, mask, prompts, config=options)
    with pytest.raises(ValueError):
        passk[1](rewards, mask, np.arange(6), config=options)


@masks
def test_reinforce_plus_plus_and_remax(mask):
    rewards = randn(3, 6) * mask
    name = "compute_reinforce_plus_plus_outcome_advantage"
    agree(getattr(ours, name), getattr(core, name), rewards, mask, SimpleNamespace(gamma=0.9))
    name = "compute_remax_outcome_advantage"
    agree(
        lambda *a: getattr(ours, name)(*a)[0] * mask, lambda *a: getattr(core, name)(*a)[0] * mask,
        rewards, randn(3, seed=1), mask,
    )  # fmt: skip


def test_remax_returns_between_turns_are_not_zero_in_verl():
    args = torch.ones(1, 3), torch.zeros(1), torch.tensor([[1, 0, 1]])
    name = "compute_remax_outcome_advantage"
    got = deviates(getattr(ours, name), getattr(core, name), *args, peer=lambda x: x[1].tolist() == [[2, 1, 1]])
    assert got[1].tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k2+", "k3+"])
def test_kl_penalty(name):
    agree(ours.kl_penalty, core.kl_penalty, randn(3, 6, scale=2), randn(3, 6, seed=1, scale=2), name, wrt=(0,))
    far = torch.tensor([[-100.0, 100.0, 15.0]]), torch.zeros(1, 3), name
    agree(ours.kl_penalty, core.kl_penalty, *far, wrt=(0,))


def test_full_kl_is_not_there_in_verl():
    logits, ref = randn(3, 11), randn(3, 11, seed=1)
    got = deviates(ours.kl_penalty, core.kl_penalty, logits, ref, "full", peer=NotImplementedError)
    want = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(got, want)


def test_rewards_and_entropy_loss():
    agree(ours.compute_rewards, core.compute_rewards, randn(3, 6), randn(3, 6, seed=1), randn(3, 6, seed=2), 0.3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)
    for mode in MODES:
        agree(ours.compute_entropy_loss, core.compute_entropy_loss, randn(3, 6, 11), mask, mode, wrt=(0,))


def test_adaptive_kl():
    pair = [module.AdaptiveKLController(0.1, 6.0, 100) for module in (ours, core)]
    for current in (20.0, 5.5, 0.0):
        for controller in pair:
            controller.update(current, 8)
        assert pair[0].value == pytest.approx(pair[1].value)


@pytest.mark.parametrize("suffix", ["", "_naive", "_v2"])
def test_logprobs(suffix):
    name = f"logprobs_from_logits{suffix}"
    logits = randn(2, 6, 11, scale=3)
    agree(getattr(ours, name), getattr(functional, name), logits, labels_for(logits), wrt=() if suffix == "" else (0,))
    half = logits.bfloat16(), labels_for(logits)
    got = deviates(getattr(ours, name), getattr(functional, name), *half, peer=lambda x: x.dtype == torch.bfloat16)
    assert got.dtype == torch.float32


def test_an_empty_batch_raises_in_verl():
    args = torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)
    for name in ("logprobs_from_logits", "logprobs_from_logits_v2"):
        assert deviates(getattr(ours, name), getattr(functional, name), *args, peer=RuntimeError).shape == (0,)


def test_response_logprobs_entropy_and_squares():
    logits = randn(2, 6, 11, scale=3)
    response = ours.log_probs_from_logits_response, functional.log_probs_from_logits_response
    agree(*response, labels_for(logits), logits, 3)
    for name in ("entropy_from_logits", "calculate_sum_pi_squared_from_logits"):
        agree(getattr(ours, name), getattr(functional, name), logits, wrt=(0,))
    name = "entropy_from_logits_with_chunking"
    agree(getattr(ours, name), getattr(functional, name), logits[0], 4)
    impossible = torch.tensor([[-math.inf, 0.0, 0.0]])
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        got = deviates(getattr(ours, name), getattr(functional, name), impossible, peer=has_nan)
        assert got.item() == pytest.approx(math.log(2))


@masks
def test_mask_statistics(mask):
    x = (randn(3, 6) + 2).masked_fill(mask == 0, math.nan)
    agree(ours.masked_sum, functional.masked_sum, x, mask)
    agree(ours.masked_mean, functional.masked_mean, x, mask)
    agree(ours.masked_mean, functional.masked_mean, x, mask, -1)
    for flag in (True, False):
        agree(ours.masked_var, functional.masked_var, x, mask, flag)
        agree(ours.masked_whiten, functional.masked_whiten, x, mask, flag, inside=mask)
    agree(ours.clip_by_value, functional.clip_by_value, randn(3, 6), -randn(3, 6).abs(), randn(3, 6, seed=1).abs())


def test_fused_linear():
    hidden, weight, ids = randn(2, 6, 5), randn(23, 5, seed=1), labels_for(randn(2, 6, 23))
    agree(ours.FusedLinearForPPO(), FusedLinearForPPO(), hidden, weight, ids, 0.7, wrt=(0, 1))
    half = hidden.bfloat16(), weight.bfloat16(), ids
    got = deviates(ours.FusedLinearForPPO(), FusedLinearForPPO(), *half, peer=lambda x: x[1].dtype == torch.bfloat16)
    assert got[1].dtype == torch.float32
