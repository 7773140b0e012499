"""One update of PPOTrainer beside TRL 1.12.0's, the last that has PPO: same weights, rollouts and settings.

TRL's train() runs as it is; only its sampling is replaced, so that both learn from the same responses. Where none of
them ends early the loss terms, the metrics and the weights afterwards agree. Where TRL is wrong, a test shows how.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from helpers import tiny_model, tiny_tokenizer

if trl.__version__ != "1.12.0":
    pytest.skip("TRL 1.12.0 is the last with PPO", allow_module_level=True)

from datasets import Dataset
from trl.experimental import ppo as peer
from trl.experimental.ppo import ppo_trainer as peer_module

from rlhf_fast.models import ValueModel, load_reward_model
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

B, R, TEMPERATURE = 16, 6, 0.7
COMMON = {"kl_coef": 0.2, "cliprange": 0.1, "cliprange_value": 0.05, "vf_coef": 0.5, "gamma": 0.97, "lam": 0.9}


def setting(seed=0, ends=(), pad="<pad>"):
    """Models, prompts of several lengths and B responses of R tokens; those numbered in `ends` close with eos early."""
    tokenizer = tiny_tokenizer(pad=pad)
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 290, (3 + i % 4,), generator=draw).tolist() for i in range(B)]
    responses = torch.randint(5, 290, (B, R), generator=draw)
    for row in ends:
        cut = 1 + row % (R - 2)
        responses[row, cut], responses[row, cut + 1 :] = tokenizer.eos_token_id, tokenizer.pad_token_id
    policy = tiny_model(tokenizer, seed=1, initializer_range=0.1)
    torch.manual_seed(3)
    reference = tiny_model(tokenizer, seed=2, initializer_range=0.1)
    reward = load_reward_model(tiny_model(tokenizer, seed=4))
    value = load_reward_model(tiny_model(tokenizer, seed=5))
    for scalar in (reward, value):
        scalar.config.pad_token_id = tokenizer.pad_token_id
    return SimpleNamespace(
        tokenizer=tokenizer, prompts=prompts, responses=responses, policy=policy, reference=reference, reward=reward,
        value=value,
    )  # fmt: skip


def run_trl(s, tmp_path, monkeypatch, *, width=R, **options):
    """TRL's train() for one batch -> its metrics, the trainer, and the number of optimizer steps."""
    table = {tuple(p): r for p, r in zip(s.prompts, s.responses, strict=True)}

    def sampled(model, queries, *_):
        pad = s.tokenizer.pad_token_id
        rows = torch.stack([table[tuple(q[q != pad].tolist()) if pad != s.tokenizer.eos_token_id else
                                  tuple(q[(q != pad).long().argmax():].tolist())] for q in queries])  # fmt: skip
        rows = torch.nn.functional.pad(rows, (0, width - R), value=pad)
        both = torch.cat([queries, rows], 1)
        with torch.no_grad():
            logits = peer_module.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / (TEMPERATURE + 1e-7)

    monkeypatch.setattr(peer_module, "batch_generation", sampled)
    defaults = {
        "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": B, "gradient_accumulation_steps": 1,
        "num_mini_batches": 1, "num_ppo_epochs": 2, "total_episodes": B, "response_length": width, "stop_token": "eos",
        "temperature": TEMPERATURE, "learning_rate": 1e-3, "num_sample_generations": 0, "report_to": "none",
        "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False, "weight_decay": 0.0,
        "local_rollout_forward_batch_size": B, "logging_steps": 1, **COMMON,
    }  # fmt: skip
    data = Dataset.from_list([{"input_ids": prompt} for prompt in s.prompts])
    tokenizer = copy.deepcopy(s.tokenizer)
    tokenizer.padding_side = "left"
    trainer = peer.PPOTrainer(
        args=peer.PPOConfig(**(defaults | options)), processing_class=tokenizer, model=copy.deepcopy(s.policy),
        ref_model=copy.deepcopy(s.reference), reward_model=copy.deepcopy(s.reward), value_model=copy.deepcopy(s.value),
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    logged, steps, inner = [], [], trainer.optimizer.optimizer
    monkeypatch.setattr(trainer, "log", lambda metrics, *_: logged.append(dict(metrics)))
    step = inner.step
    inner.step = lambda *args, **kwargs: (steps.append(1), step(*args, **kwargs))[1]
    trainer.train()
    return logged[0], trainer, len(steps)


def run_ours(s, tmp_path, **options):
    """One iteration of ours on the same responses, with the scores that TRL's function reads from the reward model."""
    pad = s.tokenizer.pad_token_id
    scores = []
    for prompt, response in zip(s.prompts, s.responses, strict=True):
        ids = torch.cat([torch.tensor(prompt), response])[None]
        scores.append(peer_module.get_reward(s.reward, ids, pad, len(prompt))[1].item())
    table = {tuple(p): i for i, p in enumerate(s.prompts)}

    def rollout_func(prompts, trainer):
        rows = [table[tuple(p["ids"])] for p in (trainer.tokens_of[q] for q in prompts)]
        kept = [s.responses[i] for i in rows]
        ends = [(row == s.tokenizer.eos_token_id).nonzero() for row in kept]
        lists = [row[: int(e[0]) + 1 if len(e) else R].tolist() for row, e in zip(kept, ends, strict=True)]
        return {"completion_ids": lists, "row": rows, "prompt_ids": [s.prompts[i] for i in rows]}

    defaults = {
        "output_dir": str(tmp_path / "ours"), "batch_size": B, "minibatch_size": B, "num_ppo_epochs": 2,
        "total_episodes": B, "response_length": R, "temperature": TEMPERATURE, "learning_rate": 1e-3,
        "max_grad_norm": 0.0, **COMMON,
    }  # fmt: skip
    texts = [f"prompt {i}" for i in range(B)]
    trainer = PPOTrainer(
        PPOConfig(**(defaults | options)), copy.deepcopy(s.policy), tokenizer=s.tokenizer,
        ref_model=copy.deepcopy(s.reference), value_model=ValueModel(copy.deepcopy(s.value)),
        reward=lambda prompts, responses, row, **_: [scores[i] for i in row], rollout_func=rollout_func,
        train_dataset=[{"prompt": text} for text in texts],
    )  # fmt: skip
    trainer.tokens_of = {text: {"ids": prompt} for text, prompt in zip(texts, s.prompts, strict=True)}
    return {name: float(value) for name, value in next(iter(trainer)).items()}, trainer


SAME = [
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/scores", "objective/rlhf_reward",
    "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "val/clipfrac_avg", "val/ratio",
]  # fmt: skip


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_one_update_is_the_same(tmp_path, monkeypatch, kl_estimator, whiten_rewards):
    """Two epochs over one batch, so that the second has ratios off 1 and both clips at work."""
    s, options = setting(), {"kl_estimator": kl_estimator, "whiten_rewards": whiten_rewards}
    theirs, their_trainer, steps = run_trl(s, tmp_path, monkeypatch, **options)
    ours, our_trainer = run_ours(s, tmp_path, **options)
    assert steps == 2 == ours["policy/updates"]
    assert ours["policy/clipfrac_avg"] > 0.05 and ours["val/clipfrac_avg"] > 0.05
    for name in SAME:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    model = their_trainer.model
    for mine, other, before in (
        (our_trainer.policy, model.policy, s.policy), (our_trainer.value_model.model, model.value_model, s.value),
    ):  # fmt: skip
        moved = (weights(other) - weights(before)).abs()
        assert moved.max() > 1e-3
        # AdamW divides by the gradient's own size, so where a gradient is rounding noise a step may differ.
        assert ((weights(mine) - weights(other)).abs() < 2e-5).float().mean() > 0.999


# --- where TRL is wrong ----------------------------------------------------------------------------------------------


def test_trl_puts_the_score_on_the_padding_after_eos(tmp_path, monkeypatch):
    """And so trains the value of a state in which nothing is chosen. Ours puts it on eos, the last action."""
    s = setting(ends=range(B))
    theirs, *_ = run_trl(s, tmp_path, monkeypatch)
    ours, _ = run_ours(s, tmp_path)
    for name in ("objective/kl", "objective/scores", "objective/entropy"):  # what does not depend on the place
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    for name in ("loss/policy_avg", "loss/value_avg"):  # ten times what is let pass above
        assert abs(ours[name] - theirs[name]) > 1e-4, f"{name} agrees: take this test out"


def test_trl_averages_metrics_over_padding(tmp_path, monkeypatch):
    s = setting(ends=range(0, B, 2))
    (narrow, *_), (wide, *_) = (run_trl(s, tmp_path, monkeypatch, width=width) for width in (R, R + 6))
    assert wide["policy/approxkl_avg"] < 0.8 * narrow["policy/approxkl_avg"], "take this test out"
    assert abs(narrow["policy/entropy_avg"] - wide["policy/entropy_avg"]) > 1e-3, "take this test out"


def test_trl_ignores_num_mini_batches(tmp_path, monkeypatch):
    """Two minibatches of two micro-batches, two epochs: four optimizer steps, and TRL takes another number."""
    s = setting()
    _, _, steps = run_trl(
        s, tmp_path, monkeypatch, per_device_train_batch_size=B // 4, gradient_accumulation_steps=4, num_mini_batches=2
    )
    ours, _ = run_ours(s, tmp_path, minibatch_size=B // 2, micro_batch_size=B // 4)
    assert ours["policy/updates"] == 4 and steps != 4


def test_trl_never_clips_gradients(tmp_path, monkeypatch):
    s = setting()
    _, free, _ = run_trl(s, tmp_path, monkeypatch, max_grad_norm=1e9)
    _, held, _ = run_trl(s, tmp_path, monkeypatch, max_grad_norm=1e-9)
    before = torch.cat([weights(s.policy), weights(s.value)])
    for trainer in (free, held):  # under a norm of 1e-9 AdamW's eps would hold every weight where it is
        assert (weights(trainer.model) - before).abs().max() > 1e-3, "max_grad_norm counts: take this test out"


def test_trl_never_trains_eos_where_it_pads(tmp_path, monkeypatch):
    """With pad == eos, eos is taken for padding: what comes after the last word is not learned."""
    s = setting(ends=range(B), pad="<eos>")
    theirs, *_ = run_trl(s, tmp_path, monkeypatch)
    ours, _ = run_ours(s, tmp_path)
    assert ours["objective/entropy"] > theirs["objective/entropy"] + 1  # -log p of eos itself is missing there
    assert ours["val/num_eos_tokens"] == B


def test_our_list_of_deviations_is_complete_where_nothing_deviates(tmp_path, monkeypatch):
    """What TRL draws at random for its minibatches does not matter where there is one: other seeds, same terms."""
    s = setting(seed=7)
    np.random.seed(11)
    theirs, *_ = run_trl(s, tmp_path, monkeypatch, seed=5)
    ours, _ = run_ours(s, tmp_path, seed=9)
    for name in SAME:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
