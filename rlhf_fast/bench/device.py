"""Measuring on a GPU: device events over a cold L2, a graph of calls for the small ops, and this card's own ceilings.

An implementation that fails on this machine (a peer's kernel on another Triton, memory) is a line in the result that
says so, not the end of the run; ours is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

import rlhf_fast as rf

from .baselines import Absent
from .harness import OURS, probe, synchronize
from .rows import Row

TRITON = f"{OURS} triton"
FLUSH_BYTES = 256 << 20  # several L2s: an H200 has 50 MB
GRAPH_CALLS = 20  # of a small op in one captured graph
# Ops that have Triton kernels too: which of the two ours should run is a row's to tell.
IN_TRITON = ("token_logprobs", "token_logprobs_and_entropy", "kl_divergence", "kl_penalty", "gae", "pairwise_loss",
             "dpo_loss", "ppo_loss")  # fmt: skip
SMALL_SECONDS = 2e-4  # shorter calls are small ops: what Python costs is told apart from what the device does


def _nothing() -> None:
    pass


class Events:
    """Time on the device between two points of its stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.others = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.most = torch.zeros((), device=device)

    def cold(self, function: Callable, repeats: int) -> list[float]:
        """Seconds of each call; before each, what the last one left in L2 is pushed out.

        By reading: lines that were written would be written back within the time of the call. function.before, where
        there is one, comes first: it restores an input that the last call has overwritten (rows.restored).
        """
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            getattr(function, "before", _nothing)()
            torch.amax(self.others, 0, out=self.most)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def graphed(self, function: Callable) -> float:
        """Seconds of a call among GRAPH_CALLS of one captured graph, which starts behind other work: no launch gaps."""
        before = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(GRAPH_CALLS):
                    function()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.amax(self.others, 0, out=self.most)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize(self.device)
            times.append(start.elapsed_time(end) * 1e-3 / GRAPH_CALLS)
        return statistics.median(times)


class WallClock:
    """The same by the wall clock, for the dry run on a CPU: the script's logic, no measurement."""

    def __init__(self, device: torch.device):
        self.device = device

    def cold(self, function: Callable, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            getattr(function, "before", _nothing)()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return times

    def graphed(self, function: Callable) -> float:
        return self.cold(function, 1)[0]


def timer(device: torch.device) -> Events | WallClock:
    return Events(device) if device.type == "cuda" else WallClock(device)


def seconds_of_a_call(function: Callable, device: torch.device, calls: int = 50, batches: int = 9) -> float:
    """From Python, one after the other without waiting for the device: what a training loop pays for a small op.

    The median of some batches, each short enough for the queue of launches, which a full one would wait for.
    """
    samples = []
    for _ in range(batches):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls)
    synchronize(device)
    return statistics.median(samples)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this card does in this run: a large copy, bytes read plus written, and a large bfloat16 product."""
    large = device.type == "cuda"
    clock = timer(device)
    source = torch.empty(4 << 30 if large else 1 << 20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = statistics.median(clock.cold(lambda: target.copy_(source), 10))
    n = 8192 if large else 128
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    out = torch.empty_like(a)
    clock.cold(lambda: torch.mm(a, b, out=out), 3)
    product = statistics.median(clock.cold(lambda: torch.mm(a, b, out=out), 20))
    return {
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9, 1),
        "bf16_tflop_per_s": round(2 * n**3 / product / 1e12, 1),
    }


def measure(row: Row, device: torch.device, seconds: float) -> dict:
    """One row of the result file: its implementations take turns, each time over a cold L2."""
    torch._dynamo.reset()
    functions, clock = row.build(), timer(device)
    failed, peaks, repeats, samples = {}, {}, {}, {}
    absent = [name for name, function in functions.items() if isinstance(function, Absent)]
    for name in absent:
        del functions[name]
    if device.type == "cuda" and row.op in IN_TRITON:
        functions[TRITON] = functions[OURS]
    for name in list(functions):
        try:
            with _backend_of(name):
                functions[name]()  # compiles, loads, allocates
                peaks[name], took = probe(functions[name], device)
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            del functions[name]
            continue
        repeats[name], samples[name] = max(1, min(20, round(0.05 / max(took, 1e-6)))), []
    names, start, rounds = list(functions), time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            with _backend_of(name):
                samples[name] += clock.cold(functions[name], repeats[name])
        rounds += 1

    ours = statistics.median(samples[OURS])
    implementations = {}
    for name in names:
        quantiles = statistics.quantiles(samples[name], n=10)
        median = statistics.median(samples[name])
        implementations[name] = figures = {
            "ms": round(1e3 * median, 6),
            "ms_p20": round(1e3 * quantiles[1], 6),
            "ms_p80": round(1e3 * quantiles[7], 6),
            "over_ours": round(median / ours, 4),
            "extra_peak_bytes": peaks[name],
            "rounds": len(samples[name]),
        }
        if row.bytes:
            figures["gb_per_s"] = round(row.bytes / median / 1e9, 1)
        if row.flops:
            figures["tflop_per_s"] = round(row.flops / median / 1e12, 2)
        if ours < SMALL_SECONDS:
            calls = max(1, min(50, round(5e-3 / median)))
            with _backend_of(name):
                figures["call_us"] = round(1e6 * seconds_of_a_call(functions[name], device, calls), 2)
            if median > 5e-3:  # thousands of launches
                figures["device_us"] = None
                continue
            try:
                with _backend_of(name):
                    figures["device_us"] = round(1e6 * clock.graphed(functions[name]), 3)
            except Exception as error:  # not every peer can be captured
                figures["device_us"] = None
                failed[f"{name}, in a graph"] = f"{type(error).__name__}: {str(error)[:150]}"
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    if ours < SMALL_SECONDS:
        # Events time the kernel of one implementation and the launches of another that cannot keep the device busy. A
        # loop pays for what takes longer, the call or the device.
        pays = {name: max(f["call_us"], f["device_us"] or 1e3 * f["ms"]) for name, f in implementations.items()}
        for name, figures in implementations.items():
            figures["over_ours"] = round(pays[name] / pays[OURS], 4)
    return {
        "op": row.op,
        "shape": row.shape,
        "dtype": row.dtype_name,
        "direction": row.direction,
        "bytes": row.bytes,
        "flops": row.flops,
        "implementations": implementations,
        "failed": failed,
        "absent": absent,
    }


def _backend_of(name: str):
    """The backend of an implementation. Not changed within its calls: that takes 10 us, as long as a launch."""
    return rf.use_backend("triton") if name == TRITON else nullcontext()


def line(result: dict) -> str:
    """The row for a terminal."""
    timed = dict(result["implementations"])
    ours = timed.pop(OURS)
    label = f"{result['op']:24} {result['shape']:24} {result['dtype']:9} {result['direction']:17}"
    rate = "".join(f" {ours[key]:8.1f} {unit}" for key, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TF/s"))
                   if key in ours)  # fmt: skip
    small = f"  device {ours['device_us']} us, call {ours['call_us']} us" if "call_us" in ours else ""
    others = "  ".join(f"{name} {figures['over_ours']:.2f}x" for name, figures in timed.items())
    missing = f"  FAILED {', '.join(result['failed'])}" if result["failed"] else ""
    absent = f"  absent: {', '.join(result['absent'])}" if result["absent"] else ""
    return f"{label}{ours['ms']:9.4f} ms{rate}{small};  {others}{missing}{absent}"
