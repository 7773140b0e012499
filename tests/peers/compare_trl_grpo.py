"""Optimizer steps of PPOTrainer beside those of TRL 1.16's GRPOTrainer and RLOOTrainer: the same weights, responses,
rewards and settings.

TRL's train() runs as it is. Both take the responses from a rollout_func; RLOOTrainer has none, and its sampling is
replaced.
"""

import copy

import pytest
import torch
import trl
from helpers import tiny_model, tiny_tokenizer

if trl.__version__ != "1.16.0":
    pytest.skip("one version of TRL's GRPO is compared", allow_module_level=True)

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

GROUP, R = 4, 9
PROMPTS = [f"say {'the cat sat on ' * k}mat {k}: " for k in range(4)]
B = GROUP * len(PROMPTS)


def responses(tokenizer, tools: bool) -> dict[str, list[tuple[list[int], list[int]]]]:
    """The tokens of GROUP responses to each prompt, some with eos, and which of them the model wrote."""
    draw, table = torch.Generator().manual_seed(0), {}
    for prompt in PROMPTS:
        table[prompt] = rows = []
        for i in range(GROUP):
            length = R if i == 0 else int(torch.randint(2, R, (), generator=draw))
            row = torch.randint(5, 290, (length,), generator=draw).tolist()
            own = [int(not tools or t != 1 or length < 4) for t in range(length)]
            rows.append((row if i == 0 else [*row[:-1], tokenizer.eos_token_id], own))
    return table


def reward(prompts, texts) -> list[float]:
    """Different for all responses. A group has no deviation to divide by if all are alike."""
    return [len(text) / 20 + (sum(map(ord, text)) % 91) / 91 for text in texts]


def sampler(tokenizer, tools: bool):
    table = responses(tokenizer, tools)

    def rollout_func(prompts, trainer):
        seen, rows = dict.fromkeys(PROMPTS, 0), []
        for prompt in prompts:
            rows.append(table[prompt][seen[prompt]])
            seen[prompt] += 1
        lists = {"completion_ids": [ids for ids, _ in rows], "logprobs": [[-1.0] * len(ids) for ids, _ in rows]}
        if tools:
            lists["env_mask"] = [own for _, own in rows]
        return lists | {"prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]}

    return rollout_func


class RLOO(RLOOTrainer):
    def __init__(self, rollout_func, **options):
        super().__init__(**options)
        self.rollout_func = rollout_func

    def _generate(self, prompts):
        self._generate_single_turn = lambda *_: self.rollout_func(prompts, self)["completion_ids"]
        return super()._generate(prompts)


def run_trl(model, tokenizer, tmp_path, tools=False, reference=None, kind=GRPOTrainer, **options):
    """-> the metrics of each optimizer step, and the model. TRL loads the reference from the policy's name."""
    logged, path = [], tmp_path / "model"
    (reference or model).save_pretrained(path)
    policy = type(model).from_pretrained(path)
    policy.load_state_dict(model.state_dict())
    defaults = {
        "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": B // 2, "gradient_accumulation_steps": 2,
        "num_generations": GROUP, "max_completion_length": R, "temperature": 0.7, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "logging_steps": 1, "disable_tqdm": True, "max_steps": 1,
    }  # fmt: skip
    config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
    trainer = kind(
        model=policy, args=config(**(defaults | options)), processing_class=copy.deepcopy(tokenizer),
        reward_funcs=lambda prompts, completions, **_: reward(prompts, completions),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        rollout_func=sampler(tokenizer, tools),
    )  # fmt: skip
    trainer.log = lambda metrics, *_: logged.append(metrics | {k: v[-1] for k, v in trainer._metrics["train"].items()})
    trainer.train()
    return [row for row in logged if "grad_norm" in row], trainer.model


def run_ours(model, tokenizer, tmp_path, tools=False, reference=None, **options):
    defaults = {
        "output_dir": str(tmp_path / "ours"), "batch_size": B, "minibatch_size": B, "micro_batch_size": B // 2,
        "num_generations": GROUP, "total_episodes": B, "response_length": R, "temperature": 0.7, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "num_ppo_epochs": 1, "advantage_estimator": "group", "kl_coef": 0.0,
        "scale_advantages": "group",
    }  # fmt: skip
    trainer = PPOTrainer(
        PPOConfig(**(defaults | options)), copy.deepcopy(model), tokenizer=tokenizer,
        reward=lambda prompts, texts, **_: reward(prompts, texts), rollout_func=sampler(tokenizer, tools),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS], ref_model=reference,
    )  # fmt: skip
    return {name: float(value) for name, value in next(iter(trainer)).items()}, trainer.policy


