"""Learning, with statistical teeth: every algorithm reaches a stated reward within a stated budget on each of 5 seeds.

The task can be checked by eye: answers of at most 8 words out of 16, and the reward is the share of them that are among
four given ones. A policy that knows nothing earns 0.25. That a run which does not learn passes all five by luck is out
of the question: its last batch of 64 answers would have to lie twenty standard errors above 0.25.
"""

import pytest
import torch
from helpers import tiny_model, word_tokenizer

from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

WORDS = [f"w{i}" for i in range(15)]
GOOD = {"w3", "w7", "w8", "w12"}
ALGORITHMS = {
    "PPO": {"advantage_estimator": "gae", "share_trunk": True},
    "RLOO": {"advantage_estimator": "rloo", "num_generations": 4},
    "GRPO": {
        "advantage_estimator": "group",
        "num_generations": 4,
        "scale_advantages": "group",
        "kl_in_loss": True,
        "kl_estimator": "k3",
    },
    "REINFORCE": {"advantage_estimator": "reinforce", "num_ppo_epochs": 1, "minibatch_size": 64},
}


def share_of_good_words(prompts, responses, **columns):
    return [sum(w in GOOD for w in r.split()) / max(1, len(r.split())) for r in responses]


def share_of_other_words(prompts, responses, **columns):
    return [-score for score in share_of_good_words(prompts, responses)]


def scores(tmp_path, seed, reward, **options):
    """Mean reward of every iteration of a run of 15 times 64 answers."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model(tokenizer, seed=seed, num_hidden_layers=1)
    defaults = {
        "output_dir": str(tmp_path), "seed": seed, "total_episodes": 64 * 15, "batch_size": 64, "minibatch_size": 32,
        "response_length": 8, "num_ppo_epochs": 2, "temperature": 1.0, "learning_rate": 1e-2, "kl_coef": 0.01,
    }  # fmt: skip
    config = PPOConfig(**(defaults | options))
    prompts = [{"prompt": word} for word in WORDS]
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, reward=reward, train_dataset=prompts)
    return torch.tensor([float(metrics["objective/scores"]) for metrics in trainer])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_what_is_rewarded(tmp_path, name, seed):
    run = scores(tmp_path, seed, share_of_good_words, **ALGORITHMS[name])
    assert 0.1 < run[0] < 0.4
    assert run[-3:].mean() > 0.85


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["PPO", "RLOO", "REINFORCE"])
def test_with_the_sign_flipped_it_goes_the_other_way(tmp_path, name, seed):
    run = -scores(tmp_path, seed, share_of_other_words, total_episodes=64 * 8, **ALGORITHMS[name])
    assert 0.1 < run[0] < 0.4
    assert run[-2:].mean() < 0.12
