"""Every option of PPOConfig does what it says, in a run of the trainer or by hand."""

import asyncio
import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from rlhf_fast import kl_penalty
from rlhf_fast.advantages import BASELINES, RunningStd, sequence_advantages, shaped_scores
from rlhf_fast.data.formats import Prompt
from rlhf_fast.errors import ConfigError, NonFiniteError
from rlhf_fast.models import ValueModel, hidden_states, load_reward_model, save_model
from rlhf_fast.ops.reference import AGGREGATIONS
from rlhf_fast.packing import packing
from rlhf_fast.rollout import check_rollout_lists, make_rollout, minibatches, packed_rows, right_padded
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [
    {"prompt": f"say {word}", "word": word} for word in ("one", "two", "three", "four", "cat", "sat", "on", "mat")
]
CRITIC_FREE = [
    {"advantage_estimator": "reinforce"},
    {"advantage_estimator": "rloo", "num_generations": 4},
    {"advantage_estimator": "group", "num_generations": 4, "scale_advantages": "group"},
]


def variety(prompts, responses, **columns):
    """Differs from answer to answer, also of a model that knows nothing."""
    return [len(set(response)) / 10 + (sum(map(ord, response)) % 97) / 970 for response in responses]


def make_trainer(tmp_path, model=None, reward=variety, train_dataset=PROMPTS, tokenizer=None, **options):
    others = ("eval_dataset", "eval_rewards", "value_model", "ref_model", "rollout_func")
    trainer_options = {name: options.pop(name) for name in others if name in options}
    tokenizer = tokenizer or tiny_tokenizer()
    defaults = {
        "output_dir": str(tmp_path), "total_episodes": 32, "batch_size": 16, "minibatch_size": 8, "response_length": 7,
        "num_ppo_epochs": 2, "temperature": 0.8, "learning_rate": 3e-3,
    }  # fmt: skip
    return PPOTrainer(
        PPOConfig(**(defaults | options)), tiny_model(tokenizer) if model is None else model, tokenizer=tokenizer,
        reward=reward, train_dataset=train_dataset, **trainer_options,
    )  # fmt: skip


def one_iteration(trainer, monkeypatch=None):
    """-> its metrics as floats, and the rollout that it learned from."""
    seen, update = [], trainer._update
    trainer._update = lambda rollout, plan: seen.append(rollout) or update(rollout, plan)
    metrics = next(iter(trainer))
    return {name: float(value) for name, value in metrics.items()}, seen[0]


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


# --- scores and advantages -------------------------------------------------------------------------------------------


def test_penalties_by_hand():
    scores = torch.tensor([12.0, -3.0, 0.5])
    lengths, ended = torch.tensor([10, 4, 7]), torch.tensor([False, True, True])
    shaped = shaped_scores(
        scores, lengths, ended, clip_range=(-2, 8), missing_eos_penalty=1.0, length_penalty=0.5, length_budget=6
    )
    assert shaped.tolist() == [8 - 1 - 0.5 * 4, -2.0, 0.5 - 0.5 * 1]


def test_the_running_standard_deviation_is_that_of_all_scores_so_far():
    scores, running = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3 + 100, RunningStd()
    for equal in (torch.tensor([4.0, 4.0]), torch.full((28,), 100.7)):  # the float32 mean of these is another number
        assert RunningStd().update(equal) == 1.0  # nothing to divide by
    for start in range(0, 50, 10):
        std = running.update(scores[start : start + 10])
        assert std == pytest.approx(float(scores[: start + 10].double().std(correction=0)), rel=1e-6)
    assert vars(RunningStd(**vars(running))) == vars(running)  # what the checkpoint keeps


def test_scores_are_scaled_clipped_and_penalised_in_the_run(tmp_path):
    options = {"scale_scores": True, "reward_clip_range": [-0.5, 0.5], "length_penalty": 0.25, "length_budget": 3}
    trainer = make_trainer(tmp_path, reward=lambda p, r, **c: [1000.0 * x for x in variety(p, r)], **options)
    metrics, rollout = one_iteration(trainer)
    raw = torch.tensor(variety(rollout.prompts, rollout.responses)) * 1000
    expected = (raw / raw.std(correction=0)).clamp(-0.5, 0.5) - 0.25 * (rollout.response_mask.sum(1) - 3).clamp(min=0)
    torch.testing.assert_close(rollout.scores, expected)
    assert metrics["rewards/<lambda>/mean"] == pytest.approx(float(raw.mean()), rel=1e-5)  # the log has what was given
    assert metrics["objective/scores"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert metrics["objective/raw_scores"] == pytest.approx(float(raw.mean()), rel=1e-5)


@pytest.mark.parametrize("option", [
    {}, {"scale_scores": True}, {"reward_clip_range": [0, 1]}, {"missing_eos_penalty": 0.1}, {"length_penalty": 0.1},
])  # fmt: skip
def test_the_raw_score_is_drawn_where_another_is_trained_on(tmp_path, option):
    make_trainer(tmp_path, total_episodes=16, eval_dataset=PROMPTS, **option).train()
    row = json.loads((tmp_path / "train_log.jsonl").read_text().splitlines()[-1])
    page = (tmp_path / "report.html").read_text()
    assert "eval_scores" in row and ("objective/raw_scores" in row) == bool(option) == (">raw score<" in page)


def test_penalties_on_length_are_no_reward_for_it(tmp_path):
    trainer = make_trainer(tmp_path, length_penalty=100.0)
    metrics, rollout = one_iteration(trainer)
    lengths, scores = rollout.response_mask.sum(1).float(), torch.tensor(variety(rollout.prompts, rollout.responses))
    both = torch.stack([scores, lengths])
    assert metrics["objective/score_length_correlation"] == pytest.approx(float(both.corrcoef()[0, 1]), abs=1e-4)
    assert torch.stack([rollout.scores, lengths]).corrcoef()[0, 1] < -0.99


def test_advantages_without_a_critic_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [4.0, 0.0, 0.0], [0.0, 8.0, 0.0]])  # sums 3 1 4 8
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    expected = {"reinforce": [-1, -3, 0, 4], "rloo": [2, -2, -4, 4], "group": [1, -1, -2, 2]}
    for name, values in expected.items():
        advantages = sequence_advantages(rewards, mask, name, 2)
        assert advantages.tolist() == [[v * float(m) for m in row] for v, row in zip(values, mask, strict=True)]
    grouped = sequence_advantages(rewards, mask, "group", 2, scale="group")[:, 0]
    torch.testing.assert_close(grouped, torch.tensor([1, -1, -2, 2]) / (torch.tensor([2, 2, 8, 8]).sqrt() + 1e-4))
    scaled = sequence_advantages(rewards, mask, "reinforce", scale="batch")[:, 0]
    torch.testing.assert_close(scaled, torch.tensor([-1.0, -3, 0, 4]) / ((26 / 3) ** 0.5 + 1e-4))
    alone = sequence_advantages(rewards, mask, "group", 1, scale="group")
    assert not alone.any()  # one answer to a prompt says nothing, and its standard deviation is not NaN


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
@pytest.mark.parametrize("baseline", ["reinforce", "rloo", "group"])
def test_equal_scores_say_nothing(baseline, scale):
    rewards, mask = torch.zeros(28, 3), torch.ones(28, 3).bool()
    rewards[:, -1] = 100.7  # whose float32 mean over 7 or 28 is another number
    assert not sequence_advantages(rewards, mask, baseline, 7, scale=scale).any()
    rewards[0, -1] = torch.inf
    others = sequence_advantages(rewards, mask, baseline, 7, scale=scale)[7:]
    assert not (others.isfinite().any() if baseline == "reinforce" or scale == "batch" else others.any())


