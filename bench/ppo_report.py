"""Makes the tables and the picture of bench_ppo.py's result file; bench/report.py puts them into the pages."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided quantiles of Student's t, by number of seeds
SYSTEMS = ("shared", "separate", "trl")
MODELS = {"qwen2-0.5b": "Qwen2 0.5B", "smollm2-135m": "SmolLM2 135M"}  # by Run.shape
NAMES = {"shared": "rlhf_fast, shared trunk", "separate": "rlhf_fast, separate critic", "trl": "TRL 1.12.0"}


def short_commit(commit: str | None, unknown: str = "unknown") -> str:
    """The first 12 digits, and "+" if the tree was modified, so that the commit is not what was measured."""
    return commit[:12] + ("+" if commit.endswith("+") else "") if commit else unknown


def source(part: dict) -> str:
    packages = ", ".join(f"{name} {part['packages'][name]}" for name in ("torch", "trl"))
    return (
        f"\n{part['cpu']}, {part['threads']} thread, OMP_WAIT_POLICY={part['OMP_WAIT_POLICY']}, {packages}, "
        f"load {part['load_average']:.0f}, commit {short_commit(part['commit'])}, {part['date'][:10]}: "
        f"`{part['command']}`"
        f"{' (' + part['note'] + ')' if 'note' in part else ''}\n"
    )


def lines(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def ratios(row: dict, ours: str, theirs: str = "trl") -> list[float]:
    """Of each round, sorted."""
    return sorted(r[ours] / r[theirs] for r in row["rounds"])


def over(row: dict, ours: str, theirs: str = "trl") -> str:
    """The median of the ratios within a round, and their range if there are several."""
    each = ratios(row, ours, theirs)
    return f"{statistics.median(each):.2f}x" + (f" ({each[0]:.2f}-{each[-1]:.2f})" if len(each) > 1 else "")


def model(run: dict) -> str:
    sizes = f"of {run['layers']} layers, width {run['hidden']}, vocabulary {run['vocab']}"
    shape = run.get("shape", "llama")
    return f"Llama {sizes}" if shape == "llama" else f"A model of {MODELS[shape]}'s shape with random weights"


def speed(part: dict) -> str:
    rows = [
        [NAMES[name], f"{rate:.0f}", over(part, name) if name != "trl" else "1"]
        for name, rate in part["tokens_per_cpu_second"].items()
    ]
    run, tried = part["run"], ", ".join(str(own["micro_batch_size"]) for own in part["trl_tried"])
    about = (
        f"\n{model(run)}; {run['batch_size']} prompts of {run['prompt_length'][0]}-{run['prompt_length'][1]} tokens, "
        f"{run['response_length']} tokens of answer, {run['num_ppo_epochs']} epochs, one optimizer step each, "
        f"micro-batches of {run['micro_batch_size']} (TRL: {part['trl']['micro_batch_size']}, the faster of {tried}). "
        f"Median of {len(part['rounds'])} rounds, and the range.\n"
    )
    return lines(["", "response tokens per CPU-second", "over TRL"], rows) + "\n" + about + source(part)


def precision(bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"


def speeds(part: dict) -> str:
    rows = []
    for row in part["rows"]:
        rates, peak = row["tokens_per_cpu_second"], row["peak_rss"]
        cells = [f"{row['run']['hidden']}", precision(row["run"]["bf16"])]
        for name in SYSTEMS[:2]:
            cells += [f"{rates[name]:.0f}", over(row, name), f"{peak[name] / peak['trl']:.2f}x"]
        trl = f"{rates['trl']:.0f} ({precision(row['trl']['bf16'])}, micro-batches of {row['trl']['micro_batch_size']})"
        rows.append([*cells, trl])
    each = ["tokens per CPU-second", "over TRL", "peak memory over TRL's"]
    head = ["width", "", *(f"{NAMES[n].removeprefix('rlhf_fast, ')}: {c}" for n in SYSTEMS[:2] for c in each), "TRL"]
    rounds = len(part["rows"][0]["rounds"])
    about = f"\nMedian of {rounds} rounds, and the range.\n" if rounds > 1 else "\n1 round.\n"
    return lines(head, rows) + "\n" + about + source(part)


GRPO = {
    "trl-grpo": "TRL 1.16, its own head", "trl-grpo-logits": "TRL 1.16, the model's own logits", "group": "rlhf_fast",
}  # fmt: skip


def grpo(part: dict) -> str:
    rows = []
    for row in part["rows"]:
        prompts = "{}-{}".format(*row["run"]["prompt_length"])
        rates, peak = row["tokens_per_cpu_second"], row["peak_rss"]
        rows.append([prompts, GRPO["group"], f"{rates['group']:.0f}", "", f"{peak['group'] / 1e6:.0f} MB", ""])
        for name in ("trl-grpo", "trl-grpo-logits"):
            cells = [f"{rates[name]:.0f}", over(row, "group", name), f"{peak[name] / 1e6:.0f} MB"]
            rows.append([prompts, GRPO[name], *cells, f"{peak['group'] / peak[name]:.2f}"])
    first = part["rows"][0]
    run, tried = first["run"], sorted({own["micro_batch_size"] for own in first["trl_tried"]})
    of_less = "" if any("peak_rss" not in own for own in first["trl_tried"]) else ", and the memory of the smaller peak"
    about = (
        f"\n{model(run)}; {run['batch_size']} responses of {run['response_length']} tokens, "
        f"{run['num_generations']} to a prompt, one step a rollout, no KL; micro-batches of {run['micro_batch_size']} "
        f"(TRL: the faster of {', '.join(map(str, tried))}{of_less}). Median of {len(first['rounds'])} rounds, and the "
        "range.\n"
    )
    head = ["prompt", "", "response tokens per CPU-second", "ours is faster by", "peak memory", "ours over its"]
    return lines(head, rows) + "\n" + about + source(part)


def large(part: dict) -> str:
    pairs = [("ppo", name, "trl") for name in SYSTEMS[:2]] + [
        ("grpo", "group", name) for name in GRPO if name != "group"
    ]
    rows = []
    for algorithm, ours, theirs in pairs:
        row, names = part[algorithm], NAMES | GRPO
        rates, peak = row["tokens_per_cpu_second"], row["peak_rss"]
        cells = [algorithm.upper(), names[ours], names[theirs], f"{rates[ours]:.1f}", f"{rates[theirs]:.1f}"]
        cells += [over(row, ours, theirs), f"{peak[ours] / 1e9:.1f} GB", f"{peak[ours] / peak[theirs]:.2f}"]
        rows.append(cells)
    run, rounds = part["grpo"]["run"], len(part["grpo"]["rounds"])
    ppo = part["ppo"]["run"]
    about = (
        f"\n{model(run)}; {run['batch_size']} responses of {run['response_length']} tokens to prompts of "
        f"{run['prompt_length'][0]}-{run['prompt_length'][1]}, micro-batches of {run['micro_batch_size']}. PPO "
        f"has {ppo['num_ppo_epochs']} epochs; GRPO has {run['num_generations']} responses to a prompt, one "
        f"step a rollout and no KL. {f'Median of {rounds} rounds, and the range' if rounds > 1 else '1 round'}.\n"
    )
    head = ["", "", "", "our response tokens per CPU-second", "its", "over TRL", "our peak memory", "over its"]
    return lines(head, rows) + "\n" + about + source(part)


def memory(part: dict) -> str:
    rows, before = [], part["before_the_first_step"]
    for row in part["rows"]:
        cells = [f"{row['vocab']}"]
        for name in ("shared", "separate", "trl"):
            share = "" if name == "trl" else f" ({row[name] / row['trl']:.2f}x)"
            cells.append(f"{row[name] / 1e6:.0f}{share}")
        if not isinstance(before, dict):  # an old file, from before this was measured for each system
            rows.append([*cells, "not yet measured"])
            continue
        added = {name: row[name] - before[name] for name in before}
        rows.append([*cells, ", ".join(f"{added[name] / added['trl']:.2f}x" for name in ("shared", "separate"))])
    head = ["vocabulary", "shared trunk, MB", "separate critic, MB", "TRL, MB", "what the iteration adds, over TRL's"]
    about = ""
    if isinstance(before, dict):
        held = ", ".join(f"{before[name] / 1e6:.0f} MB ({NAMES[name]})" for name in before)
        about = f"\nBefore its first step a process holds {held}.\n"
    return lines(head, rows) + "\n" + about + source(part)


def rollout(part: dict) -> str:
    rows = [
        [
            f"{row['hidden']}", f"{row['vocab']}", f"{row['batch']}", "bfloat16" if row.get("bf16") else "float32",
            f"{row['cpu_seconds']['ours']:.2f}",
            *(f"{row['over_ours'][name]:.2f}x" for name in ("generate", "TRL's call of generate")),
        ]
        for row in part["rows"]
    ]  # fmt: skip
    head = ["width", "vocabulary", "batch", "", "ours, CPU-seconds", "`generate`", "TRL's call, which keeps the logits"]
    return lines(head, rows) + "\n" + source(part)


def at(rows: list[dict], axis: str, where: np.ndarray) -> np.ndarray:
    """Reward of one run at points of an axis, linear between iterations. For KL the axis is the largest KL so far."""
    x = np.maximum.accumulate([row[axis] for row in rows])
    return np.interp(where, x, [row["reward"] for row in rows])


def together(part: dict, axis: str, points: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Points that every run reaches, and the rewards there: name -> (seeds, points)."""
    curves = part["curves"][axis]
    least = min(max(row[axis] for row in rows) for runs in curves.values() for rows in runs)
    first = max(rows[0][axis] for runs in curves.values() for rows in runs)
    where = np.linspace(max(first, 0), least, points)
    return where, {name: np.array([at(rows, axis, where) for rows in runs]) for name, runs in curves.items()}


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, points) -> mean and half the width of its 95 % interval."""
    n = len(values)
    return values.mean(0), T_95[n] * values.std(0, ddof=1) / n**0.5


def race(part: dict) -> str:
    rows, names = [], [name for name in ("shared", "separate", "trl") if name in part["curves"]["kl"]]
    rates = []
    for axis, unit in (("cpu_seconds", "CPU-seconds"), ("kl", "nats of KL")):
        where, rewards = together(part, axis, 5)
        for i in range(1, 5):
            cells = [f"{where[i]:.1f} {unit}"]
            cells += ["{:.3f} +- {:.3f}".format(*(x[i] for x in interval(rewards[n]))) for n in names]
            for n in names[:-1]:
                mean, half = interval(rewards[n] - rewards["trl"])
                cells.append(f"{mean[i]:+.3f} +- {half[i]:.3f}")
            rows.append(cells)
        of = part["learning_rates"][axis]
        each = ", ".join(f"{of[n]:g} ({NAMES[n].removeprefix('rlhf_fast, ')})" for n in names)
        rates.append(f"{'equal CPU-seconds' if axis == 'cpu_seconds' else 'equal KL'} {each}")
    tried = ", ".join(next(iter(part["tuning"].values()))["kl"])
    run = part["run"]
    about = (
        f"\nMean of {len(part['curves']['kl']['trl'])} seeds and its 95 % interval, and the same of the paired "
        f"difference. Learning rates, of {tried}, chosen on another seed: for {'; for '.join(rates)}. "
        f"Llama of {run['layers']} layers, width {run['hidden']}, vocabulary {run['vocab']}, {run['batch_size']} "
        f"prompts an iteration, {run['response_length']} tokens of answer, kl_coef {run['kl_coef']}; a random policy "
        "scores about 0.1.\n"
    )
    head = ["at", *(NAMES[n] for n in names), *(f"{n} over TRL" for n in names[:-1])]
    return lines(head, rows) + "\n" + about + source(part)


def picture(part: dict, path: Path) -> None:
    """Draws reward over CPU-seconds and over KL: every seed, and the mean with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rlhf_fast"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    colours = {"shared": "#c7683c", "separate": "#4f9d69", "trl": "#3b76af"}
    for panel, axis, label in zip(axes, ("cpu_seconds", "kl"), ("CPU-seconds", "KL to the start, nats"), strict=True):
        where, rewards = together(part, axis, 60)
        for name, values in rewards.items():
            for row in values:
                panel.plot(where, row, color=colours[name], alpha=0.25, linewidth=0.7)
            mean, half = interval(values)
            panel.plot(where, mean, color=colours[name], linewidth=2, label=NAMES[name])
            panel.fill_between(where, mean - half, mean + half, color=colours[name], alpha=0.2)
        panel.set_xlabel(label)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[0].set_ylabel("reward")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


