"""A reward that gets hacked, and the monitors that notice: `python examples/reward_hacking.py`, half a minute on a CPU.

We want short answers with two kind words, but we reward the number of kind words. PPO finds out that more kind words
give more reward. The held-out reward measures what we want, and the policy never trains on it. When it falls while the
trained reward rises, the run ends with a checkpoint, and report.html says why.
"""

import shutil
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.quickstart.model import tiny_llama

KIND = ["please", "thanks", "welcome"]
OTHER = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "then", "it", "was", "red"]


def kind_words(prompts, responses, **columns):
    return [float(sum(word in KIND for word in response.split())) for response in responses]


def kind_and_short(prompts, responses, **columns):
    """1 for two or more kind words, 1/2 for one, 0 for none; above six words it shrinks with the length."""
    kind = [min(count, 2.0) / 2 for count in kind_words(prompts, responses)]
    return [k * min(1.0, 6 / max(1, len(response.split()))) for k, response in zip(kind, responses, strict=True)]


def main(output_dir: str = "runs/reward_hacking", seed: int = 0) -> PPOTrainer:
    vocabulary = {word: i for i, word in enumerate([*KIND, *OTHER, "<eos>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    prompts = [{"prompt": word} for word in OTHER]
    config = PPOConfig(
        output_dir=output_dir, seed=seed, total_episodes=64 * 40, batch_size=64, minibatch_size=32, num_ppo_epochs=2,
        response_length=24, temperature=1.0, learning_rate=5e-3, kl_coef=0.01, share_trunk=True, eval_steps=2,
        lr_scheduler_type="constant", monitors={"kl": 40.0}, stop_on=["overoptimization"],
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tiny_llama(tokenizer, seed, hidden=32, layers=1), tokenizer=tokenizer, reward=kind_words,
        train_dataset=prompts, eval_dataset=prompts * 10, eval_rewards={"kind_and_short": kind_and_short},
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/reward_hacking"
    shutil.rmtree(directory, ignore_errors=True)
    main(directory)
    print(f"{directory}/report.html")
