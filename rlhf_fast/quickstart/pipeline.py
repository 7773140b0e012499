"""All stages, from random weights to an aligned model, on a task whose truth is known.

    sft          demonstrations of mixed quality, including critiques and revisions
    rm           pairs sampled from the SFT model, with an annotator's choices (rules with a little noise)
    ppo          from sft, against rm
    cai-revise   from sft: check, critique and revise under the constitution         phase 1
    cai-sft      the SFT model, trained on its selected revisions
    cai-label    pairs sampled from cai-sft, compared by the constitution's judge    phase 2
    cai-rm       a reward model on the soft labels
    cai-ppo      from cai-sft, against cai-rm

Each stage is a directory below the root, made by the public trainers. After every stage that changes the policy, it
answers the same held-out prompts and the rules check the answers: this is the true score. A policy is trained on the
proxy, a reward model. A stage is added to summary.json when it is done, so a second call continues where the first
ended.
"""

import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from .._version import __version__
from ..disk import read_json
from ..errors import ConfigError
from ..generation import generate_text
from ..judges import Constitution, RuleJudge
from ..models import load_policy, load_tokenizer
from ..report import read_jsonl, write_quickstart_report
from ..trainers.configs import check_seed
from ..trainers.constitutional import TextGenerator, label, revise, sample_pairs
from ..trainers.pipeline import StageTable
from ..trainers.ppo import PPOConfig, PPOTrainer
from ..trainers.reward import RewardConfig, RewardTrainer
from ..trainers.run_dir import can_resume, has_ended
from ..trainers.sft import SFTConfig, SFTTrainer
from . import task
from .model import tiny_llama, train_tokenizer
from .rules import RULES, check, passes, understand

CONSTITUTION = Path(__file__).with_name("constitution.yaml")
MAX_NEW_TOKENS = 56  # about the length of the longest demonstration
ANNOTATOR_NOISE = 0.05  # share of the annotator's choices that go against the rules
SAMPLES = 12  # held-out prompts whose replies summary.json shows


@dataclass(frozen=True)
class Sizes:
    """The amounts of data and training. Two CPU cores need a few minutes for the defaults."""

    layers: int = 3
    demonstrations: int = 10_000
    criticisms: int = 9_000
    candidates: int = 16_000  # pairs of written replies, for the annotator
    pairs: int = 5_000  # pairs of sampled replies, for the annotator
    judged_pairs: int = 12_000  # pairs of sampled replies, for the constitution's judge
    held_out_pairs: int = 1_000  # of each kind
    ppo_iterations: int = 20
    ppo_batch: int = 256
    revised_prompts: int = 400
    held_out_prompts: int = 500


SMOKE = Sizes(
    layers=2, demonstrations=300, criticisms=100, candidates=100, pairs=60, judged_pairs=60, held_out_pairs=30,
    ppo_iterations=2, ppo_batch=32, revised_prompts=60, held_out_prompts=40,
)  # fmt: skip


def run_quickstart(output_dir: str | Path = "runs/quickstart", seed: int = 0, smoke: bool = False) -> dict:
    """Runs all stages that are not yet done in `output_dir` and returns the summary, which is also in summary.json.

    Raises ConfigError if `output_dir` holds a quickstart of another seed or size, and KeyboardInterrupt if a signal
    ended the run; the same call then continues at the step where it stopped.
    """
    check_seed("quickstart: seed", seed)
    return Quickstart(Path(output_dir), seed, SMOKE if smoke else Sizes()).run()


