"""Installs the peers, each in a folder of its own, and compares compat with them: `make peers`.

Nothing is installed into the running environment, which brings torch, transformers and rlhf_fast; a peer is on the path
only of the process that compares with it. verl's own tests of its algorithms then run against our functions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Without dependencies: TRL's are here already, verl's are those its tensor functions import, OpenRLHF's need a GPU.
PEERS = {
    "trl-1.16.0": ["trl==1.16.0"],
    "trl-1.12.0": ["trl==1.12.0"],
    "verl-0.9.1": [
        "verl==0.9.1", "tensordict==0.10.0", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "hydra-core",
        "codetiming", "dill", "peft", "torchdata", "pyvers", "cloudpickle", "orjson",
    ],
    "openrlhf-0.11.0": ["openrlhf==0.11.0"],
}  # fmt: skip
VERL_TESTS = [
    "test_core_algos_on_cpu.py",
    "test_loss_aggregation_on_cpu.py",
    "test_value_loss_normalization_on_cpu.py",
    "test_reinforce_pp_multiturn_on_cpu.py",
    "test_dynamic_policy_losses_on_cpu.py",
]


def install(folder: Path, packages: list[str]) -> str | None:
    """Installs once; returns why it did not work, or None."""
    done = folder / ".installed"
    if done.exists() and done.read_text() == "\n".join(packages):
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
    result = subprocess.run([*command, *packages], capture_output=True, text=True)
    if result.returncode:
        return result.stderr.strip().splitlines()[-1]
    done.write_text("\n".join(packages))
    return None


def pytest(folder: Path, *arguments) -> tuple[int, str]:
    path = os.pathsep.join(map(str, [folder, ROOT, HERE, HERE.parent]))
    environment = {**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
    ]
    command += ["-W", "ignore", "--rootdir", HERE, "-c", os.devnull, *arguments]
    result = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def tidy(output: str) -> str:
    """Without progress, times, folders and versions of this machine's Python."""
    lines = []
    for line in output.splitlines():
        if re.match(r"(platform |cachedir|rootdir|configfile|plugins|collecting|hypothesis profile)", line):
            continue
        line = re.sub(r"\S*/(?=tests/peers/|tests/trainer/)", "", line)
        line = re.sub(r"\s+\[ *\d+%\]$", "", line)
        lines.append(re.sub(r" in [\d.]+s( \([\d:]+\))?", "", line))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="where the peers are installed")
    parser.add_argument("--results", type=Path, default=HERE / "results.txt")
    options = parser.parse_args()
    folder = options.folder.resolve()
    report = [f"rlhf_fast {_commit()}, torch {version('torch')}, {time.strftime('%Y-%m-%d', time.gmtime())}"]
    failed = False
    for name, packages in PEERS.items():
        why = install(folder / name, packages)
        if why is not None:
            report.append(f"\n=== {name}: skipped, not installable: {why}")
            failed = True
            continue
        runs = [(f"compat beside {name}", [HERE / f"compare_{name.split('-')[0]}.py"])]
        if name == "trl-1.16.0":
            runs.append(("SFT and reward model beside trl-1.16.0", [HERE / "compare_trl_trainers.py"]))
            runs.append(("steps of GRPO and RLOO beside trl-1.16.0", [HERE / "compare_trl_grpo.py"]))
        if name == "trl-1.12.0":
            runs.append(("one PPO update beside trl-1.12.0", [HERE / "compare_trl_ppo.py"]))
        if name.startswith("verl"):
            tests = folder / name / "tests" / "trainer" / "ppo"
            runs.append(
                ("verl's own tests on our functions", ["-p", "redirect_verl", *(tests / t for t in VERL_TESTS)])
            )
        for title, arguments in runs:
            code, output = pytest(folder / name, *arguments)
            failed |= code != 0
            report.append(f"\n=== {title}\n{tidy(output)}")
            print(tidy(output) if code else f"{title}: {tidy(output).strip().splitlines()[-1]}", flush=True)
    options.results.write_text("\n".join(report) + "\n")
    return int(failed)


def _commit() -> str:
    """Of the source tree, which is what runs; "+" where its code has changes."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "from the source tree"
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    return head.stdout.strip() + ("+" if changes.replace(" M tests/peers/results.txt\n", "") else "")


if __name__ == "__main__":
    sys.exit(main())