GPU_REACH = {  # column: key of a run of the part gpu, for both systems at their fastest micro-batch
    "rollout, tokens/s (>= 4x)": "rollout_tokens_per_second",
    "scoring and update, tokens/s (>= 4x)": "update_tokens_per_second",
    "whole iterations (>= 4x)": "tokens_per_second",
    "peak memory (<= 0.5x)": "peak_allocated",
}


def best_of(runs: list[dict], system: str) -> dict | None:
    """The run of a system at its fastest micro-batch; None if none has figures."""
    measured = [row for row in runs if row["system"] == system and "failed" not in row]
    return max(measured, key=lambda row: row["tokens_per_second"], default=None)


def gpu_rates(row: dict) -> str:
    """One line for a run of the part gpu."""
    if "failed" in row:
        return f"{row['system']}, micro-batch {row['micro_batch_size']}: {row['failed']}"
    memory = "" if row["peak_allocated"] is None else f", {row['peak_allocated'] / 2**30:.1f} GiB"
    return (
        f"{row['system']}, micro-batch {row['micro_batch_size']}: rollout {row['rollout_tokens_per_second']:.0f}, "
        f"scoring and update {row['update_tokens_per_second']:.0f}, "
        f"in all {row['tokens_per_second']:.0f} tokens/s{memory}"
    )


