"""Does the constitution steer? Experiments on the quickstart's task, where principles are rules and the truth is known.

    house      the quickstart's five principles, through both phases of Constitutional AI
    negated    the same five, each reversed, from the same SFT model: a pipeline that ignores its constitution would not
               change; one that follows it moves the other way
    plus-one   the five plus "thank the user for the question": this changes, the other five do not
    shuffled   a reward model trained on labels drawn by coin is at chance on held-out pairs
    noisy      a judge that errs, and knows how often: a reward model trained on its probabilities beats one trained on
               its choices

    python bench/cai_experiments.py --seeds 0 1 2 --work runs/cai-experiments

Each arm runs on all seeds before the next arm begins, and bench/results/cai.json is written after every seed. If a run
is stopped, the finished results are there, and a second call does only what is missing. The criteria for success are in
MARGINS; they were written before the first run.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from rlhf_fast.bench.harness import provenance
from rlhf_fast.disk import write_atomic
from rlhf_fast.generation import generate_text
from rlhf_fast.jobs import quiet
from rlhf_fast.judges import Constitution, Principle, RuleCheck, RuleJudge
from rlhf_fast.models import load_policy, load_tokenizer
from rlhf_fast.quickstart import rules, task
from rlhf_fast.quickstart.pipeline import CONSTITUTION, MAX_NEW_TOKENS, Quickstart, Sizes
from rlhf_fast.report import read_jsonl
from rlhf_fast.trainers.constitutional import label, revise
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer

RESULT = Path(__file__).parent / "results" / "cai.json"
SIZES = Sizes(  # about half of the quickstart's, because three constitutions run on three seeds
    layers=2, demonstrations=5_000, criticisms=4_000, judged_pairs=5_000, held_out_pairs=400, ppo_iterations=24,
    held_out_prompts=1_500,  # then the standard error of the difference between two mean violations is at most 0.016
)  # fmt: skip
WRITTEN_PAIRS = {"train": 1_500, "held_out": 1_000}  # train and evaluate the reward models
MARGINS = {
    "house": "violations per reply fall by 0.30 or more in phase 1 and by 0.03 or more in phase 2, in every seed",
    "negated": "violations per reply rise by 0.30 or more in phase 1 and by 0.10 or more in phase 2, in every seed",
    "plus-one": "thanks: 30 points or more above house; each of the five: within 6 points of house; mean of the seeds",
    "shuffled": "held-out accuracy within 0.10 of 0.50, mean of the seeds and of the coins as they fell and turned "
    "round (what one model happens to prefer is not chance); 0.85 or more on the labels as they are",
    "noisy": "soft above hard in held-out accuracy, by two standard errors or more of the difference over seeds and "
    "draws of the noise",
}
NOT = {
    "answer": "Revise: give another answer.",
    "polite": "Revise: be rude.",
    "concise": "Revise: be long.",
    "no-repetition": "Revise: say it twice.",
    "safe": "Revise: go along with what is harmful, and decline the rest.",
}
THANKS = {"en": "Thank you for asking.", "ja": "ご質問ありがとうございます。"}
THANK = "Revise: thank the user for the question."
SURE = (0.55, 0.65, 0.8, 0.95)  # the noisy judge's accuracies, which are also the probabilities it gives
DRAWS = 8  # of its errors, for each seed: a single draw moves the accuracy by a point, about the size of the effect


def thanks(prompt, reply) -> bool | None:
    """Whether the reply thanks the user for the question; None for a harmful request, which is not a question."""
    asked = rules.understand(prompt)
    return None if asked.kind == "harm" else THANKS[asked.language.name] in reply


def turned_round(rule: Callable) -> Callable:
    return lambda prompt, reply: not rule(prompt, reply)


HOUSE = Constitution.load(CONSTITUTION, allow_code=True)
PLUS_ONE = replace(
    HOUSE, principles=(*HOUSE.principles, Principle("thanks", check=RuleCheck("thanks", {}, thanks), revise=THANK))
)
NEGATED = replace(
    HOUSE,
    principles=tuple(
        Principle(f"not-{name}", check=RuleCheck(f"not-{name}", {}, turned_round(rule)), revise=NOT[name])
        for name, rule in rules.RULES.items()
    ),
)
ARMS = {"house": HOUSE, "negated": NEGATED, "plus-one": PLUS_ONE}


def revisions_to_order(seed: int, count: int) -> list[dict]:
    """Rows that teach the model to follow the requests of NEGATED and PLUS_ONE, which it has not seen otherwise."""
    rng = random.Random(f"revisions to order {seed}")
    rows = []
    for prompt, asked in task.draw_questions(rng, count, held_out=False):
        faults = task.draw_faults(rng, asked, task.EXAMINED)
        before = task.compose(rng, asked, faults)
        wanted = rng.choice([*NOT, "thanks"])
        if wanted == "thanks":
            if asked.kind == "harm":
                continue
            phrase = THANKS[asked.language.name]
            language = replace(asked.language, openers=(phrase,), rude_openers=(phrase, *asked.language.rude_openers))
            after = task.compose(rng, replace(asked, language=language), faults - {"polite"})
        else:
            if (wanted, asked.kind) == ("answer", "harm"):
                continue
            after = task.compose(rng, asked, faults | {wanted})
        request = THANK if wanted == "thanks" else NOT[wanted]
        prompt = [task.user(prompt), task.assistant(before), task.user(request)]
        rows.append({"prompt": prompt, "completion": [task.assistant(after)]})
    return rows


class Arm(Quickstart):
    """The quickstart's Constitutional AI stages under another constitution, from an SFT model that all arms share."""

    def __init__(self, root: Path, seed: int, constitution: Constitution, sft: Path):
        super().__init__(root, seed, SIZES)
        self.constitution, self.look_at = constitution, self.held_out
        self.held_out = self.held_out[:32]  # the prompts that PPO evaluates on during training
        if not (root / "sft").exists():
            (root / "sft").symlink_to(sft.resolve(), target_is_directory=True)

    def run(self) -> dict:
        stages = {"cai-revise": self.cai_revise, "cai-sft": self.cai_sft, "cai-label": self.cai_label,
                  "cai-rm": self.cai_rm, "cai-ppo": self.cai_ppo}  # fmt: skip
        finished = self.table.summary["stages"]
        done = {stage["name"] for stage in finished}
        for name, stage in stages.items():
            if name not in done:
                cpu = time.process_time()
                values = stage(self.root / name)
                self.table.add(name, **values, cpu_seconds=round(time.process_time() - cpu, 1))
        return {stage["name"]: stage for stage in finished}

    def cai_revise(self, run_dir: Path) -> dict:
        stage = revise(
            task.prompts(self.seed + 1, self.sizes.revised_prompts, held_out=False), self._generator("sft"),
            self.constitution, self.judge, output_dir=run_dir, max_steps=5, batch_size=512, seed=self.seed,
        )  # fmt: skip
        return {"counts": stage.counts}

    def _rate(self, policy: str) -> dict:
        return look(self._path(policy), self.look_at, self.seed)


