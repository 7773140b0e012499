"""What asking all principles in both orders costs a local judge, with shared prefixes and without.

    python bench/judge_scoring.py --data DIR [--out bench/results/cai/judge_scoring.json]

DIR holds Anthropic's constitutional-ai files (not part of this repository): 16 principles, 5 few-shots, the evaluation
pairs. The model has random weights, because neither time nor equality depends on them. Times are CPU seconds of the
process with one thread; the methods take turns, and the median of the rounds counts.

    naive      one sequence at a time, each through the whole model: what a loop over prompts does
    batched    the same sequences, sorted by length, in batches of at most 8192 tokens, padded on the right
    shared     judges/scoring.py: common prefixes go through the model once
    one judgement    one principle in both orders, naive: the questions that the paper asks per label
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from rlhf_fast.info import cpu_name
from rlhf_fast.judges import Constitution, LocalJudge, Pair
from rlhf_fast.judges.released import read_released_comparisons
from rlhf_fast.judges.scoring import label_logprobs
from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer

BUDGET = 8192
# The labels differ only in their last token, so naive scoring needs one sequence per question, not two.
LABELS = (" (A", " (B")


def questions_of(judge: LocalJudge, pairs: list[Pair]) -> list[list[list[int]]]:
    """The token sequences, one per label, of every question that the judge would ask."""
    asked = []
    score = judge.backend._scores
    judge.backend._scores = lambda requests: asked.extend(requests) or score(requests)
    judge.compare(pairs)
    judge.backend._scores = score
    return [[judge.backend._encode(r, label) for label in LABELS] for r in asked]


@torch.no_grad()
def naive(model, questions, batched: bool):
    """The log-probability of each label. Labels that differ only in their last token share a sequence."""
    rows = []  # (question, label, ids, where the label starts)
    for q, sequences in enumerate(questions):
        start = next(i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1)
        rows += [(q, label, ids, start) for label, ids in enumerate(sequences)]
    unique = sorted({tuple(ids[:-1]) for _, _, ids, _ in rows}, key=len)
    batches: list[list[tuple]] = []
    for ids in reversed(unique):
        if batched and batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= BUDGET:
            batches[-1].append(ids)
        else:
            batches.append([ids])
    hidden = {}
    for batch in batches:
        width = len(batch[0])
        states = model.model(torch.tensor([ids + (0,) * (width - len(ids)) for ids in batch]), use_cache=False)[0]
        for ids, state in zip(batch, states, strict=True):
            hidden[ids] = state
    scores = [[0.0, 0.0] for _ in questions]
    for q, label, ids, start in rows:
        logprobs = model.lm_head(hidden[tuple(ids[:-1])][start - 1 : len(ids) - 1]).log_softmax(-1)
        scores[q][label] = sum(logprobs[i, t].item() for i, t in enumerate(ids[start:]))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cai" / "judge_scoring.json")
    parser.add_argument("--pairs", type=int, default=2, help="pairs per batch of the judge")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; it has four layers")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    torch.set_num_threads(1)
    files = [options.data / f"RLMadison{part}.json" for part in ("Instructions", "FewShotPrompts")]
    constitution = Constitution.load(*files)
    rows = read_released_comparisons(options.data / "hhh_eval.jsonl")
    texts = [text for row in rows for text in (row["better"], row["worse"], *(m["content"] for m in row["prompt"]))]
    tokenizer = train_tokenizer([*texts, *(p.compare for p in constitution.principles)], 8192, max_length=4096)
    model = tiny_llama(tokenizer, 0, options.hidden).eval()
    chosen = rows[:: len(rows) // options.pairs][: options.pairs]

    ways, cells = {}, []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: cells.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()),
        with_kwargs=True,
    )
    for layout in ("anthropic", "principle_last"):
        judge = LocalJudge(
            model, tokenizer, Constitution(constitution.name, constitution.principles, compare_layout=layout,
                                           compare_few_shots=constitution.compare_few_shots))  # fmt: skip
        every = [Pair(r["prompt"], r["better"], r["worse"], constitution.principles) for r in chosen]
        one = [p._replace(principles=p.principles[:1]) for p in every]
        asked, single = questions_of(judge, every), questions_of(judge, one)
        ways[layout] = {
            "naive": lambda asked=asked: naive(model, asked, False),
            "batched": lambda asked=asked: naive(model, asked, True),
            "shared": lambda asked=asked: label_logprobs(model, asked, BUDGET),
            "one judgement": lambda single=single: naive(model, single, False),
            "one judgement, shared": lambda single=single: label_logprobs(model, single, BUDGET),
        }
    figures: dict = {layout: {name: {"seconds": []} for name in them} for layout, them in ways.items()}
    scores: dict = {}
    for _ in range(options.rounds):
        for layout, them in ways.items():
            for name, run in them.items():
                cells.clear()
                start = time.process_time()
                scores[layout, name] = torch.tensor(run())
                figures[layout][name]["seconds"].append(time.process_time() - start)
                figures[layout][name]["tokens_per_pair"] = sum(cells) / len(chosen)
    for layout, them in figures.items():
        for row in them.values():
            row["seconds"] = [round(s, 3) for s in row["seconds"]]
            row["cpu_seconds_per_pair"] = round(statistics.median(row["seconds"]) / len(chosen), 4)
        for name in ("batched", "shared"):
            them[name]["largest_difference_to_naive"] = float(
                (scores[layout, name] - scores[layout, "naive"]).abs().max()
            )
        for row in them.values():
            row["times_shared"] = round(row["cpu_seconds_per_pair"] / them["shared"]["cpu_seconds_per_pair"], 2)
    result = {
        "command": " ".join(["python", "bench/judge_scoring.py", *sys.argv[1:]]).replace(str(options.data), "DIR"),
        "commit": commit.stdout.strip(), "machine": {"cpu": cpu_name(), "python": platform.python_version(),
                                                     "torch": torch.__version__, "threads": 1},
        "model": f"Llama of {sum(p.numel() for p in model.parameters()):,} random weights, float32",
        "principles": len(constitution.principles), "orders": 2, "few_shots": len(constitution.compare_few_shots),
        "pairs": len(chosen), "layouts": figures,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for layout, them in figures.items():
        for name, row in them.items():
            print(f"{layout:15} {name:22} {row}")


if __name__ == "__main__":
    main()