@pytest.mark.parametrize("options", CRITIC_FREE, ids=lambda o: o["advantage_estimator"])
def test_a_constant_reward_does_not_move_the_policy(tmp_path, options):
    constant = lambda prompts, responses, **columns: [100.7] * len(responses)  # noqa: E731
    trainer = make_trainer(
        tmp_path, reward=constant, kl_coef=0.0, eval_dataset=PROMPTS[:7], batch_size=28, minibatch_size=28,
        **(options | ({"num_generations": 7} if "num_generations" in options else {})),
    )  # fmt: skip
    before = weights(trainer.policy)
    metrics = next(iter(trainer))
    assert metrics["rewards/<lambda>/std"] == 0.0 == trainer.evaluate()["eval_scores_stderr"]
    assert torch.equal(weights(trainer.policy), before)


@pytest.mark.parametrize("options", CRITIC_FREE, ids=lambda o: o["advantage_estimator"])
def test_without_a_critic(tmp_path, options):
    trainer = make_trainer(tmp_path / "run", save_steps=1, **options)
    assert trainer.value_model is None and len(trainer.optimizers) == 1
    metrics, rollout = one_iteration(trainer)
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.0 < metrics["policy/max_abs_log_ratio"]
    assert not [name for name in metrics if name.startswith(("critic/", "val/clipfrac", "loss/value"))]
    k = options.get("num_generations", 1)
    assert [p for p in rollout.prompts[::k] for _ in range(k)] == rollout.prompts  # side by side
    assert len(set(rollout.prompts)) == min(8, 16 // k) and len(set(rollout.responses)) > 12
    returns = rollout.scores - 0.05 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
    if k == 4:
        assert rollout.advantages[:, 0].view(4, 4).sum(1).abs().max() < 1e-4
    assert (
        rollout.advantages[:, 0].sign().tolist()
        == (returns - returns.view(-1, k if k > 1 else 16).mean(1).repeat_interleave(k if k > 1 else 16))
        .sign()
        .tolist()
    )
    trainer.train()
    assert not (tmp_path / "run/value_model").exists()


def test_whitening_may_be_off(tmp_path):
    _, raw = one_iteration(make_trainer(tmp_path, scale_advantages="none"))
    _, white = one_iteration(make_trainer(tmp_path))
    assert float(raw.advantages[raw.response_mask].std()) < 0.2  # of a share of letters
    assert float(white.advantages[white.response_mask].std()) == pytest.approx(1.0, abs=1e-4)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_kl_in_the_loss_and_not_in_the_rewards(tmp_path):
    options = {"kl_in_loss": True, "kl_estimator": "k2", "kl_coef": 0.3, "learning_rate": 1e-2}
    _, second = make_trainer(tmp_path, **options)
    assert second["objective/kl"] > 0 and second["loss/kl_avg"] > 0
    trainer = make_trainer(tmp_path, **options)
    next(iter(trainer))
    _, rollout = one_iteration(trainer)
    score_only = torch.zeros_like(rollout.rewards)
    score_only[torch.arange(16), rollout.response_mask.sum(1) - 1] = rollout.scores
    torch.testing.assert_close(rollout.rewards, score_only)
    # By autograd: what the KL adds to the gradient is that of its own mean.
    (minibatch,) = minibatches(rollout.lengths, 16, None)

    def gradient(kl_coef):
        trainer.kl_controller.kl_coef = kl_coef
        trainer._accumulate_gradient(rollout, minibatch)
        collected = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        return collected

    added = gradient(0.3) - gradient(0.0)
    rows = minibatch[0]
    *inputs, labels = packed_rows(rollout, rows)
    with packing(*trainer._trunks()):
        hidden = trainer._hidden_states(trainer.policy, *inputs)
        logprobs = rollout.scatter(rows, trainer._logprobs(trainer.policy, hidden, labels))
        kl = kl_penalty(logprobs, rollout.ref_logprobs[rows], estimator="k2")
        (0.3 * kl.sum() / rollout.response_mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-3)


def test_an_entropy_bonus_keeps_entropy_up(tmp_path):
    flat = lambda p, r, **c: [0.0] * len(r)  # noqa: E731
    ends = []
    for entropy_coef in (0.0, 1.0):
        model = tiny_model(tiny_tokenizer(), initializer_range=0.3)  # with entropy to gain
        trainer = make_trainer(
            tmp_path, model, reward=flat, entropy_coef=entropy_coef, kl_coef=0.0, learning_rate=1e-2, total_episodes=64
        )
        ends.append([float(m["policy/entropy_avg"]) for m in trainer][-1])
    assert ends[1] > ends[0] + 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cliprange_high": 0.5}, "clip"), ({"dual_clip": 1.05}, "dual"), ({"cliprange_value": None}, "value")],
)
def test_options_of_the_clips_reach_the_loss(tmp_path, options, message):
    """Large steps, so that the clips hold: asymmetric clips fewer, dual clip some, and no value clip none."""
    plain, _ = one_iteration(make_trainer(tmp_path, learning_rate=5e-2))
    with_it, _ = one_iteration(make_trainer(tmp_path, learning_rate=5e-2, **options))
    assert plain["policy/clipfrac_avg"] > 0.05 and plain["policy/dual_clipfrac_avg"] == 0 < plain["val/clipfrac_avg"]
    changed = {
        "clip": with_it["policy/clipfrac_avg"] != plain["policy/clipfrac_avg"],
        "dual": with_it["policy/dual_clipfrac_avg"] > 0,
        "value": with_it["val/clipfrac_avg"] == 0,
    }
    assert changed[message]


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_no_aggregation_depends_on_micro_batches(tmp_path, mode):
    trainer = make_trainer(tmp_path, loss_agg_mode=mode, advantage_estimator="reinforce")
    _, rollout = one_iteration(trainer)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 1
    gradients = []
    for size in (None, 5):
        (minibatch,) = minibatches(rollout.lengths, 16, size)
        trainer._accumulate_gradient(rollout, minibatch)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.parameters()]))
        trainer.optimizers[0].zero_grad()
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-3)


