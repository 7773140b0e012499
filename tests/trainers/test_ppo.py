import dataclasses
import itertools
import json
import math
import shutil
from unittest import mock

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import generation
from rlhf_fast.data.formats import Prompt
from rlhf_fast.errors import ConfigError
from rlhf_fast.models import load_reward_model
from rlhf_fast.ops import ppo_loss
from rlhf_fast.packing import packing
from rlhf_fast.rewards import RewardModelReward
from rlhf_fast.rollout import (
    Rollout,
    correlation,
    generate,
    minibatches,
    packed_rows,
    repetition,
    right_padded,
    rollout_metrics,
)
from rlhf_fast.trainers import common
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
]
PROMPTS = [{"prompt": [{"role": "user", "content": f"say {w * (1 + i % 3)}"}], "word": w} for i, w in enumerate(WORDS)]


def share_of_e(prompts, responses, **columns):
    return [response.count("e") / max(1, len(response)) for response in responses]


def make_trainer(tmp_path, model=None, tokenizer=None, reward=share_of_e, train_dataset=PROMPTS, **options):
    trainer_options = {
        k: options.pop(k) for k in ("eval_dataset", "eval_rewards", "value_model", "ref_model") if k in options
    }
    tokenizer = tokenizer or tiny_tokenizer()
    defaults = {
        "output_dir": str(tmp_path), "total_episodes": 32, "batch_size": 16, "minibatch_size": 8, "response_length": 9,
        "num_ppo_epochs": 2, "temperature": 0.8, "learning_rate": 3e-3,
    }  # fmt: skip
    return PPOTrainer(
        PPOConfig(**(defaults | options)), model or tiny_model(tokenizer), tokenizer=tokenizer, reward=reward,
        train_dataset=train_dataset, **trainer_options,
    )  # fmt: skip


def a_rollout(trainer, seed=0):
    """Sampled, scored and with advantages, as an update takes it."""
    rollout = trainer._rollout(trainer.prompts, torch.Generator().manual_seed(seed))
    trainer._score_tokens(rollout, minibatches(rollout.lengths, 8, None))
    noise = torch.Generator().manual_seed(1)
    rollout.scores = rollout.raw_scores = torch.randn(len(rollout.prompts), generator=noise)
    rollout.advantages = torch.randn(rollout.logprobs.shape, generator=noise) * rollout.response_mask
    rollout.returns = torch.randn(rollout.logprobs.shape, generator=noise) * rollout.response_mask
    return rollout


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_a_ratio_of_one_and_a_half_counts_as_1_2():
    log_ratio = torch.tensor([[1.5]]).log().requires_grad_()
    loss, stats = ppo_loss(log_ratio, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1).bool(), cliprange=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2) and log_ratio.grad.item() == 0.0
    assert stats["clipfrac_high"].item() == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch_size": 3},
        {"share_trunk": True, "micro_batch_size": 5},
        {"minibatch_size": 16},
        {"micro_batch_tokens": 50},
    ],
    ids=["plain", "ragged micro-batches", "shared trunk", "one minibatch", "token budget"],
)
def test_the_first_ratio_is_exactly_one(tmp_path, options):
    for metrics in make_trainer(tmp_path, total_episodes=48, **options):
        assert float(metrics["policy/first_minibatch_max_abs_log_ratio"]) == 0.0
        assert float(metrics["policy/max_abs_log_ratio"]) > 1e-4  # and later ones are not
        assert float(metrics["loss/policy_avg"]) != 0.0


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_model_in_float64_is_refused(tmp_path, which):
    with pytest.raises(ConfigError, match="in float64, and PPO computes in float32"):
        make_trainer(tmp_path, **{which: tiny_model(tiny_tokenizer()).double()})


def test_bf16_multiplies_in_bfloat16_and_is_refused_without_the_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "bf16_supported", lambda device: False)
    with pytest.raises(ConfigError, match="bf16: cpu has no bfloat16 instructions"):
        make_trainer(tmp_path, bf16=True)
    monkeypatch.setattr(common, "bf16_supported", lambda device: True)
    exact = make_trainer(tmp_path)
    for options in ({"share_trunk": True, "micro_batch_size": 3}, {"micro_batch_size": 5}):
        trainer = make_trainer(tmp_path, bf16=True, **options)
        rounded = a_rollout(trainer)
        assert torch.equal(rounded.logprobs, rounded.ref_logprobs)  # or the first rewards would punish rounding
        # The tokens are as likely in float32, and when they were sampled, but for rounding.
        again = dataclasses.replace(rounded)
        exact._score_tokens(again, exact._minibatches(again))
        for logprobs in (again.logprobs, rounded.rollout_logprobs):
            assert 0 < (rounded.logprobs - logprobs).abs().max() < 0.05
        assert (again.logprobs - rounded.rollout_logprobs).abs().max() > 1e-4  # they were sampled in bfloat16 too
        metrics = next(iter(trainer))
        assert float(metrics["policy/first_minibatch_max_abs_log_ratio"]) == 0.0
        assert float(metrics["policy/max_abs_log_ratio"]) > 1e-4
        trained = [trainer.policy, trainer.value_model]
        assert {p.dtype for model in trained for p in model.parameters()} == {torch.float32}