def setting():
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer, seed=1, initializer_range=0.1), tokenizer


def assert_same_weights(ours, theirs, before):
    mine, other, start = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs, before))
    assert (other - start).abs().max() > 5e-4
    # AdamW divides by the gradient's own size, so where a gradient is rounding noise a step may differ.
    assert ((mine - other).abs() < 2e-5).float().mean() > 0.999


@pytest.mark.parametrize(("theirs", "ours"), [
    ({}, {}),
    ({"loss_type": "grpo"}, {"loss_agg_mode": "seq-mean-token-mean"}),
    ({"loss_type": "dr_grpo", "scale_rewards": "none"},
     {"loss_agg_mode": "seq-mean-token-sum-norm", "scale_advantages": "none"}),
    ({"scale_rewards": "batch"}, {"scale_advantages": "batch"}),
    ({"entropy_coef": 0.01}, {"entropy_coef": 0.01}),
], ids=["dapo", "grpo", "dr_grpo", "batch", "entropy"])  # fmt: skip
@pytest.mark.parametrize("tools", [False, True])
def test_one_step_is_the_same(tmp_path, theirs, ours, tools):
    model, tokenizer = setting()
    (their_row,), their_model = run_trl(model, tokenizer, tmp_path, tools, **theirs)
    row, our_model = run_ours(model, tokenizer, tmp_path, tools, **ours)
    assert row["policy/updates"] == 1 and row["objective/scores"] == pytest.approx(their_row["reward"], rel=1e-5)
    assert row["policy/grad_norm"] == pytest.approx(float(their_row["grad_norm"]), rel=1e-4)
    assert_same_weights(our_model, their_model, model)


def test_the_second_step_of_a_rollout_clips_the_same(tmp_path):
    model, tokenizer = setting()
    theirs, their_model = run_trl(
        model, tokenizer, tmp_path, num_iterations=2, max_steps=2, epsilon=0.01, epsilon_high=0.02, delta=1.5
    )
    row, our_model = run_ours(
        model, tokenizer, tmp_path, num_ppo_epochs=2, cliprange=0.01, cliprange_high=0.02, dual_clip=1.5
    )
    assert len(theirs) == 2 == row["policy/updates"] and row["policy/clipfrac_avg"] > 0.1
    assert row["policy/grad_norm"] == pytest.approx(sum(float(x["grad_norm"]) for x in theirs) / 2, rel=1e-4)
    assert_same_weights(our_model, their_model, model)


@pytest.mark.parametrize(("steps", "corrected", "estimator"), [(1, False, "k3"), (2, False, "k3"), (1, True, "k2")])
def test_the_kl_in_the_loss(tmp_path, steps, corrected, estimator):
    """use_bias_correction_kl multiplies k3 by the ratio r, and the gradient of that is r times that of k2: the same in
    the first step from a rollout."""
    model, tokenizer = setting()
    reference, kl = tiny_model(tokenizer, seed=2, initializer_range=0.1), {"beta": 0.5, "epsilon": 9.0}
    theirs, their_model = run_trl(
        model, tokenizer, tmp_path, reference=reference, num_iterations=steps, max_steps=steps,
        use_bias_correction_kl=corrected, **kl,
    )  # fmt: skip
    row, our_model = run_ours(
        model, tokenizer, tmp_path, reference=reference, num_ppo_epochs=steps, cliprange=9.0, kl_coef=0.5,
        kl_in_loss=True, kl_estimator=estimator,
    )  # fmt: skip
    assert row["loss/kl_avg"] > 0.1
    assert row["policy/grad_norm"] == pytest.approx(sum(float(x["grad_norm"]) for x in theirs) / steps, rel=1e-4)
    assert_same_weights(our_model, their_model, model)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_one_step_of_rloo(tmp_path, beta):
    model, tokenizer = setting()
    reference = tiny_model(tokenizer, seed=2, initializer_range=0.1)
    (theirs,), their_model = run_trl(model, tokenizer, tmp_path, reference=reference, kind=RLOO, beta=beta)
    row, our_model = run_ours(
        model, tokenizer, tmp_path, reference=reference, advantage_estimator="rloo", scale_advantages="none",
        loss_agg_mode="seq-mean-token-sum", kl_coef=beta,
    )  # fmt: skip
    assert row["policy/grad_norm"] == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
    assert_same_weights(our_model, their_model, model)
