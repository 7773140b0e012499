"""Held-out accuracy of a tiny reward model from random weights, over every pair of hh-rlhf that is at hand.

    python bench/hh_reward.py --data data/hh-rlhf --json bench/results/hh_reward.json

Five folds; dialogues with the same first turn share one, so no question is both learned from and measured on. For each
fold a tokenizer and a reward model, neither of which has seen it, learn from the other four (no SFT: see docs). Every
one of CANDIDATES is run on every fold; a fold counts with the settings that were best on the other four, by one of two
rules: the highest accuracy, or the lowest loss. So a fold's own pairs never choose its settings, and all pairs count.
A pair is left out only where a transcript is malformed, and is counted; what is over max_length tokens loses the
beginning of its prompt. --runs keeps each run's directory with its report.html.

A run that is in the result file already (of the same settings) is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np

FOLDS = 5
MODEL = {"max_length": 1024, "batch_size": 16}
BASE = {"layers": 1, "hidden": 64, "vocab_size": 4096, "learning_rate": 3e-4, "epochs": 2, "target": 1.0}
CANDIDATES = [  # the first eight written down together, after looks at fold 0; the soft targets after these had run
    BASE,
    {**BASE, "epochs": 3},
    {**BASE, "epochs": 4},
    {**BASE, "learning_rate": 1e-3, "epochs": 1},
    {**BASE, "learning_rate": 1e-3},
    {**BASE, "vocab_size": 8192},
    {**BASE, "hidden": 128},
    {**BASE, "layers": 2},
    {**BASE, "target": 0.8},
    {**BASE, "target": 0.7},
    {**BASE, "target": 0.7, "epochs": 3},
    {**BASE, "target": 0.7, "learning_rate": 1e-3},
]  # target: the probability that the chosen reply is better; people agree on such pairs about seven times in ten

RULES = {"accuracy": lambda row: -row["accuracy"], "loss": lambda row: row["loss"]}


def folds_of(pairs: list[dict]) -> np.ndarray:
    """(N,) the fold of each pair, decided by its first turn."""
    first = sorted({pair["prompt"][0]["content"] for pair in pairs})
    np.random.default_rng(0).shuffle(first)
    fold = {text: i % FOLDS for i, text in enumerate(first)}
    return np.array([fold[pair["prompt"][0]["content"]] for pair in pairs])


def run(pairs: list[dict], folds: np.ndarray, fold: int, candidate: dict, directory: Path) -> dict:
    """Trains on the other folds -> what RewardTrainer measures on this one, with the floors."""
    from rlhf_fast import RewardConfig, RewardTrainer
    from rlhf_fast.models import load_reward_model
    from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer
    from rlhf_fast.trainers.common import set_seed

    train, held_out = ([p for p, f in zip(pairs, folds, strict=True) if (f == fold) == here] for here in (False, True))
    train = [{**pair, "chosen_prob": candidate["target"]} for pair in train]
    start = time.process_time()
    texts = [m["content"] for p in train for m in [*p["prompt"], *p["chosen"], *p["rejected"]]]
    tokenizer = train_tokenizer(texts, candidate["vocab_size"], max_length=MODEL["max_length"])
    model = tiny_llama(tokenizer, 0, candidate["hidden"], candidate["layers"], initializer_range=0.02)
    set_seed(0)
    trainer = RewardTrainer(
        RewardConfig(
            str(directory), learning_rate=candidate["learning_rate"], num_train_epochs=candidate["epochs"],
            per_device_train_batch_size=MODEL["batch_size"], max_length=MODEL["max_length"], on_overlong="keep_end",
            eval_steps=math.ceil(len(train) / MODEL["batch_size"]),
        ),
        load_reward_model(model, tokenizer), train_dataset=train, eval_dataset=held_out, tokenizer=tokenizer,
    )  # fmt: skip
    if len(trainer.items) != len(train) or len(trainer.eval_items) != len(held_out):
        raise SystemExit(f"fold {fold}: a reply alone is over {MODEL['max_length']} tokens: raise max_length")
    metrics = trainer.train().metrics
    judged = json.loads((directory / "preferences.json").read_text())
    return {
        "fold": fold, **candidate, "pairs": judged["pairs"], "learned_from": len(train), "accuracy": judged["accuracy"],
        "ties": judged["ties"], "loss": metrics["eval_loss"], "ece": judged["calibration"]["ece"],
        "reward_with_length": judged["length_correlation"]["reward_with_length"], "floors": judged["floors"],
        "weights": sum(p.numel() for p in trainer.model.parameters()),
        "cut": [len(report.truncated) for report in trainer.reports], "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def pooled(rows: list[dict]) -> dict:
    """Means over the pairs of some folds, and Wilson's interval of the accuracy at 95 %."""
    from rlhf_fast.data.baselines import wilson_interval

    count = sum(row["pairs"] for row in rows)

    def mean(value) -> float:
        return sum(row["pairs"] * value(row) for row in rows) / count

    accuracy = mean(lambda row: row["accuracy"])
    low, high = wilson_interval(accuracy, count)
    return {
        "pairs": count, "accuracy": accuracy, "low": low, "high": high,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        **{key: mean(lambda row, key=key: row[key]) for key in ("loss", "ece", "reward_with_length")},
        "floors": {name: mean(lambda row, name=name: row["floors"][name]) for name in rows[0]["floors"]},
    }  # fmt: skip


