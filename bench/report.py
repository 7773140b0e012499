"""Turns bench/results into the tables of README and docs/*.md, and the picture docs/bench.svg."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import op_report
import ppo_report
import run_report

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"


def rewrite(path: Path, sections: dict[str, str]) -> None:
    """Puts each text between <!-- name --> and <!-- end --> wherever the page has that section."""

    def filled(match: re.Match) -> str:
        return f"{match[1]}\n{sections[match[2]]}{END}" if match[2] in sections else match[0]

    text = path.read_text()
    path.write_text(re.sub(rf"(<!-- (\S+) -->)\n.*?{END}", filled, text, flags=re.DOTALL))


def most_complete(results: list[dict]) -> str:
    """The machine on which most ops were measured, and of several such the last one."""
    ops, dates = {}, {}
    for result in results:
        machine = result["machine"]
        ops.setdefault(machine, set()).update(row["op"] for row in result["rows"])
        dates[machine] = max(result["date"], dates.get(machine, ""))
    return max(ops, key=lambda machine: (len(ops[machine]), dates[machine]))


def main() -> None:
    """Rewrites every section from the result files; README's ops are those of one machine (most_complete)."""
    folder = ROOT / "bench" / "results"
    paths = sorted(folder.glob("*.json"))
    files = [json.loads(path.read_text()) for path in paths if not path.name.endswith("ppo.json")]
    of_ops = [file for file in files if any("op" in row for row in file.get("rows", []))]  # the ops' own bench
    results = op_report.newest([file for file in of_ops if "ceilings" not in file])  # of a CPU
    ppo_on_gpus = [json.loads(path.read_text())["parts"]["gpu"] for path in paths if path.name.endswith("-ppo.json")]
    sections = {
        "gpu": op_report.gpu_summary([file for file in of_ops if "ceilings" in file]),
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
        sections["trainers"] = "\n".join(map(run_report.trainers, trained))
    sections["stages"] = run_report.stages(trained, ppo)
    if results:
        machine = most_complete(results)  # docs/benchmarks.md has them all
        shown = [result for result in results if result["machine"] == machine and result["rows"]]
        sections["bench"] = op_report.summary(shown)
        drawn = [result for result in shown if any(row["op"] == "token_logprobs" for row in result["rows"])]
        if drawn:
            op_report.picture(drawn[0], ROOT / "docs" / "bench.svg")
        for op in {row["op"] for result in results for row in result["rows"]}:
            sections[f"bench:{op}"] = "\n".join(filter(None, (op_report.table(result, {op}) for result in results)))
    if (folder / "parallel.json").exists():
        sections["parallel"] = run_report.parallel(json.loads((folder / "parallel.json").read_text()))
    runs = [json.loads(path.read_text()) for path in sorted((folder / "quickstart").glob("*.json"))]
    if runs:
        sections["quickstart"] = run_report.quickstart(runs)
    if (folder / "cai" / "judge_scoring.json").is_file():
        sections["judge_scoring"] = run_report.judge_scoring(
            json.loads((folder / "cai" / "judge_scoring.json").read_text())
        )
    if (folder / "hh_reward.json").exists():
        sections["hh_reward"] = run_report.hh_reward(json.loads((folder / "hh_reward.json").read_text()))
    if (folder / "hh_stages.json").exists():
        stages_of_hh = json.loads((folder / "hh_stages.json").read_text())
        sections |= {"hh_data": run_report.hh_data(stages_of_hh), "hh_stages": run_report.hh_stages(stages_of_hh)}
    if (folder / "cai.json").exists():
        sections["cai"] = run_report.constitutional(json.loads((folder / "cai.json").read_text()))
    for page in pages:
        rewrite(page, sections)


if __name__ == "__main__":
    main()