# --- critic and reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_trunk", [False, True])
def test_the_critic_warms_up_before_the_policy_moves(tmp_path, share_trunk):
    trainer = make_trainer(tmp_path, critic_warmup_steps=1, share_trunk=share_trunk)
    policy, critic = weights(trainer.policy), weights(trainer.value_model.model.score)
    run = iter(trainer)
    next(run)
    assert torch.equal(weights(trainer.policy), policy) and not torch.equal(
        weights(trainer.value_model.model.score), critic
    )
    next(run)
    assert not torch.equal(weights(trainer.policy), policy)


@pytest.mark.parametrize("detach", [False, True])
def test_the_values_of_a_shared_trunk_may_stop_at_the_head(tmp_path, detach):
    trainer = make_trainer(tmp_path, share_trunk=True, detach_values=detach)
    with torch.no_grad():
        trainer.value_model.model.score.weight.normal_(generator=torch.Generator().manual_seed(2))
    _, rollout = one_iteration(trainer)
    rollout.advantages = torch.zeros_like(rollout.advantages)  # then only the values have a gradient
    trainer._accumulate_gradient(rollout, minibatches(rollout.lengths, 16, None)[0])
    assert trainer.value_model.model.score.weight.grad.abs().max() > 0
    trunk = max(float(p.grad.abs().max()) for p in trainer.policy.base_model.parameters() if p.grad is not None)
    assert trunk == 0.0 if detach else trunk > 1e-6


def test_the_scale_of_the_rewards_does_not_change_what_a_shared_trunk_learns(tmp_path):
    """Rewards and values 100 times as large: the policy's gradient is whitened, and the critic's keeps its share."""
    gradients = []
    for scale in (1.0, 100.0):
        reward = lambda prompts, responses, scale=scale, **_: [scale * x for x in variety(prompts, responses)]  # noqa: E731
        trainer = make_trainer(
            tmp_path, reward=reward, share_trunk=True, kl_coef=0.0, cliprange_value=None, learning_rate=1e-9,
            vf_coef=1.0,
        )  # fmt: skip
        with torch.no_grad():
            head = trainer.value_model.model.score.weight.normal_(generator=torch.Generator().manual_seed(2))
            head.mul_(scale)
        _, rollout = one_iteration(trainer)
        trainer._accumulate_gradient(rollout, minibatches(rollout.lengths, 16, None)[0])
        gradients.append([p.grad for p in trainer.policy.base_model.parameters()])
        rollout.advantages = torch.zeros_like(rollout.advantages)
        for p in trainer.policy.parameters():
            p.grad = None
        trainer._accumulate_gradient(rollout, minibatches(rollout.lengths, 16, None)[0])
        critics = [p.grad for p in trainer.policy.base_model.parameters()]
        assert max(float(g.abs().max()) for g in critics) > 1e-2  # and it has one
    for small, large in zip(*gradients, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4 * float(small.abs().max()))


def test_a_reward_model_with_too_few_positions_is_refused_at_the_start(tmp_path):
    tokenizer = tiny_tokenizer()
    longest = max(len(tokenizer(x["prompt"])["input_ids"]) for x in PROMPTS)
    fits, short = (
        load_reward_model(tiny_model(tokenizer, max_position_embeddings=longest + 7 + more), tokenizer)
        for more in (1, 0)  # a response that is cut at response_length = 7 is scored with an eos of its own
    )
    held_out = {"eval_dataset": PROMPTS}
    for where in ({"reward": [(fits, 1.0)]}, {"eval_rewards": {"other": fits}, **held_out}):
        make_trainer(tmp_path, **where)
    for where in ({"reward": [(short, 1.0)]}, {"eval_rewards": {"other": short}, **held_out}):
        with pytest.raises(ConfigError, match=rf"{longest + 8} tokens and .* {longest + 7} positions: .* or response_"):
            make_trainer(tmp_path, **where)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_compiled_models_are_trained_as_they_are(tmp_path, share_trunk):
    plain, _ = one_iteration(make_trainer(tmp_path / "plain", share_trunk=share_trunk))
    policy, reference = (torch.compile(tiny_model(tiny_tokenizer()), backend="eager") for _ in range(2))
    trainer = make_trainer(tmp_path / "compiled", policy, ref_model=reference, share_trunk=share_trunk)
    metrics, _ = one_iteration(trainer)
    timeless = [name for name in plain if not name.startswith(("timing_s/", "perf/"))]
    assert [metrics[name] for name in timeless] == [plain[name] for name in timeless]


@pytest.mark.parametrize(
    ("reward", "varies"),
    [
        (lambda prompts, responses, **columns: [0.0] * len(responses), False),
        (lambda prompts, responses, **columns: [0.1] * len(responses), False),
        (lambda prompts, responses, **columns: [1e-6 * x for x in variety(prompts, responses)], True),
    ],
)
def test_of_equal_returns_no_share_is_explained(tmp_path, reward, varies):
    for metrics in make_trainer(tmp_path, reward=reward, kl_coef=0.0, gamma=1.0, lam=1.0):
        assert metrics["critic/vf_explained_var"].isfinite() == varies
        if metrics["episode"] == 16:
            assert not varies or metrics["critic/vf_explained_var"] == 0.0  # by a critic of zeros


