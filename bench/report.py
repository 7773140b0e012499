"""Turns bench/results/*.json into README's table, the tables of docs/ops.md, and the picture docs/bench.svg."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "rlhf_fast"
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
        "extra MB: ours, eager",
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
        cells += [", ".join(megabytes(implementations[name]["extra_peak_bytes"]) for name in (OURS, "eager"))]
        lines.append("| " + " | ".join(cells) + " |")
    commit = (result["commit"] or "installed package")[:12]
    versions = ", ".join(f"{name} {v}" for name, v in result["packages"].items() if v)
    lines.append(
        f"\n{result['machine']}, {result['threads']} threads, OMP_WAIT_POLICY={result['OMP_WAIT_POLICY'] or 'unset'}, "
        f"{versions}, commit {commit}, {result['date'][:10]}: `{result['command']}`\n"
    )
    return "\n".join(lines)


def picture(result: dict, path: Path) -> None:
    """How many times our time the others take on the log-probabilities, forward and forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["op"] == "token_logprobs"]
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


def main() -> None:
    """Rewrites the sections from every result file, and the picture from the first that has log-probabilities."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    if not results:
        raise SystemExit("bench/results holds no JSON yet; run `make bench`")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"README.md has no section between {START} and {END}")
    section = "\n".join(["", *(table(result) for result in results), ""])
    drawn = [result for result in results if any(row["op"] == "token_logprobs" for row in result["rows"])]
    if drawn:
        picture(drawn[0], ROOT / "docs" / "bench.svg")
        section = "\n![token_logprobs beside the others](docs/bench.svg)\n" + section
    readme.write_text(before + START + section + END + after)

    def tables_of(match: re.Match) -> str:
        rows = "\n".join(filter(None, (table(result, {match[1]}) for result in results)))
        return f"<!-- bench:{match[1]} -->\n{rows}{END}"

    page = ROOT / "docs" / "ops.md"
    page.write_text(re.sub(rf"<!-- bench:(\w+) -->\n.*?{END}", tables_of, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