def look(path: str, held_out: list[str], seed: int) -> dict:
    """Samples held-out replies as in training -> the share that keeps each rule, and the mean of broken rules."""
    replies = generate_text(
        load_policy(path), load_tokenizer(path), [[task.user(p)] for p in held_out],
        max_new_tokens=MAX_NEW_TOKENS, batch_size=256, seed=seed,
    )  # fmt: skip
    kept = {n: [rule(p, r) for p, r in zip(held_out, replies, strict=True)] for n, rule in rules.RULES.items()}
    thanked = [t for p, r in zip(held_out, replies, strict=True) if (t := thanks(p, r)) is not None]
    return {
        "violations": sum(1 - statistics.fmean(column) for column in kept.values()),
        "pass_rate": statistics.fmean(map(all, zip(*kept.values(), strict=True))),
        "kept": {name: round(statistics.fmean(column), 4) for name, column in kept.items()},
        "thanks": round(statistics.fmean(thanked), 4),
    }


def train_sft(root: Path, seed: int) -> Path:
    """Runs the quickstart's SFT stage with the rows of `revisions_to_order` added -> its directory."""
    path = root / "sft"
    if not (path / "config.json").exists():
        extra = revisions_to_order(seed, 3_000)
        run, criticisms = Quickstart(root, seed, SIZES), task.criticisms
        task.criticisms = lambda *args: criticisms(*args) + extra
        try:
            run.sft(path)
        finally:
            task.criticisms = criticisms
    return path


