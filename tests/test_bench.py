"""The bench measures what it says, and its report reads what it writes."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import bench
from rlhf_fast.bench import baselines, harness, rows
from rlhf_fast.cli import _bench
from rlhf_fast.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import op_report
import ppo_report
import report

CPU = torch.device("cpu")


def test_rounds_interleave_and_ratios_compare_within_a_round(monkeypatch):
    clock, seen = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def takes(name, seconds):
        def call():
            seen.append(name)
            clock[0] += seconds

        return call

    functions = {harness.OURS: takes("ours", 0.01), "other": takes("other", 0.03)}
    samples, _ = harness.interleaved(functions, CPU, seconds=0.2)
    assert len(samples["other"]) == len(samples[harness.OURS]) >= 5
    assert seen[4:6] == ["ours", "other"]  # after the probes, not timed
    assert seen[6:10] == ["ours", "other", "other", "ours"]
    assert harness.summarize(samples, {})["other"]["over_ours"] == pytest.approx(3.0)


@pytest.mark.parametrize(("seconds", "calls"), [(harness.LEAST_SAMPLE / 200, 200), (2 * harness.LEAST_SAMPLE, 1)])
def test_short_calls_are_repeated_within_a_sample(seconds, calls, monkeypatch):
    clock, count = [0.0], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def call():
        count[0] += 1
        clock[0] += seconds

    samples, _ = harness.interleaved({harness.OURS: call}, CPU, seconds=0.0)
    assert samples[harness.OURS] == pytest.approx([seconds] * harness.LEAST_ROUNDS)
    assert count[0] == 3 + harness.LEAST_ROUNDS * calls  # to compile, to probe, and after the probes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_peak_counts_what_is_freed_again():
    size = 64 * 2**20
    peak, _ = harness.probe(lambda: torch.ones(size // 4).sum(), CPU)
    assert 0.9 * size <= peak < 1.5 * size  # pages that an earlier test left resident are not counted again


def test_the_floor_moves_the_bytes_it_names():
    read = rows.moved_bytes(4000, 0, CPU)
    assert read.__self__.numel() == 1000
    _, copied = rows.moved_bytes(12000, 4000, CPU)()
    assert copied.numel() == 1000


def test_readme_shows_the_machine_with_most_ops():
    """A machine on which one op was measured since does not take the others' place."""

    def file(machine, date, *ops):
        return {"machine": machine, "date": date, "rows": [{"op": op} for op in ops]}

    whole = [
        file("a", "2026-01-02", "gae"),
        file("a", "2026-01-01", "ppo_loss"),
        file("b", "2026-01-01", "gae", "ppo_loss"),
    ]
    assert report.most_complete([*whole, file("c", "2026-01-03", "gae", "gae")]) == "a"
    assert report.most_complete([*whole, file("b", "2026-01-04", "gae")]) == "b"


def test_only_the_rows_of_one_dtype(tmp_path, monkeypatch):
    output = tmp_path / "bench.json"
    monkeypatch.setattr(baselines, "token_logprobs", lambda device: {"eager": baselines.log_softmax_gather})
    arguments = ["token_logprobs", "--small", "--seconds", "0", "--device", "cpu", "--json", str(output)]
    _bench([*arguments, "--dtype", "bfloat16"])
    assert {row["dtype"] for row in json.loads(output.read_text())["rows"]} == {"bfloat16"}


@pytest.mark.parametrize("small", [False, True])
def test_every_row_has_its_name_once(small):
    names = [str(row) for row in rows.all_rows(CPU, small)]
    assert len(names) == len(set(names)) > 10


