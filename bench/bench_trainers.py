"""SFT and reward model against TRL's trainers: the same model, data, batches, optimizer and precision, on the CPU.

    python bench/bench_trainers.py sft    --data data/hh-rlhf --json bench/results/sft.json
    python bench/bench_trainers.py reward --data data/hh-rlhf --json bench/results/reward.json

Every run has its own process, because peak memory is measured per process, and the implementations take turns. Only
the CPU time of training counts, without loading, tokenization and evaluation. All see the same token ids: ours encodes
them, TRL gets them in the form it documents (input_ids with completion_mask; chosen_ids and rejected_ids). Real tokens
are all tokens that are not padding. Both sequences of a pair count in full for every implementation, although ours
reads a shared prompt once.

A round is one pass over steps x batch records, different ones in each round. So all learn from the same tokens, and the
held-out loss is compared at equal tokens. TRL runs in two settings:

- its defaults (gradient checkpointing; batches at random, here in the order that ours draws, so that every step learns
  from the same records)
- tuned for this machine: no checkpointing, and batches grouped by length over the whole round. (Its own sampler would
  sort pools of a quarter of so few records, and pad more than it does in a long run.)

In both, SFT uses TRL's own chunked loss, which is made for a GPU and on a CPU scores prompts and padding too. So SFT
also runs with the loss that transformers' model computes from its logits, in a subclass with another compute_loss, as
TRL recommends for custom losses. TRL's padding-free batches and packing need flash attention, which a CPU does not
have.

--shape trains a model of the size of Qwen2 0.5B or SmolLM2 135M, with random weights, in place of the small Llama.

A round takes minutes (of the 0.5B model, half an hour). An existing result file is continued from the rounds it has, if
they have the same settings, data, machine, packages and commit.
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

from ppo_report import MODELS

OURS = "rlhf_fast"
DATA = "data/hh-rlhf"
GROUPED = "TRL, grouped by length, no checkpointing"
MODELS_LOSS = f"{GROUPED}, the model's own loss"
VARIANTS = {
    OURS: {},
    "TRL, its defaults": {"gradient_checkpointing": True, "train_sampling_strategy": "sequential"},
    GROUPED: {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"},
    MODELS_LOSS: {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"},
}  # fmt: skip


def variants(stage: str) -> list[str]:
    """MODELS_LOSS is for SFT only: TRL's reward loss is not chunked."""
    return [who for who in VARIANTS if stage == "sft" or who != MODELS_LOSS]