def test_models_given_by_path_must_have_the_tokens_of_the_policy(tmp_path):
    tokenizer, paths = tiny_tokenizer(), {"ref_model": tmp_path / "other", "value_model": tmp_path / "rm"}
    tiny_model(tokenizer, seed=1).save_pretrained(paths["ref_model"])  # without its tokenizer, which is not needed
    save_model(load_reward_model(tiny_model(tokenizer), tokenizer), tokenizer, paths["value_model"])
    assert sum(1 for _ in make_trainer(tmp_path, **paths)) > 0
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})  # as in TRL's examples: a number that the others do not use
    paths["ref_model"] = tmp_path / "base"
    save_model(tiny_model(padded), tokenizer, paths["ref_model"])
    assert make_trainer(tmp_path, tokenizer=padded, ref_model=paths["ref_model"]).reference is not None
    for option, path in paths.items():
        tiny_tokenizer(eos="</s>").save_pretrained(path)
        with pytest.raises(ConfigError, match=f"{option} .*{path.name}.* another tokenizer than the policy's"):
            make_trainer(tmp_path, **{option: str(path)})


def test_a_reward_that_could_not_be_called_later_is_refused_at_the_start(tmp_path):
    for reward, message in (
        (lambda prompts, responses: [0.0] * len(responses), "unexpected keyword argument 'word'"),
        (lambda prompts, responses, answer, **columns: [0.0] * len(responses), "argument: 'answer'"),
        (lambda completions, **columns: [0.0] * len(completions), "too many positional arguments"),
        (lambda completions, prompts, **columns: [0.0] * len(prompts), "prompts must come first, then responses"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, reward=[(reward, 1.0)])
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, eval_rewards={"other": reward}, eval_dataset=PROMPTS)
    make_trainer(tmp_path, reward=lambda prompts, responses, word: [0.0] * len(word))
    with pytest.raises(ConfigError, match="would never end the run: give both"):
        make_trainer(tmp_path, stop_on=["overoptimization"])
    with pytest.raises(ConfigError, match="eval_rewards are read on held-out prompts: give an eval_dataset"):
        make_trainer(tmp_path, eval_rewards={"other": lambda prompts, responses: [0.0] * len(responses)})
    with pytest.raises(ConfigError, match=r"eval_rewards must be \{name: reward, ...\}, got function"):
        make_trainer(tmp_path, eval_rewards=variety, eval_dataset=PROMPTS)


def test_weights_in_bfloat16_are_refused(tmp_path):
    half = tiny_model(tiny_tokenizer()).bfloat16()
    with pytest.raises(ConfigError, match="the policy would learn in bfloat16"):
        make_trainer(tmp_path / "run", half)
    with pytest.raises(ConfigError, match="the value model would learn in bfloat16"):
        make_trainer(tmp_path / "run", value_model=ValueModel.from_policy(half))


