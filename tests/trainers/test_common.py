"""The run around the steps, on a trainer of one number: log, evaluation, checkpoints, resume, signals, refusals."""

import contextlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_fast.disk import write_atomic
from rlhf_fast.errors import ConfigError
from rlhf_fast.monitors import Alarm, Monitors
from rlhf_fast.trainers import checkpoints, common, optimizers, records, run, run_dir
from rlhf_fast.trainers.configs import check_config, config_from_dict
from rlhf_fast.trainers.everywhere import Everywhere
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer


@dataclass
class Config:
    output_dir: str
    seed: int = 0
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    save_total_limit: int = 2
    learning_rate: float = 0.1
    limit: int | None = None
    kind: str = "linear"
    names: list[str] | None = None

    def __post_init__(self):
        check_config(
            self, positive=("learning_rate", "limit"), non_negative=("eval_steps", "save_steps"),
            choices={"kind": ("linear", "cosine")},
        )  # fmt: skip


class Walk:
    """Adds a random number a step, from all three generators."""

    def __init__(self, config, total_steps=10, at_step=None):
        common.set_seed(config.seed)
        self.config, self.total_steps, self.at_step = config, total_steps, at_step or {}
        self.step, self.value = 0, 0.0

    def __iter__(self):
        while self.step < self.total_steps:
            self.at_step.get(self.step + 1, lambda: None)()
            self.value += random.random() + np.random.rand() + torch.rand(()).item()
            self.step += 1
            yield {"value": torch.tensor(self.value, dtype=torch.float64), "worst": float("nan")}

    def evaluate(self):
        return {"eval_draw": random.random() + np.random.rand() + torch.rand(()).item()}

    def samples(self):
        return [{"prompt": "p", "response": f"{torch.rand(()).item()}"}]

    def state_dict(self):
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state):
        self.step, self.value = state["step"], state["value"]

    def save_model(self, path):
        (path / "model.txt").write_text(str(self.value))

    def train(self, resume=False):
        return run.run_training(self, resume=resume)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(log):
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in log]


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 0.1}, "Config has no field 'learning_rat'; did you mean 'learning_rate'?"),
        ({"zzz": 1}, "Config has no field 'zzz'; it has eval_steps"),
        ({1: 1}, "Config has no field 1; it has eval_steps"),
        ({"learning_rate": 0}, "Config.learning_rate = 0.0 must be greater than 0"),
        ({"learning_rate": "fast"}, "Config.learning_rate = 'fast' must be a number"),
        ({"learning_rate": math.nan}, "Config.learning_rate = nan must be a finite number"),
        ({"learning_rate": ".inf"}, "Config.learning_rate = '.inf' must be a number"),
        ({"learning_rate": "inf"}, "Config.learning_rate = inf must be a finite number"),
        ({"save_steps": -1}, "Config.save_steps = -1 must be 0 or more"),
        ({"seed": -1}, "Config.seed = -1 must be 0 or more and below 2**64"),
        ({"seed": 2**64}, "Config.seed = 18446744073709551616 must be 0 or more and below 2**64"),
        ({"save_steps": 1.5}, "Config.save_steps = 1.5 must be int"),
        ({"save_steps": True}, "Config.save_steps = True must be int"),
        ({"kind": "square"}, "Config.kind = 'square' must be one of 'linear', 'cosine'"),
        ({"names": "a"}, "Config.names = 'a' must be list or null"),
        ({"limit": 0}, "Config.limit = 0 must be greater than 0"),
        ({"output_dir": None}, "Config.output_dir = None must be str"),
    ],
)
def test_a_bad_config_is_refused_by_field(values, message):
    with pytest.raises(ConfigError) as error:
        config_from_dict(Config, {"output_dir": "x", **values})
    assert str(error.value).startswith(message)


def test_a_trainer_says_that_its_config_comes_first():
    for trainer in (SFTTrainer, RewardTrainer):
        with pytest.raises(
            ConfigError, match=rf"{trainer.__name__}\(.*Config\(...\), model, ...\) takes the config first"
        ):
            trainer("my-model", SFTConfig(), train_dataset=[])
    with pytest.raises(ConfigError, match="takes the config first, got SFTConfig"):
        PPOTrainer(SFTConfig(), "my-model", reward=len, train_dataset=[])
    of_trl = type("SFTConfig", (), {"__module__": "trl.trainer.sft_config"})()
    for given, named in (
        (torch.nn.Linear(2, 2), "Linear"),
        (SFTConfig, "the class SFTConfig"),
        (of_trl, r"trl\.trainer\.sft_config\.SFTConfig"),
    ):
        with pytest.raises(ConfigError, match=f"takes the config first, got {named}$"):
            SFTTrainer(given, SFTConfig(), train_dataset=[])


def test_a_config_that_was_changed_is_checked_again():
    config = SFTConfig()
    config.max_steps = 1e3
    with pytest.raises(ConfigError, match=r"SFTConfig.max_steps = 1000.0 must be int"):
        SFTTrainer(config, "my-model", train_dataset=[])


def test_a_config_from_a_file():
    config = config_from_dict(Config, {"output_dir": "x", "learning_rate": "1e-5", "limit": None})
    assert config.learning_rate == 1e-5  # YAML reads 1e-5 as text
    assert isinstance(Config("x", learning_rate=1).learning_rate, float)
    assert Config(Path("runs") / "x").output_dir == str(Path("runs") / "x")
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'output_dir'"):
        config_from_dict(Config, {})


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_an_epoch_is_every_example_once(count):
    lengths = np.random.default_rng(0).integers(1, 100, count).tolist()
    batches = common.epoch_batches(lengths, 4, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert max(map(len, batches)) <= 4 and len(batches) == math.ceil(count / 4)
    assert batches == common.epoch_batches(lengths, 4, seed=1, epoch=0)


def test_batches_share_a_length_and_come_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 100, 1000).tolist()
    batches = common.epoch_batches(lengths, 10, seed=1, epoch=0)
    spread = [lengths[b[0]] - lengths[b[-1]] for b in batches]
    assert min(spread) >= 0 and np.mean(spread) < 3  # longest first; at random it would be 82
    longest = [lengths[b[0]] for b in batches]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert batches != common.epoch_batches(lengths, 10, **other)


def test_equal_lengths_keep_the_order_that_was_drawn():
    """Whatever the machine's sort does with ties, so that a run resumes on another one."""
    lengths = [7, 8] * 150
    assert common.epoch_batches(lengths, 300) == [[*range(1, 300, 2), *range(0, 300, 2)]]
    ((*drawn,),) = common.epoch_batches(lengths, 300, seed=0, by_length=False)
    pools = [sorted(pool, key=lambda i: -lengths[i]) for pool in (drawn[:200], drawn[200:])]  # sorted() is stable
    expected = [pool[i : i + 4] for pool in pools for i in range(0, len(pool), 4)]
    assert sorted(common.epoch_batches(lengths, 4, seed=0)) == sorted(expected)


