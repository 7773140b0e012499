"""`make gpu` without a GPU: what it would run, its rows and measuring code on the emulated kernels, its report."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

import pytest
import small_calls
import torch

from rlhf_fast.bench import baselines, device, rows
from rlhf_fast.bench.harness import OURS
from rlhf_fast.cli import _bench

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import gpu  # noqa: E402
import op_report  # noqa: E402
import report  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, slug", [
    ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
])  # fmt: skip
def test_the_card_names_the_file(name, slug):
    assert gpu.card(name) == slug


def test_every_part_runs_what_exists_and_one_failure_leaves_the_others(monkeypatch, capsys, tmp_path):
    commands, environments = [], []

    def run(*command, **environment):
        commands.append(command)
        environments.append(environment)
        return int("pytest" in command)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(gpu, "missing_peers", lambda: [])
    monkeypatch.setattr(gpu, "PEERS", tmp_path)
    (tmp_path / "trl-1.12.0" / "trl").mkdir(parents=True)
    assert gpu.from_root(ROOT / "build" / "peers") == "build/peers" and gpu.from_root(tmp_path) == str(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    assert gpu.main([]) == 1
    assert environments[0] == {"RLHF_FAST_CUDA": "1", "RLHF_FAST_CUDA_ARCHITECTURES": "90-real"}  # of this card alone
    tests = [given for command, given in zip(commands, environments, strict=True) if "pytest" in command]
    assert tests == [{"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}] * len(gpu.TESTS)
    words = [word for command in commands for word in command]
    assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    paths = [word for word in words if word.endswith(".json")]
    assert {str(Path(path).parent) for path in paths} == {"bench/results"}  # a result file tells its command
    written = {Path(path).name for path in paths}
    ops = {row.op for row in rows.all_rows(CPU, small=True, gpu=True)}
    assert written == {f"h200-{op}.json" for op in (*ops, "ppo")}  # no op without its file, no file without its op
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[-len(gpu.PARTS) :]] == [
        [part, "FAILED!" if part in gpu.TESTS else "passed"] for part in gpu.PARTS
    ]


@pytest.fixture(autouse=True)
def a_path_of_its_own(monkeypatch):
    """gpu.py puts the folders of peers there, which are no peers in these tests: others would import them."""
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture
def a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


def test_a_part_over_its_time_is_stopped_with_what_it_started(a_card, monkeypatch, capfd, tmp_path):
    started = tmp_path / "started"
    monkeypatch.setattr(gpu, "LIMIT", 3)
    monkeypatch.setattr(gpu, "test", lambda part: gpu.run("sh", "-c", f"sleep 60 & echo $! > {started}; wait"))
    monkeypatch.setattr(gpu, "sanitize", lambda: gpu.run("true"))
    assert gpu.main(["--part", "test", "sanitizer"]) == 1
    out = capfd.readouterr().out
    assert "test             FAILED: stopped after 3 s" in out and "sanitizer        passed" in out
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # killed; a busy machine takes a moment to bury it
        for _ in range(100):
            os.kill(int(started.read_text()), 0)
            if Path(f"/proc/{int(started.read_text())}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail("what the part started still runs")


def test_what_was_not_checked_is_not_passed(a_card, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tmp_path / "none"))
    assert gpu.main(["--part", "sanitizer"]) == 1
    assert "sanitizer        skipped: compute-sanitizer not found" in capsys.readouterr().out


def test_peers_come_into_a_folder_of_their_own(a_card, monkeypatch, capsys, tmp_path):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda *command, **env: commands.append(command) or 0)
    monkeypatch.setattr(gpu, "PEERS", tmp_path / "peers")
    monkeypatch.setattr(gpu, "find_spec", lambda module: module in ("trl", "accelerate", "cut_cross_entropy"))
    assert gpu.main(["--part", "peers"]) == 0  # nothing of ours failed, and every row will say it
    assert "peers            skipped: without datasets, trl-1.12.0, liger_kernel, quack" in capsys.readouterr().out
    assert [command[-1] for command in commands] == ["xxhash", "trl==1.12.0", "liger-kernel", "einops"]
    folders = [Path(c[c.index("--target") + 1]).relative_to(tmp_path / "peers") for c in commands]
    assert all("--no-deps" in c for c in commands)
    assert folders == [Path(), Path("trl-1.12.0"), Path(), Path()]  # two modules of one name
    (tmp_path / "peers" / "trl-1.12.0" / "trl").mkdir(parents=True)
    assert gpu.main(["--fetch-peers", "--for-python", "3.12"]) == 1
    # What this Python has of its own does not count for another one.
    assert "without accelerate, datasets, trl, liger_kernel, cut_cross_entropy, quack" in capsys.readouterr().out
    assert all(c[c.index("--python-version") + 1] == "3.12" and "--only-binary=:all:" in c for c in commands[4:])
    (tmp_path / "peers" / "some_dsl" / "dsl_packages").mkdir(parents=True)
    assert gpu.peer_folders() == [str(tmp_path / "peers"), str(tmp_path / "peers" / "some_dsl" / "dsl_packages")]


def test_peers_of_another_python_are_not_used(a_card, monkeypatch, capsys, tmp_path):
    """Their compiled modules cannot be imported, and hide those that can."""
    monkeypatch.setattr(gpu, "run", lambda *command, **env: 0)
    monkeypatch.setattr(gpu, "PEERS", tmp_path / "peers")
    (tmp_path / "peers" / "xxhash").mkdir(parents=True)
    (tmp_path / "peers" / "xxhash" / f"_xxhash.{sys.implementation.cache_tag}-x86_64-linux-gnu.so").touch()
    assert gpu.peer_folders() == [str(tmp_path / "peers")]
    other = tmp_path / "peers" / "xxhash" / "_xxhash.cpython-27-x86_64-linux-gnu.so"
    other.touch()
    assert gpu.peer_folders() == []
    assert gpu.main(["--part", "peers"]) == 0 and other.exists()  # somebody's folder
    assert "name another folder with PEERS" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(gpu, "PEERS", gpu.PEERS.rename(tmp_path / "build" / "peers-gpu"))
    assert gpu.main(["--part", "peers"]) == 0
    assert "is filled anew" in capsys.readouterr().out and not gpu.PEERS.exists()


def test_peers_travel_in_pieces(a_card, monkeypatch, capsys, tmp_path):
    peers, away = tmp_path / "build" / "peers-gpu", tmp_path / "away" / "peers-gpu"
    for name, size in (("trl", 10), ("quack", 10), ("nvidia_cutlass_dsl", 3000)):
        (peers / name / "__pycache__").mkdir(parents=True)
        (peers / name / "__init__.py").write_bytes(os.urandom(size))
    (peers / "trl" / "__pycache__" / "a.pyc").write_bytes(b"")
    monkeypatch.setattr(gpu, "run", lambda *command, **env: 0)
    monkeypatch.setattr(gpu, "PEERS", peers)
    monkeypatch.setattr(gpu, "PIECE", 2048)
    assert gpu.main(["--fetch-peers", "--pack"]) == 1  # some are missing
    pieces = sorted(path.name for path in peers.parent.glob("*.tar.xz.*"))
    assert pieces == ["peers-gpu-large.tar.xz.1of2", "peers-gpu-large.tar.xz.2of2", "peers-gpu.tar.xz.1of1"]
    monkeypatch.setattr(gpu, "PEERS", away)
    away.parent.mkdir()
    arrived = []
    for piece in pieces:
        (away.parent / piece).write_bytes((peers.parent / piece).read_bytes())
        gpu.main(["--part", "peers"])
        arrived.append(sorted(path.name for path in away.glob("*")))
    assert arrived == [[], ["nvidia_cutlass_dsl"], ["nvidia_cutlass_dsl", "quack", "trl"]]
    assert len((away / "nvidia_cutlass_dsl" / "__init__.py").read_bytes()) == 3000
    assert not (away / "trl" / "__pycache__").exists()


def test_results_are_kept_while_they_come_and_brought_home(a_card, monkeypatch, capfd, tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LIMIT", 7)
    monkeypatch.setattr(gpu, "GRACE", 2)
    script = f"trap 'echo so far; exit 1' INT; echo 1 > {results}/h200-gae.json; sleep 60 & wait"
    monkeypatch.setattr(gpu, "test", lambda part: gpu.run("bash", "-c", script))
    (results / "cpu.json").write_text("2")
    assert gpu.main(["--part", "test", "--keep", str(tmp_path / "kept")]) == 1
    assert "so far" in capfd.readouterr().out  # asked to end before it is killed
    (results / "h200-gae.json").unlink()
    monkeypatch.setattr(gpu, "run", lambda *command: 0)
    assert gpu.main(["--unpack", str(tmp_path / "kept" / "results.tar.gz")]) == 0
    assert sorted(path.name for path in results.iterdir()) == ["cpu.json", "h200-gae.json"]


def test_all_parts_end_within_the_time_they_are_given(a_card, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "test", lambda part: gpu.run("sleep", "60"))
    monkeypatch.setattr(gpu, "sanitize", lambda: pytest.fail("begun"))
    start = time.monotonic()
    assert gpu.main(["--part", "test", "sanitizer", "--within", "17"]) == 1
    assert time.monotonic() - start < 17
    out = capfd.readouterr().out
    assert "stopped after 11 s" in out and "sanitizer        FAILED: not begun, the time of all parts is over" in out


def test_ppo_is_refused_without_the_trl_that_has_it(a_card, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda *command, **env: pytest.fail(f"started {command}"))
    monkeypatch.setattr(gpu, "PEERS", tmp_path / "peers")
    assert gpu.main(["--part", "bench-ppo"]) == 1
    out = capsys.readouterr().out
    assert "needs TRL 1.12.0 in" in out and "--fetch-peers" in out and "PEERS=folder" in out
    assert gpu.main(["--dry-run", str(tmp_path), "--part", "bench-ppo"]) == 1


def test_make_gpu_writes_the_table_whatever_failed():
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("\ngpu:") :].split("\n\n")[0].replace("$$", "$").replace("$(PYTHON)", "python3")
    assert recipe.index("bench/gpu.py") < recipe.index("code=$?") < recipe.index("bench/report.py")
    assert recipe.rstrip().endswith("exit $code; }")


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--part", "build"]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_dry_run_asks_for_what_a_cpu_can_do(monkeypatch, capsys, tmp_path):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda *command, **env: commands.append(command) or 0)
    assert gpu.main(["--dry-run", str(tmp_path), "--part", "bench-logprobs", "bench-losses"]) == 0
    assert [command[4] for command in commands] == ["token_logprobs", *gpu.BENCHES["bench-losses"]]
    assert "left out" in capsys.readouterr().out


def test_a_dry_run_leaves_the_results_alone(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", str(ROOT / "bench" / "results")])
    assert "outside the repository" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch, on_emulator):
    """The GPU's rows at a size for the emulator, and nothing compiled."""
    monkeypatch.setattr(rows, "SMALL_LOGITS_SHAPES", ((2, 131),))
    monkeypatch.setattr(rows, "SMALL_HEAD", dict(rows=2, vocab=67, widths=(16,)))
    monkeypatch.setattr(rows, "LOGITS_SHAPES", ((2, 131),))
    monkeypatch.setattr(rows, "LOSS_SHAPE", (4, 32))
    monkeypatch.setattr(rows, "GAE_SHAPE", (4, 64))
    monkeypatch.setattr(rows, "RANKED", (8, 4))
    monkeypatch.setattr(rows, "PAIRS", 64)
    cold = device.WallClock.cold
    monkeypatch.setattr(device.WallClock, "cold", lambda self, function, repeats: cold(self, function, 1))
    monkeypatch.setattr(device, "seconds_of_a_call", lambda function, *others: (function(), 1e-5)[1])
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    for name in ("token_logprobs", "token_logprobs_and_entropy"):  # TRL's loop over rows takes long
        table = getattr(baselines, name)(CPU)
        table.pop("TRL", None)
        monkeypatch.setattr(baselines, name, lambda device, table=table: dict(table))
    gc.freeze()  # what the whole suite has left: the bench collects garbage before each peak of memory
    yield
    gc.unfreeze()


