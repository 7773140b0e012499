"""`make gpu`: on a machine with an NVIDIA GPU, build with nvcc, run every test that needs one, and measure every op.

    make gpu                                   all parts, one after the other
    make gpu PART="build bench-logprobs"       some; each takes at most ten minutes and stands alone once built
    python bench/gpu.py --dry-run /tmp/dry     the bench parts' logic on a CPU, small and by the clock; no measurement

Results: bench/results/<card>-<op>.json, <card> as h100 or h200. Where python3's torch sees the GPU, nothing is
installed; peers are measured where they can be imported, PEERS=folder adds one (`pip install --target folder ...`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHES = {
    "bench-logprobs": ("token_logprobs", "token_logprobs_and_entropy", "ppo_from_logits", "kl_divergence"),
    "bench-linear": ("linear_cross_entropy", "linear_ppo_loss", "linear_token_logprobs"),
    "bench-losses": (
        "ppo_loss", "value_loss", "kl_penalty", "pairwise_loss", "dpo_loss", "ranking_loss", "gae", "masked_mean",
        "masked_whiten",
    ),
}  # fmt: skip
TESTS = {  # in parts: compiling takes minutes, and 2^31 elements take the memory of one process at a time
    "test": ("not compiles_to_one_graph and not 2_to_the_31", 6),
    "test-compile": ("compiles_to_one_graph", 6),
    "test-large": ("2_to_the_31", 0),
}
PARTS = ("build", *TESTS, "sanitizer", *BENCHES)
LIMIT = 600  # seconds a part may take
PEER_MODULES = ("trl", "liger_kernel", "cut_cross_entropy", "quack")


def run(*command: str, **environment: str) -> int:
    print("$", " ".join(command), flush=True)
    modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PEERS"), os.environ.get("PYTHONPATH"))))
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # its ninja and cmake
    environment = {**os.environ, "PYTHONPATH": modules, "PATH": tools, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def card(name: str) -> str:
    """NVIDIA H200 -> h200; NVIDIA H100 80GB HBM3 -> h100; GeForce RTX 4090 -> geforce-rtx-4090."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    return re.sub(r"^([a-z]+\d+[a-z]?)-.*", r"\1", words)


def build() -> int:
    error = run(sys.executable, "setup.py", "build_ext", "--inplace", RLHF_FAST_CUDA="1")
    return error or run(sys.executable, "-c", "from rlhf_fast.info import main; main()")


def test(part: str) -> int:
    chosen, processes = TESTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "cuda", "-k", chosen, "-p", "no:cacheprovider"]
    if processes and find_spec("xdist"):
        command += ["-n", str(processes)]
    return run(*command, "tests/cuda/test_device.py")


def sanitize() -> int:
    """Every op on small shapes under compute-sanitizer: memory it must not touch, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("sanitizer: compute-sanitizer is not installed here; skipped")
        return 0
    errors = 0
    for check in ("memcheck", "racecheck"):
        errors |= run(
            tool, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=rlhf", sys.executable,
            "tests/cuda/small_calls.py", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    return errors


def bench(part: str, folder: Path, prefix: str, *options: str) -> int:
    errors = 0
    for op in BENCHES[part]:
        output = str(folder / f"{prefix}-{op}.json")
        errors |= run(sys.executable, "-m", "rlhf_fast.bench", op, "--seconds", "1.5", "--json", output, *options)
    return errors


def run_part(part: str, name: str) -> int:
    if part == "build":
        return build()
    if part in TESTS:
        return test(part)
    if part == "sanitizer":
        return sanitize()
    return bench(part, ROOT / "bench" / "results", card(name), "--device", "cuda")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="the bench parts on a CPU, results in FOLDER")
    options = parser.parse_args(argv)
    if options.dry_run:
        if ROOT in options.dry_run.resolve().parents:
            parser.error("a dry run measures nothing; its FOLDER must lie outside the repository")
        small = ("--device", "cpu", "--as-gpu", "--small")
        parts = [part for part in options.part if part in BENCHES]
        return max([bench(part, options.dry_run, "dry-run", *small) for part in parts], default=0)
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    peers = {module: "yes" if find_spec(module) else "absent" for module in PEER_MODULES}
    print(f"{name}, torch {torch.__version__}; peers: {peers}", flush=True)
    outcomes = []
    for part in options.part:  # a part that fails does not take the others' minutes
        start = time.perf_counter()
        error = run_part(part, name)
        seconds = time.perf_counter() - start
        outcomes.append((part, error, seconds))
        print(f"== {part}: {'failed' if error else 'passed'}, {seconds:.0f} s", flush=True)
        if part == "build" and error:
            break
    print(
        "\n".join(
            f"{part:16} {'FAILED' if e else 'passed'} {s:6.0f} s{' over' * (s > LIMIT)}" for part, e, s in outcomes
        )
    )
    return int(any(error for _, error, _ in outcomes))


if __name__ == "__main__":
    sys.path[:0] = filter(None, [os.environ.get("PEERS")])
    sys.exit(main())
