"""All stages, from random weights to an aligned model, on a task whose truth is known.

    sft          demonstrations of mixed quality, critiques and revisions among them
    rm           pairs sampled from the SFT model, an annotator's choices (rules with a little noise)
    ppo          from sft, against rm
    cai-revise   from sft: check, critique, revise under the constitution           phase 1
    cai-sft      the SFT model, trained on its selected revisions
    cai-label    pairs sampled from cai-sft, compared by the constitution's judge    phase 2
    cai-rm       soft labels
    cai-ppo      from cai-sft, against cai-rm

Each stage is a directory below the root, made by the public trainers. After every stage that changes the policy, the
same held-out prompts are answered and checked by the rules: that is the true score. What a policy is trained on is the
proxy, a reward model. summary.json gains a stage when it is done, so a second call goes on where the first ended.
"""

import json
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from .._version import __version__
from ..disk import make_directory, write_atomic
from ..errors import ConfigError
from ..generation import generate_text
from ..judges import Constitution, RuleJudge
from ..models import load_policy, load_tokenizer
from ..report import read_jsonl, write_quickstart_report
from ..trainers.checkpoints import latest_checkpoint
from ..trainers.constitutional import TextGenerator, label, revise, sample_pairs
from ..trainers.ppo import PPOConfig, PPOTrainer
from ..trainers.reward import RewardConfig, RewardTrainer
from ..trainers.sft import SFTConfig, SFTTrainer
from . import task
from .model import tiny_llama, train_tokenizer
from .rules import RULES, check, understand

