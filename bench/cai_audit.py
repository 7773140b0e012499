"""The card of a tiny judge on real prompts, and the report on a constitution, to show what both look like.

    python bench/cai_audit.py --data DIR --work DIR

DIR holds hh-rlhf/train.jsonl.gz and constitutional-ai/hhh_eval.jsonl (by Anthropic; not part of this repository). The
judge is a Llama of a million weights. It learns the comparison format from a few hundred pairs of hh-rlhf, each with a
principle drawn at random and in both orders. It is too weak to label with, and its card says so.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch

from rlhf_fast.bench.harness import provenance
from rlhf_fast.data import hh_rlhf
from rlhf_fast.jobs import quiet
from rlhf_fast.judges import Calibration, Constitution, LocalJudge, audit, report_on
from rlhf_fast.judges.layouts import COMPARE_LABELS, COMPARE_LAYOUTS
from rlhf_fast.judges.released import read_released_comparisons
from rlhf_fast.models import load_policy, load_tokenizer
from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

RESULT = Path(__file__).parent / "results" / "cai_audit.json"
LONGEST = 1024  # tokens per question; longer questions are recorded as "too_long"


def train_judge(pairs: list[dict], constitution: Constitution, path: Path, seed: int = 0) -> None:
    """Trains the judge to continue a comparison with the label that people chose. Each pair is shown in both orders."""
    question, prompt = COMPARE_LAYOUTS[constitution.compare_layout]
    rng, rows = random.Random(seed), []
    asked = [p.compare for p in constitution.principles if p.compare]
    for pair in pairs:
        better, worse = pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]
        instruction = rng.choice(asked)
        for first in (True, False):
            replies = (better, worse) if first else (worse, better)
            text = prompt(None, [], question(pair["prompt"], *replies, instruction))
            rows.append({"prompt": text, "completion": COMPARE_LABELS[0 if first else 1]})
    tokenizer = train_tokenizer([row["prompt"] for row in rows], 2048, max_length=LONGEST)
    model = tiny_llama(tokenizer, seed, layers=2)
    config = SFTConfig(
        output_dir=str(path), seed=seed, learning_rate=1e-3, per_device_train_batch_size=8, num_train_epochs=1,
        max_length=LONGEST, on_overlong="skip", num_samples=0,
    )  # fmt: skip
    SFTTrainer(config, model, tokenizer=tokenizer, train_dataset=rows).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300, help="number of hh-rlhf pairs that the judge learns from")
    options = parser.parse_args()
    quiet()
    constitution = Constitution.load("safe-en")
    constitution = dataclasses.replace(constitution, compare_layout="principle_last", compare_few_shots=())
    path = options.work / "tiny-judge"
    if not (path / "config.json").exists():
        pairs, _ = hh_rlhf.load_pairs(options.data / "hh-rlhf" / "train.jsonl.gz")
        train_judge(pairs[: options.pairs], constitution, path)
    torch.manual_seed(0)
    np.random.seed(0)
    judge = LocalJudge(load_policy(str(path)), load_tokenizer(str(path)), constitution)
    rows = read_released_comparisons(options.data / "constitutional-ai" / "hhh_eval.jsonl")
    card = audit(rows, constitution, judge, output_dir=options.work / "audit")
    calibration = Calibration(**card["calibration"])
    report = report_on(options.work / "audit", name=constitution.name, calibration=calibration)
    command = f"python bench/cai_audit.py --data DIR --work DIR --pairs {options.pairs}"
    about = {**provenance(torch.device("cpu"), []), "command": command}
    card["judge"]["model"] = path.name
    RESULT.write_text(json.dumps(about | {"card": card, "report": report}, indent=1, ensure_ascii=False) + "\n")
    print(options.work / "audit" / "audit.html", options.work / "audit" / "constitution.html", RESULT)


if __name__ == "__main__":
    main()