@pytest.mark.parametrize("share_trunk", [False, True])
def test_new_adapters_make_the_policy_its_own_reference(tmp_path, share_trunk):
    pytest.importorskip("peft")
    model = tiny_model(tiny_tokenizer())
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    before = hidden_states(model, torch.tensor([[5, 6, 7]])).detach()
    trainer = make_trainer(
        tmp_path / "run", model, lora_r=4, lora_alpha=8.0, lora_target_modules=["q_proj", "v_proj"],
        share_trunk=share_trunk, save_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    assert trainer.reference is None
    first, second = trainer
    assert abs(float(first["objective/kl"])) < 1e-5 and abs(float(second["objective/kl"])) > 1e-5
    with trainer.policy.disable_adapter():
        torch.testing.assert_close(hidden_states(trainer.policy, torch.tensor([[5, 6, 7]])), before)
    # Adapters that have learned already are part of the policy, so the reference keeps them.
    again = make_trainer(tmp_path / "again", trainer.policy)
    assert again.reference is not None and abs(float(next(iter(again))["objective/kl"])) < 1e-5


@pytest.mark.parametrize("learned", ["rows of the embedding", "the head"])
def test_adapters_that_two_tokens_do_not_show_are_part_of_the_reference(tmp_path, learned):
    peft = pytest.importorskip("peft")
    config = {
        "rows of the embedding": lambda: peft.TrainableTokensConfig(token_indices=list(range(9, 200))),
        "the head": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }[learned]()
    policy = peft.get_peft_model(tiny_model(tiny_tokenizer()), config)
    assert make_trainer(tmp_path, policy).reference is None  # nothing learned yet
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    trainer = make_trainer(tmp_path, policy)
    assert trainer.reference is not None and abs(float(next(iter(trainer))["objective/kl"])) < 1e-5


# --- other engines, several turns ------------------------------------------------------------------------------------


def with_a_tool(prompts, trainer):
    """The model samples three tokens, a tool answers with two, the model goes on."""
    generator = torch.Generator().manual_seed(trainer.step)
    completions, mask, logprobs = [], [], []
    for prompt in prompts:
        n = 2 + len(prompt) % 3
        own = torch.randint(5, 100, (n + 3,), generator=generator).tolist()
        completions.append([*own[:n], 7, 8, *own[n:], trainer.tokenizer.eos_token_id])
        mask.append([1] * n + [0, 0] + [1] * 4)
        logprobs.append([-6.0] * len(mask[-1]))
    return {"completion_ids": completions, "env_mask": mask, "logprobs": logprobs, "turns": [2] * len(prompts)}


def test_what_a_tool_says_is_read_and_never_learned(tmp_path):
    seen = []

    def reward(prompts, responses, turns, word, **columns):
        seen.extend(zip(responses, turns, word, strict=True))
        return variety(prompts, responses)

    trainer = make_trainer(tmp_path, rollout_func=with_a_tool, reward=reward)
    metrics, rollout = one_iteration(trainer)
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.0
    assert len(seen) == 16 and all(turns == 2 for _, turns, _ in seen)
    trainer._score_tokens(rollout, minibatches(rollout.lengths, 16, None))
    for i in range(16):
        prompt, response = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.response_ids[i][rollout.present[i]]
        mask = rollout.response_mask[i][: len(response)]
        n = 2 + len(rollout.prompts[i]) % 3
        assert mask.tolist() == [True] * n + [False] * 2 + [True] * 4 and response[~mask].tolist() == [7, 8]
        ids = torch.cat([prompt, response])[None]
        assert rollout.lengths[i] == ids.shape[1]
        with torch.no_grad():
            logp = (trainer.policy(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        want = logp.gather(1, response[:, None])[:, 0] * mask
        torch.testing.assert_close(rollout.logprobs[i, : len(response)], want, atol=1e-5, rtol=1e-5)
        last = int(mask.nonzero()[-1])
        assert rollout.rewards[i, last] > rollout.rewards[i].abs().sum() - rollout.rewards[i, last].abs() - 1e-3
    # Another tool output is another context, but no gradient ever asks for the probability of its tokens.
    ids, positions, labels = right_padded(rollout, torch.arange(16))
    assert len(labels) == int(rollout.response_mask.sum()) == len(positions)
    assert float(metrics["sampling/sampling_logp_difference/mean"]) > 0


def test_an_answer_that_ends_its_turn_is_not_cut(tmp_path):
    tokenizer = tiny_tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|user|>")
    model = tiny_model(tokenizer, tie_word_embeddings=False)
    model.generation_config.eos_token_id = [turn]
    with torch.no_grad():
        model.lm_head.weight[turn] = torch.tensor([0.6, -0.6]).repeat(16)  # likely here, impossible there
    trainer = make_trainer(tmp_path, model, missing_eos_penalty=1.0)
    _, rollout = one_iteration(trainer)
    last = rollout.response_ids.gather(1, rollout.response_mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert (last == turn).any() and not (last == turn).all()
    assert rollout.ended.equal((last == turn) | (last == tokenizer.eos_token_id))
    assert trainer.policy.generation_config.eos_token_id == [tokenizer.eos_token_id, turn]


def test_what_ends_an_answer_is_no_part_of_its_text(tmp_path):
    trainer = make_trainer(tmp_path)
    word, eos = 60, trainer.tokenizer.eos_token_id  # an added token need not be a special one
    ids = [[50, 51, word], [50, word, 51], [50, eos]]
    rollout = make_rollout(trainer.tokenizer, trainer.prompts[:3], ids, stop_token_ids=[eos, word])
    assert rollout.responses == [trainer.tokenizer.decode(row) for row in ([50, 51], [50, word, 51], [50])]
    assert rollout.ended.tolist() == [True, False, True]


def test_an_engine_finds_every_prompt_as_often_in_evaluation(tmp_path):
    asked = []

    def engine(prompts, trainer):  # n answers to every n-th prompt
        asked.append(prompts)
        texts = [text for text in prompts[::2] for _ in range(2)]
        assert texts == prompts
        ids = [[5 + len(text) % 7, 6 + i % 2, trainer.tokenizer.eos_token_id] for i, text in enumerate(texts)]
        return {"completion_ids": ids, "place": list(range(len(texts)))}

    def reward(prompts, responses, place, **columns):
        return [float(i) for i in place]

    trainer = make_trainer(
        tmp_path, reward=reward, rollout_func=engine, eval_dataset=PROMPTS[:3], advantage_estimator="rloo",
        num_generations=2,
    )  # fmt: skip
    next(iter(trainer))
    assert float(trainer.evaluate()["eval_scores"]) == 2.0  # the first answers, 0, 2 and 4
    assert [len(prompts) for prompts in asked] == [16, 6]
    trainer.rollout_func, trainer._held_out = lambda prompts, _: {"completion_ids": [[5]] * 3}, None
    with pytest.raises(ValueError, match="rollout_func: completion_ids has 3 rows for 6 prompts"):
        trainer.evaluate()


def test_weights_for_another_engine_are_truncated(tmp_path):
    trainer = make_trainer(tmp_path, rollout_func=with_a_tool, importance_cap=1.5)
    metrics, rollout = one_iteration(trainer)
    weights = rollout.importance_weights
    expected = (rollout.logprobs - rollout.rollout_logprobs).exp().clamp(max=1.5)
    mask = rollout.response_mask
    torch.testing.assert_close(weights[mask], expected[mask])
    assert weights.max() == 1.5 and (weights[mask] < 1.5).any()
    for name, x in vars(rollout).items():  # as the Rollout's docstring says
        assert not (torch.is_tensor(x) and x.shape == mask.shape and x.is_floating_point() and x[~mask].any()), name
    assert 0 < metrics["sampling/importance_sampling_ratio/mean"] < 1.5
    unweighted, _ = one_iteration(make_trainer(tmp_path, rollout_func=with_a_tool))
    assert metrics["loss/policy_avg"] != unweighted["loss/policy_avg"]


def test_a_cap_needs_what_it_weights_by(tmp_path):
    trainer = make_trainer(
        tmp_path, rollout_func=lambda *args: with_a_tool(*args) | {"logprobs": None}, importance_cap=1.5
    )
    with pytest.raises(ConfigError, match='rollout_func returned no "logprobs": return them'):
        next(iter(trainer))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"completion_ids": [[5, 6]]}, "completion_ids has 1 rows for 2 prompts"),
        (
            {"completion_ids": [[5], [6, 7]], "logprobs": [[-1.0], [-1.0]]},
            "logprobs must have one number for each token",
        ),
        ({"completion_ids": [[5], [6, 7]], "env_mask": [[1], [1]]}, "env_mask must have one number for each token"),
        ({"completion_ids": [[5], [6, 7]], "env_mask": [[1], [0, 0]]}, "response 1 has no token"),
        ({"completion_ids": [[5], []]}, "response 1 has no token"),
        ({"completion_ids": [[5], [6]], "prompt_ids": [[5]]}, "prompt_ids has 1 rows"),
        ({"completion_ids": [[5], [6]], "turns": [1]}, "turns has 1 rows"),
    ],
)
def test_a_rollout_that_does_not_fit_is_refused(tmp_path, lists, message):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_rollout(trainer.tokenizer, trainer.prompts[:2], **lists)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r'rollout_func must return \{"completion_ids".*got NoneType'),
        ([[5, 6]], "got list"),
        ({"completions": [[5]] * 16}, "got keys 'completions'"),
        ({"completion_ids": [[5]] * 16, "prompts": ["x"] * 16}, "may not return 'prompts'"),
        ({"completion_ids": [[5]] * 16, "responses": ["x"] * 16}, "may not return 'responses'"),
        ({"completion_ids": [[5]] * 3}, "completion_ids has 3 rows for 16"),
        ({"completion_ids": [[5] * 300] * 16}, "256 positions: let rollout_func return fewer tokens"),
        ({"completion_ids": [[5]] * 15 + [[5, 5000]]}, "the token 5000 in completion_ids, but the models embed only"),
        ({"completion_ids": [[5]] * 16, "prompt_ids": [[5]] * 15 + [[-1]]}, "the token -1 in prompt_ids"),
        ({"completion_ids": [[5]] * 16, "prompt_ids": [[5]] * 15 + [[]]}, r"\[\] in prompt_ids, row 15"),
        ({"completion_ids": [[5]] * 16, "logprobs": [[-1.0, -1.0]] * 16}, "one number for each token"),
        ({"completion_ids": [[5]] * 15 + [[]]}, "response 15 has no token"),
        ({"completion_ids": [[5]] * 16, "turns": None}, "turns has no rows for 16 prompts"),
        ({"completion_ids": [[5]] * 16, "turns": torch.tensor(16)}, "turns has no rows for 16 prompts"),
        *(
            ({"completion_ids": [[5]] * 15 + [row]}, r"in completion_ids, row 15, which must be a list of tokens")
            for row in ("text", ["5"], [5.0], [2**70], 5, None, [None], [[5]], {5: 1})
        ),
        *(
            ({"completion_ids": [[5]] * 16, "logprobs": [row] * 16}, "in logprobs, row 0, .* of finite numbers")
            for row in (None, [None], [math.nan], ["-1"], [{5: -1.0}])
        ),
        ({"completion_ids": [[5]] * 16, "env_mask": [[None]] * 16}, "in env_mask, row 0, which must be a list of 0 a"),
    ],
)
def test_an_engine_that_returns_what_no_model_reads_is_named_and_loses_no_iteration(tmp_path, returned, message):
    def engine(prompts, trainer):
        return with_a_tool(prompts, trainer) if trainer.step == 0 else returned

    trainer = make_trainer(tmp_path, rollout_func=engine)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_an_engine_may_return_any_token_that_is_embedded_and_none_for_what_is_optional():
    lists = {"completion_ids": [[0, 9], torch.tensor([3])], "prompt_ids": None, "logprobs": None, "env_mask": None}
    check_rollout_lists(lists | {"turns": (1, 2)}, 2, embedded=10, with_logprobs=False)
    with pytest.raises(ConfigError, match="the token 10 in completion_ids, but the models embed only 10 tokens"):
        check_rollout_lists({"completion_ids": [[0], [10]]}, 2, embedded=10, with_logprobs=False)


