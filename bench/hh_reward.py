"""Held-out accuracy of a tiny reward model from random weights, over every available pair of hh-rlhf.

    python bench/hh_reward.py --data data/hh-rlhf --json bench/results/hh_reward.json

There are twenty folds. Dialogues with the same first turn share a fold, so no question is used both for training and
for measuring. For each fold, a tokenizer and a reward model are trained on the other folds (no SFT: see
docs/hh_rlhf.md).

Every one of CANDIDATES runs on every fold with every one of SEEDS. The candidate for a fold is the one with the highest
accuracy on the other folds, as a mean over the seeds; the fold's result is that candidate's mean over the seeds. So a
fold's own pairs do not influence the choice of the candidate, no seed is picked, no models are combined, and all pairs
count. The candidates were written down after looking at the folds EXPLORED; `confirmed` is the result, on the
remaining folds, of the candidate that is best on EXPLORED.

A pair is left out, and counted, only if a transcript is malformed. A text longer than max_length tokens loses the
beginning of its prompt. --runs keeps each run's directory with its report.html.

A run that is already in the result file with the same settings is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

FOLDS, SEEDS = 20, (50, 51, 52)
EXPLORED = tuple(fold for fold in range(FOLDS) if fold % 5 < 2)  # these were folds 0 and 1 when there were five
MODEL = {"max_length": 1024, "hidden": 64, "vocab_size": 4096, "epochs": 2}
BASE = {"turns": 0, "layers": 1, "batch_size": 64, "learning_rate": 1e-3}
CANDIDATES = [  # turns: the number of last messages of the prompt that the model reads; None: all
    BASE,
    {**BASE, "layers": 2},
    {**BASE, "learning_rate": 7e-4},
    {**BASE, "batch_size": 32},
    {**BASE, "batch_size": 16, "learning_rate": 3e-4},
    {**BASE, "turns": 3},
    {**BASE, "turns": None, "batch_size": 16, "learning_rate": 3e-4},
]


def folds_of(pairs: list[dict]) -> np.ndarray:
    """(N,) the fold of each pair, which depends on its first turn."""
    first = sorted({pair["prompt"][0]["content"] for pair in pairs})
    np.random.default_rng(0).shuffle(first)
    fold = {text: i % FOLDS for i, text in enumerate(first)}
    return np.array([fold[pair["prompt"][0]["content"]] for pair in pairs])


def last_turns(pair: dict, turns: int | None) -> dict:
    """The pair with only the last turns of its prompt; turns = 0 leaves two replies without a prompt."""
    prompt = pair["prompt"] if turns is None else pair["prompt"][max(0, len(pair["prompt"]) - turns) :]
    return {**({"prompt": prompt} if prompt else {}), "chosen": pair["chosen"], "rejected": pair["rejected"]}


def run(pairs: list[dict], folds: np.ndarray, fold: int, candidate: dict, seed: int, directory: Path) -> dict:
    """Trains on the other folds -> what RewardTrainer measures on this one, including the floors."""
    import torch

    from rlhf_fast import RewardConfig, RewardTrainer
    from rlhf_fast.models import load_reward_model
    from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer
    from rlhf_fast.trainers.common import set_seed

    train, held_out = ([p for p, f in zip(pairs, folds, strict=True) if (f == fold) == here] for here in (False, True))
    train, held_out = ([last_turns(pair, candidate["turns"]) for pair in some] for some in (train, held_out))
    torch.set_num_threads(1)
    start = time.process_time()
    texts = [m["content"] for p in train for m in [*p.get("prompt", []), *p["chosen"], *p["rejected"]]]
    tokenizer = train_tokenizer(texts, MODEL["vocab_size"], max_length=MODEL["max_length"])
    model = tiny_llama(tokenizer, seed, MODEL["hidden"], candidate["layers"], initializer_range=0.02)
    set_seed(seed)
    trainer = RewardTrainer(
        RewardConfig(
            str(directory), seed=seed, learning_rate=candidate["learning_rate"], num_train_epochs=MODEL["epochs"],
            per_device_train_batch_size=candidate["batch_size"], max_length=MODEL["max_length"], on_overlong="keep_end",
            eval_steps=math.ceil(len(train) / candidate["batch_size"]),
        ),
        load_reward_model(model, tokenizer), train_dataset=train, eval_dataset=held_out, tokenizer=tokenizer,
    )  # fmt: skip
    if len(trainer.items) != len(train) or len(trainer.eval_items) != len(held_out):
        raise SystemExit(f"fold {fold}: a reply alone is over {MODEL['max_length']} tokens: raise max_length")
    metrics = trainer.train().metrics
    judged = json.loads((directory / "preferences.json").read_text())
    return {
        "fold": fold, "seed": seed, **candidate, "pairs": judged["pairs"], "learned_from": len(train),
        "accuracy": judged["accuracy"], "ties": judged["ties"],
        "loss": metrics["eval_loss"], "ece": judged["calibration"]["ece"],
        "reward_with_length": judged["length_correlation"]["reward_with_length"], "floors": judged["floors"],
        "weights": sum(p.numel() for p in trainer.model.parameters()),
        "cut": [len(report.truncated) for report in trainer.reports], "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def pooled(rows: list[dict]) -> dict:
    """Means over the pairs of some folds and over the seeds, and Wilson's 95 % interval of the accuracy.

    The interval counts each pair once, so more seeds do not narrow it.
    """
    from rlhf_fast.data.floors import wilson_interval

    def mean(value, rows=rows) -> float:
        return sum(row["pairs"] * value(row) for row in rows) / sum(row["pairs"] for row in rows)

    def accuracy(row: dict) -> float:
        return row["accuracy"]

    count, average = sum(row["pairs"] for row in rows) // len(SEEDS), mean(accuracy)
    low, high = wilson_interval(average, count)
    return {
        "pairs": count, "accuracy": average, "low": low, "high": high,
        "standard_error": math.sqrt(average * (1 - average) / count),
        "of each seed": [mean(accuracy, [row for row in rows if row["seed"] == seed]) for seed in SEEDS],
        **{key: mean(lambda row, key=key: row[key]) for key in ("loss", "ece", "reward_with_length")},
        "floors": {name: mean(lambda row, name=name: row["floors"][name]) for name in rows[0]["floors"]},
    }  # fmt: skip


def summary(rows: list[dict]) -> dict:
    """Results of each candidate, of each fold with the candidate that was best on the others, and of all folds."""
    table = [[row for row in rows if all(row[k] == v for k, v in c.items())] for c in CANDIDATES]
    if any(len(found) < FOLDS * len(SEEDS) for found in table):
        return {}

    def part(candidate: int, folds) -> list[dict]:
        return [row for row in table[candidate] if row["fold"] in folds]

    def best_on(folds) -> int:
        return max(range(len(CANDIDATES)), key=lambda c: pooled(part(c, folds))["accuracy"])

    rest = set(range(FOLDS)) - set(EXPLORED)
    chosen = [best_on(set(range(FOLDS)) - {fold}) for fold in range(FOLDS)]
    first = best_on(EXPLORED)
    return {
        "folds": [{"fold": f, **CANDIDATES[c], **pooled(part(c, {f}))} for f, c in enumerate(chosen)],
        "all": pooled([row for f, c in enumerate(chosen) for row in part(c, {f})]),
        "confirmed": {**CANDIDATES[first], "explored": list(EXPLORED), **pooled(part(first, rest))},
        "each candidate": [{**c, **pooled(of)} for c, of in zip(CANDIDATES, table, strict=True)],
    }


def run_in(runs: Path | None, pairs: list[dict], folds: np.ndarray, fold: int, candidate: dict, seed: int) -> dict:
    """Calls run in a subdirectory of `runs`, or in a temporary directory."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = (runs or Path(temporary)) / "-".join(map(str, [fold, seed, *candidate.values()]))
        return run(pairs, folds, fold, candidate, seed, directory)


