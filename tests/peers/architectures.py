"""Every decoder of transformers, tiny and with random weights, through generation, SFT, a reward model and PPO.

    python tests/peers/architectures.py [model_type ...] > tests/peers/architectures.txt

An architecture takes a few seconds, all of them a quarter of an hour. What is checked, beside that nothing fails:
  generate  greedy answers to prompts of three lengths are the model's own most likely tokens, and the log-probability
            of each is that of a forward pass over the whole text
  sft       the loss of the first step is the mean of -log p that the model's own logits give (dropout is 0 where the
            config has one of the usual names; a model that adds noise in training differs)
  reward    a trained reward model gives a text the same score alone, beside a longer one, and loaded again
  ppo       the first ratio is 1, with a critic
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(Path(__file__).parents[1]))
from helpers import tiny_tokenizer

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, models
from rlhf_fast.generation import generate_with_logprobs

VOCABULARY = 300  # at least that of tiny_tokenizer
LIMIT = 180  # seconds for an architecture
# What makes a model tiny, under all names that configs have for it.
TINY = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "embedding_size"), 32)
TINY |= dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48)
TINY |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
TINY |= dict.fromkeys(("n_positions", "max_position_embeddings", "max_seq_len"), 512)
TINY |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
TINY |= dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2)
TINY |= dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1)
TINY |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "attention_window", "mamba_d_head"), 16)
TINY |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels", "global_head_dim"), 8)
TINY |= dict.fromkeys(("state_size", "mamba_d_state", "linear_key_head_dim", "linear_value_head_dim"), 8)
TINY |= dict.fromkeys(("hidden_size_per_layer_input", "query_pre_attn_scalar"), 8)
TINY |= dict.fromkeys(("mamba_n_heads", "time_step_rank", "linear_num_value_heads", "rotary_dim"), 4)
TINY |= dict.fromkeys(("linear_num_key_heads", "multi_query_group_num", "mamba_expand"), 2)
TINY |= dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
TINY |= dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "layerdrop"), 0.0)
TINY |= dict.fromkeys(("attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TINY |= dict.fromkeys(("activation_dropout", "residual_dropout"), 0.0)
TINY |= {"logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 0.3, "is_decoder": True}
TINY |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# Hybrids need more layers to have one of each kind, and some attentions as many key heads as others.
SHAPES = (
    dict.fromkeys(LAYERS, 2) | {"num_key_value_heads": 2, "head_dim": 8},
    dict.fromkeys(LAYERS, 2) | {"num_key_value_heads": 4, "head_dim": 8},
    dict.fromkeys(LAYERS, 8) | {"num_key_value_heads": 2, "head_dim": 8},
    dict.fromkeys(LAYERS, 8) | {"num_key_value_heads": 4},
)
OWN = {  # what their configs want to fit together
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_conv": 4},
    "mamba2": {"head_dim": 16, "n_groups": 1},
}


def tiny(model_type: str, tokens: dict[str, int]):
    """A model of the architecture, with logits far from uniform. The error of the last shape that was tried."""
    config_class = CONFIG_MAPPING[model_type]
    known, own = config_class().to_dict(), OWN.get(model_type, {}) | tokens
    for shape in SHAPES:
        settings = {name: value for name, value in (TINY | shape | own).items() if name in known or name in own}
        try:
            config = config_class(**settings)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 3e7:
                raise ValueError(f"{size:.0e} weights: no names here make it tiny")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            model(input_ids=torch.arange(3, 9)[None], use_cache=True)
        except Exception as last:
            error = last
            continue
        for p in model.parameters():
            if p.dim() > 1 and p.std() < 0.2:
                p.data.mul_(4)
        return model
    raise error


@torch.no_grad()
def logprobs(model, ids: list[int]) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def check_generate(model, tokenizer) -> str:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, len(tokenizer), (n,), generator=generator).tolist() for n in (5, 9, 7)]
    answers, found = generate_with_logprobs(
        model, prompts, max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    for prompt, answer, values in zip(prompts, answers, found, strict=True):
        truth = logprobs(model, prompt + answer)[len(prompt) - 1 : -1]
        of_answer = truth.gather(1, torch.tensor(answer)[:, None])[:, 0]
        if (truth.amax(-1) - of_answer).max() > 1e-3 or (of_answer - torch.tensor(values)).abs().max() > 1e-3:
            return "differs"
    return "ok"


def check_sft(model, tokenizer, records, folder) -> str:
    total, count = 0.0, 0
    for record in records:
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = [*tokenizer(record["completion"])["input_ids"], tokenizer.eos_token_id]
        truth = logprobs(model, prompt + answer)[len(prompt) - 1 : -1]
        total, count = total - float(truth.gather(1, torch.tensor(answer)[:, None]).sum()), count + len(answer)
    config = SFTConfig(output_dir=folder, per_device_train_batch_size=len(records), max_steps=1)
    loss = float(next(iter(SFTTrainer(config, model, train_dataset=records, tokenizer=tokenizer)))["loss"])
    return "ok" if abs(loss - total / count) < 2e-4 * total / count else f"loss {loss:.4f}, not {total / count:.4f}"


def check_reward(model, tokenizer, records, folder) -> str:
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in records]
    models.save_model(model, tokenizer, f"{folder}/base")
    config = RewardConfig(output_dir=f"{folder}/run", per_device_train_batch_size=3, max_steps=1)
    trainer = RewardTrainer(config, f"{folder}/base", train_dataset=pairs)
    trainer.train()
    ids, mask = torch.tensor([[7, 8, 9, 0, 0], [9, 8, 7, 6, 5]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        one = models.score_tokens(trainer.model.eval(), ids[:1, :3], mask[:1, :3])
        again = models.load_reward_model(f"{folder}/run").eval()
        others = [models.score_tokens(m, ids, mask)[:1] for m in (trainer.model, again)]
    return "ok" if all(torch.allclose(one, other, atol=1e-4) for other in others) else "scores differ"


def check_ppo(model, tokenizer, records, folder) -> str:
    config = PPOConfig(output_dir=folder, batch_size=4, minibatch_size=2, response_length=5, total_episodes=4)
    trainer = PPOTrainer(
        config, model, reward=lambda prompts, responses: list(map(len, responses)), tokenizer=tokenizer,
        train_dataset=[{"prompt": record["prompt"]} for record in records],
    )  # fmt: skip
    first = float(next(iter(trainer))["policy/first_minibatch_max_abs_log_ratio"])
    return "ok" if first == 0 else f"first log ratio {first:.1e}"


def check(model_type: str) -> list[str]:
    tokenizer = tiny_tokenizer()
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    build = partial(tiny, model_type, tokens | {"bos_token_id": tokens["eos_token_id"]})
    build()
    records = [{"prompt": "what is two? ", "completion": "two"}, {"prompt": "a ", "completion": "the cat sat"}] * 3
    results = []
    for run in (check_generate, check_sft, check_reward, check_ppo):
        with tempfile.TemporaryDirectory() as folder:
            try:
                arguments = (build(), tokenizer) if run is check_generate else (build(), tokenizer, records, folder)
                results.append(run(*arguments))
            except Exception as error:
                results.append(f"{type(error).__name__}: {' '.join(str(error).split())[:110]}")
    return results


def too_slow(*_) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", flush=True)
    print("architecture | generate | sft | reward | ppo", flush=True)
    for model_type in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if child := os.fork():  # what one leaves behind, or a crash, is not the next one's
            os.waitpid(child, 0)
            continue
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(LIMIT)
        try:
            results = check(model_type)
        except Exception as error:
            results = [f"not built: {type(error).__name__}: {' '.join(str(error).split())[:110]}"]
        print(" | ".join([model_type, *results]), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