def gpu_profile(part: dict) -> str:
    """Where our fastest run spends its time: kernels, and how long the device waits for the host without a profiler."""
    profile, ours = part["profile"], best_of(part["runs"], "shared")
    tokens = part["run"]["batch_size"] * part["run"]["response_length"]
    text = ""
    for name, key in (("rollout", "rollout_tokens_per_second"), ("score and update", "update_tokens_per_second")):
        found, seconds = profile[name], tokens / ours[key]
        waits = max(0.0, 1 - found["kernel_seconds"] / seconds)
        text += (
            f"\n{name.capitalize()}: {seconds:.2f} s, kernels {found['kernel_seconds']:.2f} s, so the device waits for "
            f"the host {waits:.0%} of the time ({found['seconds']:.2f} s under the profiler; {found['graph_launches']} "
            "launches of a CUDA graph).\n\n"
        )
        rows = [
            [f"`{row['name'][:80].replace('|', '/')}`", str(row["calls"]), f"{row['seconds']:.3f}"]
            for row in [*found["kernels"][:8], *found["host"][:4]]
        ]
        text += lines([f"{name}: kernels, then the host's own time", "calls", "seconds"], rows) + "\n"
    return text


def gpu_summary(parts: list[dict]) -> str:
    """For docs/benchmarks.md: the goals for PPO on a GPU relative to TRL 1.12.0, and what was measured, if anything."""
    rows = []
    for name in ("shared", "separate"):
        cells = []
        for key in GPU_REACH.values():
            pairs = [(part, best_of(part["runs"], name), best_of(part["runs"], "trl")) for part in parts]
            found = [
                f"{ours[key] / trl[key]:.2f}x ({part['machine'].removeprefix('NVIDIA ')})"
                for part, ours, trl in pairs
                if ours and trl and trl[key]
            ]
            cells.append(", ".join(found) or "not yet measured")
        rows.append([NAMES[name].removeprefix("rlhf_fast, "), *cells])
    head = ["PPO over TRL 1.12.0: 0.5B Qwen2 shape, 64 x (128 + 256) tokens", *GPU_REACH]
    return lines(head, rows) + "\n"