def test_a_rollout_from_lists_by_hand():
    prompts = [Prompt("a", [5], {"word": "x", "kind": "k"}), Prompt("b", [6, 7], {"word": "y"})]
    rollout = make_rollout(
        tiny_tokenizer(), prompts, [[8, 9, 10], [11]], env_mask=[[1, 0, 1], [1]], word=["z", "w"],
        logprobs=[[-1.0, -2.0, -3.0], [-4.0]],
    )  # fmt: skip
    assert rollout.rollout_logprobs.tolist() == [[-1.0, 0.0, -3.0], [-4.0, 0.0, 0.0]]
    assert rollout.columns == {"word": ["z", "w"], "kind": ["k", None]} and rollout.lengths.tolist() == [4, 3]


def test_prompts_of_several_turns(tmp_path):
    turns = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"}, {"role": "user", "content": "say cat"},
    ]  # fmt: skip
    seen = []

    def reward(prompts, responses, **columns):
        seen.extend(prompts)
        return variety(prompts, responses)

    _, rollout = one_iteration(make_trainer(tmp_path, reward=reward, train_dataset=[{"prompt": turns}]))
    assert seen == [turns] * 16
    text = make_trainer(tmp_path).tokenizer.decode(rollout.prompt_ids[0])
    assert text == "<|system|>be brief<|user|>hello<|assistant|>hi<eos>\n<|user|>say cat<|assistant|>"


def test_a_rollout_func_may_continue_the_prompts_that_it_gets(tmp_path):
    """As a loop of several turns does; what it appends must not be in the prompts of the next iteration."""
    data = [{"prompt": [{"role": "user", "content": text}]} for text in ("say cat", "say dog")]

    def several_turns(prompts, trainer):
        for prompt in prompts:
            assert len(prompt) == 1
            prompt.append({"role": "assistant", "content": "cat"})
        return {"completion_ids": [[7, 8]] * len(prompts)}

    trainer = make_trainer(tmp_path, rollout_func=several_turns, train_dataset=data)
    assert [len(rollout_prompt) for _ in range(2) for rollout_prompt in one_iteration(trainer)[1].prompts] == [1] * 32
    assert [len(record["prompt"]) for record in data] == [1, 1]


def test_rewards_may_be_async_and_each_part_is_logged(tmp_path):
    async def remote(prompts, responses, word, **columns):
        await asyncio.sleep(0.01)
        return [float(w in r) for w, r in zip(word, responses, strict=True)]

    metrics, _ = one_iteration(make_trainer(tmp_path, reward=[(variety, 2.0), (remote, 1.0)]))
    assert metrics["rewards/variety/mean"] > 0 and 0 <= metrics["rewards/remote/mean"] <= 1
    total = 2 * metrics["rewards/variety/mean"] + metrics["rewards/remote/mean"]
    assert metrics["objective/scores"] == pytest.approx(total, rel=1e-5)


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_a_reward_that_is_not_finite_skips_the_update(tmp_path):
    calls = []

    def reward(prompts, responses, **columns):
        calls.append(1)
        return [float("nan") if len(calls) == 2 and i == 3 else 1.0 * len(r) for i, r in enumerate(responses)]

    trainer = make_trainer(tmp_path, reward=reward, total_episodes=48)
    run = iter(trainer)
    next(run)
    before = weights(trainer.policy)
    with pytest.warns(RuntimeWarning, match="the reward is not finite"):
        metrics = next(run)
    assert torch.equal(weights(trainer.policy), before) and metrics["skipped_steps"] == 1
    metrics = next(run)
    assert (
        metrics["skipped_steps"] == 1
        and trainer.guard.in_a_row == 0
        and not torch.equal(weights(trainer.policy), before)
    )


