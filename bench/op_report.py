"""Makes the tables of the ops on a CPU and a GPU, and the picture docs/bench.svg; report.py puts them in the pages."""

from __future__ import annotations

from pathlib import Path

from ppo_report import short_commit

OURS, BARE = "rlhf_fast", "bare autograd.Function"
ALONE = ("loss",)  # "loss alone (eager)", "loss alone (compile)": without the statistics that all others give
NO_PEERS = ("floor", BARE, "bare, as many tensors", "without entropy", "statistics read")
IN_ORDER = (  # of the README's table; every op that is measured has a line there, whoever wins
    "token_logprobs", "token_logprobs_and_entropy", "kl_divergence", "linear_cross_entropy", "linear_ppo_loss",
    "linear_token_logprobs", "ppo_loss", "value_loss", "kl_penalty", "pairwise_loss", "dpo_loss", "ranking_loss", "gae",
    "masked_mean", "masked_whiten",
)  # fmt: skip
GROUPS = {"eager": ("eager",), "torch.compile": ("compile",), "TRL": ("TRL",)}  # column -> prefixes; the best counts


def best(row: dict, prefixes: tuple[str, ...]) -> float | None:
    """How many times our time the fastest of these implementations takes."""
    ratios = [
        figures["over_ours"] for name, figures in row["implementations"].items() if name.split()[0].startswith(prefixes)
    ]
    return min(ratios, default=None)


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 1 else f"{ms:.1f}"


def megabytes(peak: int | None) -> str:
    return "?" if peak is None else f"{peak / 1e6:.0f}"


def span(ratios: list[float | None]) -> str:
    """The least and the most of what one op has over its shapes: "2.1-2.9x"."""
    known = sorted(ratio for ratio in ratios if ratio is not None)
    if not known:
        return ""
    least, most = f"{known[0]:.1f}", f"{known[-1]:.1f}"
    return f"{least}x" if least == most else f"{least}-{most}x"