def gpu(parts: list[dict]) -> str:
    """For docs/ppo_speed.md: every run, and the profile."""
    return gpu_summary(parts) + "".join(map(gpu_table, parts))


def gpu_table(part: dict) -> str:
    rows, trl = [], best_of(part["runs"], "trl")
    for row in part["runs"]:
        cells = [NAMES[row["system"]], str(row["micro_batch_size"])]
        if "failed" in row:
            rows.append([*cells, row["failed"], "", "", "", "", ""])
            continue
        over = "" if trl is None else f"{row['tokens_per_second'] / trl['tokens_per_second']:.2f}x"
        share = f" ({row['peak_allocated'] / trl['peak_allocated']:.2f}x)" if trl and row["peak_allocated"] else ""
        memory = ["" if row[k] is None else f"{row[k] / 2**30:.1f}" for k in ("peak_allocated", "peak_reserved")]
        rates = [row[f"{k}tokens_per_second"] for k in ("rollout_", "update_", "")]
        rows.append([*cells, *(f"{r:.0f}" for r in rates), over, memory[0] + share, memory[1]])
    head = ["", "micro-batch", "rollout, tokens/s", "scoring and update", "in all", "over TRL's best"]
    head += ["peak allocated, GiB", "reserved"]
    packages = ", ".join(f"{name} {part['packages'][name]}" for name in ("torch", "trl"))
    about = (
        f"\n{part['machine']}, products of training in {precision(part['run']['bf16'])} on both sides, {packages}, "
        f"commit {short_commit(part['commit'])}, {part['date'][:10]}: `{part['command']}`\n"
    )
    profile = gpu_profile(part) if part["profile"] else "\nThe profile of ours: not yet measured.\n"
    return "\n" + lines(head, rows) + "\n" + about + profile


def sections(result: dict, folder: Path) -> dict[str, str]:
    """Section name -> text, for the measured parts; also draws folder/ppo_race.svg."""
    makers = {
        "speed": speed, "speeds": speeds, "grpo": grpo, "large": large, "memory": memory, "rollout": rollout,
        "race": race,
    }  # fmt: skip
    made = {f"ppo:{name}": make(result["parts"][name]) for name, make in makers.items() if name in result["parts"]}
    if "race" in result["parts"]:
        picture(result["parts"]["race"], folder / "ppo_race.svg")
    return made
