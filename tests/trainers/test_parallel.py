"""Two processes (torchrun, gloo) that train one model do what one process does, from the gradient to the files.

The parts that both run are in parallel_runs.py; each process leaves found-<rank>.json.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import parallel_runs
import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import parallel
from rlhf_fast.cli import main
from rlhf_fast.errors import ConfigError, NonFiniteError
from rlhf_fast.trainers.checkpoints import latest_checkpoint
from rlhf_fast.trainers.sft_config import SFTConfig

RUNS = Path(__file__).with_name("parallel_runs.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(path, *part, processes=2):
    """A run of parallel_runs.py in its own session."""
    path.mkdir(exist_ok=True)
    paths = [str(RUNS.parents[2]), str(RUNS.parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*(TORCHRUN if processes == 2 else [sys.executable]), str(RUNS), part[0], str(path), *part[1:]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def run(path, *part, processes=2, fails=False):
    """-> its output, and the content of each process's found-<rank>.json."""
    process = start(path, *part, processes=processes)
    try:
        said, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # some processes may wait for others
        raise
    assert bool(process.returncode) == fails, said
    return said, [json.loads(file.read_text()) for file in sorted(path.glob("found-*.json"))]


def close(one, two, tolerance=1e-4):
    """Compares metrics of one process and of two, whose sums round differently. Times are not compared."""
    assert one.keys() == two.keys()
    for name in one:
        if not name.startswith(("timing_s/", "perf/")):
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-5, nan_ok=True), name


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if "tensorboard" not in p.parts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """parallel_runs.everything: what one process finds, what each of two finds, their output, and the folder."""
    path = tmp_path_factory.mktemp("parallel")
    _, (one,) = run(path / "one", "everything", processes=1)
    said, (first, second) = run(path / "two", "everything")
    return one, first, second, said, path


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "engine"])
def test_two_processes_learn_what_one_does(runs, stage):
    one, first, second = (found["found"][stage] for found in runs[:3])
    assert first["digest"] == second["digest"], "the replicas differ"
    assert len(one["metrics"]) == len(first["metrics"]) > 2
    for a, b, c in zip(one["metrics"], first["metrics"], second["metrics"], strict=True):
        close(a, b)
        close(b, c, tolerance=0)
        assert b.get("policy/first_minibatch_max_abs_log_ratio", 0.0) == 0.0
    close(one["evaluation"], first["evaluation"])
    weights = zip(*(torch.load(runs[4] / n / f"{stage}.pt") for n in ("one", "two")), strict=True)
    # Adam divides by the size of a gradient: if that is rounding error only, a weight may move either way.
    apart = torch.cat([(a - b).abs().flatten() for a, b in weights])
    assert apart.quantile(0.99) < 1e-4 and apart.max() < 2e-2


def test_the_first_process_asks_the_engine_for_all(runs):
    one, first, second = (found["asked"] for found in runs[:3])
    assert first == one == [12, 12, 12, 6] and second == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_leaves_the_files_of_one_process(runs, stage):
    one, first, second = (found["found"][f"run of {stage}"] for found in runs[:3])
    assert first == second and first["step"] == one["step"] > 2 and not first["interrupted"]
    best = [{k: v for k, v in found["metrics"].items() if k.startswith(("eval_", "best_"))} for found in (one, first)]
    close(*best)  # of the model that is kept
    assert best[1].get("best_step") == (2 if stage == "reward" else None)
    folders = [runs[4] / name / "runs" / stage for name in ("one", "two")]
    assert names(folders[0]) == names(folders[1])
    logs = [[json.loads(line) for line in (folder / "train_log.jsonl").open()] for folder in folders]
    for a, b in zip(*logs, strict=True):
        close(*({k: float("nan") if v is None else v for k, v in row.items()} for row in (a, b)))
    assert runs[3].count("finishing") == 0 and runs[3].count("Trainer: 100%") == 0


def test_every_process_is_told_what_is_refused(runs):
    one, first, second = (found["refused"] for found in runs[:3])
    assert len(one) == 1 and "already holds a run" in one[0]
    assert first == second and "already holds a run" in first[0]
    assert "the 2 processes read different data" in first[1] and "different config" in first[2]
    assert "the 2 processes hold different models" in first[3] and "read different eval_dataset" in first[4]


def test_a_gradient_that_one_process_has_is_that_of_all(runs):
    """Also if the parameter is not contiguous in memory."""
    assert [found["gradients"] for found in runs[:3]] == [[[[0, 1, 2], [3, 4, 5]], [1, 1, 1], False, [1, 1]]] * 3


