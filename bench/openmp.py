"""Do our kernels and torch's compete for threads? Alternates a native op with a torch op, against each one alone.

    python bench/openmp.py        prints time(alternating) / (time(torch alone) + time(native alone)), 1 and 2 threads

A ratio of 1.0 means no conflict. Two OpenMP runtimes whose idle threads spin would show as a ratio far above 1 with two
threads. The script lists the runtimes that the process has loaded. With torch's wheels there is only one, because both
link libgomp by its plain name.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

import rlhf_fast as rf
from rlhf_fast.bench.harness import provenance

ROUNDS, CALLS = 31, 20


def seconds(*functions) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        for function in functions:
            function()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Measures two sizes: the small one shows the hand-over between runtimes, the large one the work itself."""
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line} if maps.exists() else set()
    print("OpenMP runtimes:", ", ".join(sorted(Path(name).name for name in loaded)))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows, vocab in ((64, 4096), (256, 32_000)):
            logits, labels = torch.randn(rows, vocab), torch.randint(vocab, (rows,))
            native = lambda logits=logits, labels=labels: rf.token_logprobs(logits, labels)  # noqa: E731
            other = lambda logits=logits: torch.softmax(logits, -1)  # noqa: E731
            ratios = []
            seconds(native, other)
            for _ in range(ROUNDS):
                alone = seconds(native) + seconds(other)
                ratios.append(seconds(native, other) / alone)
            print(f"{threads} threads, [{rows} x {vocab}]: alternating / alone = {statistics.median(ratios):.3f}")
    facts = provenance(torch.device("cpu"), [])
    print(f"{facts['cpu']}, {os.cpu_count()} CPUs, torch {torch.__version__}, commit {facts['commit']}, "
          f"OMP_WAIT_POLICY={facts['OMP_WAIT_POLICY']}, load {facts['load_average']:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
