"""The trainers on a device that is not the CPU: no tensor is left behind, and the CUDA backend runs underneath."""

from __future__ import annotations

import battery
import placement
import pytest
import torch
import transformers
from helpers import tiny_model, tiny_tokenizer
from placement import CUDA, Card, device_of, put_module

import rlhf_fast as rf
from rlhf_fast.decoder import Decoder
from rlhf_fast.ops import _native
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PROMPTS = [{"prompt": f"say {word}"} for word in WORDS]


@pytest.fixture
def card(monkeypatch):
    placement.install(monkeypatch)


@pytest.fixture
def on_cuda_kernels(card, on_emulator, monkeypatch):
    """The CUDA backend, chosen because a tensor says that it is on CUDA."""
    unavailable = _native.unavailable
    known = lambda *pair: None if pair == ("cuda", "native") else unavailable(*pair)  # noqa: E731
    monkeypatch.setattr(_native, "unavailable", known)
    return on_emulator


def score(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def a_model(tokenizer):
    return put_module(tiny_model(tokenizer), CUDA)


def test_a_tensor_left_on_the_cpu_is_found(card):
    with Card():
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        assert there.is_cuda and (there + 1).view(3, 1).device.type == "cuda" and here.device.type == "cpu"
        assert device_of(there[torch.tensor([0])]) == CUDA and device_of(there.cpu() + here) != CUDA
        assert device_of(here.to("cuda")) == CUDA and device_of(here) != CUDA  # a copy, not the tensor itself
        with pytest.raises(RuntimeError, match="tensors of both devices"):
            torch.where(there > 0, here, there)
        with pytest.raises(RuntimeError, match="tensors of both devices"):
            there.masked_fill(here.bool(), 0.0)
        linear = put_module(torch.nn.Linear(3, 3), CUDA)
        with pytest.raises(RuntimeError, match="tensors of both devices"):
            linear(here)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast says so, and does nothing
@pytest.mark.parametrize("options", [
    {"micro_batch_size": 3},
    {"share_trunk": True, "whiten_rewards": True, "missing_eos_penalty": 1.0, "scale_scores": True},
    {"advantage_estimator": "rloo", "num_generations": 2, "kl_in_loss": True, "kl_estimator": "k3"},
    {"bf16": True, "share_trunk": True, "micro_batch_size": 3},  # the head's products and its kernels
], ids=["critic", "shared trunk", "rloo", "bf16"])  # fmt: skip
def test_ppo(options, tmp_path, on_cuda_kernels, monkeypatch):
    tokenizer, decoders, launched = tiny_tokenizer(), [], on_cuda_kernels.launches()
    config = PPOConfig(
        output_dir=str(tmp_path), total_episodes=16, batch_size=8, minibatch_size=4, num_ppo_epochs=2,
        response_length=6, **options,
    )  # fmt: skip
    monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device: device == CUDA)
    monkeypatch.setattr("rlhf_fast.generation.Decoder", lambda *a: decoders.append(Decoder(*a)) or decoders[-1])
    with Card():
        trainer = PPOTrainer(
            config, a_model(tokenizer), tokenizer=tokenizer, reward=score, train_dataset=PROMPTS,
            eval_dataset=PROMPTS[:3],
        )  # fmt: skip
        for metrics in trainer:
            assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.0 < metrics["policy/grad_norm"]
        trainer.evaluate()
    assert decoders and all(decoder.fixed for decoder in decoders)  # the form that a CUDA graph can hold
    assert on_cuda_kernels.launches() > launched
    assert rf.backends()["ppo_loss"]["cuda"]["backend"] == "native"


@pytest.mark.parametrize("architecture", battery.GRAPHS)
def test_generation(architecture, card, monkeypatch):
    made, steps = [], []

    def graph(decoder):
        made.append(decoder)
        return lambda tokens: steps.append(len(tokens)) or decoder.step(tokens)

    monkeypatch.setattr("rlhf_fast.generation._Graph", graph)
    with rf.use_backend("reference"), Card():
        battery.generates_as_transformers(architecture, "cuda")
    if transformers.__version__ >= "5":  # with the weights that it draws
        assert len(made) == battery.GRAPHS[architecture] and len(steps) == battery.STEPS.get(architecture, 39)


def test_sft_and_a_reward_model(tmp_path, card):
    tokenizer = tiny_tokenizer()
    demonstrations = [row | {"completion": f" {word}"} for row, word in zip(PROMPTS, WORDS, strict=True)]
    pairs = [{**row, "chosen": f" {word}", "rejected": " no no"} for row, word in zip(PROMPTS, WORDS, strict=True)]
    steps = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 2}
    with rf.use_backend("reference"), Card():
        data = {"tokenizer": tokenizer, "train_dataset": demonstrations, "eval_dataset": demonstrations[:3]}
        for packing in (False, True):
            trainer = SFTTrainer(SFTConfig(packing=packing, **steps), a_model(tokenizer), **data)
            assert len(list(trainer)) == 2 and trainer.evaluate()["eval_loss"] > 0
        data = {"tokenizer": tokenizer, "train_dataset": pairs, "eval_dataset": pairs[:3]}
        trainer = RewardTrainer(RewardConfig(**steps), a_model(tokenizer), **data)
        assert len(list(trainer)) == 2 and trainer.evaluate()["eval_loss"] > 0