class Quickstart:
    """The stages in one directory. The result of every method that trains depends only on the seed and on the stages
    before it."""

    def __init__(self, root: Path, seed: int, sizes: Sizes):
        self.root, self.seed, self.sizes = root, seed, sizes
        self.constitution = Constitution.load(CONSTITUTION, allow_code=True)
        self.judge = RuleJudge()
        self.held_out = task.prompts(seed, sizes.held_out_prompts, held_out=True)
        self.table = StageTable(root, self._summary())

    def run(self) -> dict:
        """Runs the stages that are not in the summary yet, and writes the report."""
        stages = {
            "sft": self.sft, "rm": self.rm, "ppo": self.ppo, "cai-revise": self.cai_revise, "cai-sft": self.cai_sft,
            "cai-label": self.cai_label, "cai-rm": self.cai_rm, "cai-ppo": self.cai_ppo,
        }  # fmt: skip
        summary = self.table.summary
        done = {stage["name"] for stage in summary["stages"]}
        for name, stage in stages.items():
            if name in done:
                continue
            cpu = time.process_time()
            print(f"[{list(stages).index(name) + 1}/{len(stages)}] {name}", flush=True)
            values = stage(self.root / name)
            summary["peak_memory_gib"] = _peak_memory_gib()
            self.table.add(name, **values, cpu_seconds=round(time.process_time() - cpu, 1))
        write_quickstart_report(self.root)  # also if a process was killed before it could write the last one
        return summary

    # --- the stages: each takes its directory and returns its values for the summary ---

    def sft(self, run_dir: Path) -> dict:
        requests = {p.id: (p.critique, p.revise) for p in self.constitution.principles}
        rows = task.demonstrations(self.seed, self.sizes.demonstrations)
        rows += task.criticisms(self.seed, self.sizes.criticisms, requests)
        held_out = task.demonstrations(self.seed, self.sizes.held_out_prompts, held_out=True)
        turns = [message for row in rows for messages in row.values() for message in messages]
        # The longest requests of phase 1 hold a reply and its critique. With the answer they have up to 260 tokens.
        tokenizer = train_tokenizer([message["content"] for message in turns], max_length=320)
        model = tiny_llama(tokenizer, self.seed, layers=self.sizes.layers)
        config = self._sft_config(run_dir, learning_rate=3e-3)
        self._train(SFTTrainer(config, model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=held_out))
        return self._rate("sft")

    def rm(self, run_dir: Path) -> dict:
        """The annotator errs in the training pairs only. The held-out pairs follow the rules, so accuracy is measured
        on the truth."""
        sizes = self.sizes
        train, held_out = (
            task.prefer(
                self.seed,
                task.candidates(self.seed, number, held_out=held_out)
                + self._pairs("sft", run_dir, sizes.pairs, held_out=held_out),
                noise=0.0 if held_out else ANNOTATOR_NOISE,
            )
            for held_out, number in ((False, sizes.candidates), (True, sizes.held_out_pairs))
        )
        return self._train_reward_model("sft", run_dir, train, held_out, epochs=1)

    def ppo(self, run_dir: Path) -> dict:
        return self._ppo("sft", "rm", run_dir, kl_coef=0.1)

    def cai_revise(self, run_dir: Path) -> dict:
        """Phase 1. A critique is asked for only if a rule found a fault, so a good critique names that fault."""
        stage = revise(
            task.prompts(self.seed + 1, self.sizes.revised_prompts, held_out=False), self._generator("sft"),
            self.constitution, self.judge, output_dir=run_dir, max_steps=3, drop=("empty", "scaffold_leak"),
            batch_size=512, seed=self.seed,  # a truncated reply breaks the rules, or does no harm
        )  # fmt: skip
        before = [all(record["checks"][0].values()) for record in stage.records]
        after = [all(record["checks"][record["selected"]].values()) for record in stage.records]
        critiques = [
            step["critique"] == understand(record["prompt"]).language.critiques[step["principle"]]
            for record in stage.records
            for step in record["steps"]
        ]
        return {
            "counts": stage.counts,
            "critiques_that_name_the_fault": _mean(critiques or [0]),
            "pass_rate_before_revision": _mean(before),
            "pass_rate_after_revision": _mean(after),
        }

    def cai_sft(self, run_dir: Path) -> dict:
        rows = read_jsonl(self.root / "cai-revise" / "sft.jsonl")
        config = self._sft_config(run_dir, learning_rate=1e-3)
        self._train(SFTTrainer(config, self._path("sft"), train_dataset=rows))
        return self._rate("cai-sft")

    def cai_label(self, run_dir: Path) -> dict:
        """The judge compares sampled pairs, and also the first replies of phase 1 with the revisions selected there."""
        revised = [
            {"prompt": record["prompt"], "a": record["replies"][0], "b": record["replies"][record["selected"]]}
            for record in read_jsonl(self.root / "cai-revise" / "revisions.jsonl")
            if record["selected"]
        ]
        counts = {}
        for name, held_out, more in (("train", False, revised), ("held_out", True, [])):
            pairs = self._pairs("cai-sft", run_dir, self.sizes.judged_pairs, held_out=held_out) + more
            stage = label(pairs, self.constitution, self.judge, output_dir=run_dir / name, seed=self.seed)
            counts[name] = stage.counts
        return {"counts": counts}

    def cai_rm(self, run_dir: Path) -> dict:
        train, held_out = (
            read_jsonl(self.root / "cai-label" / name / "comparisons.jsonl") for name in ("train", "held_out")
        )
        return self._train_reward_model("cai-sft", run_dir, train, held_out, epochs=2)

    def cai_ppo(self, run_dir: Path) -> dict:
        # A reward model from a third of the labels is right only closer to the policy that it was sampled from.
        return self._ppo("cai-sft", "cai-rm", run_dir, kl_coef=0.2)

    # --- shared by stages ---

    def _sft_config(self, run_dir: Path, learning_rate: float) -> SFTConfig:
        return SFTConfig(
            output_dir=str(run_dir), seed=self.seed, learning_rate=learning_rate, per_device_train_batch_size=16,
            per_device_eval_batch_size=128, sample_max_new_tokens=MAX_NEW_TOKENS, max_length=256,
        )  # fmt: skip

    def _train_reward_model(
        self, start: str, run_dir: Path, train: list[dict], held_out: list[dict], epochs: int
    ) -> dict:
        config = RewardConfig(
            output_dir=str(run_dir), seed=self.seed, learning_rate=1e-3, num_train_epochs=epochs,
            per_device_train_batch_size=32, per_device_eval_batch_size=128, max_length=256,
            center_rewards_coefficient=0.01,
        )  # fmt: skip
        trainer = RewardTrainer(config, self._path(start), train_dataset=train, eval_dataset=held_out)
        return {"rm_accuracy": self._train(trainer)["eval_accuracy"]}

    def _ppo(self, start: str, reward_model: str, run_dir: Path, kl_coef: float) -> dict:
        """PPO against the reward model. The rules rate the policy at a few iterations and at the end."""
        sizes = self.sizes
        config = PPOConfig(
            output_dir=str(run_dir), seed=self.seed, total_episodes=sizes.ppo_iterations * sizes.ppo_batch,
            batch_size=sizes.ppo_batch, minibatch_size=sizes.ppo_batch // 4, generation_batch_size=sizes.ppo_batch,
            response_length=MAX_NEW_TOKENS, temperature=1.0, learning_rate=1.5e-4, kl_coef=kl_coef, vf_coef=0.1,
            num_ppo_epochs=2, missing_eos_penalty=1.0, share_trunk=True, eval_steps=max(1, sizes.ppo_iterations // 5),
        )  # fmt: skip
        prompts = task.prompts(self.seed + 2, 4 * sizes.ppo_batch, held_out=False)
        trainer = PPOTrainer(
            config, self._path(start), reward=self._path(reward_model), train_dataset=_rows(prompts),
            eval_dataset=_rows(self.held_out),
            eval_rewards={name: _reward_of(rule) for name, rule in {"pass_rate": passes, **RULES}.items()},
        )  # fmt: skip
        metrics = self._train(trainer)
        before = read_jsonl(run_dir / "train_log.jsonl")[0]
        started_from = next(stage for stage in self.table.summary["stages"] if stage["name"] == start)
        started_from["proxy_reward"] = before["eval_scores"]
        return {**self._rate(run_dir.name), "proxy_reward": metrics["eval_scores"], "kl": metrics["eval_kl"]}

    def _pairs(self, policy: str, run_dir: Path, count: int, *, held_out: bool) -> list[dict]:
        """Two replies of the policy to each of `count` prompts, sampled once and then read from the directory."""
        count = self.sizes.held_out_pairs if held_out else count
        return sample_pairs(
            task.prompts(self.seed + 3, count, held_out=held_out), self._generator(policy), self.constitution,
            output_dir=run_dir / ("pairs_held_out" if held_out else "pairs"), batch_size=512, seed=self.seed,
        ).rows  # fmt: skip

    def _generator(self, policy: str) -> TextGenerator:
        path = self._path(policy)
        return TextGenerator(load_policy(path), load_tokenizer(path), MAX_NEW_TOKENS, batch_size=256)

    def _rate(self, policy: str) -> dict:
        """Pass rates of the policy's replies to the held-out prompts, which are sampled as in training."""
        path = self._path(policy)
        replies = generate_text(
            load_policy(path), load_tokenizer(path), _messages(self.held_out), max_new_tokens=MAX_NEW_TOKENS,
            batch_size=256, seed=self.seed,
        )  # fmt: skip
        kept = [check(prompt, reply) for prompt, reply in zip(self.held_out, replies, strict=True)]
        return self.table.rate(policy, replies, kept, [True] * len(kept))

    def _path(self, stage: str) -> str:
        return str(self.root / stage)

    def _train(self, trainer) -> dict:
        """Trains, or continues from the stage's checkpoint -> the last metrics. Without a checkpoint a killed stage
        begins again; one that had ended before the kill stays as it is."""
        run_dir = Path(trainer.config.output_dir)
        if has_ended(run_dir):
            return read_jsonl(run_dir / "train_log.jsonl")[-1]
        result = trainer.train(resume=can_resume(run_dir))
        if result.interrupted:
            raise KeyboardInterrupt
        return result.metrics

    def _summary(self) -> dict:
        """The summary in the directory, or a new one."""
        about, path = {"seed": self.seed, "sizes": vars(self.sizes)}, self.root / "summary.json"
        if path.exists():
            summary = read_json(path)
            if {name: summary.get(name) for name in about} != about:
                raise ConfigError(
                    f"quickstart: {self.root} holds a run of seed {summary.get('seed')} and sizes "
                    f"{summary.get('sizes')}, not {about}: choose another --output_dir, or delete it"
                )
            return summary
        samples = [{"prompt": prompt, "responses": []} for prompt in self.held_out[:SAMPLES]]
        return {**about, "provenance": _provenance(), "stages": [], "samples": samples}


def _reward_of(rule: Callable) -> Callable:
    """A rule as a reward: 1 for a reply that keeps it, else 0. No policy is trained on it."""
    return lambda prompts, responses, **columns: [
        float(rule(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)
    ]


def _messages(prompts: list[str]) -> list[task.Messages]:
    return [[task.user(prompt)] for prompt in prompts]


def _rows(prompts: list[str]) -> list[dict]:
    return [{"prompt": messages} for messages in _messages(prompts)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _peak_memory_gib() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def _provenance() -> dict:
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "rlhf_fast": __version__,
        "commit": git.stdout.strip() or None,
        **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "threads": torch.get_num_threads(),
    }