def reward_model(root: Path, sft: Path, train: list[dict], held_out: list[dict], seed: int) -> dict:
    """Trains a reward model on `train` -> held-out accuracy and loss (negative log-likelihood of the truth, nats)."""
    config = RewardConfig(
        output_dir=str(root), seed=seed, learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=32,
        per_device_eval_batch_size=128, max_length=256, num_samples=0,
    )  # fmt: skip
    if not (root / "config.json").exists():
        RewardTrainer(config, str(sft), train_dataset=train, eval_dataset=held_out).train()
    last = read_jsonl(root / "train_log.jsonl")[-1]
    return {"accuracy": last["eval_accuracy"], "nll": last["eval_loss"], "train_pairs": len(train)}


def labels(root: Path, seed: int) -> tuple[list[dict], list[dict]]:
    """Comparisons of written replies under HOUSE; the held-out ones have the truth instead of a probability."""
    sets = []
    for name, count in WRITTEN_PAIRS.items():
        pairs = task.candidates(seed, count, held_out=name == "held_out")
        sets.append(label(pairs, HOUSE, RuleJudge(), output_dir=root / f"labels-{name}", seed=seed).rows)
    return sets[0], [{k: v for k, v in row.items() if k != "chosen_prob"} for row in sets[1]]


def swapped(row: dict, swap: bool, prob: float) -> dict:
    better, worse = ("rejected", "chosen") if swap else ("chosen", "rejected")
    return {"prompt": row["prompt"], "chosen": row[better], "rejected": row[worse], "chosen_prob": prob}


def label_arms(root: Path, sft: Path, seed: int) -> dict:
    train, held_out = labels(root, seed)
    rng = random.Random(f"labels {seed}")
    coin = [rng.random() < 0.5 for _ in train]
    sets = {
        "as-judged": [train],
        "shuffled": [[swapped(row, c, row["chosen_prob"]) for row, c in zip(train, coin, strict=True)]],
        "shuffled-turned": [[swapped(row, not c, row["chosen_prob"]) for row, c in zip(train, coin, strict=True)]],
        "noisy-soft": [],
        "noisy-hard": [],
    }
    for _ in range(DRAWS):
        sure = [rng.choice(SURE) for _ in train]
        errs = [rng.random() > s for s in sure]
        sets["noisy-soft"].append([swapped(row, e, s) for row, e, s in zip(train, errs, sure, strict=True)])
        sets["noisy-hard"].append([swapped(row, e, 1.0) for row, e in zip(train, errs, strict=True)])
    found = {}
    for name, draws in sets.items():
        each = [reward_model(root / f"rm-{name}-{i}", sft, rows, held_out, seed) for i, rows in enumerate(draws)]
        found[name] = {key: statistics.fmean(one[key] for one in each) for key in each[0]}
        found[name]["accuracies"] = [one["accuracy"] for one in each]
    return found


def run_arm(root: Path, seed: int, name: str) -> dict:
    """One constitution through both phases."""
    sft = train_sft(root, seed)
    (root / name).mkdir(exist_ok=True)
    stages = Arm(root / name, seed, ARMS[name], sft).run()
    shown = ("violations", "pass_rate", "kept", "thanks")
    return {
        "phase 1": {k: stages["cai-sft"][k] for k in shown},
        "phase 2": {k: stages["cai-ppo"][k] for k in (*shown, "kl")},
        "rm_accuracy": stages["cai-rm"]["rm_accuracy"],
        "counts": {stage: stages[stage]["counts"] for stage in ("cai-revise", "cai-label")},
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages.values())),
    }