CONSTITUTION = Path(__file__).with_name("constitution.yaml")
MAX_NEW_TOKENS = 56  # the longest demonstration has about as many
ANNOTATOR_NOISE = 0.05  # share of its choices that go against the rules
SAMPLES = 12  # held-out prompts whose replies summary.json shows


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The defaults are what two CPU cores do in a few minutes."""

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
    """Runs what is not yet done of all stages in `output_dir` and returns the summary, which is also summary.json.

    Raises ConfigError where `output_dir` holds a quickstart of another seed or size, KeyboardInterrupt when a signal
    ended it; the same call then goes on at the step where it stopped.
    """
    return Quickstart(Path(output_dir), seed, SMOKE if smoke else Sizes()).run()


class Quickstart:
    """The stages over one directory. Every method that trains is a function of the seed and of the stages before it."""

    def __init__(self, root: Path, seed: int, sizes: Sizes):
        self.root, self.seed, self.sizes = root, seed, sizes
        self.constitution = Constitution.load(CONSTITUTION, allow_code=True)
        self.judge = RuleJudge()
        self.held_out = task.prompts(seed, sizes.held_out_prompts, held_out=True)
        self.summary_path = root / "summary.json"
        self.summary = self._open()

    def run(self) -> dict:
        """All stages that the summary does not list yet, then the report."""
        stages = {
            "sft": self.sft, "rm": self.rm, "ppo": self.ppo, "cai-revise": self.cai_revise, "cai-sft": self.cai_sft,
            "cai-label": self.cai_label, "cai-rm": self.cai_rm, "cai-ppo": self.cai_ppo,
        }  # fmt: skip
        done = {stage["name"] for stage in self.summary["stages"]}
        for name, stage in stages.items():
            if name in done:
                continue
            clock, cpu = time.perf_counter(), time.process_time()
            print(f"[{list(stages).index(name) + 1}/{len(stages)}] {name}", flush=True)
            result = {"name": name, "run": name, **stage(self.root / name)}
            result["seconds"] = round(time.perf_counter() - clock, 1)
            result["cpu_seconds"] = round(time.process_time() - cpu, 1)
            self.summary["stages"].append(result)
            self.summary["peak_memory_gib"] = _peak_memory_gib()
            self._write(result)
        write_quickstart_report(self.root)
        return self.summary

    # --- the stages: each takes its directory and returns what the summary says of it ---

    def sft(self, run_dir: Path) -> dict:
        requests = {p.id: (p.critique, p.revise) for p in self.constitution.principles}
        rows = task.demonstrations(self.seed, self.sizes.demonstrations)
        rows += task.criticisms(self.seed, self.sizes.criticisms, requests)
        held_out = task.demonstrations(self.seed, self.sizes.held_out_prompts, held_out=True)
        turns = [message for row in rows for messages in row.values() for message in messages]
        tokenizer = train_tokenizer([message["content"] for message in turns])
        model = tiny_llama(tokenizer, self.seed, layers=self.sizes.layers)
        config = self._sft_config(run_dir, learning_rate=3e-3)
        self._train(SFTTrainer(config, model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=held_out))
        return self._look("sft")

    def rm(self, run_dir: Path) -> dict:
        """The annotator errs in what is trained on, never in what is held out: accuracy is measured on the truth."""
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
        """Phase 1. A critique is asked for where a rule found a fault, so a good one names that fault."""
        stage = revise(
            task.prompts(self.seed + 1, self.sizes.revised_prompts, held_out=False), self._generator("sft"),
            self.constitution, self.judge, output_dir=run_dir, max_steps=3, drop=("empty", "scaffold_leak"),
            batch_size=512, seed=self.seed,  # what is cut off is wrong by the rules, or harmless
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
        return self._look("cai-sft")

    def cai_label(self, run_dir: Path) -> dict:
        """The judge compares sampled pairs, and the first reply of phase 1 with the revision that was selected."""
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
        # A third of the labels makes a reward model that is right over a shorter distance.
        return self._ppo("cai-sft", "cai-rm", run_dir, kl_coef=0.2)

    # --- what stages share ---

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
        return {"rm_accuracy": self._train(trainer).metrics["eval_accuracy"]}

    def _ppo(self, start: str, reward_model: str, run_dir: Path, kl_coef: float) -> dict:
        """PPO against the reward model; the rules look on, at a few iterations and at the end."""
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
            eval_dataset=_rows(self.held_out), eval_rewards={"pass_rate": rules_kept, **rule_rewards()},
        )  # fmt: skip
        metrics = self._train(trainer).metrics
        before = read_jsonl(run_dir / "train_log.jsonl")[0]
        next(stage for stage in self.summary["stages"] if stage["name"] == start)["proxy_reward"] = before[
            "eval_scores"
        ]
        return {**self._look(run_dir.name), "proxy_reward": metrics["eval_scores"], "kl": metrics["eval_kl"]}

    def _pairs(self, policy: str, run_dir: Path, count: int, *, held_out: bool) -> list[dict]:
        """Two replies of the policy to each of some prompts, sampled once and then read from the directory."""
        count = self.sizes.held_out_pairs if held_out else count
        return sample_pairs(
            task.prompts(self.seed + 3, count, held_out=held_out), self._generator(policy), self.constitution,
            output_dir=run_dir / ("pairs_held_out" if held_out else "pairs"), batch_size=512, seed=self.seed,
        ).rows  # fmt: skip

    def _generator(self, policy: str) -> TextGenerator:
        path = self._path(policy)
        return TextGenerator(load_policy(path), load_tokenizer(path), MAX_NEW_TOKENS, batch_size=256)

    def _look(self, policy: str) -> dict:
        """The policy's replies to the held-out prompts, sampled as in training, and how many keep the rules."""
        path = self._path(policy)
        replies = generate_text(
            load_policy(path), load_tokenizer(path), _messages(self.held_out), max_new_tokens=MAX_NEW_TOKENS,
            batch_size=256, seed=self.seed,
        )  # fmt: skip
        verdicts = [check(prompt, reply) for prompt, reply in zip(self.held_out, replies, strict=True)]
        for sample, reply, verdict in zip(self.summary["samples"], replies, verdicts, strict=False):
            violated = [rule for rule, kept in verdict.items() if not kept]
            sample["responses"].append({"stage": policy, "text": reply, "violates": violated})
        return {
            "pass_rate": _mean(all(verdict.values()) for verdict in verdicts),
            "pass_rate_per_principle": {rule: _mean(verdict[rule] for verdict in verdicts) for rule in RULES},
        }

    def _path(self, stage: str) -> str:
        return str(self.root / stage)

    def _train(self, trainer):
        """Trains, or goes on from the stage's checkpoint; what a killed process left without one is begun again."""
        run_dir = Path(trainer.config.output_dir)
        resume = latest_checkpoint(run_dir) is not None
        if not resume:
            for name in ("train_log.jsonl", "samples.jsonl"):
                (run_dir / name).unlink(missing_ok=True)
            shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        result = trainer.train(resume=resume)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    def _open(self) -> dict:
        about = {"seed": self.seed, "sizes": vars(self.sizes)}
        if self.summary_path.exists():
            summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
            if {name: summary.get(name) for name in about} != about:
                raise ConfigError(
                    f"quickstart: {self.root} holds a run of seed {summary.get('seed')} and sizes "
                    f"{summary.get('sizes')}, not {about}: choose another --output_dir, or delete it"
                )
            return summary
        make_directory(self.root)
        samples = [{"prompt": prompt, "responses": []} for prompt in self.held_out[:SAMPLES]]
        return {**about, "provenance": _provenance(), "stages": [], "samples": samples}

    def _write(self, result: dict) -> None:
        write_atomic(self.summary_path, json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n")
        shown = {k: v for k, v in result.items() if isinstance(v, float)}
        print("      " + ", ".join(f"{name} {value:.3g}" for name, value in shown.items()), flush=True)


def rules_kept(prompts, responses, **columns) -> list[float]:
    """The true score, as a reward that no policy trains on: 1 for a reply that keeps all rules, else 0."""
    return [float(all(check(prompt, response).values())) for prompt, response in zip(prompts, responses, strict=True)]


def rule_rewards() -> dict:
    """One such reward for each rule."""

    def reward(rule):
        return lambda prompts, responses, **columns: [
            float(rule(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)
        ]

    return {name: reward(rule) for name, rule in RULES.items()}


def _messages(prompts: list[str]) -> list[task.Messages]:
    return [[task.user(prompt)] for prompt in prompts]


def _rows(prompts: list[str]) -> list[dict]:
    return [{"prompt": messages} for messages in _messages(prompts)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _peak_memory_gib() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
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