def states(path):
    """The optimizer's state in checkpoint-2, as {index: {name: tensor}}."""
    return torch.load(path / "checkpoint-2/state.pt", weights_only=True)["trainer"]["optimizer"]["state"]


def test_the_optimizer_is_shared_out_and_steps_to_the_same_bits(runs):
    one, first, second = (found["found"] for found in runs[:3])
    assert first["sft"]["digest"] == first["whole"]["digest"]
    assert first["whole"]["state"] == second["whole"]["state"] == one["sft"]["state"]
    for stage in ("sft", "reward", "ppo"):
        for whole, *parts in zip(*(found[stage]["state"] for found in (one, first, second)), strict=True):
            assert sum(parts) == whole and max(parts) < 0.55 * whole, stage


def test_a_process_without_a_parameter_of_its_own_learns_the_same(runs):
    """And a parameter may be column-major in memory."""
    one, first, second = (found["found"]["one matrix"] for found in runs[:3])
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert first["digest"] == second["digest"] and second["state"] == [0] and first["state"] == one["state"] > [0]
    for a, b in ((one["weight"], first["weight"]), *((one["saved"]["0"][k], first["saved"]["0"][k]) for k in moments)):
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-3, atol=1e-5)


def test_a_checkpoint_is_that_of_one_process(runs):
    one, two = (states(runs[4] / name / "runs/sft") for name in ("one", "two"))
    assert list(one) == list(two) and len(one) > 10
    for place, state in one.items():
        assert state.keys() == two[place].keys()
        for name, tensor in state.items():
            torch.testing.assert_close(two[place][name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [("one", 2), ("two", 1)])
def test_a_run_goes_on_in_another_number_of_processes(runs, tmp_path, before, after):
    whole, resumed = runs[4] / before / "runs/sft", tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    _, found = run(tmp_path, "resumed", processes=after)
    kept = [process["state"] for process in found]
    assert sum(kept) == runs[0]["found"]["sft"]["state"][0] and max(kept) < (0.55 if after == 2 else 1.01) * sum(kept)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert apart.quantile(0.99) < 1e-4 and apart.max() < 2e-2


def test_gradients_are_summed_in_buckets_of_one_dtype_and_device():
    sizes = [(torch.float32, n) for n in (3, 3, 1, 9, 2, 2, 1)]
    sizes.insert(3, (torch.float64, 1))
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for dtype, n in sizes]
    parameters.append(torch.nn.Parameter(torch.zeros(1, device="meta")))
    with mock.patch.object(parallel, "BUCKET", 24):
        buckets = parallel._buckets(parameters)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 3], [1], [1], [9], [2, 2, 1], [1]]


def test_dropout_and_the_numbers_of_rewards_are_drawn_apart(runs):
    one, first, second = ([found["found"][stage]["drawn"] for stage in ("sft", "reward", "ppo")] for found in runs[:3])
    assert one == first and all(a != b for a, b in zip(first, second, strict=True))