def summary(results: list[dict]) -> str:
    """The README's table: a line for each op and direction, with the ranges over its shapes, dtypes and allocators.

    Tiny shapes, which measure the call and not the kernel, are left to docs/benchmarks.md.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in (row for result in results for row in result["rows"]):
        if BARE not in row["implementations"]:
            groups.setdefault((row["op"], row["direction"]), []).append(row)
    columns = GROUPS | {"loss alone": ALONE}
    head = ["op", "shapes", "dtypes", "", *columns, "our time over the floor"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for op, direction in sorted(groups, key=lambda group: (*IN_ORDER, group[0]).index(group[0])):
        rows = groups[op, direction]
        shapes, dtypes = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "dtype"))
        others = [span([best(row, prefixes) for row in rows]) for prefixes in columns.values()]
        floors = span([1 / row["implementations"]["floor"]["over_ours"] for row in rows])
        lines.append("| " + " | ".join([f"`{op}`", shapes, dtypes, direction, *others, floors]) + " |")
    settings = dict.fromkeys(map(setting, results))
    commits = dict.fromkeys(measured_at(result) for result in results)
    return "\n".join([*lines, f"\n{'; '.join(settings)}, commit {' and '.join(commits)}\n"])


def newest(results: list[dict]) -> list[dict]:
    """The files without rows that the same machine, with as many threads and the same malloc, measured again later."""

    def key(result: dict, row: dict) -> tuple:
        setting = result["machine"], result["threads"], result.get("allocator", "")
        return *setting, row["op"], row["shape"], row["dtype"], row["direction"]

    by_date = sorted(results, key=lambda result: result["date"])
    latest = {key(result, row): result["date"] for result in by_date for row in result["rows"]}
    return [r | {"rows": [row for row in r["rows"] if latest[key(r, row)] == r["date"]]} for r in results]


def setting(result: dict) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in result["packages"].items() if v)
    waiting = f"OMP_WAIT_POLICY={result['OMP_WAIT_POLICY'] or 'unset'}"
    return f"{result['machine']}, {result['threads']} threads, {waiting}, {versions}"


def measured_at(result: dict) -> str:
    return f"{short_commit(result['commit'], 'of an installed package')}, {result['date'][:10]}"


def source(result: dict) -> str:
    """Where the figures of a result file come from."""
    allocator = f", {result['allocator']}" if result.get("allocator") else ""
    return f"\n{setting(result)}{allocator}, commit {measured_at(result)}: `{result['command']}`\n"


def table(result: dict, ops: set[str] | None = None) -> str:
    """One result file as Markdown, or its rows of some ops; "" where it has none."""
    result = result | {"rows": [row for row in result["rows"] if ops is None or row["op"] in ops]}
    if not result["rows"]:
        return ""
    others = sorted(
        {
            name
            for row in result["rows"]
            for name in row["implementations"]
            if name not in ("floor", OURS, f"{OURS} in place")
            and not any(name.startswith(p) for p in ("eager", "compile", "TRL"))
        }
    )
    head = [
        "op",
        "shape",
        "dtype",
        "",
        "ours, ms",
        "times the floor",
        *GROUPS,
        *others,
        "in place",
        "extra MB: ours, eager, least of the others",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in result["rows"]:
        implementations = row["implementations"]
        ours, floor = implementations[OURS]["ms"], implementations["floor"]["over_ours"]
        in_place = implementations.get(f"{OURS} in place")
        cells = [f"`{row['op']}`", row["shape"], row["dtype"], row["direction"], milliseconds(ours), f"{1 / floor:.2f}"]
        cells += [times(best(row, prefixes)) for prefixes in GROUPS.values()]
        cells += [times(implementations[name]["over_ours"] if name in implementations else None) for name in others]
        cells += [f"{1 / in_place['over_ours']:.1f}x faster" if in_place else ""]
        cells += [", ".join(map(megabytes, extra_memory(implementations)))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, source(result)])


def extra_memory(implementations: dict[str, dict]) -> list[int | None]:
    """Peak bytes of a call of ours, of eager's, and of whoever else needs least."""
    peaks = {name: figures["extra_peak_bytes"] for name, figures in implementations.items()}
    others = [peak for name, peak in peaks.items() if name not in (OURS, "eager", *NO_PEERS) and "in place" not in name]
    known = [peak for peak in others if peak is not None]
    return [peaks[OURS], peaks["eager"], *([min(known)] if known else [])]


# op, shape, direction, what an H200 should take (ms; of the small ops the device's us), and us of a call from Python.
# A small op's figure is of its forward with inputs that require a gradient, which is there when the call returns.
REACH = (
    ("token_logprobs_and_entropy", "8192x151936", "forward", 0.61, None),
    ("token_logprobs_and_entropy", "8192x151936", "forward+backward", 1.85, None),
    ("ppo_from_logits", "8192x151936", "forward+backward", 1.28, None),
    ("linear_token_logprobs", "8192x4096x128256", "forward", 12.4, None),
    ("linear_ppo_loss", "8192x4096x128256", "forward+backward", 35.5, None),
    ("linear_ppo_loss", "8192x896x151936", "forward+backward", 10.6, None),
    ("ppo_loss", "64x1024", "forward with gradient", 3.0, 25),
    ("kl_penalty", "64x1024 k3", "forward with gradient", 3.0, 25),
    ("pairwise_loss", "65536", "forward with gradient", 3.0, 25),
    ("gae", "64x1024", "forward", 2.5, 15),
)