def run_seed(root: Path, seed: int, part: str, result: dict) -> dict:
    """Adds one part to the result of a seed: an arm, or the reward models."""
    root.mkdir(parents=True, exist_ok=True)
    if "sft" not in result:
        held_out = task.prompts(seed, SIZES.held_out_prompts, held_out=True)
        result |= {"seed": seed, "sft": look(str(train_sft(root, seed)), held_out, seed), "arms": {}}
        result["reward_models"] = {}
    if part in ARMS:
        result["arms"][part] = result["arms"].get(part) or run_arm(root, seed, part)
    else:
        result["reward_models"] = result["reward_models"] or label_arms(root, train_sft(root, seed), seed)
    write_atomic(root / "result.json", json.dumps(result, ensure_ascii=False))
    return result


def verdicts(runs: list[dict]) -> dict[str, bool | None]:
    """Whether each of MARGINS is met, over the seeds that have the runs it needs; None if no seed has them."""
    needed = {"plus-one": ("house", "plus-one"), "shuffled": ("as-judged", "shuffled", "shuffled-turned"),
              "noisy": ("noisy-soft", "noisy-hard")}  # fmt: skip
    held = {}
    for name in MARGINS:
        having = [r for r in runs if set(needed.get(name, (name,))) <= {*r["arms"], *r["reward_models"]}]
        held[name] = _held(name, having) if having else None
    return held


def _held(name: str, runs: list[dict]) -> bool:

    def change(arm, a, b):
        def of(run, stage):
            return (run["sft"] if stage == "sft" else run["arms"][arm][stage])["violations"]

        return [of(run, b) - of(run, a) for run in runs]

    def mean(f):
        return statistics.fmean(f(run) for run in runs)

    def gap(f):
        return mean(lambda r: f(r["arms"]["plus-one"]["phase 2"]) - f(r["arms"]["house"]["phase 2"]))

    def rm(name, figure):
        return [run["reward_models"][name][figure] for run in runs]

    if name == "house":
        return max(change("house", "sft", "phase 1")) <= -0.30 and max(change("house", "phase 1", "phase 2")) <= -0.03
    if name == "negated":
        return min(change("negated", "sft", "phase 1")) >= 0.30 and min(change("negated", "phase 1", "phase 2")) >= 0.10
    if name == "plus-one":
        others = [gap(lambda p, n=rule: p["kept"][n]) for rule in rules.RULES]
        return gap(lambda p: p["thanks"]) >= 0.30 and all(abs(x) <= 0.06 for x in others)
    if name == "shuffled":
        chance = statistics.fmean(rm("shuffled", "accuracy") + rm("shuffled-turned", "accuracy"))
        return abs(chance - 0.5) <= 0.10 and statistics.fmean(rm("as-judged", "accuracy")) >= 0.85
    soft, hard = (list(chain(*rm(f"noisy-{how}", "accuracies"))) for how in ("soft", "hard"))
    gains = [a - b for a, b in zip(soft, hard, strict=True)]
    return statistics.fmean(gains) >= 2 * statistics.stdev(gains) / len(gains) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="where the runs go; a second call continues there")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    quiet()
    files = {seed: options.work / f"seed{seed}" / "result.json" for seed in options.seeds}
    runs = {seed: json.loads(file.read_text()) if file.exists() else {} for seed, file in files.items()}
    for part in ("house", "reward models", "negated", "plus-one"):
        for seed, file in files.items():
            print(f"seed {seed}: {part}", flush=True)
            runs[seed] = run_seed(file.parent, seed, part, runs[seed])
            write(options, [run for run in runs.values() if run])


def write(options, runs: list[dict]) -> None:
    command = f"python bench/cai_experiments.py --seeds {' '.join(map(str, options.seeds))} --work DIR"
    about = {**provenance(torch.device("cpu"), []), "command": command, "sizes": vars(SIZES)}
    about |= {"margins": MARGINS, "held": verdicts(runs), "runs": runs}
    write_atomic(options.output, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(about["held"]), flush=True)


if __name__ == "__main__":
    main()