def test_too_many_in_a_row_end_the_run_and_leave_the_batch(tmp_path):
    trainer = make_trainer(
        tmp_path, reward=lambda p, r, **c: [float("inf")] * len(r), max_skipped_steps=2, total_episodes=320
    )
    with warnings.catch_warnings(), pytest.raises(NonFiniteError, match="in 2 updates in a row"):
        warnings.simplefilter("ignore")
        trainer.train()
    batch = torch.load(tmp_path / "non_finite_batch.pt")
    assert len(batch["responses"]) == 16 and batch["scores"].isinf().all() and batch["response_ids"].shape[0] == 16
    assert trainer.step == 1


def test_a_resumed_run_counts_the_step_that_ended_it_only_once(tmp_path):
    def reward(prompts, responses, **columns):
        return [float("inf") if broken else 1.0] * len(responses)

    broken, options = True, {"max_skipped_steps": 2, "total_episodes": 48}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # the second run resumes, and ends at the same step
            with pytest.raises(NonFiniteError, match="in 2 updates in a row"):
                make_trainer(tmp_path, reward=reward, **options).train(resume=(tmp_path / "checkpoint-1").exists())
        broken = False
        metrics = make_trainer(tmp_path, reward=reward, **options).train(resume=True).metrics
    assert metrics["skipped_steps"] == 1


def test_updates_that_happened_before_a_resume_count(tmp_path):
    """Four a step, of which the first step's are finite: the run has learned something."""
    poison = []

    def reward(prompts, responses, **columns):
        return [float("nan") if poison else 1.0] * len(responses)

    options = {"save_steps": 1, "num_samples": 0}
    trainer = make_trainer(tmp_path, reward=reward, **options)
    stopped = trainer._iteration
    trainer._iteration = lambda: stopped() if trainer.step < 1 else raise_it()

    def raise_it():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    poison.append(True)
    with pytest.warns(RuntimeWarning, match="the reward is not finite"):
        result = make_trainer(tmp_path, reward=reward, **options).train(resume=True)
    assert result.step == 2 and result.metrics["skipped_steps"] == 1


def test_an_evaluation_asks_no_critic(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS[:2])
    before = {name: float(x) for name, x in trainer.evaluate().items()}
    trainer.value_model.model.base_model.register_forward_hook(lambda *_: pytest.fail("the critic was asked"))
    trainer._held_out = None
    assert {name: float(x) for name, x in trainer.evaluate().items()} == before and "eval_kl" in before


def test_a_checkpoint_of_other_prompts_is_refused(tmp_path):
    state = make_trainer(tmp_path, train_dataset=[{"prompt": f"say {i} "} for i in "45"]).state_dict()
    other = make_trainer(tmp_path, train_dataset=[{"prompt": f"say {i} "} for i in "54"])
    with pytest.raises(ConfigError, match=r"trained on other data .in content"):
        other.load_state_dict(state)


def test_an_update_that_was_interrupted_leaves_nothing_to_the_next(tmp_path):
    whole, broken = (make_trainer(tmp_path) for _ in range(2))
    next(iter(whole))
    for module in (broken.policy, broken.value_model):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    next(iter(broken))
    assert torch.equal(weights(whole.policy), weights(broken.policy))
    assert torch.equal(weights(whole.value_model), weights(broken.value_model))


def test_a_gradient_that_is_not_finite_skips_its_update(tmp_path):
    trainer = make_trainer(tmp_path, advantage_estimator="reinforce")
    accumulate, count = trainer._accumulate_gradient, []

    def broken(*args):
        stats = accumulate(*args)
        count.append(1)
        if len(count) == 2:
            next(trainer.policy.parameters()).grad.fill_(float("nan"))
        return stats

    trainer._accumulate_gradient = broken
    with pytest.warns(RuntimeWarning, match="the gradient is not finite"):
        metrics = next(iter(trainer))
    assert metrics["skipped_steps"] == 1 and metrics["policy/updates"] == 4
    assert weights(trainer.policy).isfinite().all()


def test_a_gradient_of_the_critic_that_is_not_finite_counts_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.value_model.model.score.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.warns(RuntimeWarning, match="the gradient is not finite"):
        metrics = next(iter(trainer))
    assert metrics["skipped_steps"] == 4 == metrics["policy/updates"]


def test_the_critics_rate_follows_the_schedule_too(tmp_path):
    trainer = make_trainer(tmp_path, value_learning_rate=6e-3)
    next(iter(trainer))  # of two iterations
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([1.5e-3, 3e-3])


def test_the_largest_log_ratio_is_that_of_all_minibatches(tmp_path):
    trainer = make_trainer(tmp_path)
    accumulate, largest = trainer._accumulate_gradient, iter(torch.tensor([0.5, 3.0, 1.0, 2.0]))
    trainer._accumulate_gradient = lambda *given: accumulate(*given) | {"max_abs_log_ratio": next(largest)}
    metrics = next(iter(trainer))
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.5 and metrics["policy/max_abs_log_ratio"] == 3.0


def test_a_token_that_only_the_policy_embeds_is_refused(tmp_path):
    policy, reference = (tiny_model(tiny_tokenizer()) for _ in range(2))
    embedded = policy.get_input_embeddings().weight.shape[0]
    policy.resize_token_embeddings(embedded + 8)  # as a padded checkpoint has them
    answers = {"completion_ids": [[5, embedded]] * 16}
    trainer = make_trainer(tmp_path, policy, ref_model=reference, rollout_func=lambda *_: answers)
    with pytest.raises(ConfigError, match=f"the token {embedded} in completion_ids, but the models embed only"):
        next(iter(trainer))