def test_a_run_goes_on_where_it_was():
    lengths = list(range(10))
    whole = list(common.run_batches(lengths, 4, seed=0, start=0, stop=7))
    assert [epoch for epoch, _ in whole] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 7 / 3])
    for start in range(7):
        assert list(common.run_batches(lengths, 4, seed=0, start=start, stop=7)) == whole[start:]
    mixed = [indices for _, indices in common.run_batches(lengths, 4, seed=0, start=0, stop=6, by_length=False)]
    first, second = (common.epoch_batches(lengths, 4, seed=0, epoch=epoch, by_length=False) for epoch in (0, 1))
    assert mixed == first + second and first != second


def test_a_process_takes_its_share_of_the_tokens_of_a_step(monkeypatch):
    monkeypatch.setattr(common.parallel, "size", lambda: 2)
    monkeypatch.setattr(common.parallel, "rank", lambda: 0)
    batch, config = ["long", "short", "shorter", "longer"], SFTConfig(per_device_train_batch_size=1)
    assert common.batch_size(config) == 2
    assert common.micro_batches(batch, [8, 2, 1, 9], config) == [(["shorter"], 1), (["longer"], 1)]


def test_steps_of_a_run():
    def steps(num_examples, batch_size, num_train_epochs, max_steps):
        batches = {"per_device_train_batch_size": batch_size // 2, "gradient_accumulation_steps": 2}
        config = SFTConfig(**batches, num_train_epochs=num_train_epochs, max_steps=max_steps)
        return common.steps_in_run(num_examples, config)

    assert steps(10, 4, 2.0, 0) == 6
    assert steps(10, 4, 0.5, 0) == 2
    assert steps(3, 64, 1.0, 0) == 1
    assert steps(10, 4, 2.0, 100) == 100


# --- optimizer -------------------------------------------------------------------------------------------------------


def test_only_matrices_decay_and_each_parameter_is_there_once():
    layer = torch.nn.Linear(2, 2)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    modules = [layer, torch.nn.Sequential(layer), frozen]
    groups = optimizers.make_optimizer(modules, 0.1, weight_decay=0.5).param_groups
    assert [(g["weight_decay"], [id(p) for p in g["params"]]) for g in groups] == [
        (0.5, [id(layer.weight)]),
        (0.0, [id(layer.bias)]),
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1]),
        ("linear", [0.5, 1, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1, 0.75, 0.25]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = optimizers.make_scheduler(optimizer, schedule, total_steps=4, warmup_ratio=0.2)  # of 0.8 steps
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0] / 2.0)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)

    warm = optimizers.make_scheduler(optimizer, schedule, total_steps=1, warmup_ratio=1.0)
    warm.step()
    assert warm.get_last_lr() == [2.0]  # the end of a run that only warms up


def test_a_learner_is_as_its_config_says():
    config = SFTConfig(learning_rate=0.3, weight_decay=0.5, warmup_ratio=0.5, lr_scheduler_type="constant")
    for given, rate in ((None, 0.3), (0.6, 0.6)):
        optimizer, scheduler = optimizers.make_learner(torch.nn.Linear(2, 2), config, 4, given)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert scheduler.get_last_lr() == pytest.approx([rate / 3] * 2)  # two steps of warm-up


