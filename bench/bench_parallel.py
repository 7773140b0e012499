"""What a second process gains: seconds per step of SFT and PPO, and memory, with one process and with two.

    python bench/bench_parallel.py [--json bench/results/parallel.json]

One process with one thread, one with two threads, and two with one thread each (torchrun, gloo; without and with fsdp)
take turns at the same steps. The model is a Llama of 4 layers and width 256 with random weights on random words, so
nothing has to be loaded. Times are wall-clock seconds, the median of the steps after the second. The figures are only
valid on an otherwise idle machine with two or more cores.

Memory is the largest growth of a process's resident memory, in bytes per parameter, from before the model is made to
the end of three steps of SFT. That model has 16 layers and width 512, so its weights make up most of the growth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = {  # number of processes, threads per process, fsdp
    "1 process, 1 thread": (1, 1, False),
    "1 process, 2 threads": (1, 2, False),
    "2 processes, 1 thread each": (2, 1, False),
    "2 processes, 1 thread each, fsdp": (2, 1, True),
}
STAGES = ("sft", "ppo", "memory")  # sft and ppo in seconds per step, memory in bytes per parameter
STEPS = 6


def child(stage: str, folder: str, fsdp: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_fast import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer, parallel
    from rlhf_fast.quickstart.model import train_tokenizer

    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(draw.choices(words, k=draw.randint(8, 120))) for _ in range(16 * STEPS)]
    tokenizer = train_tokenizer(texts, 1024, max_length=1024)
    torch.manual_seed(0)
    before = peak()
    vocab, width, layers = (1024, 512, 16) if stage == "memory" else (8192, 256, 4)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )  # fmt: skip
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if stage == "memory":
        config = SFTConfig(folder, per_device_train_batch_size=1, max_steps=3, fsdp=fsdp)
        trainer = SFTTrainer(config, model, train_dataset=[{"text": text} for text in texts], tokenizer=tokenizer)
    elif stage == "sft":
        config = SFTConfig(folder, per_device_train_batch_size=16 // processes, max_steps=STEPS, fsdp=fsdp)
        trainer = SFTTrainer(config, model, train_dataset=[{"text": text} for text in texts], tokenizer=tokenizer)
    else:
        config = PPOConfig(
            folder, batch_size=16, minibatch_size=8, micro_batch_size=4, response_length=32, num_ppo_epochs=2,
            total_episodes=16 * STEPS, share_trunk=True, fsdp=fsdp,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, model, reward=lambda prompts, responses, **columns: [float(len(set(r))) for r in responses],
            train_dataset=[{"prompt": text} for text in texts], tokenizer=tokenizer,
        )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())  # if the model is sharded, the parameters of all processes
    seconds, start = [], time.perf_counter()
    for _ in trainer:
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    grown = max(parallel.all_gather(peak() - before)) / parameters
    if parallel.rank() == 0:
        print("RESULT", grown if stage == "memory" else statistics.median(seconds[2:]))


def peak() -> int:
    """The peak resident memory of this process, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(stage: str, processes: int, threads: int, fsdp: bool) -> float:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if stage == "memory":
        settings["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)  # larger blocks go back to the system when they are freed
    with tempfile.TemporaryDirectory() as folder:
        told = ["--child", stage, folder, *(["fsdp"] if fsdp else [])]
        done = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), __file__, *told],
            env=os.environ | settings, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stage, folder, *fsdp = options.child
        child(stage, folder, bool(fsdp))
        return

    import torch

    from rlhf_fast.bench.harness import provenance

    rounds = {stage: [] for stage in STAGES}
    for k in range(options.rounds):
        ways = list(WAYS)[k % len(WAYS) :] + list(WAYS)[: k % len(WAYS)]
        for stage in STAGES:
            rounds[stage].append({way: measured(stage, *WAYS[way]) for way in ways})
            print(stage, {way: round(number, 3) for way, number in rounds[stage][-1].items()}, flush=True)
    rows = []
    for stage, done in rounds.items():
        numbers = {way: statistics.median(r[way] for r in done) for way in WAYS}
        alone = next(iter(WAYS))
        ratios = {way: statistics.median(r[alone] / r[way] for r in done) for way in WAYS}
        unit = "bytes_a_parameter" if stage == "memory" else "seconds_a_step"
        rows.append({"stage": stage, unit: numbers, "over_1_process_1_thread": ratios, "rounds": done})
    for row in rows:
        print(row["stage"], {way: f"{ratio:.2f}x" for way, ratio in row["over_1_process_1_thread"].items()})
    if options.json:
        facts = provenance(torch.device("cpu"), []) | {"OMP_WAIT_POLICY": "PASSIVE"}
        facts["command"] = " ".join(["python bench/bench_parallel.py", *sys.argv[1:]])
        options.json.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
