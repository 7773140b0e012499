"""Defaults are part of the interface: if they change, a run or a loop that swapped an import changes without a word."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import rlhf_fast as rf

OPS = """
token_logprobs temperature=1.0
token_logprobs_and_entropy temperature=1.0
cross_entropy ignore_index=-100
linear_token_logprobs temperature=1.0
linear_cross_entropy ignore_index=-100
linear_ppo_loss temperature=1.0, cliprange=0.2, kl_coef=0.0, kl_estimator='k3', entropy_coef=0.0,
    loss_agg_mode='token-mean'
ppo_loss cliprange=0.2, kl_coef=0.0, kl_estimator='k3', entropy_coef=0.0, loss_agg_mode='token-mean'
value_loss cliprange_value=0.2, loss_agg_mode='token-mean'
kl_penalty estimator='k1'
pairwise_loss center_coef=0.0
dpo_loss beta=0.1, label_smoothing=0.0
gae gamma=1.0, lam=0.95, gap_mode='carry'
masked_whiten shift_mean=True, eps=1e-08
"""
CONFIGS = """
SFTConfig num_train_epochs=1.0, per_device_train_batch_size=8, learning_rate=1e-05, lr_scheduler_type='linear',
    warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0, max_length=1024, save_steps=500, save_total_limit=2
RewardConfig num_train_epochs=1.0, per_device_train_batch_size=8, learning_rate=1e-05, lr_scheduler_type='linear',
    warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0, center_rewards_coefficient=0.0, max_length=1024,
    save_steps=500, save_total_limit=2
PPOConfig batch_size=512, response_length=53, temperature=0.7, kl_coef=0.05, kl_estimator='k1',
    kl_horizon=10000.0, advantage_estimator='gae', gamma=1.0, lam=0.95, scale_advantages='batch',
    minibatch_size=64, num_ppo_epochs=4, learning_rate=3e-06, lr_scheduler_type='linear', warmup_ratio=0.0,
    weight_decay=0.0, max_grad_norm=1.0, cliprange=0.2, entropy_coef=0.0, loss_agg_mode='token-mean',
    cliprange_value=0.2, vf_coef=0.1, save_steps=50, save_total_limit=2
"""
COMPAT = """
trl.entropy_from_logits chunk_size=128
trl.first_true_indices dtype=torch.int64
trl.masked_var unbiased=True
trl.masked_whiten shift_mean=True
trl.selective_log_softmax temperature=1.0
trl.selective_log_softmax_and_entropy entropy_requires_grad=True, temperature=1.0
verl.FusedLinearForPPO chunk_size=512, impl_backend='torch'
verl.agg_loss dp_size=1
verl.apply_kl_penalty kl_penalty='kl'
verl.compute_entropy_loss loss_agg_mode='token-mean'
verl.compute_gpg_outcome_advantage epsilon=1e-06, f_norm=1.0, alpha=1.0
verl.compute_grpo_outcome_advantage epsilon=1e-06, norm_adv_by_std_in_grpo=True
verl.compute_grpo_passk_outcome_advantage epsilon=1e-06, norm_adv_by_std_in_grpo=True
verl.compute_grpo_vectorized_outcome_advantage epsilon=1e-06, norm_adv_by_std_in_grpo=True
verl.compute_opo_outcome_advantage epsilon=1e-06
verl.compute_policy_loss clip_ratio_c=3.0, loss_agg_mode='token-mean'
verl.compute_policy_loss_bypass_mode loss_agg_mode='token-mean'
verl.compute_policy_loss_cispo loss_agg_mode='token-mean'
verl.compute_policy_loss_clip_cov loss_agg_mode='token-mean'
verl.compute_policy_loss_geo_mean loss_agg_mode='token-mean'
verl.compute_policy_loss_gpg loss_agg_mode='token-mean'
verl.compute_policy_loss_gspo loss_agg_mode='seq-mean-token-mean'
verl.compute_policy_loss_kl_cov loss_agg_mode='token-mean'
verl.compute_policy_loss_reinforce loss_agg_mode='seq-mean-token-sum'
verl.compute_policy_loss_sapo loss_agg_mode='seq-mean-token-mean'
verl.compute_policy_loss_vanilla loss_agg_mode='token-mean'
verl.compute_reinforce_plus_plus_baseline_outcome_advantage epsilon=1e-06
verl.compute_rloo_outcome_advantage epsilon=1e-06
verl.compute_rloo_vectorized_outcome_advantage epsilon=1e-06
verl.compute_value_loss loss_agg_mode='token-mean', dp_size=1
verl.entropy_from_logits_with_chunking chunk_size=2048
verl.linear_cross_entropy temperature=1.0, reduction='none'
verl.logprobs_from_logits inplace_backward=True
verl.logprobs_from_logits_flash_attn inplace_backward=True
verl.masked_var unbiased=True
verl.masked_whiten shift_mean=True
openrlhf.DPOLoss label_smoothing=0.0
openrlhf.PolicyLoss clip_eps_low=0.2, clip_eps_high=0.2, token_level_loss=True, policy_loss_type='ppo',
    vllm_is_correction_type='tis'
openrlhf.SFTLoss token_level_loss=True
openrlhf.ValueLoss token_level_loss=True
openrlhf.aggregate_loss token_level_loss=True, dp_size=1
openrlhf.compute_approx_kl kl_estimator='k1'
openrlhf.log_probs_from_logits temperature=1.0
openrlhf.masked_normalize dim=1, eps=1e-08
"""


def rows(table: str) -> list[tuple[str, dict[str, str]]]:
    """(name, {argument: default}) of each line; an indented line continues the one before."""
    lines = table.replace("\n    ", " ").strip().splitlines()
    names = (line.split(" ", 1) for line in lines)
    return [(name, dict(default.split("=") for default in defaults.split(", "))) for name, defaults in names]


def check(function, defaults: dict[str, str]) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: repr(parameters[name].default) for name in defaults} == defaults


@pytest.mark.parametrize(("name", "defaults"), rows(OPS) + rows(CONFIGS))
def test_ours(name, defaults):
    check(getattr(rf, name), defaults)


@pytest.mark.parametrize(("name", "defaults"), rows(COMPAT))
def test_those_of_the_peers(name, defaults):
    """Read in TRL 1.16, verl and OpenRLHF."""
    module, function = name.split(".")
    check(getattr(importlib.import_module(f"rlhf_fast.compat.{module}"), function), defaults)


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "GRPOConfig", "RLOOConfig"])
def test_a_default_that_differs_from_trls_stands_in_its_table(name):
    """Who brings a config of TRL should not find out from the result."""
    trl = pytest.importorskip("trl")
    docs = Path(__file__).parents[1] / "docs"
    page, title = ("sft_reward", "## Coming from TRL\n") if hasattr(rf, name) else ("ppo", "## Coming from TRL's PPO\n")
    section = (docs / f"{page}.md").read_text(encoding="utf-8").split(title)[1]
    section = section.split("\n## ")[0] if page == "sft_reward" else section  # PPO's is followed by GRPO's
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(config)}
        for config in (getattr(rf, name, rf.PPOConfig), getattr(trl, name))
    )
    differ = [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]
    assert len(differ) > 5 and [key for key in sorted(differ) if f"`{key}" not in section] == []