def test_clipping_by_hand():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizers.optimizer_step(optimizer, max_grad_norm=1.0).item() == 5.0
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5) and weight.grad is None
    weight.grad = torch.tensor([3.0, 4.0])
    optimizers.optimizer_step(optimizer, max_grad_norm=0)
    assert weight.tolist() == pytest.approx([-3.6, -4.8], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_applied(bad):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizers.make_optimizer(torch.nn.ParameterList([weight]), 0.1)
    weight.grad = torch.tensor([1.0, bad])
    scheduler = optimizers.make_scheduler(optimizer, "constant", 10)
    norm = optimizers.optimizer_step(optimizer, scheduler)
    assert not torch.isfinite(norm) and weight.tolist() == [1.0, 1.0] and weight.grad is None
    assert scheduler.last_epoch == 1  # a skipped update is a step of the schedule
    weight.grad = torch.ones(2)
    optimizers.optimizer_step(optimizer)
    assert weight.tolist() == pytest.approx([0.9, 0.9])


def test_a_resumed_optimizer_has_its_state_and_the_rates_of_the_config_as_it_is_now():
    def learner(learning_rate, weight_decay):
        optimizer = optimizers.make_optimizer(torch.nn.Linear(2, 2), learning_rate, weight_decay)
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        return optimizer, optimizers.make_scheduler(optimizer, "linear", 10)

    before, schedule = learner(0.1, 0.5)
    for _ in range(4):
        optimizers.optimizer_step(before, schedule)
    optimizer, scheduler = learner(0.2, 0.25)
    optimizers.load_optimizer(optimizer, scheduler, optimizers.optimizer_state(before), schedule.state_dict())
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == scheduler.get_last_lr() == pytest.approx([0.2 * 0.6] * 2)
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert all(group["params"][0].grad is None for group in groups)  # a step that failed may have left one
    assert optimizer.state[groups[0]["params"][0]]["exp_avg"].any()
    optimizers.optimizer_step(optimizer, scheduler)
    assert [group["lr"] for group in groups] == pytest.approx([0.2 * 0.5] * 2)
    other = optimizers.make_optimizer([torch.nn.Linear(2, 2, bias=False) for _ in range(2)], 0.1)  # two matrices
    with pytest.raises(ConfigError, match="the checkpoint trained 2 tensors of the model, and this run 2: resume"):
        optimizers.load_optimizer(other, scheduler, optimizers.optimizer_state(before), schedule.state_dict())


def test_a_state_is_laid_out_in_memory_as_the_weight_is():
    """One process keeps a weight that lies column by column as it is; several hold it row by row."""

    def steps(weight, gradients, saved=None):
        parameter = torch.nn.Parameter(weight)
        optimizer = optimizers.make_optimizer(torch.nn.ParameterList([parameter]), 0.1)
        scheduler = optimizers.make_scheduler(optimizer, "constant", 9)
        if saved:
            optimizers.load_optimizer(optimizer, scheduler, *saved)
        for gradient in gradients:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizers.optimizer_step(optimizer, scheduler)
        return parameter.detach(), (optimizers.optimizer_state(optimizer), scheduler.state_dict())

    gradients = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, _ = steps(torch.zeros(2, 3), gradients)
    half, saved = steps(torch.zeros(3, 2).t(), gradients[:2])
    assert saved[0]["state"][0]["exp_avg"].stride() == (1, 2)
    resumed, (state, _) = steps(half.contiguous(), gradients[2:], saved)
    assert torch.equal(resumed, whole) and state["state"][0]["exp_avg"].is_contiguous()


def test_what_learns_is_in_float32():
    model = torch.nn.Linear(2, 2)
    common.check_learns(model, "it")
    for dtype in ("float16", "bfloat16"):
        model.weight.data = model.weight.data.to(getattr(torch, dtype))
        with pytest.raises(ConfigError, match=rf"it would learn in {dtype}.*dtype=torch.float32"):
            common.check_learns(model, "it")
    model.weight.requires_grad_(False)
    common.check_learns(model, "it")  # what is frozen may be in any dtype
    model.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"it has nothing that requires grad: call its requires_grad_\(True\)"):
        common.check_learns(model, "it")


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_directory(tmp_path):
    result = Walk(Config(str(tmp_path), eval_steps=4, save_steps=3)).train()
    log = rows(tmp_path / "train_log.jsonl")
    assert [row["step"] for row in log] == list(range(11))
    assert [row["step"] for row in log if "eval_draw" in row] == [0, 4, 8, 10]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [0, 4, 8, 10]
    assert log[5]["worst"] is None  # NaN is not JSON
    assert not result.interrupted and result.step == 10 and result.metrics["eval_draw"] == log[-1]["eval_draw"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    assert (tmp_path / "model.txt").read_text() == str(log[-1]["value"])
    assert json.loads((tmp_path / "run_config.json").read_text())["learning_rate"] == 0.1
    assert "| `learning_rate` | 0.1 |" in (tmp_path / "README.md").read_text()


def test_tensorboard_gets_the_logged_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Walk(Config(str(tmp_path), logging_steps=4)).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("value")
    assert [event.step for event in events] == [4, 8, 10]
    assert events[-1].value == pytest.approx(rows(tmp_path / "train_log.jsonl")[-1]["value"])


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    records._say_what_is_missing.cache_clear()
    for name in ("first", "second"):  # of a command that trains several models
        Walk(Config(str(tmp_path / name))).train()
    assert capsys.readouterr().out.count("pip install tensorboard") == 1
    assert not list(tmp_path.glob("*/tensorboard"))


def test_tensorboard_gets_every_evaluation(tmp_path, monkeypatch):
    """Also those between the logged steps, and that before the first step."""
    plotted = []
    monkeypatch.setattr(records.Records, "plot", lambda self, step, metrics: plotted.append((step, *metrics)))
    Walk(Config(str(tmp_path), logging_steps=4, eval_steps=3)).train()
    assert [step for step, *_ in plotted] == [0, 3, 4, 6, 8, 9, 10]
    assert [step for step, *names in plotted if "eval_draw" in names] == [0, 3, 6, 9, 10]
    plotted.clear()
    walk = Walk(Config(str(tmp_path / "nothing_held_out"), logging_steps=4))
    walk.evaluate = dict
    walk.train()
    assert [step for step, *_ in plotted] == [4, 8, 10]


@pytest.mark.parametrize("crash_after", [3, 4, 5, 7])
def test_a_crashed_run_resumes_to_the_last_bit(tmp_path, crash_after):
    def crash():
        raise RuntimeError("crash")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Walk(Config(str(whole), eval_steps=2, save_steps=3)).train()
    config = Config(str(broken), eval_steps=2, save_steps=3)
    with pytest.raises(RuntimeError, match="crash"):
        Walk(config, at_step={crash_after + 1: crash}).train()
    with (broken / "train_log.jsonl").open("a") as log:
        log.write('{"step": 8, "val')  # the power failed in the middle of a line
    random.random()
    Walk(config).train(resume=True)
    for name in ("train_log.jsonl", "samples.jsonl"):
        assert without_time(rows(broken / name)) == without_time(rows(whole / name))
    assert (broken / "model.txt").read_text() == (whole / "model.txt").read_text()


def test_a_run_that_died_while_saving_its_model_still_ends_well(tmp_path):
    config = Config(str(tmp_path), save_steps=5)
    walk = Walk(config)
    walk.save_model = lambda path: None if path.name.startswith(".tmp") else (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        walk.train()
    result = Walk(config).train(resume=True)
    assert result.step == 10 and not result.interrupted and "step" not in result.metrics
    assert result.metrics["eval_draw"] == rows(tmp_path / "train_log.jsonl")[-1]["eval_draw"]
    assert (tmp_path / "model.txt").read_text() == str(result.metrics["value"])


@pytest.mark.parametrize("save_steps", [0, 3, 5])
@pytest.mark.parametrize("part", ["samples", "evaluate", "finish", "report", "save_model"])
def test_a_run_whose_end_fails_is_not_lost(tmp_path, part, save_steps, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Walk(Config(str(whole), save_steps=save_steps)).train()
    config, walk = Config(str(broken), save_steps=save_steps), Walk(Config(str(broken), save_steps=save_steps))
    if part == "report":
        monkeypatch.setattr(run, "write_report", lambda _: _crash())
    elif part == "save_model":
        walk.save_model = lambda path: _crash() if path == broken else Walk.save_model(walk, path)
    else:
        setattr(walk, part, lambda *_: _crash())
    with pytest.raises(RuntimeError, match="crash"):
        walk.train()
    assert checkpoints.latest_checkpoint(broken).name == "checkpoint-10"
    monkeypatch.undo()
    random.random()
    again = Walk(config, at_step={step: _crash for step in range(12)})  # no step is done twice
    again.save_in_checkpoint = lambda path: pytest.fail("nor is any saved twice")
    assert again.train(resume=True).metrics["eval_draw"] == rows(whole / "train_log.jsonl")[-1]["eval_draw"]
    for name in ("train_log.jsonl", "samples.jsonl"):
        assert without_time(rows(broken / name)) == without_time(rows(whole / name))
    assert (broken / "model.txt").read_text() == (whole / "model.txt").read_text()
    kept = [sorted(p.name for p in folder.glob("*checkpoint-*")) for folder in (whole, broken)]
    assert kept[0] == kept[1] == {
        0: [], 3: ["checkpoint-6", "checkpoint-9"], 5: ["checkpoint-10", "checkpoint-5"]
    }[save_steps]  # fmt: skip


@pytest.mark.parametrize("died_in", ["train_log.jsonl", "alarms.jsonl"])
def test_a_run_that_died_between_its_last_line_and_its_alarm_loses_neither(tmp_path, died_in, monkeypatch):
    class Watch:
        stop_on = ()

        def __call__(self, row):
            return [Alarm(row["step"], "walk", "it walks")] if row["step"] in (4, 10) else []

        def replay(self, log):
            pass

    config, write = Config(str(tmp_path), save_steps=5), records.JsonLines.write

    def dying(file, row):
        if row["step"] == 10 and file._file.name.endswith(died_in):
            _crash()
        write(file, row)

    for resume in (False, True):
        walk = Walk(config)
        walk.monitors = Watch()
        if resume:
            monkeypatch.undo()
            walk.train(resume=True)
        else:
            monkeypatch.setattr(records.JsonLines, "write", dying)
            with pytest.raises(RuntimeError, match="crash"):
                walk.train()
    alarms = rows(tmp_path / "alarms.jsonl")
    assert [alarm["step"] for alarm in alarms] == [4, 10] and not any("ended_run_of" in alarm for alarm in alarms)
    assert [row["step"] for row in rows(tmp_path / "train_log.jsonl")] == [*range(1, 11)]


def test_a_trainer_that_goes_on_after_a_failure_raises_the_alarms_of_a_run_without_one(tmp_path):
    class Growth(Walk):
        monitors, whole = None, True

        def __iter__(self):
            return ({"response_length/mean": metrics["value"]} for metrics in super().__iter__())

    for name, at_step in (("whole", {}), ("broken", {4: _crash})):
        walk = Growth(Config(str(tmp_path / name)), at_step=at_step)
        walk.monitors = Monitors({})
        if at_step:
            with pytest.raises(RuntimeError, match="crash"):
                walk.train()
            at_step.clear()
        walk.train(resume=name == "broken")
    alarms = [rows(tmp_path / name / "alarms.jsonl") for name in ("whole", "broken")]
    assert alarms[0] and alarms[0] == alarms[1]


def test_an_alarm_of_the_last_step_is_said_and_ends_no_run(tmp_path, capsys):
    class Watch:
        stop_on = ("kl",)

        def __call__(self, row):
            return [Alarm(row["step"], "kl", "too far")] if row["step"] == 10 else []

        def replay(self, log):
            pass

    walk = Walk(Config(str(tmp_path)))
    walk.monitors = Watch()
    result = walk.train()
    assert result.step == 10 and not result.interrupted and result.stopped_by is None
    (alarm,) = rows(tmp_path / "alarms.jsonl")
    assert alarm["message"] == "too far" and "ended_run_of" not in alarm and "kl: too far" in capsys.readouterr().out


def test_an_evaluation_that_fails_on_the_way_loses_no_step(tmp_path):
    whole, broken = (Config(str(tmp_path / name), eval_steps=2) for name in ("whole", "broken"))
    Walk(whole).train()
    walk = Walk(broken)
    walk.evaluate = lambda: Walk.evaluate(walk) if walk.step < 4 else _crash()
    with pytest.raises(RuntimeError, match="crash"):
        walk.train()
    assert checkpoints.latest_checkpoint(tmp_path / "broken").name == "checkpoint-4"
    Walk(broken, at_step={step: _crash for step in range(5)}).train(resume=True)
    for name in ("train_log.jsonl", "samples.jsonl"):
        assert without_time(rows(tmp_path / "broken" / name)) == without_time(rows(tmp_path / "whole" / name))


def test_a_step_that_fails_loses_none_before_it_where_it_has_changed_nothing(tmp_path):
    for unchanged in (True, False):
        walk = Walk(Config(str(tmp_path / str(unchanged))), at_step={4: _crash})
        walk.whole = unchanged
        with pytest.raises(RuntimeError, match="crash"):
            walk.train()
        kept = checkpoints.latest_checkpoint(tmp_path / str(unchanged))
        assert (kept and kept.name) == ("checkpoint-3" if unchanged else None)


def test_what_failed_is_raised_also_where_the_other_processes_are_gone(tmp_path, monkeypatch):
    def broadcast(call):
        if call[0] is Everywhere.leave:
            raise ConnectionError("nobody is there")
        return call

    monkeypatch.setattr(common.parallel, "broadcast", broadcast)
    with pytest.raises(RuntimeError, match="crash"):
        Walk(Config(str(tmp_path)), at_step={4: _crash}).train()


def test_a_run_that_fails_again_and_again_keeps_no_more_checkpoints_than_its_limit(tmp_path):
    config = Config(str(tmp_path), save_total_limit=2)
    for resume, failing in ((False, 3), (True, 5), (True, 6), (True, 9)):
        walk = Walk(config, at_step={failing: _crash})
        walk.whole = True
        with pytest.raises(RuntimeError, match="crash"):
            walk.train(resume=resume)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-5", "checkpoint-8"]


def files_of_checkpoints(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*checkpoint-*/*"))


@pytest.mark.parametrize("save_steps", [0, 4, 5])
def test_a_signal_in_the_last_step_deletes_no_checkpoint(tmp_path, save_steps):
    whole, late = (Config(str(tmp_path / name), save_steps=save_steps, save_total_limit=1) for name in ("a", "b"))
    Walk(whole).train()
    assert not Walk(late, at_step={10: lambda: os.kill(os.getpid(), signal.SIGINT)}).train().interrupted
    assert files_of_checkpoints(tmp_path / "a") == files_of_checkpoints(tmp_path / "b")


@pytest.mark.parametrize("save_steps", [0, 3, 5])  # deletes that of step 10, of step 3, and in the last step that of 5
def test_nothing_is_left_of_a_checkpoint_whose_deletion_was_interrupted(tmp_path, save_steps, monkeypatch):
    whole, torn = (Config(str(tmp_path / name), save_steps=save_steps, save_total_limit=1) for name in ("a", "b"))
    Walk(whole).train()
    delete = shutil.rmtree

    def interrupted(path, **options):
        if options:  # of what is not there
            return delete(path, **options)
        (path / "state.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Walk(torn).train()
    monkeypatch.undo()
    with nullcontext() if save_steps else pytest.raises(ConfigError, match="a run that ended needs none"):
        Walk(torn).train(resume=True)
    assert files_of_checkpoints(tmp_path / "a") == files_of_checkpoints(tmp_path / "b")


def test_a_run_ends_without_the_checkpoint_that_nobody_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="checkpoint-10 could not be saved .disk full.*continues to its end without"):
        assert Walk(Config(str(tmp_path))).train().step == 10
    assert (tmp_path / "model.txt").exists() and not list(tmp_path.glob("*checkpoint*"))


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": None}


@pytest.mark.parametrize(("save_steps", "best"), [(0, {}), (5, {}), (0, BEST)])
def test_the_model_is_saved_also_where_the_state_of_its_last_step_cannot_be_gathered(tmp_path, save_steps, best):
    """Of several processes the first one gathers AdamW's state, for which it may have no room."""

    class Crowded(Walk):
        def state_dict(self):
            if self.step == 10:
                raise torch.OutOfMemoryError("no room")
            return super().state_dict()

        def evaluate(self):
            return {"eval_loss": 10.0 - self.step}

    config = Config(str(tmp_path), save_steps=save_steps)
    vars(config).update(best)
    told = r"checkpoint-10 could not be saved \(no room\).*The run continues to its end without it"
    with pytest.warns(UserWarning, match=told):
        assert Crowded(config).train().metrics["eval_loss"] == 0.0
    assert (tmp_path / "model.txt").exists()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-5"] * bool(save_steps)


@pytest.mark.parametrize("manifest", ["[]", "5"])
def test_a_manifest_that_somebody_changed_is_a_damaged_checkpoint(tmp_path, manifest):
    Walk(Config(str(tmp_path), save_steps=5)).train()
    (tmp_path / "checkpoint-10" / "manifest.json").write_text(manifest)
    assert checkpoints.damage(tmp_path / "checkpoint-10") and not checkpoints.damage(tmp_path / "checkpoint-5")


def test_a_model_card_that_is_not_utf8_is_no_card_of_ours(tmp_path):
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    assert not run_dir.has_ended(tmp_path)
    assert Walk(Config(str(tmp_path))).train().step == 10 and run_dir.has_ended(tmp_path)


def test_the_last_step_keeps_its_checkpoint_if_it_is_the_best(tmp_path):
    class Better(Walk):
        def evaluate(self):
            return {"eval_loss": 10.0 - self.step}

    config = Config(str(tmp_path))
    vars(config).update(BEST)
    Better(config, total_steps=2).train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_run_that_is_stopped_keeps_its_last_model_and_not_its_best(tmp_path):
    class Worse(Walk):
        def evaluate(self):
            return {"eval_loss": float(self.step)}

    config = Config(str(tmp_path), eval_steps=2)
    vars(config).update(BEST)
    result = Worse(config, at_step={5: lambda: os.kill(os.getpid(), signal.SIGTERM)}).train()
    assert result.interrupted and result.step == 5 and "best_step" not in result.metrics
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-5"}


def test_looking_does_not_change_the_run(tmp_path):
    for name, every in (("never", 0), ("often", 1)):
        Walk(Config(str(tmp_path / name), eval_steps=every)).train()
    assert (tmp_path / "never/model.txt").read_text() == (tmp_path / "often/model.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Walk(Config(str(whole))).train()
    before = signal.getsignal(number)
    result = Walk(Config(str(stopped)), at_step={4: lambda: os.kill(os.getpid(), number)}).train()
    assert signal.getsignal(number) is before
    assert result.interrupted and result.step == 4 and result.stopped_by is None
    assert f"Stopped by {number.name} after step 4 of 10; nothing is lost" in capsys.readouterr().out
    assert not (stopped / "model.txt").exists()
    assert not Walk(Config(str(stopped))).train(resume=True).interrupted
    assert without_time(rows(stopped / "train_log.jsonl")) == without_time(rows(whole / "train_log.jsonl"))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(tmp_path, second):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)

    # A background job starts with SIGINT ignored.
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, second)}
    try:
        with pytest.raises(KeyboardInterrupt):
            Walk(Config(str(tmp_path)), at_step={4: twice}).train()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_of_several_processes_each_gets_signals_of_two_kinds(monkeypatch):
    """Those of Ctrl-C and of torchrun; only a second one of a kind stops at once."""
    monkeypatch.setattr(run.parallel, "size", lambda: 2)
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
    received = []
    try:
        with pytest.raises(KeyboardInterrupt), run._signals(received, say=False):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert received == ["SIGINT", "SIGTERM"]


def test_a_thread_that_gets_no_signals_may_train(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(Walk(Config(str(tmp_path))).train).result().step == 10


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        Walk(Config(str(tmp_path / "file"))).train()
    with pytest.raises(ConfigError, match="output_dir is empty"):
        Walk(Config("")).train()
    with pytest.raises(ConfigError, match="only a shell knows what ~ stands for"):
        Walk(Config("~/run")).train()


def test_what_would_lose_a_run_is_refused(tmp_path):
    config = Config(str(tmp_path / "run"), save_steps=5)
    with pytest.raises(ConfigError, match=r"nothing to resume.*run without resume"):
        Walk(config).train(resume=True)
    Walk(config).train()
    with pytest.raises(ConfigError, match=r"from the newest checkpoint in output_dir; got '.*/checkpoint-5'"):
        Walk(config).train(resume=str(tmp_path / "run/checkpoint-5"))
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume=True"):
        Walk(config).train()
    Walk(Config(str(tmp_path / "short"))).train()
    with pytest.raises(ConfigError, match="already holds a run: choose another output_dir"):
        Walk(Config(str(tmp_path / "short"))).train()
    with pytest.raises(ConfigError, match=r"a run that ended needs none.*choose another output_dir"):
        Walk(Config(str(tmp_path / "short"))).train(resume=True)


def test_a_run_that_has_ended_is_not_started_again_whatever_became_of_its_card(tmp_path):
    """The card is made to be edited; a model without a checkpoint is what an ended run leaves."""
    config = Config(str(tmp_path / "run"))
    Walk(config).train()
    (tmp_path / "run" / "model.safetensors").touch()
    (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\n---\n")
    log = (tmp_path / "run" / "train_log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="nothing to resume"):
        Walk(config).train(resume=True)
    with pytest.raises(ConfigError, match="already holds a run: choose another output_dir"):
        Walk(config).train()
    assert (tmp_path / "run" / "train_log.jsonl").read_bytes() == log


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    def fail():
        raise RuntimeError("killed")

    Walk(Config(str(tmp_path / "whole"), eval_steps=2), total_steps=6).train()
    config = Config(str(tmp_path / "killed"), save_steps=5, eval_steps=2)
    failed = Walk(config, total_steps=6, at_step={3: fail})
    with pytest.raises(RuntimeError, match="killed"):
        failed.train()
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume=True"):
        Walk(config, total_steps=6).train()
    with pytest.raises(ConfigError, match=r"nothing to resume.*create a new trainer"):
        failed.train(resume=True)
    capsys.readouterr()
    Walk(config, total_steps=6).train(resume=True)
    assert "starts again from its first step" in capsys.readouterr().out
    assert len(list((tmp_path / "killed/tensorboard").iterdir())) == 1  # without the steps of the first try
    for name in ("train_log.jsonl", "samples.jsonl"):
        whole, killed = (without_time(rows(tmp_path / run / name)) for run in ("whole", "killed"))
        assert whole == killed


def test_a_trainer_that_is_done_does_not_train_again_where_its_run_was_deleted(tmp_path):
    walk = Walk(Config(str(tmp_path / "run")))
    walk.train()
    with pytest.raises(ConfigError, match="already holds a run"):
        walk.train()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="taken all its 10 steps: create a new trainer"):
        walk.train()


def test_where_no_bar_can_be_drawn_each_logged_step_is_a_line(tmp_path, capsys):
    Walk(Config(str(tmp_path), logging_steps=3), total_steps=7).train()
    steps = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["Walk 3/7", "Walk 6/7", "Walk 7/7"]
    Walk(Config(str(tmp_path / "evaluated"), logging_steps=7, eval_steps=7), total_steps=7).train()
    steps = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["Walk 0/7", "Walk 7/7"]


def test_a_first_step_that_changed_something_is_not_repeated_by_the_same_trainer(tmp_path):
    walk = Walk(Config(str(tmp_path)), at_step={1: lambda: 1 / 0})
    walk.whole = False
    with pytest.raises(ZeroDivisionError):
        walk.train()
    walk.at_step.clear()
    with pytest.raises(ConfigError, match=r"nothing to resume.*create a new trainer"):
        walk.train(resume=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_first_step_that_changed_nothing_is_repeated_by_the_same_trainer(tmp_path, error):
    def fail():
        random.random()
        walk.guard.skipped += 1
        raise error("stopped")

    Walk(Config(str(tmp_path / "whole"))).train()
    walk = Walk(Config(str(tmp_path / "stopped")), at_step={1: fail})
    walk.whole, walk.guard = True, common.NonFiniteGuard(5, str(tmp_path))
    with pytest.raises(error, match="stopped"):
        walk.train()
    assert not (tmp_path / "stopped/checkpoint-0").exists() and walk.guard.skipped == 0
    walk.at_step.clear()
    walk.train(resume=True)
    whole, stopped = (without_time(rows(tmp_path / name / "train_log.jsonl")) for name in ("whole", "stopped"))
    assert whole == stopped


def test_resuming_with_another_config_says_so(tmp_path):
    Walk(Config(str(tmp_path), save_steps=5)).train()
    with pytest.warns(UserWarning, match="differs in learning_rate"):
        Walk(Config(str(tmp_path), save_steps=5, learning_rate=0.2)).train(resume=True)
    assert json.loads((tmp_path / "run_config.json").read_text())["learning_rate"] == 0.2
    with pytest.warns(UserWarning, match="differs in num_generations; .* some data is read twice or not at all"):
        run._continue(Walk(Config(str(tmp_path))), tmp_path / "checkpoint-10", {"num_generations": 2}, lambda *_: None)


def test_a_run_of_before_processes_were_counted_had_one(tmp_path):
    (tmp_path / "run_config.json").write_text("{}")
    assert run_dir.changed_settings(tmp_path, {"num_processes": 1}) == []
    assert run_dir.changed_settings(tmp_path, {"num_processes": 2}) == ["num_processes"]


def test_resuming_past_the_end_that_the_config_now_has_is_refused(tmp_path):
    Walk(Config(str(tmp_path), save_steps=8)).train()
    with (
        pytest.warns(UserWarning, match="differs in save_steps"),
        pytest.raises(ConfigError, match=r"checkpoint-8 is past the 5 steps of the config as it is now \(save_steps\)"),
    ):
        Walk(Config(str(tmp_path), save_steps=4), total_steps=5).train(resume=True)


def test_a_run_has_ended_when_its_card_is_there_and_not_before(tmp_path):
    walk = Walk(Config(str(tmp_path), save_steps=5))
    walk.save_model = lambda path: (path / "README.md").write_text("---\nlibrary_name: peft\n---\n")  # as peft does
    walk.train()
    assert run_dir.has_ended(tmp_path) and not run_dir.has_ended(tmp_path / "checkpoint-5")


def test_generators_of_gpus_that_are_gone_are_left_aside(monkeypatch):
    state, restored = {**common.rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 8}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    common.set_rng_state(state)
    assert len(restored) == 1


def test_saving_moves_no_generator(tmp_path):
    walk = Walk(Config(str(tmp_path)))
    walk.save_model, walk.save_in_checkpoint = None, lambda path: torch.rand(3)
    before = torch.get_rng_state()
    checkpoints.save_checkpoint(walk, tmp_path, None, Everywhere(walk).state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    checkpoints.load_checkpoint(walk, tmp_path / "checkpoint-0")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trainer_that_does_not_load_its_step_is_named(tmp_path):
    walk = Walk(Config(str(tmp_path)))
    saved = checkpoints.save_checkpoint(walk, tmp_path, None, Everywhere(walk).state)
    walk.step, walk.load_state_dict = 3, lambda state: None
    with pytest.raises(RuntimeError, match=r"Walk\.load_state_dict left step at 3, not 0"):
        checkpoints.load_checkpoint(walk, saved)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    walk = Walk(Config(str(tmp_path), save_steps=2), total_steps=4)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        walk.train()
    assert checkpoints.latest_checkpoint(tmp_path) is None
    monkeypatch.undo()
    (tmp_path / "train_log.jsonl").unlink()
    Walk(Config(str(tmp_path), save_steps=2), total_steps=4).train()
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-4"
    assert not list(tmp_path.glob(".tmp*"))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("renamed"), rename(old, new)))
    walk = Walk(Config(str(tmp_path)), total_steps=4)
    saved = checkpoints.save_checkpoint(walk, tmp_path, None, Everywhere(walk).state)
    at = events.index("renamed")
    written = {path.stat().st_ino for path in (saved, *saved.rglob("*"))}
    assert len(written) >= 3 and written <= set(events[:at])
    assert tmp_path.stat().st_ino in events[at:]


def test_the_log_is_on_the_disk_before_a_checkpoint_that_goes_with_it(tmp_path, monkeypatch):
    events, fsync, save = [], os.fsync, run.save_checkpoint
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: (events.append("saved"), save(*given))[1])
    walk = Walk(Config(str(tmp_path), save_steps=2), total_steps=3)
    walk.monitors = Monitors({})
    walk.train()
    written = {(tmp_path / name).stat().st_ino for name in ("train_log.jsonl", "samples.jsonl", "alarms.jsonl")}
    assert written <= set(events[: events.index("saved")])


@pytest.mark.parametrize(
    ("metric", "better"), [("loss", 0.1), ("perplexity", 0.1), ("ece", 0.1), ("accuracy", 0.3), ("margin", 0.3)]
)
def test_whether_a_metric_is_better_when_it_is_lower_follows_from_its_name(tmp_path, metric, better):
    @dataclass
    class Best:
        metric_for_best_model: str = f"eval_{metric}"
        load_best_model_at_end: bool = True
        greater_is_better: bool | None = None

    best = run._Best(Best(), [], tmp_path)
    assert not best.improved(0, {f"eval_{metric}": better})  # of the model that is not trained yet
    assert best.improved(1, {f"eval_{metric}": 0.2}) and best.improved(2, {f"eval_{metric}": better})
    assert not best.improved(3, {f"eval_{metric}": 0.4 - better})
    assert not best.improved(4, {f"eval_{metric}": better}) and best.step == 2  # the first of equals


def test_a_checkpoint_that_is_a_link_is_unlinked_and_what_it_names_stays(tmp_path):
    """Where the disk is full, old checkpoints are moved elsewhere and linked."""
    config = Config(str(tmp_path / "run"), save_steps=1, save_total_limit=2)
    Walk(config, total_steps=10, at_step={3: lambda: os.kill(os.getpid(), signal.SIGINT)}).train()
    for name in ("checkpoint-2", ".tmp-checkpoint-9", "damaged-checkpoint-3"):
        elsewhere = tmp_path / "elsewhere" / name
        if name == "checkpoint-2":
            shutil.copytree(tmp_path / "run" / name, elsewhere)
            shutil.rmtree(tmp_path / "run" / name)
        else:
            elsewhere.mkdir()
            (elsewhere / "mine").touch()
        (tmp_path / "run" / name).symlink_to(elsewhere)
    (tmp_path / "run/checkpoint-3/state.pt").write_text("torn")
    with pytest.warns(UserWarning, match="checkpoint-3 is damaged"):
        assert Walk(config).train(resume=True).step == 10
    left = {path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name}
    assert left == {"checkpoint-9", "checkpoint-10", "damaged-checkpoint-3"}
    elsewhere = tmp_path / "elsewhere"
    assert checkpoints.damage(elsewhere / "checkpoint-2") is None and len(list(elsewhere.glob("*/mine"))) == 2


def test_a_run_does_not_write_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run/value_model").mkdir(parents=True)
    for name in ("model.txt", "README.md", "samples.jsonl", "value_model/config.json", "value_model"):
        if name == "value_model":
            (tmp_path / "run" / name).rmdir()
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
        with pytest.raises(ConfigError, match=rf"run/{name} is a link, .* over .*/mine: replace it by a copy"):
            Walk(Config(str(tmp_path / "run"))).train()
        (tmp_path / "run" / name).unlink()
    for name in ("job.json.tmp", "slurm.log"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    write_atomic(tmp_path / "run" / "job.json", "{}")
    assert Walk(Config(str(tmp_path / "run"))).train().step
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_best_step_is_one_whose_checkpoint_is_whole(tmp_path):
    config = SimpleNamespace(metric_for_best_model="eval_loss", load_best_model_at_end=True, greater_is_better=None)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2/manifest.json").write_text("{}")  # of no files; the other has none, so it is torn
    with pytest.warns(UserWarning, match="step 1 .eval_loss 0.1., is gone or damaged; .* there: step 2"):
        best = run._Best(config, [{"step": 1, "eval_loss": 0.1}, {"step": 2, "eval_loss": 0.2}], tmp_path)
    assert (best.step, best.value) == (2, 0.2)


def test_a_checkpoint_has_the_counts_of_skipped_updates(tmp_path):
    counts = []
    for skipped, in_a_row in ((3, 2), (0, 0)):
        walk = Walk(Config(str(tmp_path)))
        walk.guard = common.NonFiniteGuard(5, str(tmp_path))
        walk.guard.skipped, walk.guard.in_a_row = skipped, in_a_row
        if skipped:
            saved = checkpoints.save_checkpoint(walk, tmp_path, None, Everywhere(walk).state)
        checkpoints.load_checkpoint(walk, saved)
        counts.append((walk.guard.skipped, walk.guard.in_a_row))
    assert counts == [(3, 2), (3, 2)]


def test_a_file_anywhere_in_a_checkpoint_may_be_damaged_also_for_the_second_time(tmp_path):
    class Nested(Walk):
        def save_model(self, path):
            (path / "value_model").mkdir(exist_ok=True)
            (path / "value_model/config.json").write_text(" " * 2**20 + "{}")

    Nested(Config(str(tmp_path), save_steps=5)).train()
    (tmp_path / "checkpoint-10/value_model/config.json").write_text(" " * 2**20)
    (tmp_path / "damaged-checkpoint-10/before").mkdir(parents=True)
    with pytest.warns(UserWarning, match="checkpoint-10 is damaged .value_model/config.json not as written"):
        assert checkpoints.newest_whole_checkpoint(tmp_path).name == "checkpoint-5"
    assert not (tmp_path / "damaged-checkpoint-10/before").exists()


def test_the_newest_checkpoint_is_the_highest_number(tmp_path):
    Walk(Config(str(tmp_path), save_steps=1, save_total_limit=3), total_steps=11).train()
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-11"
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3


def test_folders_that_the_user_named_are_no_checkpoints_and_stay(tmp_path):
    def copy():
        for name in ("best", "2-keep"):
            shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{name}")

    config = Config(str(tmp_path), save_steps=2, save_total_limit=1)
    Walk(config, total_steps=6, at_step={3: copy}).train()
    names = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-6", "checkpoint-best", "checkpoint-2-keep"}
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-6"
    shutil.rmtree(tmp_path / "checkpoint-6")
    with pytest.raises(ConfigError, match="nothing to resume"):
        Walk(config).train(resume=True)


def test_a_seed_is_that_of_every_generator():
    draws = []
    for seed in (1, 2, 2**64 + 1):  # the last one is that of the second process of a run with seed 2**64
        common.set_seed(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert all(a != b for a, b in zip(*draws[:2], strict=True)) and draws[2][1:] == draws[0][1:]


def test_every_generator_comes_back():
    common.set_seed(3)
    state = common.rng_state()
    draws = [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()) for _ in range(2)]
    common.set_rng_state(state)
    with common.preserved_rng():
        random.gauss(0, 1), np.random.randn(5), torch.randn(7)
    assert [(random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()) for _ in range(2)] == draws


def test_other_data_cannot_resume(tokenizer):
    state = {"lengths": torch.tensor([3, 4]), "data": "a"}
    common.check_same_data(state, [3, 4], "a", tokenizer)
    with pytest.raises(ConfigError, match=r"other data \(2 examples, now 3.* dataset, tokenizer and maximum"):
        common.check_same_data(state, [3, 4, 5], "a", tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template  # as Llama 3.2's
    with pytest.raises(ConfigError, match=r"other data \(in content.* tokenizer \(its chat template writes today's"):
        common.check_same_data(state | {"data": "b"}, [3, 4], "a", tokenizer)


def test_samples_survive_a_resume_whatever_is_in_them(tmp_path):
    """Line separators of Unicode inside a text, and a line torn within a character by a crash."""

    class Odd(Walk):
        def samples(self):
            return [{"prompt": "日本", "response": "a\u2028b\x85"}]

    config = Config(str(tmp_path), eval_steps=2, save_steps=4)
    Odd(config, total_steps=6).train()
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"step": 6, "prompt": "日'.encode()[:-1])
    Odd(config, total_steps=6).train(resume=True)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]


def test_a_sample_whose_score_is_not_finite_is_json(tmp_path):
    class Scored(Walk):
        def samples(self):
            return [{"prompt": "p", "response": "r", "scores": math.nan, "length": math.inf}]

    Scored(Config(str(tmp_path)), total_steps=1).train()
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "prompt": "p", "response": "r", "scores": null, "length": null}'


def test_a_run_that_failed_before_its_first_line_can_be_started_again(tmp_path):
    def fail():
        raise RuntimeError("a reward with a mistake")

    with pytest.raises(RuntimeError):
        Walk(Config(str(tmp_path)), at_step={1: fail}).train()
    assert Walk(Config(str(tmp_path))).train().step == 10
    config = Config(str(tmp_path / "samples"), eval_steps=5)
    broken = Walk(config)
    broken.evaluate = fail  # after the samples of step 0
    with pytest.raises(RuntimeError):
        broken.train()
    Walk(config).train()
    assert [row["step"] for row in rows(tmp_path / "samples/samples.jsonl")] == [0, 5, 10]


def test_a_resumed_run_does_not_raise_an_alarm_that_lasts_again(tmp_path):
    class Far(Walk):
        def __iter__(self):
            for metrics in super().__iter__():
                yield metrics | {"objective/kl": 90.0}

    def far(**options):
        walk = Far(Config(str(tmp_path), save_steps=4), **options)
        walk.monitors = Monitors({})
        return walk

    with pytest.raises(ZeroDivisionError):
        far(at_step={6: lambda: 1 / 0}).train()
    far().train(resume=True)
    assert [alarm["step"] for alarm in rows(tmp_path / "alarms.jsonl")] == [2]


def test_the_log_of_a_long_run_stays_in_its_file(tmp_path, monkeypatch):
    """A run that resumes after 40,000 steps held 0.4 GB of log lines until its end."""
    log = tmp_path / "train_log.jsonl"
    log.write_text("".join(json.dumps({"step": i, **dict.fromkeys(map(str, range(50)), i / 7)}) + "\n"
                           for i in range(1, 2001)))  # fmt: skip
    (tmp_path / "samples.jsonl").write_bytes(log.read_bytes())
    monkeypatch.setattr(records, "_tensorboard", lambda *_: None)  # importing it takes memory once
    tracemalloc.start()
    opened = records.Records(tmp_path, 1500, None, Monitors({}), 3000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    opened.close()
    assert most < log.stat().st_size / 4 and opened.log.last["step"] == 1500 and len(rows(log)) == 1500


def test_tensorboard_gets_a_gap_where_a_metric_is_not_finite(tmp_path, monkeypatch):
    seen, closed = [], []
    board = SimpleNamespace(add_scalar=lambda *given: seen.append(given), close=lambda: closed.append(len(seen)))
    monkeypatch.setattr(records, "_tensorboard", lambda *given: board)
    Walk(Config(str(tmp_path)), total_steps=2).train()
    assert {name for name, value, _ in seen if math.isnan(value)} == {"worst"}
    assert closed == [len(seen)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path, monkeypatch):
    given, tensorboard = [], pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda path, purge_step: given.append(purge_step))
    for start in (0, 3):
        records._tensorboard(tmp_path, start)
    assert given == [None, 4]


def test_a_line_is_in_its_file_once_it_is_written(tmp_path):
    log = records.JsonLines(tmp_path / "log.jsonl", -1)
    log.write({"step": 1})
    assert rows(tmp_path / "log.jsonl") == [{"step": 1}]  # a process that is killed flushes nothing


def tear(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [tear, flip_a_bit, lambda path: path.unlink()], ids=["torn", "a bit", "gone"])
@pytest.mark.parametrize("name", ["model.txt", "manifest.json", "state.pt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, harm, name):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Walk(Config(str(whole))).train()
    config = Config(str(broken), save_steps=3)
    with pytest.raises(RuntimeError, match="crash"):
        Walk(config, at_step={8: _crash}).train()
    harm(broken / "checkpoint-6" / name)
    if (name, harm.__name__) == ("state.pt", "<lambda>"):  # without it, it is no checkpoint at all
        assert checkpoints.latest_checkpoint(broken).name == "checkpoint-3"
        Walk(config).train(resume=True)
    else:
        with pytest.warns(UserWarning, match="checkpoint-6 is damaged .*: resuming from checkpoint-3"):
            Walk(config).train(resume=True)
        assert (broken / "damaged-checkpoint-6").is_dir()
    assert without_time(rows(broken / "train_log.jsonl")) == without_time(rows(whole / "train_log.jsonl"))
    assert checkpoints.damage(broken / "checkpoint-6") is None  # saved again on the way
    assert not list(broken.glob(".tmp*"))


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("train_log.jsonl", "not JSON", r"train_log\.jsonl: line 2 .* was damaged: delete that line to resume"),
    ("train_log.jsonl", "[]", r"train_log\.jsonl: line 2 "),
    ("samples.jsonl", "{}", r"samples\.jsonl: line 2 "),
    ("run_config.json", "{", r"run_config\.json is damaged: delete it to resume"),
])  # fmt: skip
def test_a_record_that_was_damaged_is_named(tmp_path, name, damage, message):
    config = Config(str(tmp_path), save_steps=3, eval_steps=1)
    with pytest.raises(RuntimeError, match="crash"):
        Walk(config, at_step={8: _crash}).train()
    file = tmp_path / name
    whole = file.read_text()
    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:1], damage, *lines[2:], ""]))
    with pytest.raises(ConfigError, match=message):
        Walk(config).train(resume=True)
    if name == "run_config.json":  # as the message says
        file.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Walk(config).train(resume=True).step == 10
        assert file.read_text() == whole
        return
    file.write_text(whole)
    assert Walk(config).train(resume=True).step == 10