def test_the_first_ratio_is_one_under_a_model_with_dropout(tmp_path):
    tokenizer = tiny_tokenizer()
    trainer = make_trainer(tmp_path, tiny_model(tokenizer, attention_dropout=0.5).train(), tokenizer)
    metrics = next(iter(trainer))
    assert float(metrics["policy/first_minibatch_max_abs_log_ratio"]) == 0.0


def test_log_probabilities_are_those_of_transformers_without_any_padding(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout = a_rollout(trainer)
    assert len(set(rollout.prompt_mask.sum(1).tolist())) > 1 and len(set(rollout.response_mask.sum(1).tolist())) > 1
    for i in range(len(rollout.prompts)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            logp = (trainer.policy(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
            values = trainer.value_model(ids)[0, len(prompt) - 1 : -1]
        n = len(response)
        torch.testing.assert_close(
            rollout.logprobs[i, :n], logp.gather(1, response[:, None])[:, 0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(rollout.values[i, :n], values, atol=1e-5, rtol=1e-5)
        assert not rollout.logprobs[i, n:].any() and not rollout.values[i, n:].any()


@pytest.mark.parametrize("share_trunk", [False, True])
def test_the_gradient_does_not_depend_on_micro_batches(tmp_path, share_trunk):
    trainer = make_trainer(tmp_path, share_trunk=share_trunk)
    with torch.no_grad():  # a critic of zeros would have no gradient into its trunk
        trainer.value_model.model.score.weight.normal_(generator=torch.Generator().manual_seed(2))
    rollout = a_rollout(trainer)
    gradients, losses = [], []
    for limits in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 40}):
        (minibatch,) = minibatches(rollout.lengths, len(rollout.prompts), **limits)
        losses.append(trainer._accumulate_gradient(rollout, minibatch)["loss/policy_avg"])
        parameters = [*trainer.policy.parameters(), *trainer.value_model.parameters()]
        gradients.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.grad = None
    assert any(g.abs().max() > 1e-3 for g in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(losses[1:], [losses[0]] * 3)


def test_the_variance_of_the_ratio_is_that_of_the_minibatch(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout = a_rollout(trainer)
    logprobs, noise = rollout.logprobs, torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(3))
    for size, shift in ((0.3, 0.0), (1e-4, 0.0), (0.3, 0.5)):
        rollout.logprobs, found = logprobs + size * noise + shift, []
        for limits in ({}, {"micro_batch_size": 1}):
            (minibatch,) = minibatches(rollout.lengths, len(rollout.prompts), **limits)
            found.append(float(trainer._accumulate_gradient(rollout, minibatch)["val/ratio_var"]))
        assert found[0] == pytest.approx(size**2 * math.exp(-2 * shift), rel=0.5)
        assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"])
def test_statistics_are_those_of_the_minibatch(tmp_path, mode):
    """However it is split; entropy is that of a token, however the loss adds them up."""
    trainer = make_trainer(tmp_path, loss_agg_mode=mode)
    rollout, found = a_rollout(trainer), []
    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(3))
    rollout.logprobs = rollout.logprobs + 0.3 * noise * rollout.response_mask
    for limits in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}):
        (minibatch,) = minibatches(rollout.lengths, len(rollout.prompts), **limits)
        found.append({k: float(v) for k, v in trainer._accumulate_gradient(rollout, minibatch).items()})
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    assert found[0]["max_abs_log_ratio"] == pytest.approx(float((0.3 * noise)[rollout.response_mask].abs().max()), 1e-3)
    rows = torch.arange(len(rollout.prompts))
    with packing(*trainer._trunks()):
        hidden = trainer._hidden_states(trainer.policy, *packed_rows(rollout, rows)[:2])
    logits = trainer.policy.lm_head(hidden) / trainer.config.temperature
    entropy = rollout.scatter(rows, torch.distributions.Categorical(logits=logits).entropy())
    lengths = rollout.response_mask.sum(1)
    of_sequences = (entropy.sum(1) / lengths).mean()
    expected = of_sequences if mode == "seq-mean-token-mean" else entropy.sum() / lengths.sum()
    assert lengths.min() < lengths.max()
    assert found[0]["policy/entropy_avg"] == pytest.approx(float(expected), rel=1e-5)


def test_padding_columns_change_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout = a_rollout(trainer)
    widths = {
        "prompt_ids": (4, 0, 7),
        "prompt_mask": (4, 0, False),
        "response_ids": (0, 5, 7),
        "response_mask": (0, 5, False),
    }
    for name in ("rollout_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns"):
        widths[name] = (0, 5, 99.0)  # what lies outside the mask must not matter
    wider = dataclasses.replace(rollout, **{
        name: torch.nn.functional.pad(getattr(rollout, name), pad[:2], value=pad[2]) for name, pad in widths.items()
    })  # fmt: skip
    results = []
    for r in (rollout, wider):
        (minibatch,) = minibatches(r.lengths, len(r.prompts), None)
        stats = trainer._accumulate_gradient(r, minibatch)
        results.append({k: float(v) for k, v in {**stats, **rollout_metrics(r, 0.05, "k1")}.items()})
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_eos_counts_and_padding_does_not_also_where_they_are_one_token(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    model = tiny_model(tokenizer)
    prompts = [Prompt(w, tokenizer(w)["input_ids"], {"word": w}) for w in WORDS]
    rollout = generate(model, tokenizer, prompts, max_new_tokens=150, generator=torch.Generator().manual_seed(0))
    assert 0 < rollout.ended.sum() < len(WORDS)
    for ids, mask, ended in zip(rollout.response_ids, rollout.response_mask, rollout.ended, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        assert (ids[:n] == tokenizer.eos_token_id).tolist() == [False] * (n - 1) + [bool(ended)]
    assert rollout.columns == {"word": WORDS}


def test_right_padded_takes_the_padding_out_of_the_middle():
    rollout = Rollout(
        prompt_ids=torch.tensor([[0, 0, 11], [12, 13, 14], [0, 15, 16]]),
        prompt_mask=torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]).bool(),
        response_ids=torch.tensor([[21, 22, 23], [24, 0, 0], [25, 26, 0]]),
        response_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool(),
        ended=torch.ones(3).bool(), prompts=[], responses=[],
    )  # fmt: skip
    ids, positions, labels = right_padded(rollout, torch.tensor([2, 0]))
    assert ids.shape == (2, 4) and ids[0].tolist() == [15, 16, 25, 26] and ids[1].tolist() == [11, 21, 22, 23]
    assert labels.tolist() == [25, 26, 21, 22, 23]
    assert ids.flatten()[positions].tolist() == [16, 25, 11, 21, 22]  # what stands before each label
    assert rollout.scatter(torch.tensor([2, 0]), labels).tolist() == [[25, 26, 0], [21, 22, 23]]


def test_minibatches_hold_each_row_once_and_sort_only_within():
    lengths = torch.arange(24) % 7
    first, second = (minibatches(lengths, 8, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert [[len(rows) for rows in minibatch] for minibatch in first] == [[3, 3, 2]] * 3
    for minibatch in first:
        in_order = lengths[torch.cat(minibatch)].tolist()
        assert in_order == sorted(in_order, reverse=True)
    assert sorted(torch.cat([torch.cat(m) for m in first]).tolist()) == list(range(24))
    assert set(torch.cat(first[0]).tolist()) != set(torch.cat(second[0]).tolist())


def test_micro_batches_hold_the_tokens_they_may_and_at_least_a_row():
    lengths = torch.tensor([3, 9, 4, 12, 1, 5])
    (minibatch,) = minibatches(lengths, 6, micro_batch_tokens=10)
    assert [lengths[rows].tolist() for rows in minibatch] == [[12], [9], [5, 4], [3, 1]]  # 12 alone is over the budget
    (minibatch,) = minibatches(lengths, 6, 1, micro_batch_tokens=10)
    assert [len(rows) for rows in minibatch] == [1] * 6


def test_repetition_is_the_share_of_pairs_seen_before():
    ids = torch.tensor([[5, 6, 5, 6, 5], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [8, 9, 0, 0, 0], [8, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert repetition(ids, mask).tolist() == pytest.approx([2 / 4, 0.0, 2 / 3, 0.0, 0.0])
    assert repetition(ids[:, :1], mask[:, :1]).tolist() == [0.0] * 5
    assert repetition(torch.tensor([[0, 65536, 1, 0]]), torch.ones(1, 4).bool()).tolist() == [0.0]  # (0, 65536), (1, 0)
    a_tool_between = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    assert repetition(torch.tensor([[5, 6, 9, 5, 6]]), a_tool_between).tolist() == [1 / 2]


def test_metrics_of_a_rollout_by_hand():
    """Two responses of 2 and 3 tokens, the second with a tool's token between its own; nan stands where none counts."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    nan = torch.nan
    rollout = Rollout(
        prompt_ids=torch.ones(2, 1, dtype=torch.int64), prompt_mask=torch.ones(2, 1).bool(),
        response_ids=torch.tensor([[5, 6, 0, 0], [7, 8, 7, 7]]), response_mask=mask, ended=torch.tensor([True, False]),
        prompts=["p", "p"], responses=["same", "same"], present=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
        logprobs=torch.tensor([[-1.0, -2.0, 0, 0], [-3.0, 0, -4.0, -5.0]]),
        rollout_logprobs=torch.tensor([[-1.5, -1.0, nan, nan], [-3.0, nan, -4.0, -5.0]]),
        ref_logprobs=torch.tensor([[-2.0, -4.0, 0, 0], [-7.0, 0, -4.0, -5.0]]),
        raw_scores=torch.tensor([2.0, 6.0]), scores=torch.tensor([1.0, 0.0]),
        values=torch.tensor([[1.0, 1.0, nan, nan], [1.0, nan, 1.0, 3.0]]),
        returns=torch.tensor([[1.0, 2.0, nan, nan], [3.0, nan, 4.0, 5.0]]),
        importance_weights=torch.tensor([[1.0, 0.5, 0, 0], [1.0, 0, 1.0, 1.0]]),
    )  # fmt: skip
    metrics = {name: float(x) for name, x in rollout_metrics(rollout, 0.1, "k1", shaped=True).items()}
    assert metrics == pytest.approx({
        "objective/kl": 7 / 2, "objective/kl_per_token": 7 / 5, "objective/kl_coef": 0.1, "objective/entropy": 15 / 2,
        "objective/non_score_reward": -0.35, "objective/scores": 0.5, "objective/rlhf_reward": 0.15,
        "objective/raw_scores": 4.0, "objective/score_length_correlation": 1.0,
        "critic/vf_explained_var": 1 - 1.04 / 2,  # of 0 1 2 3 2 and of 1 2 3 4 5
        "sampling/sampling_logp_difference/mean": 1.5 / 5, "sampling/sampling_logp_difference/max": 1.0,
        "sampling/importance_sampling_ratio/mean": 4.5 / 5, "val/num_eos_tokens": 1.0, "response_length/mean": 2.5,
        "response_length/max": 3.0, "response/ended": 0.5, "response/repetition": 0.0, "response/unique": 0.5,
    })  # fmt: skip
    assert float(rollout_metrics(rollout, 0.1, "k2")["objective/kl"]) == pytest.approx((1 + 4 + 16) / 2 / 2)


def test_what_is_constant_has_no_correlation():
    constant, rising = torch.ones(4), torch.arange(4.0)
    assert correlation(constant, rising) == correlation(rising, constant) == 0
    assert correlation(rising, -2 * rising) == pytest.approx(-1)


def test_the_batch_that_is_left_for_inspection_is_of_the_rows_asked_for():
    ids, ones = torch.tensor([[4], [5], [6]]), torch.ones(3, 1).bool()
    rollout = Rollout(ids, ones, ids + 3, ones, ones[:, 0], ["a", "b", "c"], ["d", "e", "f"])
    rollout.raw_scores = torch.tensor([1.0, 2.0, 3.0])
    left = rollout.texts_and_tokens(torch.tensor([2, 0]))
    left = {name: x if isinstance(x, list) else x.tolist() for name, x in left.items()}
    assert left == {
        "prompts": ["c", "a"], "responses": ["f", "d"], "prompt_ids": [[6], [4]], "response_ids": [[9], [7]],
        "response_mask": [[True], [True]], "scores": [3.0, 1.0],
    }  # fmt: skip
    rollout.scores = -rollout.raw_scores
    assert rollout.texts_and_tokens()["scores"].tolist() == [-1.0, -2.0, -3.0]


# --- what an iteration does ------------------------------------------------------------------------------------------


# Large enough steps for a random model to learn within seconds.
LEARNING = {
    "batch_size": 64,
    "minibatch_size": 32,
    "temperature": 1.0,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
}


def test_the_policy_learns_what_is_rewarded(tmp_path):
    trainer = make_trainer(tmp_path, total_episodes=64 * 15, kl_coef=0.01, **LEARNING)
    scores = [float(metrics["objective/scores"]) for metrics in trainer]
    assert sum(scores[:2]) / 2 < 0.04  # one letter among many
    assert sum(scores[-2:]) / 2 > 0.12


def test_a_strong_kl_holds_the_policy_where_it_is(tmp_path):
    kls = []
    for kl_coef in (1e-9, 0.2):
        *_, last = make_trainer(tmp_path, total_episodes=64 * 10, kl_coef=kl_coef, **LEARNING)
        kls.append(float(last["objective/kl"]))
    assert kls[1] < 0.25 * kls[0]


def test_metrics_add_up(tmp_path):
    trainer = make_trainer(tmp_path, missing_eos_penalty=2.0, kl_coef=0.1)
    for step, m in enumerate(trainer, 1):
        m = {k: float(v) for k, v in m.items()}
        assert m["objective/rlhf_reward"] == pytest.approx(m["objective/scores"] + m["objective/non_score_reward"])
        assert m["objective/non_score_reward"] == pytest.approx(-0.1 * m["objective/kl"])
        cut = 1 - m["val/num_eos_tokens"] / 16
        assert -2.0 * cut <= m["objective/scores"] <= 1 - 2.0 * cut  # share_of_e lies in [0, 1]
        assert m["policy/updates"] == 4 and m["episode"] == 16 * step and m["val/ratio"] == pytest.approx(1, abs=0.3)
        assert 0 < m["policy/entropy_avg"] < 6 and m["response_length/mean"] <= 9
    assert step == 2


def test_the_kl_of_the_first_iteration_is_zero_and_then_grows(tmp_path):
    first, second = make_trainer(tmp_path, learning_rate=1e-2)
    assert abs(float(first["objective/kl"])) < 1e-5 and float(second["objective/kl"]) != 0


def test_target_kl_ends_the_update(tmp_path):
    free = next(iter(make_trainer(tmp_path, learning_rate=5e-2)))
    held = next(iter(make_trainer(tmp_path, learning_rate=5e-2, target_kl=0.01)))
    assert float(free["policy/approxkl_k3_avg"]) > 0.01 and free["policy/updates"] == 4
    assert 1 <= held["policy/updates"] < 4 and float(held["policy/approxkl_k3_avg"]) <= 0.01


def test_target_kl_leaves_the_first_step(tmp_path):
    """Whatever a model's noise makes of its ratios: an update without a step would have nothing to report."""
    trainer = make_trainer(tmp_path, target_kl=1e-6)
    score = trainer._score_tokens

    def noisy(rollout, *arguments):
        score(rollout, *arguments)
        rollout.logprobs += 0.1

    trainer._score_tokens = noisy
    assert next(iter(trainer))["policy/updates"] == 1


def test_an_adaptive_kl_coefficient_moves(tmp_path):
    trainer = make_trainer(tmp_path, kl_coef=0.05, kl_target=6.0, kl_horizon=160.0)
    first, second = trainer
    assert first["objective/kl_coef"] == 0.05
    assert second["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 160))  # a KL of 0 is 20 % off and more


def test_while_the_critic_warms_up_the_kl_coefficient_waits(tmp_path):
    trainer = make_trainer(tmp_path, kl_target=6.0, kl_horizon=160.0, critic_warmup_steps=1)
    first, second = trainer
    assert first["objective/kl_coef"] == second["objective/kl_coef"] == 0.05


@pytest.mark.parametrize("whiten", [False, True])
def test_rewards_may_be_whitened(tmp_path, whiten, monkeypatch):
    def thousands(prompts, responses, **columns):
        return [1000.0 + len(response) for response in responses]

    trainer, seen = make_trainer(tmp_path, whiten_rewards=whiten, reward=thousands), []
    update = trainer._update
    monkeypatch.setattr(trainer, "_update", lambda rollout, plan: seen.append(rollout) or update(rollout, plan))
    next(iter(trainer))
    rewards = seen[0].rewards[seen[0].response_mask]
    assert float(rewards.mean()) == pytest.approx(1000 / 9, rel=0.1)  # on one token of nine
    assert float(rewards.std()) == pytest.approx(1.0, abs=1e-4) if whiten else float(rewards.std()) > 100


def test_reward_functions_get_prompts_text_and_columns(tmp_path):
    seen = []

    def reward(prompts, responses, word, **columns):
        seen.extend(zip(prompts, responses, word, strict=True))
        return [0.0] * len(responses)

    next(iter(make_trainer(tmp_path, reward=reward)))
    assert len(seen) == 16 and all(isinstance(response, str) for _, response, _ in seen)
    assert all(word in prompt[0]["content"] for prompt, _, word in seen)


def test_a_reward_model_with_its_own_tokenizer_scores_and_starts_the_critic(tmp_path):
    tokenizer = tiny_tokenizer()
    other = AutoTokenizer.from_pretrained(_saved(tiny_tokenizer(eos="<end>"), tmp_path / "other"))
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    reward_model = load_reward_model(tiny_model(other, seed=5), other)
    reward = RewardModelReward(reward_model, other)
    trainer = make_trainer(
        tmp_path, tokenizer=tokenizer, reward=reward, value_model=load_reward_model(tiny_model(tokenizer))
    )
    metrics = next(iter(trainer))
    assert other.decode(reward.encode(PROMPTS[0]["prompt"], "hello")) == "user: say one\nassistant: hello\n"
    assert float(metrics["objective/scores"]) != 0.0
    assert "critic/grad_norm" in metrics and float(metrics["critic/grad_norm"]) > 0


def _saved(tokenizer, path):
    tokenizer.save_pretrained(path)
    return str(path)


def test_every_prompt_is_answered_once_an_epoch(tmp_path):
    trainer = make_trainer(tmp_path, total_episodes=64, batch_size=24)
    words = []
    for trainer.step in range(4):
        words += [prompt.columns["word"] for prompt in trainer._next_prompts()]
    for epoch in range(6):
        assert sorted(words[16 * epoch : 16 * epoch + 16]) == sorted(WORDS)
    assert words[:16] != words[16:32]


def test_one_prompt_is_enough(tmp_path):
    metrics = list(make_trainer(tmp_path, train_dataset=PROMPTS[:1]))
    assert len(metrics) == 2 and metrics[-1]["episode"] == 32


class _LargestLogits(TorchDispatchMode):
    """Records the largest tensor with a vocabulary axis that any op makes."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.ndim >= 2 and x.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return out


def test_a_critic_of_its_own_comes_after_the_backward_of_the_policy(tmp_path, monkeypatch):
    """So that no more than one of their graphs is in memory."""
    trainer, policy_has_gradients = make_trainer(tmp_path), []
    values = trainer._values

    def watched(*arguments):
        if torch.is_grad_enabled():
            policy_has_gradients.append(all(p.grad is not None for p in trainer.policy.parameters()))
        return values(*arguments)

    monkeypatch.setattr(trainer, "_values", watched)
    next(iter(trainer))
    assert policy_has_gradients and all(policy_has_gradients)


def test_logits_never_exist_for_more_than_a_micro_batch_of_response_tokens(tmp_path):
    trainer = make_trainer(
        tmp_path, batch_size=16, minibatch_size=16, micro_batch_size=2, response_length=12, generation_batch_size=16
    )
    vocabulary = len(trainer.tokenizer)
    with (
        mock.patch.object(generation, "batches", wraps=generation.batches) as batches,
        _LargestLogits(vocabulary) as largest,
    ):
        next(iter(trainer))
    assert batches.call_args_list[0].args[1] == 16
    # The tokens of a micro-batch, or the width of the lm_head's weight (32), but never the 192 of the rollout.
    assert 12 < largest.rows <= 32 < 16 * 12


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, share_trunk):
    options = {
        "total_episodes": 64,
        "save_steps": 2,
        "kl_target": 6.0,
        "share_trunk": share_trunk,
        "save_total_limit": 5,
    }
    options |= {"eval_steps": 2, "eval_dataset": PROMPTS[:4], "value_learning_rate": None if share_trunk else 1e-3}
    whole = make_trainer(tmp_path / "whole", **options)
    assert whole.train().step == 4
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "part/checkpoint-2")
    for name in ("train_log.jsonl", "run_config.json"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "part" / name)

    resumed = make_trainer(tmp_path / "part", **options)
    assert resumed.train(resume=True).step == 4
    for trainer in (whole, resumed):
        trainer.policy.eval()
    for a, b in ((whole.policy, resumed.policy), (whole.value_model, resumed.value_model)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    logs = [(tmp_path / run / "train_log.jsonl").read_text().splitlines() for run in ("whole", "part")]
    assert [_without_times(row) for row in logs[0]] == [_without_times(row) for row in logs[1]]


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2}], ids=["whole", "lora"])
def test_a_checkpoint_of_a_shared_trunk_holds_what_learns_and_no_second_trunk(tmp_path, adapters):
    if adapters:
        pytest.importorskip("peft")
    tiny_model(tiny_tokenizer()).save_pretrained(tmp_path / "base")
    options = {"save_steps": 1, "save_total_limit": 5, "share_trunk": True, **adapters}
    whole = make_trainer(tmp_path / "whole", str(tmp_path / "base"), **options)
    whole.train()
    saved = torch.load(tmp_path / "whole/checkpoint-1/state.pt", weights_only=True)["trainer"]
    head = whole.value_model.model.score
    learning = sum(p.numel() for p in (*whole.policy.parameters(), *head.parameters()) if p.requires_grad)
    models = [*saved["policy"].values(), *saved["value_model"].values()]
    assert sum(x.numel() for x in models) == learning
    files = {path.name for path in (tmp_path / "whole/checkpoint-1").rglob("*") if path.is_file()}
    weights = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert weights in files and not (tmp_path / "whole/checkpoint-1/value_model").exists()

    shutil.rmtree(tmp_path / "whole/checkpoint-2")
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole/value_model")
    resumed = make_trainer(tmp_path / "whole", str(tmp_path / "base"), **options)
    resumed.train(resume=True)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole/value_model")
    assert all(torch.equal(x, y) for x, y in zip(final.parameters(), again.parameters(), strict=True))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(input_ids=ids).logits[0, 0], resumed.value_model(ids)[0, -1])


def test_a_checkpoint_with_another_critic_is_refused_in_words(tmp_path):
    kinds = ({}, {"share_trunk": True}, {"advantage_estimator": "reinforce"})
    trainers = [make_trainer(tmp_path, **options) for options in kinds]
    for trainer, other in itertools.permutations(trainers, 2):
        with pytest.raises(ConfigError, match="another critic, or none: resume with the same advantage_estimator"):
            trainer.load_state_dict(other.state_dict())
    state = trainers[0].state_dict() | {"step": 3}
    state["optimizers"][1]["param_groups"][0]["params"].pop()
    with pytest.raises(ConfigError, match="tensors of the model"):
        trainers[0].load_state_dict(state)
    assert trainers[0].step == 0


def test_a_resumed_run_takes_what_its_config_says_now(tmp_path):
    options = {"total_episodes": 64, "save_steps": 1, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    trainer = make_trainer(tmp_path / "run", **options)
    trainer.total_steps = 1  # as if it had been stopped there
    trainer.train()
    changed = {"kl_coef": 0.2, "learning_rate": 1e-4, "weight_decay": 0.0, "value_learning_rate": 1e-5}
    resumed = make_trainer(tmp_path / "run", **(options | changed))
    with pytest.warns(UserWarning, match="differs in kl_coef, learning_rate"):
        resumed.train(resume=True)
    log = [json.loads(row) for row in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [row["objective/kl_coef"] for row in log] == [0.05, 0.2, 0.2, 0.2]
    fresh = make_trainer(tmp_path / "fresh", **(options | changed))
    assert [row["lr"] for row in log[1:]] == [float(row["lr"]) for row in fresh][1:]
    assert [group["weight_decay"] for o in resumed.optimizers for group in o.param_groups] == [0.0] * 4
    assert {group["initial_lr"] for group in resumed.optimizers[1].param_groups} == {1e-5}
    assert resumed.schedulers[1].base_lrs == [1e-5, 1e-5]
    assert json.loads((tmp_path / "run/run_config.json").read_text())["kl_coef"] == 0.2


def _without_times(row):
    return {k: v for k, v in json.loads(row).items() if not k.startswith(("timing_s/", "perf/"))}


def test_what_is_saved_loads_in_transformers(tmp_path):
    trainer = make_trainer(tmp_path / "run", total_episodes=16)
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(policy(input_ids=ids).logits, trainer.policy(input_ids=ids).logits)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/value_model")
    torch.testing.assert_close(critic(input_ids=ids).logits[0, 0], trainer.value_model(ids)[0, -1])
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == trainer.tokenizer.chat_template
    stops = policy.generation_config.eos_token_id  # what PPO taught it to end with, whatever the model knew before
    assert trainer.tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_held_out_prompts_are_read_by_rewards_that_are_not_trained_on(tmp_path):
    calls = []

    def pass_rate(prompts, responses, **columns):
        calls.append(list(responses))
        return [0.25] * len(responses)

    trainer = make_trainer(
        tmp_path / "run", eval_dataset=PROMPTS[:3], eval_rewards={"pass_rate": pass_rate}, eval_steps=1, num_samples=2
    )
    trainer.train()
    rows = [json.loads(row) for row in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["eval_pass_rate"] == 0.25 and 0 <= row["eval_scores"] <= 1 for row in rows)
    assert abs(rows[0]["eval_kl"]) < 1e-5 and rows[2]["eval_kl"] != 0
    assert all(len(responses) == 3 for responses in calls)  # never a training response
    samples = [json.loads(row) for row in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 0, 1, 1, 2, 2] and samples[0]["pass_rate"] == 0.25
    assert samples[0]["prompt"] == PROMPTS[0]["prompt"]
    assert all(row["eval_pass_rate_stderr"] == 0 for row in rows)
    one = make_trainer(tmp_path / "one", eval_dataset=PROMPTS[:1])
    assert one.evaluate()["eval_scores_stderr"].isnan()  # not 0, which would say that all prompts agree


def test_every_look_at_the_held_out_prompts_draws_alike(tmp_path):
    """So what changes from look to look is the policy."""
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS[:3])
    before, _ = trainer._held_out_rollout()
    trainer.step = 1
    after, _ = trainer._held_out_rollout()
    assert after is not before and after.responses == before.responses


@pytest.mark.parametrize("held_out", [None, PROMPTS[:3]])
def test_without_samples_only_held_out_prompts_are_looked_at(tmp_path, held_out):
    sizes = []

    def reward(prompts, responses, **columns):
        sizes.append(len(responses))
        return [0.0] * len(responses)

    make_trainer(tmp_path, reward=reward, eval_dataset=held_out, eval_steps=1, num_samples=0).train()
    assert sizes == ([16, 16] if held_out is None else [3, 16, 3, 16, 3])
    assert not (tmp_path / "samples.jsonl").read_text()


@pytest.mark.parametrize("where", ["reward", "update"])
def test_a_reward_that_fails_loses_no_iteration(tmp_path, where, monkeypatch):
    whole = make_trainer(tmp_path / "whole", total_episodes=4 * 16, batch_size=16)
    whole.train()
    broken = make_trainer(tmp_path / "broken", total_episodes=4 * 16, batch_size=16)
    name = {"reward": "_score", "update": "_update"}[where]
    method = getattr(broken, name)

    def fails(*args):
        if broken.step == 2:
            raise ConnectionError("the judge is away")
        return method(*args)

    monkeypatch.setattr(broken, name, fails)
    with pytest.raises(ConnectionError, match="the judge is away"):
        broken.train()
    saved = [path.name for path in (tmp_path / "broken").glob("checkpoint-*")]
    assert saved == (["checkpoint-2"] if where == "reward" else [])  # an update may have moved some weights
    if where == "reward":
        again = make_trainer(tmp_path / "broken", total_episodes=4 * 16, batch_size=16)
        again.train(resume=True)
        for x, y in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
            assert torch.equal(x, y)


def test_looking_does_not_change_the_run(tmp_path):
    seen = make_trainer(tmp_path / "a", eval_steps=1, eval_dataset=PROMPTS[:4])
    unseen = make_trainer(tmp_path / "b")
    seen.train(), unseen.train()
    for x, y in zip(seen.policy.parameters(), unseen.policy.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 12}, "multiple of minibatch_size"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"response_length": 0}, "response_length"),
        ({"temperature": 0.0}, "temperature"),
        ({"kl_estimator": "k9"}, "'k1', 'k2', 'k3'"),
        ({"lam": 1.5}, "lam"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "start above 0"),
        ({"response_length": 400}, "256 positions"),
        ({"max_prompt_length": 3}, r"longer than max_prompt_length=3.*set on_overlong='skip'$"),
        ({"train_dataset": []}, "empty"),
        ({"train_dataset": [{"text": "hello"}]}, "prompt"),
        ({"train_dataset": [{"prompt": ""}]}, "no tokens"),
        ({"share_trunk": True, "value_model": object()}, "share_trunk"),
        ({"eval_rewards": {"response": len}, "eval_dataset": PROMPTS}, "may not be called 'response'"),
        ({"eval_rewards": {"step": len}, "eval_dataset": PROMPTS}, "may not be called 'step'"),  # in samples.jsonl
        ({"eval_rewards": {"scores_stderr": len}, "eval_dataset": PROMPTS}, "may not be called 'scores_stderr'"),
        ({"eval_rewards": {"response/ended": len}, "eval_dataset": PROMPTS}, "may not be called 'response/ended'"),
        ({"eval_rewards": {"response_length/mean": len}, "eval_dataset": PROMPTS}, "called 'response_length/mean'"),
        ({"critic_warmup_steps": 2}, "of 2 iterations in all: the policy would never move"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **wrong)


def test_the_policy_as_its_own_reference_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with pytest.raises(ConfigError, match="ref_model is the policy"):
        make_trainer(tmp_path, model, tokenizer, ref_model=model)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos"):
        make_trainer(tmp_path, model, tokenizer)


def test_longer_prompts_may_be_left_out(tmp_path):
    trainer = make_trainer(
        tmp_path, train_dataset=[*PROMPTS, {"prompt": "a b c d " * 40}], max_prompt_length=60, on_overlong="skip"
    )
    assert len(trainer.prompts) == 16 and trainer.reports[0].overlong[0][0] == 16


def test_a_default_dtype_of_float64_changes_nothing(tmp_path):
    times = ("timing_s/", "perf/")
    metrics = list(make_trainer(tmp_path / "float32"))
    before = [{name: float(x) for name, x in m.items() if not name.startswith(times)} for m in metrics]
    model = tiny_model(tiny_tokenizer())
    torch.set_default_dtype(torch.float64)
    try:
        trainer = make_trainer(tmp_path / "float64", model)
        after = [{name: float(m[name]) for name in before[0]} for m in trainer]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(before, after, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True)
