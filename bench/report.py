"""Turns bench/results into the tables of README and docs/*.md, and the picture docs/bench.svg."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import ppo_report
from ppo_report import short_commit

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"
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


def quickstart(results: list[dict]) -> str:
    """The quickstart's runs, one a line: the true score by stage, and what the run took."""
    stages = {"SFT": "sft", "PPO": "ppo", "CAI phase 1": "cai-sft", "CAI phase 2": "cai-ppo"}
    judges = {"RM accuracy": "rm", "CAI RM accuracy": "cai-rm"}
    lines = [f"| seed | {' | '.join([*stages, *judges])} | KL | minutes | CPU | memory |", "|" + " --- |" * 11]
    for result in results:
        by_name = {stage["name"]: stage for stage in result["stages"]}
        threads = result["provenance"]["threads"]
        run = f"{result['seed']}" + (f", `{result['command']}`: {threads} threads" if threads > 1 else "")
        cells = [run, *(f"{by_name[stage]['pass_rate']:.1%}" for stage in stages.values())]
        cells += [f"{by_name[stage]['rm_accuracy']:.1%}" for stage in judges.values()]
        cells += ["{:.2f}, {:.2f}".format(*(by_name[stage]["kl"] for stage in ("ppo", "cai-ppo")))]
        seconds, cpu = (sum(stage[name] for stage in result["stages"]) for name in ("seconds", "cpu_seconds"))
        cells += [f"{seconds / 60:.1f}", f"{cpu:.0f} s", f"{result['peak_memory_gib']:.2f} GiB"]
        lines.append("| " + " | ".join(cells) + " |")
    about = results[0]
    lines.append(
        f"\n{about['machine']}, torch {about['provenance']['torch']}, "
        f"commit {short_commit(about['provenance']['commit'])}: `{about['command']}`\n"
    )
    return "\n".join(lines)


