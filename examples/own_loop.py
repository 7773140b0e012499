"""The ops in your own training loop: REINFORCE with a leave-one-out baseline (RLOO), without our trainers.

A model with random weights learns to say only five of its 64 words. Run it: python examples/own_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_fast as rf

WANTED = torch.arange(10, 15)  # the rewarded token ids
NUM_STEPS, K, T = 40, 32, 6  # K responses of T tokens to a single prompt


def main():
    """Prints the mean reward, which is the share of wanted tokens, every ten steps, and returns the last one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompt = torch.ones(K, 1, dtype=torch.long)
    mask = torch.ones(K, T, dtype=torch.bool)
    for step in range(NUM_STEPS):
        tokens = model.generate(prompt, do_sample=True, min_new_tokens=T, max_new_tokens=T, top_k=0)
        response = tokens[:, 1:]
        rewards = torch.isin(response, WANTED).float().mean(1)  # (K,)
        advantages = (rewards - (rewards.sum() - rewards) / (K - 1))[:, None].expand(K, T)

        logprobs = rf.token_logprobs(model(tokens[:, :-1]).logits, response)
        loss, stats = rf.ppo_loss(logprobs, logprobs.detach(), advantages, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: reward {rewards.mean():.2f}, ratio {stats['ratio_mean']:.3f}")
    return float(rewards.mean())


if __name__ == "__main__":
    main()
