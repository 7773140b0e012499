"""`make gpu`: on a machine with an NVIDIA GPU, build with nvcc, run every test that needs one, and measure every op.

    python bench/gpu.py [--part build|test|bench-logprobs|bench-linear|bench-losses] ...

Each part takes under ten minutes and stands alone once `build` has run. Results: bench/results/<gpu>-<part>.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHES = {
    "bench-logprobs": ["token_logprobs", "token_logprobs_and_entropy"],
    "bench-linear": ["linear_cross_entropy", "linear_ppo_loss"],
    "bench-losses": ["ppo_loss", "value_loss", "kl_penalty", "pairwise_loss", "gae"],
}
PARTS = ("build", "test", *BENCHES)


def run(*command: str, **environment: str) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def gpu_slug() -> str:
    """NVIDIA H200 -> h200."""
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-")


def run_part(part: str) -> None:
    if part == "build":
        run(sys.executable, "setup.py", "build_ext", "--inplace", RLHF_FAST_CUDA="1")
        run(sys.executable, "-c", "from rlhf_fast.info import main; main()")
    elif part == "test":
        run(sys.executable, "-m", "pytest", "-q", "-rs", "-m", "cuda", "tests")
    else:
        output = f"bench/results/{gpu_slug()}-{part.removeprefix('bench-')}.json"
        run(
            sys.executable,
            "-m",
            "rlhf_fast.bench",
            *BENCHES[part],
            "--device",
            "cuda",
            "--seconds",
            "3",
            "--json",
            output,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated (default: all)")
    parts = parser.parse_args().part or PARTS
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 1
    for part in parts:
        run_part(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
