"""What an iteration leaves out if nobody needs it: the reference, and log-probabilities before the first step."""

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from rlhf_fast import parallel
from rlhf_fast.errors import ConfigError
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": f"say {'the cat sat on ' * (1 + i)}{i}: "} for i in range(8)]


def share_of_letters(prompts, responses, **columns):
    return [sum(map(str.isalpha, text)) / (1 + len(text)) for text in responses]


def make_trainer(tmp_path, ref_model=None, rollout_func=None, **options):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    if "lora_r" in options:
        for saved in (model, tokenizer):
            saved.save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    defaults = {
        "batch_size": 16, "minibatch_size": 16, "micro_batch_size": 8, "num_generations": 4, "total_episodes": 48,
        "num_ppo_epochs": 1, "response_length": 9, "advantage_estimator": "group", "kl_coef": 0.0,
        "learning_rate": 3e-3, "temperature": 0.8,
    }  # fmt: skip
    return PPOTrainer(
        PPOConfig(str(tmp_path / "run"), **defaults | options), model, tokenizer=tokenizer, ref_model=ref_model,
        reward=share_of_letters, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2], rollout_func=rollout_func,
    )  # fmt: skip


def iterations(trainer):
    rows = [{k: float(v) for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in trainer]
    return rows, [p.detach() for p in trainer.policy.parameters()]


def counted(trainer, monkeypatch):
    """The forwards of policy and reference in trainer, and those of the reference."""
    calls = {"_hidden_states": 0, "_reference_logprobs": 0}
    for name in calls:
        method = getattr(trainer, name)

        def count(*arguments, name=name, method=method):
            calls[name] += 1
            return method(*arguments)

        monkeypatch.setattr(trainer, name, count)
    return calls


def with_tools(prompts, trainer):
    """An engine whose responses have a tool's token in their middle."""
    tokens = [[5 + i % 3, 9, 6 + i % 5, trainer.tokenizer.eos_token_id] for i in range(len(prompts))]
    return {
        "completion_ids": tokens,
        "env_mask": [[1, 0, 1, 1]] * len(prompts),
        "logprobs": [[-1.0] * 4] * len(prompts),
    }


@pytest.mark.parametrize("options", [
    {}, {"num_generations": 1, "advantage_estimator": "reinforce", "micro_batch_size": 3}, {"lora_r": 4},
    {"kl_coef": 0.1, "kl_in_loss": True, "kl_estimator": "k3"}, {"rollout_func": with_tools}, {"bf16": True},
    {"advantage_estimator": "gae", "scale_advantages": "batch"},
], ids=["group", "ungrouped", "lora", "kl in the loss", "tools", "bf16", "critic of its own"])  # fmt: skip
def test_one_step_needs_no_old_logprobs_and_learns_the_same_to_the_last_bit(tmp_path, options, monkeypatch):
    monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device: True)
    trainer = make_trainer(tmp_path / "a", **options)
    assert not trainer.config.needs_old_logprobs
    calls = counted(trainer, monkeypatch)
    rows, weights = iterations(trainer)
    steps = -(-16 // trainer.config.micro_batch_size) * len(rows)
    of_reference = steps if trainer.has_reference else 0
    of_others = of_reference + (2 * steps if trainer.value_model else 0)  # the critic is read before and in the step
    assert calls == {"_hidden_states": steps + of_others, "_reference_logprobs": of_reference}

    monkeypatch.setattr(PPOConfig, "needs_old_logprobs", True)
    other = make_trainer(tmp_path / "b", **options)
    calls = counted(other, monkeypatch)
    want_rows, want_weights = iterations(other)
    assert calls["_hidden_states"] == 2 * steps + of_others
    for row, want in zip(rows, want_rows, strict=True):
        assert row == pytest.approx(want, nan_ok=True, rel=1e-6, abs=1e-9)
        assert row["policy/max_abs_log_ratio"] == 0.0 and row["objective/entropy"] > 1
    assert all(map(torch.equal, weights, want_weights))


@pytest.mark.parametrize("options", [
    {"num_ppo_epochs": 2}, {"minibatch_size": 8}, {"kl_coef": 0.1}, {"importance_cap": 2.0},
    {"advantage_estimator": "gae", "scale_advantages": "batch", "share_trunk": True},
])  # fmt: skip
def test_what_needs_the_old_logprobs(tmp_path, options):
    trainer = make_trainer(tmp_path, **options)
    assert trainer.config.needs_old_logprobs
    _, row, _ = iterations(trainer)[0]
    assert row["objective/entropy"] > 1 and ("objective/kl" in row) == bool(trainer.config.kl_coef)


def test_a_kl_of_weight_zero_needs_no_reference_unless_one_is_given_to_measure_it(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    assert trainer.reference is None and len(trainer._networks()) == 1
    rows, weights = iterations(trainer)
    measured = make_trainer(tmp_path / "b", ref_model=tiny_model(tiny_tokenizer()))
    want_rows, want_weights = iterations(measured)
    assert all(map(torch.equal, weights, want_weights))
    of_kl = ("kl", "kl_per_token", "kl_coef", "non_score_reward", "rlhf_reward")
    extra = {"loss/kl_avg", *(f"objective/{name}" for name in of_kl)}
    assert want_rows[0].keys() - rows[0].keys() == extra and want_rows[2]["objective/kl"] != 0
    for row, want in zip(rows, want_rows, strict=True):
        assert row == pytest.approx({k: v for k, v in want.items() if k not in extra}, nan_ok=True)
    assert measured.evaluate().keys() - trainer.evaluate().keys() == {"eval_kl"}


def test_the_kl_of_adapters_of_weight_zero_is_not_computed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, lora_r=4)
    calls = counted(trainer, monkeypatch)
    trainer.evaluate()
    assert "objective/kl" not in next(iter(trainer)) and calls["_reference_logprobs"] == 0


@pytest.mark.parametrize("options", [{"stop_on": ["kl"]}, {"monitors": {"kl": 5.0}}])
def test_a_monitor_of_a_kl_that_is_not_measured_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"kl_coef 0 there is no reference.*give a ref_model"):
        make_trainer(tmp_path, **options)
    make_trainer(tmp_path, ref_model=tiny_model(tiny_tokenizer()), **options)
    make_trainer(tmp_path, monitors={"kl": None})


def test_only_what_was_scored_is_summed_over_the_processes(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, kl_coef=0.1, kl_in_loss=True, kl_estimator="k3")
    rollout = trainer._rollout(trainer.prompts, torch.Generator().manual_seed(0))
    summed, add = [], parallel.all_reduce_sum
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda x: summed.append(x) or add(x))
    trainer._score_tokens(rollout, trainer._minibatches(rollout), with_policy=False)
    assert [x is rollout.ref_logprobs for x in summed] == [True] and not rollout.logprobs.any()
