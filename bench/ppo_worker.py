"""Runs PPO, ours or TRL's, in a process for bench_ppo.py: python bench/ppo_worker.py runs.json result.json

Both get the same model from the same seed, the same prompts and the same reward, and write one row per iteration:
CPU-seconds used so far (all threads), response tokens, reward and KL to the reference.

The score of a response is the share of its tokens that lie in a fixed tenth of the vocabulary. Prompts contain no such
tokens.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PAD, EOS, FIRST = 0, 1, 2  # FIRST: the first token that is not special
SHAPES = {  # a Run's shape: the sizes of a model; its head is its embedding
    "qwen2-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "qwen2-tiny": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
    },
}  # fmt: skip


@dataclass
class Run:
    """The settings of both trainers. One optimizer step takes minibatch_size responses, in micro-batches."""

    system: str = "shared"  # or "separate", "trl"; for GRPO "group", "trl-grpo", or "trl-grpo-logits"
    vocab: int = 8192
    hidden: int = 256
    layers: int = 4
    batch_size: int = 64
    minibatch_size: int = 64
    micro_batch_size: int = 16
    num_ppo_epochs: int = 4
    prompt_length: tuple[int, int] = (16, 48)
    response_length: int = 64
    iterations: int = 4
    num_prompts: int = 512
    num_generations: int = 1
    learning_rate: float = 3e-4
    kl_coef: float = 0.05
    temperature: float = 1.0
    seed: int = 0
    endless: bool = False  # the model never says eos or pad, so all responses have full length
    shape: str = "llama"  # or a key of SHAPES, whose sizes replace hidden and layers, not vocab
    device: str = "cpu"
    bf16: bool = False  # training products in bfloat16 (in ours also sampling and scoring), weights in float32
    profile: bool = False  # ours only: one more iteration, under torch's profiler

    @property
    def good(self) -> range:
        """The tokens that are rewarded."""
        return range(FIRST, FIRST + self.vocab // 10)

    def reward(self, prompts, responses, **columns) -> list[float]:
        words = [[int(word[1:]) in self.good for word in response.split()] for response in responses]
        return [sum(row) / self.response_length for row in words]


def make_tokenizer(vocab: int):
    """Token i is the word t<i>, except for the two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"t{i}": i for i in range(FIRST, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(run: Run):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(run.seed)
    if run.shape in SHAPES:
        with torch.device(run.device):  # half a billion random numbers take one thread of a CPU a quarter of a minute
            return of_shape(
                run.shape, vocab_size=run.vocab, max_position_embeddings=1024, pad_token_id=PAD, eos_token_id=EOS
            )
    heads = max(1, run.hidden // 64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=run.vocab, hidden_size=run.hidden, intermediate_size=run.hidden * 8 // 3,
            num_hidden_layers=run.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=1024, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
        )
    ).to(run.device)  # fmt: skip
    if run.endless:
        bias = torch.zeros(run.vocab, device=run.device)
        bias[[PAD, EOS]] = -30.0
        model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def of_shape(shape: str, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    fixed = {"tie_word_embeddings": True, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPES[shape], **fixed, **options}))