def test_command_writes_what_the_report_reads(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench" / "results" / "cpu.json"
    monkeypatch.setattr(baselines, "token_logprobs", lambda device: {"eager": baselines.log_softmax_gather})
    arguments = ["token_logprobs", "--small", "--seconds", "0", "--device", "cpu", "--json", str(output)]
    _bench(arguments)
    assert "eager" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert {"machine", "commit", "command", "OMP_WAIT_POLICY", "threads", "rows"} <= result.keys()
    forward, both = result["rows"][:2]
    assert set(forward["implementations"]) == {"floor", "eager", harness.OURS}
    assert set(both["implementations"]) == {"floor", "eager", harness.OURS, f"{harness.OURS} in place"}

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- bench -->\nearlier rows\n{report.END}\nafter\n")
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text(
        f"formula\n<!-- bench:token_logprobs -->\nearlier rows\n{report.END}\n<!-- bench:gae -->\n{report.END}\nend\n"
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "earlier rows" not in text
    assert "| `token_logprobs` | 64x50257 | float32, bfloat16 | forward |" in text and result["machine"] in text
    assert (tmp_path / "docs" / "bench.svg").stat().st_size > 1000
    assert page.read_text().startswith("formula\n") and page.read_text().endswith(
        f"<!-- bench:gae -->\n{report.END}\nend\n"
    )
    assert "| `token_logprobs` | 64x50257 |" in page.read_text() and "earlier rows" not in page.read_text()
    report.main()
    assert readme.read_text() == text


def test_a_commit_with_changes_is_shown_with_them():
    commit = 3 * "0123456789abcdef"
    assert ppo_report.short_commit(commit) == commit[:12] and ppo_report.short_commit(commit + "+") == commit[:12] + "+"


def test_the_pages_say_what_the_result_files_do(tmp_path, monkeypatch):
    """Who changes a result or the report also runs bench/report.py."""
    pytest.importorskip("matplotlib")
    root = report.ROOT
    pages = [path.relative_to(root) for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    shutil.copytree(root / "bench" / "results", tmp_path / "bench" / "results")
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(root / page, tmp_path / page)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main()
    for page in pages:
        assert (tmp_path / page).read_text() == (root / page).read_text(), f"run bench/report.py: {page}"


def test_the_sentences_beside_the_tables_name_their_ratios():
    """Those that change with every measurement; CONTRIBUTING asks to read the others again."""

    results = report.ROOT / "bench" / "results"
    intel, amd = (
        op_report.newest([json.loads(path.read_text()) for path in results.glob(f"cpu_{name}*.json")])
        for name in ("intel", "amd")
    )

    def between(rows, op, direction, peer, digits=1):
        rows = [row for row in rows if row["op"] in op.split() and row["direction"] == direction]
        ratios = [op_report.best(row, (peer,)) for row in rows if op_report.BARE not in row["implementations"]]
        return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}"

    readme, page = (" ".join((report.ROOT / page).read_text().split()) for page in ("README.md", "docs/benchmarks.md"))
    both, malloc = "forward+backward", [row for file in intel if file.get("allocator") for row in file["rows"]]
    linear, other_linear = (
        [row for file in files for row in file["rows"] if "x896x" in row["shape"]] for files in (intel, amd)
    )
    eager = [between(malloc, "token_logprobs", direction, "eager") for direction in ("forward", both)]
    compiled = [between(malloc, "token_logprobs token_logprobs_and_entropy", "forward", "compile"),
                between(malloc, "token_logprobs", both, "compile")]  # fmt: skip
    assert f"eager then takes {eager[0]} times our time forward and {eager[1]} times forward and backward" in page
    assert f"`torch.compile` {compiled[0]} and {compiled[1]}." in page
    assert f"{eager[0]}x forward, {eager[1]}x with backward" in page
    losses = between(other_linear, "linear_cross_entropy linear_ppo_loss", both, "compile")
    logprobs = between(other_linear, "linear_token_logprobs", both, "compile", 2)
    told = f"`torch.compile` takes {losses} times our time on the losses, and {logprobs} on `linear_token_logprobs`"
    assert told in page and f"Other CPUs: [{logprobs}]" in readme
    (row,) = (row for row in linear if row["op"] == "linear_token_logprobs" and row["direction"] == both)
    eager, compiled = (f"{op_report.best(row, (peer,)):.2f}" for peer in ("eager", "compile"))
    told = f"At a width of 896 eager takes {eager} times our time on `linear_token_logprobs` in {row['dtype']}"
    assert told in readme and f"`torch.compile` {compiled}:" in readme and f"eager takes {eager} of its time" in page


def test_an_op_measured_again_takes_the_place_of_its_older_rows():
    def file(machine, threads, date, *shapes):
        rows = [{"op": "gae", "shape": shape, "dtype": "float32", "direction": "forward"} for shape in shapes]
        return {"machine": machine, "threads": threads, "date": date, "rows": rows}

    others = [file("b", 2, "2025-01-01", "8"), file("a", 1, "2025-01-01", "8")]
    old, new = file("a", 2, "2026-01-01", "8", "16"), file("a", 2, "2026-01-02", "8")
    assert op_report.newest([old, *others, new]) == [file("a", 2, "2026-01-01", "16"), *others, new]
    kept = new | {"allocator": "MALLOC_MMAP_MAX_=0"}  # another question, not a later answer
    assert op_report.newest([old, kept]) == [old, kept]


def test_the_readme_has_the_range_of_every_op_also_where_another_is_faster():
    def file(commit, *rows):
        return {"machine": "m", "threads": 1, "OMP_WAIT_POLICY": "", "packages": {"torch": "2"}, "commit": commit,
                "date": "2026-01-01", "rows": list(rows)}  # fmt: skip

    def row(op, shape, dtype, **over):
        over = {op_report.OURS: 1.0, "floor": 0.5} | over
        named = {name.replace("_", " "): {"over_ours": ratio} for name, ratio in over.items()}
        return {"op": op, "shape": shape, "dtype": dtype, "direction": "forward", "implementations": named}

    files = [
        file("a", row("new", "1", "float32", eager=2.0), row("gae", "8", "float32", eager=9.0, eager_loop=0.84)),
        file("b", row("gae", "8", "bfloat16", eager=3.0, compile=1.5), row("gae", "16", "bfloat16", eager=7.0)),
    ]
    *_, gae, new, _, about = op_report.summary(files).splitlines()
    assert gae == "| `gae` | 8, 16 | float32, bfloat16 | forward | 0.8-7.0x | 1.5x |  |  | 2.0x |"
    assert new == "| `new` | 1 | float32 | forward | 2.0x |  |  |  | 2.0x |"
    assert about == "m, 1 threads, OMP_WAIT_POLICY=unset, torch 2, commit a, 2026-01-01 and b, 2026-01-01"


def test_a_malloc_that_keeps_its_memory_is_told(monkeypatch):
    monkeypatch.setattr(harness, "ALLOCATOR", ("MALLOC_MMAP_MAX_",))
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert "MALLOC" not in op_report.source(harness.provenance(CPU, []))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert "MALLOC_MMAP_MAX_=0, " in op_report.source(harness.provenance(CPU, []))


def test_a_tiny_row_stands_beside_a_bare_function_and_not_in_the_readme(monkeypatch):
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    monkeypatch.setattr(baselines, "token_logprobs", lambda device: {"eager": baselines.log_softmax_gather})
    tiny = [row for row in rows.all_rows(CPU) if row.direction == rows.BOTH and row.shape in ("512", "8", "16x16")]
    chosen = [row for row in tiny if row.op in ("pairwise_loss", "token_logprobs")]
    measured = [bench.measure(row, CPU, 0.0) for row in chosen]
    usual = {
        "floor",
        "eager",
        "compile",
        harness.OURS,
        "loss alone (eager)",
        "loss alone (compile)",
        f"{harness.OURS} in place",
    }
    bare = {op_report.BARE, "bare, as many tensors"}
    assert [set(row["implementations"]) - usual for row in measured] == [set(), bare | {"statistics read"}, bare]
    lines = op_report.summary([{**harness.provenance(CPU, []), "rows": measured}]).splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| `")] == ["512"]


def plain(value):
    """The numbers of what an implementation gives: of a loss with statistics, the loss."""
    if isinstance(value, tuple):
        return plain(value[0]) if isinstance(value[-1], dict) else torch.stack([plain(x) for x in value])
    return value.detach().float()


@pytest.mark.parametrize("op", ["token_logprobs", "token_logprobs_and_entropy", "linear_token_logprobs",
                                "linear_cross_entropy", "linear_ppo_loss", "ppo_loss", "value_loss", "pairwise_loss",
                                "dpo_loss", "gae"])  # fmt: skip
def test_what_is_compared_computes_the_same(op, monkeypatch):
    """And TRL's functions get sequences of tokens, over which they loop in Python, as TRL gives them."""
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    monkeypatch.setattr(baselines, "SEQUENCE", 5)
    draw = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 4, 5, generator=draw)
    labels, mask = torch.randint(7, (20,), generator=draw), torch.arange(5) < torch.arange(1, 5)[:, None]
    hidden, weight = torch.randn(20, 3, generator=draw), torch.randn(7, 3, generator=draw)
    inputs = {
        "token_logprobs": (hidden @ weight.T, labels), "token_logprobs_and_entropy": (hidden @ weight.T, labels),
        "linear_token_logprobs": (hidden, weight, labels), "linear_cross_entropy": (hidden, weight, labels),
        "linear_ppo_loss": (hidden.view(4, 5, 3), weight, labels.view(4, 5), a - 2, b, mask),
        "pairwise_loss": (a[0], b[0]), "dpo_loss": (a[0], b[0], c[0], c[1]), "gae": (a, b, mask),
    }.get(op, (a, a + b, c, mask))  # fmt: skip
    table = rows._small_baselines(op)(CPU)
    if op in baselines.LOSS_ALONE:
        table["loss alone"] = baselines.LOSS_ALONE[op]
    if op.startswith("token") and not isinstance(table["TRL"], baselines.Absent):
        from trl.trainer import utils

        name = {"token_logprobs": "selective_log_softmax"}.get(op, "selective_log_softmax_and_entropy")
        theirs, shapes = getattr(utils, name), []
        monkeypatch.setattr(utils, name, lambda x, y: shapes.append(x.shape) or theirs(x, y))
        table["TRL"] = getattr(baselines, op)(CPU)["TRL"]
        table["TRL"](*inputs)
        assert shapes == [(4, 5, 7)]
    ours = plain(getattr(rows.rf, op)(*inputs))
    for name, function in table.items():
        if not isinstance(function, baselines.Absent):
            torch.testing.assert_close(plain(function(*inputs)), ours, atol=1e-5, rtol=1e-5, msg=name)


def test_an_unknown_op_is_refused():
    for op, near in (("softmax", ""), ("value_los", "; did you mean 'value_loss'?")):
        with pytest.raises(ConfigError, match=re.escape(f"bench: unknown op '{op}'{near} (there are dpo_loss, ")):
            _bench(["gae", op, "--small"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "{there}"], "--json {there}: Is a directory"),
        (["--json", "{there}/file/cpu.json"], "--json {there}/file/cpu.json: File exists"),
        (["--json", "{there}/dangling"], "--json {there}/dangling: No such file or directory"),
        (["--seconds", "-1"], "--seconds -1.0 must be a number of seconds"),
        (["--seconds", "nan"], "--seconds nan must be a number of seconds"),
        (["--seconds", "inf"], "--seconds inf must be a number of seconds"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_row_is_measured(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "cpu.json")
    with pytest.raises(ConfigError, match=re.escape("bench: " + message.format(there=tmp_path))):
        _bench(["gae", "--small", "--device", "cpu", *(flag.format(there=tmp_path) for flag in flags)])


def test_results_stay_until_there_are_new_ones(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    (tmp_path / "old.json").write_text("{}")
    for path in (tmp_path / "old.json", tmp_path / "new.json"):
        with pytest.raises(KeyboardInterrupt):
            _bench(["gae", "--small", "--device", "cpu", "--json", str(path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "{}")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device is usable here"):
        _bench(["gae", "--device", "cuda"])


def test_a_peer_that_cannot_be_imported_fails_in_its_own_name():
    def load():
        raise ImportError("built for another Triton")

    table = {}
    baselines.add_peer(table, "absent", "no_such_module", load)
    baselines.add_peer(table, "there", "json", lambda: len)
    baselines.add_peer(table, "broken", "json", load)
    assert table.keys() == {"absent", "there", "broken"} and table["there"]("ab") == 2
    with pytest.raises(ModuleNotFoundError, match="no_such_module is not installed"):
        table["absent"]()
    with pytest.raises(ImportError, match="another Triton"):
        table["broken"](1)


@pytest.mark.skipif(not (Path(harness.__file__).parents[2] / ".git").exists(), reason="not a checkout")
def test_a_machine_without_git_and_a_tree_that_git_does_not_trust_measure_all_the_same(monkeypatch, tmp_path):
    assert len(harness._commit().rstrip("+")) == 40
    (tmp_path / "git").write_text("#!/bin/sh\necho fatal: detected dubious ownership >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RLHF_FAST_COMMIT", "of a copy")
    assert harness.provenance(CPU, [])["commit"] is None
    (tmp_path / "git").unlink()
    assert harness.provenance(CPU, [])["commit"] is None