def test_processes_that_are_killed_resume_to_the_last_bit(tmp_path):
    """Each process has its own dropout masks, so both random states must be restored."""
    _, whole = run(tmp_path / "whole", "with_dropout")
    run(tmp_path / "killed", "killed", fails=True)
    assert latest_checkpoint(tmp_path / "killed/run").name == "checkpoint-3"
    state = torch.load(tmp_path / "killed/run/checkpoint-3/state.pt", weights_only=True)
    masks = [generators["torch"] for generators in state["rng"]]
    assert len(masks) == 2 and not torch.equal(*masks)
    shutil.copytree(tmp_path / "killed/run", tmp_path / "alone/run")
    _, resumed = run(tmp_path / "killed", "with_dropout", "resume")
    assert resumed == whole
    weights = [load_file(tmp_path / name / "run/model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    with pytest.warns(UserWarning, match="differs in gradient_accumulation_steps, num_processes; a checkpoint's place"):
        parallel_runs.with_dropout(tmp_path / "alone", "resume")  # continues, with other masks


def test_a_process_that_is_killed_alone_ends_all_and_the_last_checkpoint_is_whole(tmp_path):
    run(tmp_path, "killed_alone", fails=True)
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    _, (first, second) = run(tmp_path, "resumed")
    assert first["digest"] == second["digest"]


def test_what_fails_in_one_process_ends_all_and_loses_no_step(tmp_path):
    said, (first, second) = run(tmp_path, "failing_reward", fails=True)
    alone = {name: f"{name} fails" for name in ("evaluate", "step", "zeros_like", "clip_grads_with_norm_")}
    unsaved = ("state_of", "state_dict")  # before and after the optimizer's state is gathered
    assert first["raised"] == {
        **{name: f"process 1 of 2 failed: OSError: {what}" for name, what in alone.items()},
        **{name: first["raised"][name] for name in ("save_model", *unsaved)},
        "rollout_func": "cannot pickle 'generator' object",
    }
    assert "could not be saved (save_model fails)" in first["raised"]["save_model"]
    for name in unsaved:
        assert f"could not be saved (process 1 of 2 failed: OSError: {name} fails)" in first["raised"][name]
    assert second["raised"] == {
        **alone,
        **{name: f"{name} fails" for name in unsaved},
        "save_model": f"the first process failed: OSError: {first['raised']['save_model']}",
        "rollout_func": "process 0 of 2 failed: TypeError: cannot pickle 'generator' object",
    }  # fmt: skip
    assert "RuntimeError: process 1 of 2 failed: ValueError: the judge is gone" in said
    assert "Continue with resume=True" in said
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_a_signal_to_one_or_all_ends_the_run_after_its_step_with_a_checkpoint(tmp_path):
    process = start(tmp_path, "stopped")

    def is_in_steps_of(name):
        log = tmp_path / name / "train_log.jsonl"
        while not (log.exists() and log.read_bytes().count(b"\n") > 2):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

    is_in_steps_of("one")
    os.kill(int((tmp_path / "process-1").read_text()), signal.SIGTERM)  # as if one of several machines shuts down
    is_in_steps_of("all")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: torchrun and both processes
    said, _ = process.communicate(timeout=100)
    first, second = [json.loads(file.read_text())["ended"] for file in sorted(tmp_path.glob("found-*.json"))]
    assert first == second and all(interrupted for _, interrupted in first), said
    for name, (step, _) in zip(("one", "all"), first, strict=True):
        assert latest_checkpoint(tmp_path / name).name == f"checkpoint-{step}" and step < 400
    assert said.count("finishing this step") == 1
    assert f"Stopped by a signal to another process after step {first[0][0]} of 400" in said


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_that_accelerate_is_to_use_is_refused(engine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=f"asks for {engine}, which these trainers do not use"):
        parallel.start()


@pytest.mark.parametrize(
    ("asked", "bf16", "told"),
    [
        ("bf16", False, "bf16: set bf16: true in"),
        ("fp16", True, "fp16: these trainers"),
        ("fp8", False, "fp8: these trainers have only bf16, or"),
    ],
)
def test_a_precision_of_accelerate_that_the_config_does_not_ask_for_is_refused(asked, bf16, told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.warns(UserWarning, match=f"asks for mixed precision in {told.removesuffix(', or')}.*; this run mult"):
        parallel.start(SFTConfig(bf16=bf16))  # one process: transformers 4 may have set it
    with monkeypatch.context() as several, pytest.raises(ConfigError, match=f"mixed precision in .*{told}"):
        several.setenv("WORLD_SIZE", "2")
        parallel.start(SFTConfig(bf16=bf16))
    parallel.start()  # the config is not known yet
    for asked, bf16 in (("no", False), ("no", True), ("bf16", True), ("", False), ("BF16", True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        parallel.start(SFTConfig(bf16=bf16))


def joining(monkeypatch, **patched):
    """As if torchrun had started two processes: what start() calls of torch.distributed is replaced."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "_joined", False)
    for name, result in patched.items():
        monkeypatch.setattr(parallel.dist, name, lambda *arguments, result=result, **options: result)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    taken, at_exit, options = [], [], {}
    monkeypatch.setattr(parallel.atexit, "register", at_exit.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for gpu in range(3):
        joining(monkeypatch, is_initialized=False)
        monkeypatch.setattr(parallel.dist, "init_process_group", lambda _, **given: options.update(given))
        monkeypatch.setenv("LOCAL_RANK", str(gpu))
        with pytest.raises(ConfigError, match="only 2: start one process per GPU") if gpu == 2 else nullcontext():
            parallel.start()
        assert parallel._joined is (gpu < 2)
    assert taken == [0, 1] and at_exit == [parallel._leave] * 2
    assert options == {"timeout": parallel.WAIT}  # torch's half an hour is too short for a judge


@pytest.mark.parametrize(("theirs", "joins"), [("cuda:nccl", False), ("cpu:gloo,cuda:nccl", True)])
def test_a_process_group_of_the_user_needs_a_cpu_backend(theirs, joins, monkeypatch):
    joining(monkeypatch, is_initialized=True, get_backend_config=theirs, get_world_size=2, get_rank=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # says nothing as long as the config is not known
    with nullcontext() if joins else pytest.raises(ConfigError, match=rf"\({theirs}\) has no CPU backend"):
        parallel.start()
    assert (parallel.size(), parallel.rank()) == ((2, 1) if joins else (1, 0))


def test_what_makes_models_different_is_compared_and_buffers_are_sent(monkeypatch):
    """The first process's view: what it tells the others of its weights, and what it sends them."""
    told, sent = [], []
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "all_gather", lambda value: told.append(str(value)) or [value] * 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda *arguments: None)
    monkeypatch.setattr(parallel.dist, "broadcast", lambda tensor, src: sent.append(tensor))
    nn = torch.nn
    for model in (nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(2, 3).double(), nn.Bilinear(2, 3, 3), nn.BatchNorm1d(3),
                  nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3).requires_grad_(False)):  # fmt: skip
        sent.clear()
        parallel.begin_equal([model])
        assert [x.data_ptr() for x in sent] == [x.data_ptr() for x in model.state_dict().values()]
    assert len(set(told)) == len(told)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate's launcher")
def test_accelerate_launch_trains_in_two_processes_but_not_in_a_precision_that_is_ignored(tmp_path):
    """Both in one launch: with its precision, then as with --mixed_precision no. Without mpirun, accelerate starts
    several processes only with --multi_gpu, which does not look for GPUs."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a ", "completion": "b"}\n' * 8)
    argv = ["sft", "--train_data", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "run"),
            "--scratch", "{vocab_size: 300, hidden: 32}", "--max_steps", "1", "--num_samples", "0"]  # fmt: skip
    (tmp_path / "both.py").write_text(
        "import os, sys; from rlhf_fast.cli import main\n"
        f"assert main({argv}) == 2\n"
        "os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
        f"sys.exit(main({argv}))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:  # with port 0 accelerate 1.4 waits for ever
        port = str(server.getsockname()[1])
    two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    command = ["-m", "accelerate.commands.launch", *two, "--mixed_precision", "bf16", str(tmp_path / "both.py")]
    environment = {**os.environ, "PYTHONPATH": str(RUNS.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("asks for mixed precision in bf16: set bf16: true in the run's own config") == 2
    assert json.loads((tmp_path / "run" / "run_config.json").read_text())["num_processes"] == 2


def test_the_command_line_in_two_processes(tmp_path):
    """One pair of the data is left out."""
    data, said = tmp_path / "train.jsonl", "\n\nHuman: {}\n\nAssistant: {}"
    pairs = [{"chosen": said.format(i, "the cat"), "rejected": said.format(i, "mat")} for i in range(8)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0] | {"rejected": "mat"}]))
    command = [
        *TORCHRUN, "-m", "rlhf_fast", "sft", "--train_data", str(data), "--scratch", "{vocab_size: 300, hidden: 32}",
        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--num_samples", "0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(RUNS.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step 2; .*report.html", done.stdout)) == 1
    assert done.stdout.count(f"{data}: ") == 1, done.stdout


def test_what_does_not_run_in_several_processes_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--model", "x"]) == 2
    assert "generate runs in one process, and this is one of 2" in capsys.readouterr().err


def as_one_of_two(monkeypatch, rank, other=None):
    """What the other process tells in raise_in_all: (whether its exception is a ConfigError, the message), or None."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda told, op: told[:1].fill_(told[0] or other is not None))

    def gather(said, mine):
        said[:] = [other, mine] if rank else [mine, other]

    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)


@pytest.mark.parametrize(("is_config", "kind"), [(True, ConfigError), (False, RuntimeError)])
def test_what_fails_in_another_process_is_refused_here_if_it_is_there(is_config, kind, monkeypatch):
    as_one_of_two(monkeypatch, 1, (is_config, "what it says"))
    with pytest.raises(kind, match=r"^process 0 of 2 failed: what it says$") as raised, parallel.raise_in_all():
        pass
    assert raised.type is kind


@pytest.mark.parametrize(
    ("rank", "kind", "shown"),
    [(1, OSError, True), (0, OSError, False), (1, ConfigError, False), (1, NonFiniteError, False)],
)
def test_a_traceback_that_the_first_process_does_not_have_is_printed(rank, kind, shown, monkeypatch, capsys):
    as_one_of_two(monkeypatch, rank)
    with pytest.raises(kind), parallel.raise_in_all(), parallel.raise_in_all():
        raise kind("no room")
    assert capsys.readouterr().err.count("Traceback") == shown


def test_work_is_shared_out_in_turns_and_an_empty_share_asks_for_none(monkeypatch):
    def asked(rank, items):
        as_one_of_two(monkeypatch, rank)
        monkeypatch.setattr(parallel, "all_gather", lambda mine: gathered.append(mine) or [items[::2], items[1::2]])
        calls, gathered = [], []
        assert parallel.map_shares(lambda share: calls.append(share) or share, items) == items
        return calls, gathered

    assert asked(0, [1, 2, 3]) == ([[1, 3]], [[1, 3]]) and asked(1, [1, 2, 3]) == ([[2]], [[2]])
    assert asked(1, [1]) == ([], [[]])
    with pytest.raises(ZeroDivisionError) as raised:
        parallel.map_shares(lambda share: 1 / 0, [1, 2])
    assert raised.value._raised_in_all


def test_the_first_process_works_as_if_it_were_alone_and_is_not_afterwards(monkeypatch):
    joining(monkeypatch, get_world_size=2, get_rank=0, all_reduce=None, broadcast_object_list=None)
    monkeypatch.setattr(parallel, "_joined", True)
    monkeypatch.setattr(parallel.dist, "all_gather_object", lambda said, mine: said.__setitem__(0, mine))
    assert parallel.on_first(parallel.size) == 1 and parallel.size() == 2
    with pytest.raises(ZeroDivisionError):
        parallel.on_first(lambda: 1 / 0)
    assert parallel.size() == 2


@pytest.mark.parametrize(
    ("rank", "name", "work"),
    [
        (1, "zeros_like", lambda: parallel.sum_gradients([torch.nn.Parameter(torch.ones(1))])),
        (0, "empty_like", lambda: parallel.gather_states({0: {"step": torch.ones(1)}})),
    ],
)
def test_what_one_process_has_no_room_for_fails_in_all(rank, name, work, monkeypatch):
    as_one_of_two(monkeypatch, rank)
    if rank:
        monkeypatch.setattr(parallel.dist, "all_reduce", lambda told, op: told.fill_(1))  # the other has a gradient
    monkeypatch.setattr(parallel, "all_gather", lambda mine: [mine, {(1, "step"): torch.ones(1, device="meta")}])
    no_room = mock.patch.object(torch, name, side_effect=torch.OutOfMemoryError)
    with no_room, pytest.raises(torch.OutOfMemoryError) as raised:
        work()
    assert raised.value._raised_in_all


def test_a_maximum_is_no_sum(monkeypatch):
    found, kind = [], parallel.dist.ReduceOp
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda x, op=kind.SUM: found.append(op))
    parallel.all_reduce_max(torch.ones(1)), parallel.all_reduce_sum(torch.ones(1))
    assert found == [kind.MAX, kind.SUM]


@pytest.mark.parametrize(("size", "count", "multiple"), [(2, 12, 2), (2, 12, 4), (3, 10, 4), (4, 3, 1), (2, 1, 8)])
def test_blocks_cut_no_group_and_miss_nothing(monkeypatch, size, count, multiple):
    monkeypatch.setattr(parallel, "size", lambda: size)
    blocks = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        blocks.append(parallel.block(count, multiple))
    assert [i for block in blocks for i in range(count)[block]] == list(range(count))
    assert all(block.start % multiple == 0 for block in blocks)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_miss_nothing_and_are_about_as_much_work(monkeypatch, size):
    loads = [300, 7, 8, 120, 40, 41, 90, 5, 260, 33, 64, 2, 180]

    def shares(*loads):
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            yield parallel.share(range(13), *loads)

    monkeypatch.setattr(parallel, "size", lambda: size)
    assert list(shares()) == [list(range(13))[rank::size] for rank in range(size)]
    balanced = list(shares(loads))
    assert sorted(i for share in balanced for i in share) == list(range(13))
    assert all(share == sorted(share) and len(share) <= -(-13 // size) for share in balanced)
    most = max(sum(loads[i] for i in share) for share in balanced)
    assert most <= max(300, 1.1 * sum(loads) / size), "in turns one of two has 1.6 times the mean, of three 1.9"


def test_no_share_has_more_items_than_an_equal_part(monkeypatch):
    """Even if its items are little work."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    assert parallel._shares([100, 1, 1, 1]) == [[0, 3], [1, 2]]