def test_gradients_that_are_never_finite_end_the_run_across_iterations(tmp_path):
    """Finite rewards in between do not count as progress: four updates an iteration, so the sixth is in the second."""
    options = {"max_skipped_steps": 6, "total_episodes": 320, "reward_clip_range": [-0.1, 0.1]}
    trainer = make_trainer(tmp_path, advantage_estimator="reinforce", **options)
    accumulate = trainer._accumulate_gradient

    def broken(*args):
        stats = accumulate(*args)
        next(trainer.policy.parameters()).grad.fill_(float("inf"))
        return stats

    trainer._accumulate_gradient = broken
    with warnings.catch_warnings(), pytest.raises(NonFiniteError, match="in 6 updates in a row"):
        warnings.simplefilter("ignore")
        list(trainer)
    batch = torch.load(tmp_path / "non_finite_batch.pt")
    assert trainer.step == 1 and len(batch["responses"]) == 8
    assert batch["scores"].abs().max() == pytest.approx(0.1)  # as they were learned from


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"advantage_estimator": "rloo"}, "num_generations must be 2 or more"),
        (
            {"advantage_estimator": "reinforce", "batch_size": 1, "minibatch_size": 1},
            "batch_size must be 2 or more",
        ),
        ({"advantage_estimator": "magic"}, "must be one of 'gae', 'reinforce', 'rloo', 'group'"),
        ({"num_generations": 3}, "multiple of num_generations"),
        ({"scale_advantages": "group"}, "without a critic"),
        ({"advantage_estimator": "reinforce", "share_trunk": True}, "has no critic"),
        ({"advantage_estimator": "reinforce", "value_learning_rate": 1e-3}, "has no critic"),
        ({"share_trunk": True, "value_learning_rate": 1e-3}, "with share_trunk there is none"),
        ({"kl_target": 6.0, "kl_horizon": 3.2, "batch_size": 16}, "kl_horizon = 3.2 must be above a fifth"),
        ({"advantage_estimator": "reinforce", "value_model": object()}, "has no critic; give no value_model"),
        ({"detach_values": True}, "set share_trunk too"),
        ({"kl_in_loss": True}, "expectation 0"),
        ({"reward_clip_range": [1.0]}, "low, high"),
        ({"reward_clip_range": []}, "low, high"),
        ({"reward_clip_range": [2.0, 1.0]}, "low, high"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"rollout_func": "tools.py"}, "must be a function"),
        ({"monitors": {"lenght": 3}}, "monitors and stop_on know kl, entropy, length"),
        ({"stop_on": ["everything"]}, "monitors and stop_on know"),
        ({"monitors": {"length": False}}, "numbers above 0 .*, or null"),
        ({"monitors": {"length": 0.5}}, "length: above 1"),
        ({"monitors": {"kl": "5e0"}}, "numbers above 0 .*, or null"),
        ({"monitors": {"kl": math.nan}}, "numbers above 0"),
        ({"reward": [(len, math.nan)]}, "finite weights"),
        ({"monitors": {"kl": None}, "stop_on": ["kl"]}, "stop_on names kl, which monitors switches off"),
        ({"reward_clip_range": ["-1e1", "1e1"]}, r"must be \[low, high\]"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("field", "names"), [("loss_agg_mode", AGGREGATIONS), ("advantage_estimator", ("gae", *BASELINES))]
)
def test_the_config_which_imports_no_torch_takes_the_names_that_are_implemented(field, names):
    with pytest.raises(ConfigError) as error:
        PPOConfig(**{field: "magic"})
    assert str(error.value).endswith(f"must be one of {', '.join(map(repr, names))}")


def test_a_kl_estimator_that_the_rewards_should_not_have_is_warned_of_once(tmp_path, recwarn):
    make_trainer(tmp_path, kl_estimator="k3")
    assert len([w for w in recwarn if "does not give the gradient of a KL" in str(w.message)]) == 1


def test_no_field_is_without_a_test_or_a_run():
    """Speculative options are not welcome: each field is set in some test, example, quickstart or benchmark."""
    root = Path(__file__).parents[2]
    folders = ("tests/**/*.py", "examples/*.*", "rlhf_fast/quickstart/*.py", "bench/*.py")
    text = "\n".join(path.read_text() for folder in folders for path in root.glob(folder))
    names = [field.name for field in dataclasses.fields(PPOConfig)]
    assert not [name for name in names if not re.search(rf'\b{name}("\s*:|=|:)', text)]


def test_what_is_logged_stands_in_the_docs(tmp_path):
    trainer = make_trainer(
        tmp_path, rollout_func=with_a_tool, importance_cap=1.5, reward_clip_range=[-9, 9], eval_dataset=PROMPTS,
        eval_rewards={"variety": variety},
    )  # fmt: skip
    trainer.train()
    lines = (tmp_path / "train_log.jsonl").read_text().splitlines()
    logged = {name.replace("variety", "<name>") for line in lines for name in json.loads(line)} - {"step"}
    logged = {name for name in logged if not name.startswith("eval_response")}
    page = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
    table = page.partition("## What the log says")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == logged


def test_a_monitor_ends_the_run_with_a_checkpoint_and_resume_overrides_it(tmp_path, capsys):
    options = {"monitors": {"length": 1.0001}, "stop_on": ["length"], "total_episodes": 160, "num_ppo_epochs": 1}
    result = make_trainer(tmp_path, **options).train()
    assert result.interrupted and 6 <= result.step < 10 and (tmp_path / f"checkpoint-{result.step}").exists()
    alarms = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert alarms[-1]["monitor"] == "length" and alarms[-1]["step"] == result.step
    assert alarms[-1]["ended_run_of"] == 10 and result.stopped_by == f"length: {alarms[-1]['message']}"
    page = (tmp_path / "report.html").read_text()
    assert f"This ended the run after step {result.step} of 10 planned steps.</b>" in page
    out = capsys.readouterr().out
    assert f"Stopped by monitor length after step {result.step} of 10" in out
    resumed = make_trainer(tmp_path, **options | {"stop_on": [], "monitors": {"length": 9.0}}).train(resume=True)
    assert not resumed.interrupted and resumed.stopped_by is None
    page = (tmp_path / "report.html").read_text()
    assert alarms[-1]["message"] in page and "planned steps; it was resumed.</b>" in page
    again = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert again[: len(alarms)] == alarms