def test_every_row_is_measured_written_and_reported(small, tmp_path, monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no kernel for this card\nand more")

    gae = baselines.gae
    monkeypatch.setattr(
        baselines, "gae", lambda device: gae(device) | {"a peer": broken, "another": baselines.Absent("another")}
    )
    folder = tmp_path / "bench" / "results"
    chosen = [op for part in gpu.BENCHES for op in gpu.BENCHES[part]]
    for op in chosen:
        arguments = [op, "--device", "cpu", "--as-gpu", "--small", "--seconds", "0"]
        _bench([*arguments, "--json", str(folder / f"h200-{op}.json")])
    results = {op: json.loads((folder / f"h200-{op}.json").read_text()) for op in chosen}
    for op, result in results.items():
        assert result["ceilings"].keys() == {"copy_gb_per_s", "bf16_tflop_per_s"} and result["rows"]
        for row in result["rows"]:
            assert row["op"] == op and {OURS, "floor"} <= row["implementations"].keys()
            assert all(f["ms"] >= 0 for f in row["implementations"].values())
            assert ("gb_per_s" in row["implementations"][OURS]) == bool(row["bytes"])
            assert ("tflop_per_s" in row["implementations"][OURS]) == bool(row["flops"])
    assert results["gae"]["rows"][0]["failed"] == {"a peer": "RuntimeError: no kernel for this card"}
    assert results["gae"]["rows"][0]["absent"] == ["another"]
    assert [row["direction"] for row in results["ppo_loss"]["rows"][:2]] == [rows.WITH_GRADIENT, rows.BOTH]
    peaked = [row["shape"] for row in results["token_logprobs"]["rows"] if "peaked" in row["shape"]]
    assert len(peaked) == 2
    directions = [row["direction"] for row in results["linear_token_logprobs"]["rows"]]
    assert directions == [rows.BOTH, rows.FROZEN, rows.FORWARD]

    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- gpu -->\nold\n{report.END}\n<!-- gpu:ppo -->\nold\n{report.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(
        op_report,
        "REACH",
        (
            ("gae", "4x64", "forward", 2.5, None),
            ("gae", "9x9", "forward", 1, None),
            ("ppo_loss", "4x32", "forward with gradient", 3.0, 25),
        ),
    )
    for result in results.values():  # as the card would have written them
        small = result["rows"][0]["op"] == "ppo_loss"
        result["rows"] = [row if small else row | {"dtype": "bfloat16"} for row in result["rows"]]
        for row in result["rows"] if small else ():
            row["implementations"][OURS] |= {"device_us": 2.9, "call_us": 21.0}
        (folder / f"h200-{result['rows'][0]['op']}.json").write_text(json.dumps(result))
    report.main()
    text = readme.read_text()
    assert "| `gae` | 4x64 | forward | 2.5 ms | " in text and "(absent: another)" in text
    assert "| `gae` | 9x9 | forward | 1 ms | not yet measured" in text
    assert "| `ppo_loss` | 4x32 | forward with gradient | 3.0 us, call 25 us | 2.9 us, call 21 us (" in text
    assert "x, with backward |" in text
    assert "\n| shared trunk |" + 4 * " not yet measured |" + "\n" in text
    monkeypatch.setattr(report, "find_spec", lambda module: None)  # where there is torch and little else
    monkeypatch.setattr(op_report, "picture", None)
    (folder / "cpu.json").write_text(json.dumps({k: v for k, v in results["gae"].items() if k != "ceilings"}))
    readme.write_text(f"<!-- gpu -->\nold\n{report.END}\n<!-- bench -->\nkept\n{report.END}\n")
    report.main()
    assert "\nold\n" not in readme.read_text() and "\nkept\n" in readme.read_text()


def test_the_rows_of_the_card_are_the_ones_to_reach():
    """Each figure of docs/benchmarks.md has a row that measures it; on a GPU, where building one allocates."""
    there = {(row.op, row.shape, row.direction) for row in rows.all_rows(CPU, gpu=True)}
    assert {entry[:3] for entry in op_report.REACH} <= there
    to_reach = {entry[0] for entry in op_report.REACH}
    for ops in gpu.BENCHES.values():  # and what has one is measured before what has none
        reached = [op in to_reach for op in ops]
        assert reached == sorted(reached, reverse=True)


def test_what_the_sanitizer_runs(on_emulator):
    assert small_calls.battery("cpu", 1) == len(small_calls.CASES)
    small_calls.rows_at_every_alignment("cpu")


def test_a_peer_that_overwrites_the_logits_is_compared_with_ours_that_does():
    ratios = {OURS: 1.0, f"{OURS} in place": 0.5, "floor": 0.4, "eager": 3.0, "P": 1.2, "P in place": 0.8}
    assert op_report.peer({"implementations": {name: {"over_ours": r} for name, r in ratios.items()}}) == "P 1.20x"


def test_a_call_is_timed_in_batches(monkeypatch):
    """One slow batch of nine, as when the queue of launches fills, does not show."""
    clock, calls = [0.0], [0]

    def call():
        clock[0] += 1.0 if 100 <= calls[0] < 150 else 1e-5
        calls[0] += 1

    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    assert device.seconds_of_a_call(call, CPU) == pytest.approx(1e-5)


def test_what_is_timed_in_triton_is_the_call_alone(monkeypatch):
    """Not the change of the backend, which takes as long as a small op's launch."""
    inside, entered, calls = [], [], []

    @contextlib.contextmanager
    def use_backend(name):
        entered.append(name)
        inside.append(name)
        yield
        inside.pop()

    monkeypatch.setattr(device.rf, "use_backend", use_backend)
    monkeypatch.setattr(device, "timer", device.WallClock)
    monkeypatch.setattr(device, "synchronize", lambda on: None)
    monkeypatch.setattr(device, "probe", lambda function, on: (function(), (0, 1e-5))[1])
    functions = {OURS: lambda: calls.append(list(inside)), "floor": lambda: None}
    row = rows.Row("gae", "4x4", torch.float32, rows.FORWARD, functions.copy)
    result = device.measure(row, torch.device("cuda"), 0.0)
    assert list(result["implementations"]) == [OURS, "floor", f"{OURS} triton"]
    assert calls.count([]) == calls.count(["triton"]) > 100 and len(entered) < 10


def test_the_table_of_parts_has_them_all():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [part.strip("` ") for row in rows for part in row.split(",")] == list(gpu.PARTS)