def by_rule(rows: list[dict]) -> dict:
    """By each rule: every fold's row of the settings that were best on the other folds, and all of these together."""
    table = {tuple(c.values()): [r for r in rows if all(r[k] == v for k, v in c.items())] for c in CANDIDATES}
    if any(len(found) < FOLDS for found in table.values()):
        return {}
    found = {}
    for rule, order in RULES.items():
        chosen = []
        for fold in range(FOLDS):
            others = {c: pooled([r for r in of if r["fold"] != fold]) for c, of in table.items()}
            best = min(others, key=lambda c, others=others: order(others[c]))
            chosen += [r for r in table[best] if r["fold"] == fold]
        found[rule] = {"rows": chosen, "all": pooled(chosen)}
    found["each candidate"] = [{**dict(zip(BASE, c, strict=True)), **pooled(of)} for c, of in table.items()]
    return found


def command(options: argparse.Namespace) -> str:
    """As it was called, without where this machine has the data."""
    return " ".join(["python", *sys.argv]).replace(str(options.data), "data/hh-rlhf")


def main() -> None:
    import torch

    from rlhf_fast.bench.harness import provenance
    from rlhf_fast.data.hh_rlhf import load_pairs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/hh-rlhf"), help="with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, help="where the run directories are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = [load_pairs(options.data / f"{name}.jsonl.gz") for name in ("train", "eval")]
    pairs = [pair for used, _ in loaded for pair in used]
    left_out = [str(item) for _, left in loaded for item in left]
    folds, rows = folds_of(pairs), []
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        rows = before["rows"] if before.get("model") == MODEL else []
    done = {(row["fold"], *(row[key] for key in BASE)) for row in rows}
    for fold, candidate in product(range(FOLDS), CANDIDATES):
        if (fold, *candidate.values()) in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            name = "-".join(f"{v:g}" for v in [fold, *candidate.values()])
            rows.append(run(pairs, folds, fold, candidate, (options.runs or Path(temporary)) / name))
        print({k: v for k, v in rows[-1].items() if k not in ("floors", "cut")}, rows[-1]["floors"], flush=True)
        if options.json:
            result = {
                "pairs": len(pairs), "left_out": left_out, "model": MODEL, "candidates": CANDIDATES, "rows": rows,
                "rules": by_rule(rows), **provenance(torch.device("cpu"), []), "command": command(options),
            }  # fmt: skip
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(by_rule(rows), indent=1))


if __name__ == "__main__":
    main()