def make_critic(run: Run, policy):
    """TRL's: the policy's trunk and a head of zeros, as in ours."""
    from transformers import AutoModelForSequenceClassification

    config = type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1})
    with torch.device(run.device):  # as in make_model
        critic = AutoModelForSequenceClassification.from_config(config).to(run.device, policy.dtype)
    critic.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def make_prompts(run: Run) -> list[list[int]]:
    rng = random.Random(run.seed)
    words = range(run.good.stop, run.vocab)
    return [[rng.choice(words) for _ in range(rng.randint(*run.prompt_length))] for _ in range(run.num_prompts)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Collects rows of CPU-seconds and wall-clock seconds since the start of training, and other values."""

    def __init__(self, device: str):
        self.rows: list[dict] = []
        self.device = device
        self.begin()

    def begin(self) -> None:
        self.start, self.wall = time.process_time(), time.perf_counter()

    def row(self, **values) -> None:
        synchronize(self.device)
        now = {"cpu_seconds": time.process_time() - self.start, "seconds": time.perf_counter() - self.wall}
        self.rows.append(now | values)


def run_ours(run: Run) -> list[dict]:
    from rlhf_fast.decoder import why_no_decoder
    from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        output_dir="", seed=run.seed, total_episodes=max(1, run.iterations + run.profile) * run.batch_size,
        batch_size=run.batch_size, minibatch_size=run.minibatch_size, micro_batch_size=run.micro_batch_size,
        num_ppo_epochs=run.num_ppo_epochs, generation_batch_size=run.batch_size, response_length=run.response_length,
        temperature=run.temperature, learning_rate=run.learning_rate, lr_scheduler_type="constant", kl_coef=run.kl_coef,
        share_trunk=run.system == "shared", bf16=run.bf16, num_generations=run.num_generations,
        **({"advantage_estimator": "group", "scale_advantages": "group"} if run.system == "group" else {}),
    )  # fmt: skip
    trainer = PPOTrainer(
        config, make_model(run), reward=run.reward, tokenizer=make_tokenizer(run.vocab),
        train_dataset=[{"prompt": " ".join(f"t{i}" for i in row)} for row in make_prompts(run)],
    )  # fmt: skip
    if reason := why_no_decoder(trainer.policy):  # it would generate through transformers, and only warn
        raise RuntimeError(f"our decoder, which is to be measured, does not run this model: {reason}")
    clock, iterations = Clock(run.device), iter(trainer)
    for _ in range(run.iterations):
        metrics = next(iterations)
        clock.row(
            tokens=int(metrics["response_length/mean"] * run.batch_size + 0.5),
            reward=float(metrics["objective/scores"]), entropy=float(metrics["policy/entropy_avg"]),
            generate_seconds=metrics["timing_s/generate"],  # no synchronize(): it ends with the tokens on the CPU
            **({"kl": float(metrics["objective/kl"])} if run.kl_coef else {}),
        )  # fmt: skip
    if run.profile:
        clock.rows[-1]["profile"] = profile(trainer, iterations, run.device)
    return clock.rows


def profile(trainer, iterations, device: str) -> dict[str, dict]:
    """Profiles one iteration in two parts -> the shares of each part."""
    rollout, parts, running = trainer._rollout, {}, Profiler(device)

    def then_the_rest(*arguments, **options):
        nonlocal running
        out = rollout(*arguments, **options)
        parts["rollout"] = running.stop()
        running = Profiler(device)
        return out

    trainer._rollout = then_the_rest
    next(iterations)
    parts["score and update"] = running.stop()
    return parts


class Profiler:
    def __init__(self, device: str):
        self.device, self.profiler = device, torch.profiler.profile()
        synchronize(device)
        self.profiler.start()
        self.start = time.perf_counter()

    def stop(self) -> dict:
        synchronize(self.device)
        seconds = time.perf_counter() - self.start
        self.profiler.stop()
        return {"seconds": seconds} | shares(self.profiler.key_averages())


def shares(events, most: int = 12) -> dict:
    """Seconds of all kernels, the largest kernels, and the operations on which the host spends most of its own time.

    The profiler slows the host down. To see how long the device waits for it, compare kernel_seconds with a run
    without a profiler.
    """
    from torch.autograd import DeviceType

    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    host = [e for e in events if e.device_type == DeviceType.CPU]

    def largest(events, key: str) -> list[dict]:
        rows = sorted(events, key=lambda e: -getattr(e, key))[:most]
        return [{"name": e.key, "calls": e.count, "seconds": getattr(e, key) / 1e6} for e in rows]

    return {
        "kernel_seconds": sum(e.self_device_time_total for e in kernels) / 1e6,
        "kernels": largest(kernels, "self_device_time_total"), "host": largest(host, "self_cpu_time_total"),
        "graph_launches": sum(e.count for e in host if e.key.startswith("cudaGraphLaunch")),
    }  # fmt: skip


class ShareOfGood(torch.nn.Module):
    """The reward in the only form that TRL takes: a module with a backbone, whose "hidden states" a head turns into a
    reward at every token. Here the backbone counts tokens."""

    base_model_prefix = "backbone"

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    @property
    def backbone(self):
        return self.count

    def count(self, input_ids, **_):
        from types import SimpleNamespace

        good = (input_ids >= self.run.good.start) & (input_ids < self.run.good.stop)
        return SimpleNamespace(hidden_states=[good.cumsum(1).float()[..., None]])

    def score(self, counts):
        return counts / self.run.response_length


def run_trl(run: Run) -> list[dict]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    clock, generation, generate = Clock(run.device), [0.0], ppo_trainer.batch_generation

    def timed(*arguments, **options):
        synchronize(run.device)
        start = time.perf_counter()
        out = generate(*arguments, **options)
        synchronize(run.device)
        generation[0] = time.perf_counter() - start
        return out

    ppo_trainer.batch_generation = timed

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            clock.row(
                tokens=run.batch_size * run.response_length, reward=logs["objective/scores"],
                kl=logs["objective/kl"], entropy=logs["policy/entropy_avg"], generate_seconds=generation[0],
            )  # fmt: skip

    policy, tokenizer = make_model(run), make_tokenizer(run.vocab)
    value_model = make_critic(run, policy)
    if run.batch_size != run.minibatch_size:
        raise ValueError("TRL 1.12.0 ignores num_mini_batches: it takes one optimizer step for the whole batch")
    accumulate = run.minibatch_size // run.micro_batch_size
    args = PPOConfig(
        output_dir="/tmp/trl", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        seed=run.seed, total_episodes=max(1, run.iterations) * run.batch_size,
        per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=accumulate, num_mini_batches=1, num_ppo_epochs=run.num_ppo_epochs,
        local_rollout_forward_batch_size=run.batch_size, response_length=run.response_length, stop_token="eos",
        temperature=run.temperature, learning_rate=run.learning_rate, lr_scheduler_type="constant", kl_coef=run.kl_coef,
        num_sample_generations=0, gradient_checkpointing=False, bf16=run.bf16, use_cpu=run.device == "cpu",
    )  # fmt: skip
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=ShareOfGood(run),
        train_dataset=Dataset.from_dict({"input_ids": make_prompts(run)}), value_model=value_model, callbacks=[Watch()],
    )  # fmt: skip
    if (trainer.accelerator.mixed_precision == "bf16") != run.bf16:
        raise RuntimeError(f"TRL computes in {trainer.accelerator.mixed_precision}, and bf16 is {run.bf16}")
    clock.begin()
    if run.iterations:
        trainer.train()
    return clock.rows


def run_grpo_of_trl(run: Run) -> list[dict]:
    """TRL's GRPOTrainer with its defaults wherever Run does not set something. "trl-grpo-logits": its log-probabilities
    come from the model's own logits, as in earlier versions of TRL; its own head is made for a GPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    clock = Clock(run.device)

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "completions/mean_length" in logs:
                clock.row(
                    tokens=int(logs["completions/mean_length"] * run.batch_size + 0.5), reward=logs["reward"],
                    entropy=logs["entropy"],
                )  # fmt: skip

    class FromLogits(GRPOTrainer):
        def _get_per_token_logps_and_entropies(
            self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
        ):
            parts = []
            for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
                with self.accelerator.autocast():
                    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep + 1, use_cache=False)
                logits = out.logits[:, :-1]
                logits = logits if self.temperature == 1.0 else logits / self.temperature
                logps = selective_log_softmax(logits, ids[:, -logits_to_keep:])
                with torch.no_grad():  # else it would keep three more tensors of the size of the logits for a while
                    entropy = entropy_from_logits(logits) if compute_entropy else logps
                parts.append((logps, entropy))
            logps, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
            return logps, entropies if compute_entropy else None, None

    args = GRPOConfig(
        output_dir="/tmp/trl", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=run.seed,
        max_steps=run.iterations * run.num_ppo_epochs, per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=run.minibatch_size // run.micro_batch_size, num_generations=run.num_generations,
        num_iterations=run.num_ppo_epochs, max_completion_length=run.response_length, temperature=run.temperature,
        learning_rate=run.learning_rate, lr_scheduler_type="constant", beta=run.kl_coef, bf16=run.bf16,
        gradient_checkpointing=False, use_cpu=run.device == "cpu",
    )  # fmt: skip
    trainer = (FromLogits if run.system == "trl-grpo-logits" else GRPOTrainer)(
        args=args, processing_class=make_tokenizer(run.vocab), model=make_model(run), callbacks=[Watch()],
        reward_funcs=lambda prompts, completions, **_: run.reward(prompts, completions),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in row) for row in make_prompts(run)]}),
    )  # fmt: skip
    clock.begin()
    if run.iterations:
        trainer.train()
    return clock.rows


RUN = {"trl": run_trl, "trl-grpo": run_grpo_of_trl, "trl-grpo-logits": run_grpo_of_trl}


def main() -> None:
    """Reads a list of runs of one system and writes {"runs": [rows of each], "peak_rss": bytes}."""
    torch.set_num_threads(1)
    runs = [Run(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    result = {"runs": [RUN.get(run.system, run_ours)(run) for run in runs]}
    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if runs[-1].device == "cuda":
        result["peak_allocated"] = torch.cuda.max_memory_allocated()
        result["peak_reserved"] = torch.cuda.max_memory_reserved()
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