def command(options: argparse.Namespace, runs: str = "runs/hh") -> str:
    """The command line, without this machine's paths of the data and the run directories."""
    called = " ".join(["python", *sys.argv]).replace(str(options.data), "data/hh-rlhf")
    return called.replace(str(options.runs), runs) if options.runs else called


def main() -> None:
    import torch

    from rlhf_fast.bench.harness import provenance
    from rlhf_fast.data.hh_rlhf import load_pairs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/hh-rlhf"), help="with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, help="keep the run directories here")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, with one thread each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = [load_pairs(options.data / f"{name}.jsonl.gz") for name in ("train", "eval")]
    pairs = [pair for used, _ in loaded for pair in used]
    left_out = [str(item) for _, left in loaded for item in left]
    folds, rows = folds_of(pairs), []
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        rows = before["rows"] if (before.get("model"), before.get("folds")) == (MODEL, FOLDS) else []
    done = {(row["fold"], row["seed"], *(row[key] for key in BASE)) for row in rows}
    grid = product(range(FOLDS), SEEDS, CANDIDATES)
    left = [(fold, candidate, seed) for fold, seed, candidate in grid if (fold, seed, *candidate.values()) not in done]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for row in pool.map(partial(run_in, options.runs, pairs, folds), *zip(*left, strict=True)):
            rows.append(row)
            print({k: v for k, v in row.items() if k not in ("floors", "cut")}, row["floors"], flush=True)
            if options.json:
                result = {
                    "pairs": len(pairs), "left_out": left_out, "model": MODEL, "folds": FOLDS,
                    "candidates": CANDIDATES, "rows": rows, "summary": summary(rows),
                    **provenance(torch.device("cpu"), []), "command": command(options),
                }  # fmt: skip
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