def test_where_every_checkpoint_is_damaged_nothing_is_touched(tmp_path):
    config = Config(str(tmp_path), save_steps=3)
    with pytest.raises(RuntimeError, match="crash"):
        Walk(config, at_step={8: _crash}).train()
    for step in (3, 6):
        tear(tmp_path / f"checkpoint-{step}/state.pt")
    with pytest.raises(
        ConfigError, match=r"no checkpoint in .* is whole \(checkpoint-6: state.pt not as written; check"
    ):
        Walk(config).train(resume=True)
    assert {p.name for p in tmp_path.glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-6"}


def _crash():
    raise RuntimeError("crash")


def test_a_checkpoint_that_cannot_be_saved_leaves_the_one_before(tmp_path, monkeypatch):
    config, save = Config(str(tmp_path), save_steps=3), torch.save

    def full(state, path):
        if state["step"] == 6:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be saved .*No space left.*checkpoint-3 is untouched"):
        Walk(config).train()
    assert not list(tmp_path.glob(".tmp*")) and checkpoints.damage(tmp_path / "checkpoint-3") is None
    monkeypatch.undo()
    assert Walk(config).train(resume=True).step == 10


def test_what_was_gathered_for_a_checkpoint_is_let_go_where_saving_fails(tmp_path):
    events, walk = [], Walk(Config(str(tmp_path)))

    @contextlib.contextmanager
    def gathered():
        events.append("whole")
        yield
        events.append("sharded")

    walk.gathered = gathered
    with pytest.raises(RuntimeError, match="crash"), Everywhere(walk).gathered():
        _crash()
    assert events == ["whole", "sharded"]


def test_updates_that_are_skipped_are_counted_and_too_many_in_a_row_end_the_run(tmp_path):
    guard = common.NonFiniteGuard(3, str(tmp_path / "run"))
    batch = lambda: {"texts": ["a"]}  # noqa: E731
    for finite in (True, False, False, True, False, False):
        if finite:
            assert guard.check(True, "the gradient", batch)
        else:
            with pytest.warns(RuntimeWarning, match="the gradient is not finite: this update is skipped, number"):
                assert not guard.check(False, "the gradient", batch)
    assert (guard.skipped, guard.in_a_row) == (4, 2) and not (tmp_path / "run").exists()
    with pytest.warns(RuntimeWarning), pytest.raises(common.NonFiniteError, match="in 3 updates in a row"):
        guard.check(False, "the gradient", batch)
    assert torch.load(tmp_path / "run/non_finite_batch.pt") == {"texts": ["a"]}


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig])
def test_where_adapters_go_means_nothing_without_any(config):
    with pytest.raises(ConfigError, match="lora_target_modules says where adapters go"):
        config("run", lora_target_modules=["q_proj"])
    config("run", lora_target_modules=["q_proj"], lora_r=2)


# --- memory ----------------------------------------------------------------------------------------------------------


RESIDENT = """
import os, sys
from pathlib import Path
import torch, parallel_runs

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

make, leave_early, size = getattr(parallel_runs, sys.argv[1]), sys.argv[2] == "True", 256 << 20
trainer = make(Path(sys.argv[3]))
before = resident()
torch.ones(size // 4)
assert resident() - before < size // 4
for _ in trainer:
    torch.ones(size // 4)
    assert resident() - before > 3 * size // 4
    if leave_early:
        break
assert resident() - before < size // 4
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("leave_early", [False, True])
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_freed_memory_is_kept_from_step_to_step_and_returned_at_the_end(kind, leave_early, tmp_path):
    """In a process of its own: in other threads than the main one, as pytest-xdist may use, malloc does as always."""
    command = [sys.executable, "-c", RESIDENT, kind, str(leave_early), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