# -- one run, in its own process ---------------------------------------------------------------------------------------


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Measured:
    """A context manager that measures CPU seconds, wall seconds and peak memory."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = resident("VmRSS")
        self.cpu, self.wall = self._cpu(), time.perf_counter()
        return self

    def __exit__(self, *error):
        self.cpu, self.wall = self._cpu() - self.cpu, time.perf_counter() - self.wall
        self.peak = resident("VmHWM")

    @staticmethod
    def _cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def figures(self) -> dict:
        return {"cpu_seconds": self.cpu, "wall_seconds": self.wall, "peak_bytes": self.peak,
                "training_bytes": self.peak - self.before}  # fmt: skip


def drawn(folder: Path, options: dict, seed: int) -> tuple[list[int], list[int]]:
    """The records of a round, and the same records in the order that TRL gets: the order in which our trainer learns
    from them, or batches of records of similar length, with the batches shuffled."""
    from rlhf_fast.trainers.common import epoch_batches

    rows, wanted = json.loads((folder / "train.json").read_text()), options["steps"] * options["batch"]
    if wanted > len(rows):
        raise SystemExit(
            f"{options['steps']} steps of {options['batch']} are over one pass: there are {len(rows)} records"
        )
    chosen = random.Random(seed).sample(range(len(rows)), wanted)
    lengths = [max(len(ids) for key, ids in rows[i].items() if key.endswith("_ids")) for i in chosen]
    batches = epoch_batches(lengths, options["batch"], seed=seed, by_length=options["who"].startswith(GROUPED))
    return chosen, [chosen[i] for batch in batches for i in batch]


def run_ours(folder: Path, options: dict, seed: int) -> tuple:
    from rlhf_fast import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    from rlhf_fast.models import load_policy, load_reward_model, load_tokenizer

    config, trainer = (SFTConfig, SFTTrainer) if options["stage"] == "sft" else (RewardConfig, RewardTrainer)
    load = load_policy if options["stage"] == "sft" else load_reward_model
    records = json.loads((folder / "records.json").read_text())
    records = [records[i] for i in drawn(folder, options, seed)[0]]
    trainer = trainer(
        config(
            str(folder / "run"), seed=seed, max_steps=options["steps"], warmup_ratio=0.0,
            per_device_train_batch_size=options["batch"], learning_rate=options["learning_rate"],
            max_length=options["max_length"], bf16=options["bf16"],
        ),
        load(folder / "model"), train_dataset=records, tokenizer=load_tokenizer(folder / "model"),
    )  # fmt: skip
    with Measured() as measured:
        for _ in trainer:
            pass
    return trainer.model, trainer.num_tokens, measured


def run_trl(folder: Path, options: dict, seed: int) -> tuple:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

    sft = options["stage"] == "sft"
    load = AutoModelForCausalLM if sft else AutoModelForSequenceClassification
    rows = json.loads((folder / "train.json").read_text())
    rows = [rows[i] for i in drawn(folder, options, seed)[1]]
    config = trl.SFTConfig if sft else trl.RewardConfig
    arguments = config(
        output_dir=str(folder / "run"), seed=seed, max_steps=options["steps"], warmup_steps=0,
        per_device_train_batch_size=options["batch"], learning_rate=options["learning_rate"],
        max_length=options["max_length"], lr_scheduler_type="linear", use_cpu=True, bf16=options["bf16"], report_to=[],
        save_strategy="no", logging_steps=10, disable_tqdm=True, dataloader_pin_memory=False,
        # Given token ids, TRL would learn the prompts too; for pairs it would drop the lengths that it groups by.
        **({"completion_only_loss": True} if sft else {"remove_unused_columns": False}),
        **VARIANTS[options["who"]],
    )  # fmt: skip

    class ModelsLoss(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    trainer = (ModelsLoss if options["who"] == MODELS_LOSS else trl.SFTTrainer if sft else trl.RewardTrainer)(
        model=load.from_pretrained(folder / "model"), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    tokens, collate = [], trainer.data_collator

    def counting(examples):
        keys = ["input_ids"] if sft else ["chosen_ids", "rejected_ids"]
        tokens.append(sum(len(e[key]) for e in examples for key in keys))
        return collate(examples)

    trainer.data_collator = counting
    with Measured() as measured:
        trainer.train()
    return trainer.model, sum(tokens[: options["steps"]]), measured


def held_out(model, stage: str, rows: list[dict]) -> dict:
    """Loss on the held-out rows, by plain transformers, one sequence at a time; for pairs also the accuracy."""
    import torch
    from torch.nn import functional

    model.eval()
    with torch.no_grad():
        if stage == "sft":
            total = count = 0
            for row in rows:
                ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"][1:]).bool()
                logits = model(input_ids=ids).logits[0, :-1][mask]
                total += float(functional.cross_entropy(logits, ids[0, 1:][mask], reduction="sum"))
                count += int(mask.sum())
            return {"held_out_loss": total / count}
        reward = lambda ids: float(model(input_ids=torch.tensor([ids])).logits)  # noqa: E731
        margins = torch.tensor([reward(row["chosen_ids"]) - reward(row["rejected_ids"]) for row in rows])
        return {
            "held_out_loss": float(-functional.logsigmoid(margins).mean()),
            "held_out_accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        }


def child(folder: Path, options: dict, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    model, tokens, measured = (run_ours if options["who"] == OURS else run_trl)(folder, options, seed)
    figures = {"real_tokens": tokens, **measured.figures()}
    figures |= held_out(model, options["stage"], json.loads((folder / "eval.json").read_text()))
    print("RESULT " + json.dumps(figures))


# -- inputs of all implementations -------------------------------------------------------------------------------------


def prepare(folder: Path, options: dict, data: Path) -> dict:
    """Writes records.json for ours, train.json and eval.json (token ids) for TRL and evaluation, and model/."""
    import torch
    from ppo_worker import SHAPES, of_shape
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_fast.data.formats import comparisons, sft_examples
    from rlhf_fast.data.hh_rlhf import load_pairs
    from rlhf_fast.models import load_reward_model
    from rlhf_fast.quickstart.model import train_tokenizer

    pairs = {name: load_pairs(data / f"{name}.jsonl.gz")[0] for name in ("train", "eval")}
    texts = [m["content"] for row in pairs["train"] for m in [*row["prompt"], *row["chosen"], *row["rejected"]]]
    tokenizer = train_tokenizer(texts, options["tokenizer_vocab"], max_length=options["max_length"])
    common = {
        "max_position_embeddings": options["max_length"], "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    if options["shape"] in SHAPES:
        model = of_shape(options["shape"], **common)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options["vocab"], hidden_size=options["hidden"],
                intermediate_size=11 * options["hidden"] // 4, num_hidden_layers=options["layers"],
                num_attention_heads=options["hidden"] // 64, bos_token_id=None, **common,
            )
        )  # fmt: skip
    sft = options["stage"] == "sft"
    model = model if sft else load_reward_model(model, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    limit = {"max_length": options["max_length"], "on_overlong": "skip"}
    lengths, about = [], {"weights": sum(p.numel() for p in model.parameters()), "tokenizer": len(tokenizer)}
    for name in ("train", "eval"):
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} if sft else r for r in pairs[name]]
        kept, tokens = [], []
        for row in rows:  # one by one, to find those that are too long
            try:
                (item,), _ = (sft_examples if sft else comparisons)([row], tokenizer, **limit)
            except ValueError:
                continue
            kept.append(row)
            if sft:
                tokens.append(
                    {"input_ids": item.input_ids.tolist(), "completion_mask": item.response_mask.astype(int).tolist()}
                )
            else:
                chosen, rejected = (response.tolist() for response in item.responses)
                tokens.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": len(item)})
        if name == "train":
            (folder / "records.json").write_text(json.dumps(kept))
            about["records"] = len(kept)
        (folder / f"{name}.json").write_text(json.dumps(tokens if name == "train" else tokens[: options["eval_rows"]]))
        lengths += [len(t) for row in tokens for k, t in row.items() if k.endswith("_ids")] if name == "train" else []
    learned = [sum(r["completion_mask"]) for r in json.loads((folder / "train.json").read_text())] if sft else []
    spread = {"mean": statistics.mean(lengths), "median": statistics.median(lengths), "max": max(lengths)}
    about["tokens_a_sequence"] = spread
    return about | ({"learned_share": sum(learned) / sum(lengths)} if sft else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("sft", "reward"))
    parser.add_argument("--data", type=Path, default=Path(DATA), help="with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_000, help="of the model, like Llama 2; the tokenizer has fewer")
    parser.add_argument("--tokenizer_vocab", type=int, default=8192)
    parser.add_argument("--shape", choices=("llama", *MODELS), default="llama", help="others set all sizes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--eval_rows", type=int, default=200, help="held-out records that the loss is measured on")
    parser.add_argument("--bf16", action="store_true", help="as in TRL's defaults: products in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if run := options.pop("child"):
        child(Path(run["folder"]), run["options"], run["seed"])
        return
    if options["shape"] != "llama":
        from ppo_worker import SHAPES

        names = {"vocab": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers"}
        options |= {name: SHAPES[options["shape"]][key] for name, key in names.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"]), "OMP_WAIT_POLICY": "PASSIVE",
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    settings = {k: v for k, v in options.items() if k not in ("data", "json", "rounds")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        about = prepare(folder, settings, options["data"])
        facts = provenance(options)
        same = {key: facts[key] for key in ("machine", "packages", "commit")}
        names = variants(options["stage"])
        runs = finished(options["json"], {"settings": settings, "model_and_data": about, **same}, names)
        for seed in range(len(runs[OURS]), options["rounds"]):
            done = {}
            for who in names[seed % len(names) :] + names[: seed % len(names)]:
                run = {"folder": temporary, "options": {**settings, "who": who}, "seed": seed}
                done[who] = in_a_process(options["stage"], run, environment)
                print(seed, who, {k: round(v, 4) for k, v in done[who].items()}, flush=True)
            for who, figures in done.items():
                runs[who].append(figures)
            if options["json"]:
                result = {**summarized(runs), "settings": settings, "model_and_data": about, **facts}
                options["json"].write_text(json.dumps({"stage": options["stage"], **result}, indent=1) + "\n")


def finished(path: Path | None, same: dict, names: list[str]) -> dict[str, list[dict]]:
    """The rounds of a result file if it matches `same`; none for a modified tree ("+"), whose state is unknown."""
    before = json.loads(path.read_text()) if path and path.exists() else {}
    changed = (same["commit"] or "+").endswith("+")
    if changed or any(before.get(key) != value for key, value in same.items()):
        return {who: [] for who in names}
    return {row["who"]: row["rounds"] for row in before["rows"]}


def in_a_process(stage: str, run: dict, environment: dict) -> dict:
    command = [sys.executable, __file__, stage, "--child", json.dumps(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run['options']['who']}:\n{done.stderr}")
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))


def summarized(runs: dict[str, list[dict]]) -> dict:
    """Medians over the rounds. Ratios to ours are taken within each round, then their median."""
    rows = []
    for who, rounds in runs.items():
        row = {"who": who, **{k: statistics.median(r[k] for r in rounds) for k in rounds[0]}}
        speed = [r["real_tokens"] / r["cpu_seconds"] for r in rounds]
        ours = [r["real_tokens"] / r["cpu_seconds"] for r in runs[OURS]]
        row["real_tokens_per_cpu_second"] = statistics.median(speed)
        row["ours_is_faster_by"] = statistics.median(a / b for a, b in zip(ours, speed, strict=True))
        for key in ("peak_bytes", "training_bytes"):
            row[f"our_{key}_over_its"] = statistics.median(
                a[key] / b[key] for a, b in zip(runs[OURS], rounds, strict=True)
            )
        rows.append({**row, "rounds": rounds})
    return {"rows": rows}


def provenance(options: dict) -> dict:
    import torch

    from rlhf_fast.bench.harness import provenance

    torch.set_num_threads(options["threads"])
    facts = provenance(torch.device("cpu"), [])
    return facts | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "command": " ".join(["python bench/bench_trainers.py", *sys.argv[1:]]).replace(str(options["data"]), DATA),
    }


if __name__ == "__main__":
    main()