def judge_scoring(result: dict) -> str:
    """What all principles in both orders cost a local judge, one way a line."""
    layouts = result["layouts"]
    heads = [f"{layout}: tokens | CPU s | over shared" for layout in layouts]
    lines = [f"| a pair, both orders, {result['principles']} principles | {' | '.join(heads)} |"]
    lines.append("|" + " --- |" * (1 + 3 * len(layouts)))
    for name in next(iter(layouts.values())):
        cells = [name]
        for them in layouts.values():
            row = them[name]
            cells += [
                f"{row['tokens_per_pair']:,.0f}",
                f"{row['cpu_seconds_per_pair']:.2f}",
                times(row["times_shared"]),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    differences = ", ".join(f"{them['shared']['largest_difference_to_naive']:.1e}" for them in layouts.values())
    price = ", ".join(
        f"{them['shared']['cpu_seconds_per_pair'] / them['one judgement']['cpu_seconds_per_pair']:.1f} in {layout}"
        for layout, them in layouts.items()
    )
    return "\n".join([
        *lines,
        f"\nEvery principle in both orders, shared, costs so many times one naive judgement: {price}. Time falls less "
        "than tokens, for every question still attends to all that it shares.",
        f"\nLargest difference of a log-probability between shared and naive: {differences}. {result['model']}, "
        f"{result['few_shots']} few-shots, batches of {result['pairs']} pairs of Anthropic's evaluation set; "
        f"{result['machine']['cpu']}, one thread, commit {result['commit']}: `{result['command']}`\n",
    ])  # fmt: skip


def constitutional(result: dict) -> str:
    """bench/cai_experiments.py: violations per reply in each phase, what one principle more changes, reward models.

    A seed that was stopped has some of the arms and reward models; a cell is over those that have it.
    """

    def mean(values, digits: int = 2) -> str:
        values = list(values)
        each = ", ".join(f"{v:.{digits}f}" for v in values)
        return f"{sum(values) / len(values):.{digits}f} ({each})" if values else ""

    runs, principles = result["runs"], list(result["runs"][0]["sft"]["kept"])
    lines = ["| violations per reply | SFT | phase 1 | phase 2 |", "| --- | --- | --- | --- |"]
    for arm in ("house", "negated", "plus-one"):
        having = [run for run in runs if arm in run["arms"]]
        cells = [mean(run["sft"]["violations"] for run in having)]
        cells += [mean(run["arms"][arm][phase]["violations"] for run in having) for phase in ("phase 1", "phase 2")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", f"| kept after phase 2 | {' | '.join(principles)} | thanks |", "|" + " --- |" * (len(principles) + 2)]
    for arm in ("house", "plus-one"):
        last = [run["arms"][arm]["phase 2"] for run in runs if arm in run["arms"]]
        cells = [mean(stage["kept"][name] for stage in last) for name in principles] + [mean(s["thanks"] for s in last)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| reward model trained on | held-out accuracy |", "| --- | --- |"]
    for name in ("as-judged", "shuffled", "shuffled-turned", "noisy-soft", "noisy-hard"):
        known = [run["reward_models"][name]["accuracy"] for run in runs if name in run["reward_models"]]
        lines.append(f"| {name} | {mean(known, 3)} |")
    draws = [run["reward_models"] for run in runs if "noisy-soft" in run["reward_models"]]
    gains = [
        soft - hard
        for models in draws
        for soft, hard in zip(*(models[f"noisy-{how}"]["accuracies"] for how in ("soft", "hard")), strict=True)
    ]
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        lines.append(f"| noisy-soft less noisy-hard | {statistics.fmean(gains):+.4f}, standard error {error:.4f} |")
    lines += ["", "| margin, stated before | held |", "| --- | --- |"]
    told = {True: "yes", False: "NO", None: ""}
    lines += [f"| {name}: {text} | {told[result['held'][name]]} |" for name, text in result["margins"].items()]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines.append(
        f"\nMeans of seeds {seeds} (each in brackets; an empty cell is not measured). {result['cpu']}, "
        f"{result['threads']} thread, shared with other work, commit {short_commit(result['commit'])}: "
        f"`{result['command']}`\n"
    )
    return "\n".join(lines)


def trainers(result: dict) -> str:
    """One result of bench_trainers.py: a line for each implementation, medians over its rounds."""
    accuracy = [" held-out accuracy |", " --- |"] if result["stage"] == "reward" else ["", ""]
    lines = [
        f"| {result['stage']} | real tokens a CPU-second | ours is faster by | peak memory | ours over its | "
        f"of which training | ours over its | held-out loss | over ours, each round |{accuracy[0]}",
        "|" + " --- |" * 9 + accuracy[1],
    ]
    rounds = next(row["rounds"] for row in result["rows"] if row["who"] == OURS)
    for row in result["rows"]:
        ours = row["who"] == OURS
        cells = [
            row["who"],
            f"{row['real_tokens_per_cpu_second']:.0f}",
            "" if ours else f"{row['ours_is_faster_by']:.1f}x",
        ]
        for key in ("peak_bytes", "training_bytes"):
            cells += [f"{row[key] / 1e6:.0f} MB", "" if ours else f"{row[f'our_{key}_over_its']:.2f}"]
        cells += [f"{row['held_out_loss']:.3f}"]
        over = (b["held_out_loss"] - a["held_out_loss"] for a, b in zip(rounds, row["rounds"], strict=True))
        cells += ["" if ours else ", ".join(f"{difference:+.4f}" for difference in over)]
        cells += [f"{row['held_out_accuracy']:.3f}"] if accuracy[0] else []
        lines.append("| " + " | ".join(cells) + " |")
    about, settings = result["model_and_data"], result["settings"]
    of = "sequences" if result["stage"] == "sft" else "pairs"
    length = about["tokens_a_sequence"]
    learned = f", {about['learned_share']:.0%} of them learned" if "learned_share" in about else ""
    return "\n".join(lines) + (
        f"\n\nLlama of {about['weights'] / 1e6:.1f}M weights ({settings['hidden']} x {settings['layers']}, vocabulary "
        f"{settings['vocab']}), float32, {settings['steps']} steps of {settings['batch']} {of} of hh-rlhf; tokens a "
        f"sequence: mean {length['mean']:.0f}, median {length['median']:.0f}, most {length['max']}{learned}; "
        f"{len(result['rows'][0]['rounds'])} rounds.\n"
        f"{source(result)}"
    )


def stages(trained: list[dict], ppo: dict | None) -> str:
    """The README's table of whole trainers beside TRL's, from bench_trainers.py's and bench_ppo.py's results."""
    columns = ["stage", "TRL's defaults", "TRL's fastest setting here", "our peak memory over TRL's"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for result in trained:
        default, *others = result["rows"][1:]
        best = min(others, key=lambda row: row["ours_is_faster_by"])
        memory = ", ".join(f"{row['our_peak_bytes_over_its']:.2f}" for row in result["rows"][1:])
        name = {"sft": "SFT", "reward": "reward model"}[result["stage"]]
        lines.append(f"| {name} | {default['ours_is_faster_by']:.1f}x | {best['ours_is_faster_by']:.1f}x | {memory} |")
    parts = ppo["parts"] if ppo else {}
    if {"speed", "memory"} <= parts.keys():
        for name in ("shared", "separate"):
            memory = " to ".join(f"{row[name] / row['trl']:.2f}" for row in reversed(parts["memory"]["rows"]))
            title = ppo_report.NAMES[name].removeprefix("rlhf_fast, ")
            lines.append(f"| PPO, {title} | | {parts['speed']['over_trl'][name]:.1f}x | {memory} |")
    return "\n".join(lines) + "\n"


def parallel(result: dict) -> str:
    """What a second process buys (bench/bench_parallel.py)."""
    rows = {row["stage"]: row for row in result["rows"]}
    lines = ["| | a step of SFT | a step of PPO | memory, bytes per parameter |", "| --- | --- | --- | --- |"]
    for way, memory in rows["memory"]["bytes_a_parameter"].items():
        faster = (times(rows[stage]["over_1_process_1_thread"][way]) for stage in ("sft", "ppo"))
        lines.append(f"| {way} | {' | '.join(faster)} | {memory:.1f} |")
    return "\n".join(lines) + f"\n\n{source(result).lstrip()}"


def hh_reward(result: dict) -> str:
    """bench/hh_reward.py: each fold by the settings chosen on the others, with the floors; and each candidate."""
    found, model = result["summary"], result["model"]
    columns = ["pairs", "accuracy", "95 % interval", "loss", "ECE", "reward with length", *found["all"]["floors"]]
    lines = ["| " + " | ".join(["held out", "settings", *columns]) + " |", "|" + " --- |" * (2 + len(columns))]

    def settings(row: dict) -> str:
        read = {0: "reply alone", None: "whole prompt"}.get(row["turns"], f"last {row['turns']} turns and reply")
        layers = f"{row['layers']} layer{'s' * (row['layers'] > 1)}"
        return f"{read}, {layers}, batch {row['batch_size']}, rate {row['learning_rate']:g}"

    def line(name: str, how: str, row: dict) -> str:
        cells = [name, how, str(row["pairs"]), f"{row['accuracy']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        cells += [f"{row['loss']:.3f}", f"{row['ece']:.3f}", f"{row['reward_with_length']:+.2f}"]
        return "| " + " | ".join([*cells, *(f"{value:.3f}" for value in row["floors"].values())]) + " |"

    lines.append(line("**all pairs**", "each fold's as chosen on the others", found["all"]))
    how = f"best on the rest: {settings(found['confirmed'])}"
    lines.append(line("those the settings were not searched on", how, found["confirmed"]))
    chosen = Counter(map(settings, found["folds"])).most_common()
    chosen = "; ".join(f"{how}: {count} of {len(found['folds'])} folds" for how, count in chosen)
    each = [row["accuracy"] for row in found["folds"]]
    lines += ["", "| settings | accuracy over all folds | of each seed | loss |", "|" + " --- |" * 4]
    for row in found["each candidate"]:
        seeds = ", ".join(f"{value:.3f}" for value in row["of each seed"])
        lines.append(f"| {settings(row)} | {row['accuracy']:.3f} | {seeds} | {row['loss']:.3f} |")
    weights = [row["weights"] for row in result["rows"]]
    cut = max(sum(row["cut"]) for row in result["rows"])
    return "\n".join(lines) + (
        f"\n\nChosen: {chosen}. A fold's accuracy: {min(each):.3f} to {max(each):.3f}. An accuracy is the mean over "
        f"{len(found['all']['of each seed'])} seeds of that of one model; its "
        "interval is that of so many pairs. "
        f"Llamas of {min(weights):,} to {max(weights):,} weights from random initialisation, width {model['hidden']}, "
        f"BPE {model['vocab_size']}, {model['epochs']} epochs. Every one of the {result['pairs']} well-formed pairs is "
        f"held out once; {len(result['left_out'])} lines of the files are malformed; {cut} pairs are over "
        f"{model['max_length']} tokens with their prompt and lose its beginning where it is read. Standard error of "
        f"the accuracy: {found['all']['standard_error']:.3f}; CPU time of all runs: "
        f"{sum(row['cpu_seconds'] for row in result['rows']) / 60:.0f} min.\n{source(result)}"
    )


def hh_data(result: dict) -> str:
    """The pairs of hh-rlhf that the reward model learns from and is measured on, and those left out, by kind."""
    kinds = {"malformed": "malformed", "identical": "identical", "diverging": "diverging before the last turn"}
    kinds["over-long"] = "over 512 tokens"
    lines = ["| " + " | ".join(["file", "pairs", "used", *kinds.values()]) + " |", "|" + " --- |" * (3 + len(kinds))]
    for name, row in result["data"].items():
        left_out = [row["left_out"].get(kind, 0) for kind in kinds]
        cells = [name, *map(str, [row["used"] + sum(row["left_out"].values()), row["used"], *left_out])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def hh_stages(result: dict) -> str:
    """bench/hh_stages.py: the four stages of examples/hh_rlhf.yaml on human data, a line a figure."""

    def each(rows: list[dict], name: str, form: str) -> str:
        return ", ".join(format(row[name], form) for row in rows)

    def steps(rows: list[dict]) -> str:
        return ", ".join(str(row["step"]) for row in rows)

    sft, reward, ppo, cai = (result[stage] for stage in ("sft", "reward", "ppo", "cai"))
    before, after = sft["evaluations"][0], sft["evaluations"][-1]
    lengths, looks = reward["by_length_difference"], ppo["evaluations"]
    shortest, longest = lengths[0], lengths[-1]
    checked = [stage for stage in cai["stages"] if "pass_rate" in stage]
    refused = {name: n for name, n in cai["revise"].items() if name in ("hard_violation", "flagged", "failed") and n}
    label = {name: n for name, n in cai["label"].items() if n and name != "inputs"}
    count = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in refused.items())
    rows = [
        ("sft", f"held-out loss after {steps(sft['evaluations'])} steps, nats per reply token",
         each(sft["evaluations"], "eval_loss", ".2f")),
        ("sft", "held-out token accuracy before, after",
         each([before, after], "eval_mean_token_accuracy", ".1%")),
        ("reward", f"held-out accuracy, {reward['steps']} steps", f"{reward['accuracy']:.3f}"),
        ("reward", f"its 95 % interval, {reward['pairs']} pairs", f"{reward['low']:.3f} to {reward['high']:.3f}"),
        *(("reward", f"floor on the same pairs: {name}", f"{v:.3f}") for name, v in reward["floors"].items()),
        ("reward", f"held-out loss after {steps(reward['evaluations'])} steps",
         each(reward["evaluations"], "eval_loss", ".3f")),
        ("reward", "training loss, the last tenth of the steps", f"{reward['loss_at_the_end']:.2f}"),
        ("reward", "expected calibration error before, at the end",
         each([reward["evaluations"][0], reward["evaluations"][-1]], "eval_ece", ".3f")),
        ("reward", "correlation of the reward with the length of the reply",
         f"{reward['length_correlation']['reward_with_length']:+.2f}"),
        ("reward", f"accuracy where the better reply is at least {-shortest['to']} tokens shorter, and "
         f"at least {longest['from']} longer", f"{shortest['accuracy']:.2f}, {longest['accuracy']:.2f}"),
        ("ppo", f"held-out score after {steps(looks)} iterations", each(looks, "eval_scores", ".2f")),
        ("ppo", "KL to the reference, nats a reply", each(looks, "eval_kl", ".2f")),
        ("ppo", "never trained on: replies that end in a finished sentence", each(looks, "eval_finished", ".1%")),
        ("ppo", "never trained on: of all sequences of three words, how many are different",
         each(looks, "eval_no_repetition", ".1%")),
        ("ppo", "tokens a reply, on average", each(looks, "eval_response_length/mean", ".0f")),
        ("cai", f"phase 1, {cai['revise']['inputs']} prompts: clean, revised, unchanged; left out",
         ", ".join(str(cai["revise"][name]) for name in ("clean", "revised", "unchanged")) + f"; {count or 0}"),
        ("cai", f"phase 2, {cai['label']['inputs']} pairs, by what the judge says",
         ", ".join(f"{n} {'told apart' if name == 'ok' else name}" for name, n in label.items())),
        ("cai", f"its reward model's accuracy on {cai['reward']['pairs']} held-out pairs, and its 95 % interval",
         f"{cai['reward']['accuracy']:.2f}, {cai['reward']['low']:.2f} to {cai['reward']['high']:.2f}"),
        ("cai", "held-out answers that keep every principle: before, after phase 1, after phase 2",
         each(checked, "pass_rate", ".1%")),
        ("cai", "KL to the reference after phase 2, nats a reply",
         f"{cai['ppo']['evaluations'][-1]['eval_kl']:.2f}"),
    ]  # fmt: skip
    lines = ["| stage | what | value |", "| --- | --- | --- |"]
    for stage in ("sft", "reward", "ppo", "cai"):
        seconds = f"{result[stage]['cpu_seconds']:.0f} s"
        lines += [f"| {' | '.join(row)} |" for row in [*rows, (stage, "CPU time", seconds)] if row[0] == stage]
    return "\n".join(lines) + f"\n\nSeed 0. {source(result).lstrip()}"


def rewrite(path: Path, sections: dict[str, str]) -> None:
    """Puts each text between <!-- name --> and <!-- end --> wherever the page has that section."""

    def filled(match: re.Match) -> str:
        return f"{match[1]}\n{sections[match[2]]}{END}" if match[2] in sections else match[0]

    text = path.read_text()
    path.write_text(re.sub(rf"(<!-- (\S+) -->)\n.*?{END}", filled, text, flags=re.DOTALL))


def main() -> None:
    """Rewrites every section from the result files; README's ops are those of the machine that was measured last."""
    folder = ROOT / "bench" / "results"
    paths = sorted(folder.glob("*.json"))
    files = [json.loads(path.read_text()) for path in paths if not path.name.endswith("ppo.json")]
    of_ops = [file for file in files if any("op" in row for row in file.get("rows", []))]  # the ops' own bench
    results = newest([file for file in of_ops if "ceilings" not in file])  # of a CPU
    ppo_on_gpus = [json.loads(path.read_text())["parts"]["gpu"] for path in paths if path.name.endswith("-ppo.json")]
    sections = {
        "gpu": gpu_summary([file for file in of_ops if "ceilings" in file]),
        "gpu:ppo": ppo_report.gpu_summary(ppo_on_gpus), "ppo:gpu": ppo_report.gpu(ppo_on_gpus),
    }  # fmt: skip
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if find_spec("matplotlib") is None:  # where a GPU is there may be torch and little else
        print("report: matplotlib is not installed, so only the GPU's tables are written")
        for page in pages:
            rewrite(page, sections)
        return
    ppo = json.loads((folder / "ppo.json").read_text()) if (folder / "ppo.json").exists() else None
    if ppo:
        sections |= ppo_report.sections(ppo, ROOT / "docs")
    trained = [file for stage in ("sft", "reward") for file in files if file.get("stage") == stage]
    if trained:
        sections["trainers"] = "\n".join(map(trainers, trained))
    sections["stages"] = stages(trained, ppo)
    if results:
        last = max(results, key=lambda result: result["date"])["machine"]  # docs/benchmarks.md has them all
        shown = [result for result in results if result["machine"] == last and result["rows"]]
        sections["bench"] = summary(shown)
        drawn = [result for result in shown if any(row["op"] == "token_logprobs" for row in result["rows"])]
        if drawn:
            picture(drawn[0], ROOT / "docs" / "bench.svg")
        for op in {row["op"] for result in results for row in result["rows"]}:
            sections[f"bench:{op}"] = "\n".join(filter(None, (table(result, {op}) for result in results)))
    if (folder / "parallel.json").exists():
        sections["parallel"] = parallel(json.loads((folder / "parallel.json").read_text()))
    runs = [json.loads(path.read_text()) for path in sorted((folder / "quickstart").glob("*.json"))]
    if runs:
        sections["quickstart"] = quickstart(runs)
    if (folder / "cai" / "judge_scoring.json").is_file():
        sections["judge_scoring"] = judge_scoring(json.loads((folder / "cai" / "judge_scoring.json").read_text()))
    if (folder / "hh_reward.json").exists():
        sections["hh_reward"] = hh_reward(json.loads((folder / "hh_reward.json").read_text()))
    if (folder / "hh_stages.json").exists():
        stages_of_hh = json.loads((folder / "hh_stages.json").read_text())
        sections |= {"hh_data": hh_data(stages_of_hh), "hh_stages": hh_stages(stages_of_hh)}
    if (folder / "cai.json").exists():
        sections["cai"] = constitutional(json.loads((folder / "cai.json").read_text()))
    for page in pages:
        rewrite(page, sections)


if __name__ == "__main__":
    main()