def gpu_summary(results: list[dict]) -> str:
    """For docs/benchmarks.md: what an H200 should take, and what was measured where anything was."""
    head = ["op", "shape", "", "to reach on an H200", "measured", "of the copy or cuBLAS rate", "fastest peer"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows = [(result, row) for result in results for row in result["rows"]]
    for op, shape, direction, reach, call in REACH:
        target = f"{reach} ms" if call is None else f"{reach} us, call {call} us"
        dtype = "bfloat16" if call is None else "float32"
        found = [(r, row) for r, row in rows if (row["op"], row["shape"], row["dtype"]) == (op, shape, dtype)]
        measured = [(r, row) for r, row in found if row["direction"] == direction]
        if not measured:
            lines.append(f"| `{op}` | {shape} | {direction} | {target} | not yet measured | | |")
        for result, row in measured:
            ours = row["implementations"][OURS]
            taken = f"{ours['ms']:.4g} ms" if call is None else told(ours)
            # What PyTorch leaves to the backward is no forward with gradient: beside the others stands both together.
            beside = row
            if direction == "forward with gradient":
                beside = next((o for r, o in found if r is result and o["direction"] == "forward+backward"), None)
            others = "" if beside is None else peer(beside)
            if beside is not None and beside is not row:
                others += others and ", with backward"
            cells = [f"`{op}`", shape, direction, target, f"{taken} ({result['machine'].removeprefix('NVIDIA ')})"]
            lines.append("| " + " | ".join([*cells, rate(ours, result), others]) + " |")
    sources = dict.fromkeys(gpu_source(result) for result in results)
    return "\n".join([*lines, *sources]) + "\n"


def told(ours: dict) -> str:
    """The device's microseconds in a captured graph, and the call's; of a slow one, what a cold call takes."""
    if "call_us" not in ours:
        return f"{1e3 * ours['ms']:.0f} us over a cold L2"
    device = "not captured" if ours["device_us"] is None else f"{ours['device_us']:.3g} us"
    return f"{device}, call {ours['call_us']:.3g} us"


def rate(figures: dict, result: dict) -> str:
    """A share of what the same run's own large copy, or large bfloat16 product, reached."""
    for key, ceiling in (("gb_per_s", "copy_gb_per_s"), ("tflop_per_s", "bf16_tflop_per_s")):
        if key in figures:
            return f"{figures[key] / result['ceilings'][ceiling]:.0%}"
    return ""


def peer(row: dict) -> str:
    """The fastest implementation that is not ours, how many times our time it takes, and which were not there.

    One that overwrites the logits is compared with ours that does.
    """
    in_place = row["implementations"].get(f"{OURS} in place", {"over_ours": 1.0})["over_ours"]
    others = {
        name: f["over_ours"] / (in_place if name.endswith("in place") else 1.0)
        for name, f in row["implementations"].items()
        if not name.startswith(OURS) and name not in NO_PEERS
    }
    name = min(others, key=others.get, default=None)
    absent = f" (absent: {', '.join(row['absent'])})" if row.get("absent") else ""
    return "" if name is None else f"{name} {others[name]:.2f}x{absent}"


def gpu_source(result: dict) -> str:
    versions = ", ".join(f"{name} {v or 'absent'}" for name, v in result["packages"].items())
    measured = result["ceilings"]
    return (
        f"\n{result['machine']}, copy {measured['copy_gb_per_s'] / 1e3:.2f} TB/s, bfloat16 product "
        f"{measured['bf16_tflop_per_s']:.0f} TFLOP/s, medians over a cold L2, {versions}, commit "
        f"{short_commit(result['commit'], 'of an installed package')}, {result['date'][:10]}: `make gpu`"
    )


def picture(result: dict, path: Path) -> None:
    """How many times our time the others take on the log-probabilities, forward and forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"  # the same picture is the same file
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["op"] == "token_logprobs" and BARE not in row["implementations"]]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.2))
    colours = dict(zip(GROUPS, ("#8a8f98", "#3b76af", "#c7683c"), strict=True))
    height = 0.8 / len(GROUPS)
    for i, (name, prefixes) in enumerate(GROUPS.items()):
        values = [best(row, prefixes) or 0.0 for row in rows]
        axes.barh([y + i * height for y in range(len(rows))], values, height, label=name, color=colours[name])
    axes.set_yticks([y + height for y in range(len(rows))])
    axes.set_yticklabels([f"{row['shape']} {row['dtype']} {row['direction']}" for row in rows], fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"time over ours, token_logprobs on {result['machine']}")
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
