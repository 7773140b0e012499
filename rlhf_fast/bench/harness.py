"""How a row is measured: its implementations take turns in one process, and every figure is a median of rounds."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .._version import __version__
from ..info import cpu_name
from ..ops import empty_cache

OURS = "rlhf_fast"
LEAST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within one sample, so that the clock does not matter
LEAST_ROUNDS = 5  # of three the median is the luck of two, where a host takes memory away between calls
LIBC = ctypes.CDLL(None)
# What decides whether freed memory stays in the process: with it eager and compiled code find their pages again.
ALLOCATOR = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
PEERS = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable, device: torch.device, calls: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleaved(functions: dict[str, Callable], device: torch.device, seconds: float) -> tuple[dict, dict]:
    """(name -> seconds per call, round by round; name -> extra peak bytes) for about `seconds`, or LEAST_ROUNDS.

    The round's order rotates, so that no function always follows the same one.
    """
    names = list(functions)
    calls, peaks = {}, {}
    for name in names:
        functions[name]()  # compiles, loads, allocates
        peaks[name], took = probe(functions[name], device)
        calls[name] = max(1, round(LEAST_SAMPLE / took))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for function in functions.values():
        function()  # the probes have given all kept memory back, of every implementation
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            samples[name].append(seconds_per_call(functions[name], device, calls[name]))
        rounds += 1
    return samples, peaks


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def probe(function: Callable, device: torch.device) -> tuple[int | None, float]:
    """One call: bytes at its peak on top of what was allocated (None where the system cannot tell), and seconds."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # else glibc serves up to 32 MB from pages that it kept, and the peak does not show them
    empty_cache()  # nor those that ours has kept
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = seconds_per_call(function, device, 1)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
    except OSError:
        return None, seconds_per_call(function, device, 1)
    before = _resident("VmRSS")
    seconds = seconds_per_call(function, device, 1)
    return _resident("VmHWM") - before, seconds


def summarize(samples: dict[str, list[float]], peaks: dict[str, int | None]) -> dict[str, dict]:
    """Per implementation: milliseconds (quantiles .2, .5, .8), its time over ours (median of rounds), peak bytes."""
    summary = {}
    for name, times in samples.items():
        quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
        ratios = [t / ours for t, ours in zip(times, samples[OURS], strict=True)]
        summary[name] = {
            "ms": round(1e3 * statistics.median(times), 6),
            "ms_p20": round(1e3 * quantiles[1], 6),
            "ms_p80": round(1e3 * quantiles[7], 6),
            "over_ours": round(statistics.median(ratios), 4),
            "extra_peak_bytes": peaks.get(name),
            "rounds": len(times),
        }
    return summary


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, "+" where it has changes beside results; None for an installed package,
    and where git is not there or does not trust the tree's owner. A copy without .git is what RLHF_FAST_COMMIT says."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("RLHF_FAST_COMMIT")
    git = ["git", "-C", str(root)]
    asked = {"capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **asked).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno", "--", ".", ":!bench/results"], **asked).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes.strip() else "")


def provenance(device: torch.device, arguments: list[str]) -> dict:
    """Machine, versions, commit and command: what makes a number repeatable."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "rlhf_fast": __version__,
        "commit": _commit(),
        "command": " ".join(["rlhf-fast", "bench", *arguments]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: _installed(name) for name in PEERS},
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "allocator": " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if os.environ.get(name)),
        "load_average": os.getloadavg()[0],
    }
