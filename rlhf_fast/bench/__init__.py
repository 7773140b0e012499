"""`rlhf-fast bench`: our ops beside PyTorch, torch.compile and the installed peers, on this machine, with the floor.

Times are medians; "x" columns are the other's time over ours, the median over rounds in which all took turns.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace

import torch

from ..commands import unknown
from ..errors import ConfigError
from . import device as on_device
from .baselines import Absent
from .harness import OURS, interleaved, provenance, summarize
from .rows import Row, all_rows


def measure(row: Row, device: torch.device, seconds: float) -> dict:
    """One row of the result file."""
    torch._dynamo.reset()  # else the ninth shape of a function falls back to eager
    functions = row.build()
    absent = [name for name, function in functions.items() if isinstance(function, Absent)]
    samples, peaks = interleaved({n: f for n, f in functions.items() if n not in absent}, device, seconds)
    return {
        "op": row.op,
        "shape": row.shape,
        "dtype": row.dtype_name,
        "direction": row.direction,
        "implementations": summarize(samples, peaks),
        "absent": absent,
    }


def line(result: dict) -> str:
    """The row for a terminal."""
    timed = dict(result["implementations"])
    ours, floor = timed.pop(OURS), timed.pop("floor")
    others = "  ".join(f"{name} {figures['over_ours']:.2f}x" for name, figures in timed.items())
    label = f"{result['op']:27}{result['shape']:16}{result['dtype']:9}{result['direction']:17}"
    absent = f"  absent: {', '.join(result['absent'])}" if result["absent"] else ""
    return f"{label}{ours['ms']:10.3f} ms, {1 / floor['over_ours']:5.2f} floors;  {others}{absent}"


def main(options: Namespace, argv: list[str]) -> None:
    """Measures, prints a line per row, and writes the JSON if asked to. Raises ConfigError for what it refuses.

    options: of cli._bench, which it read from argv.
    """
    if not 0 <= options.seconds < math.inf:
        raise ConfigError(f"bench: --seconds {options.seconds} must be a number of seconds")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench: --device cuda: no CUDA device is usable here; rlhf-fast info says more")
    gpu = device.type == "cuda" or options.as_gpu
    chosen = list(all_rows(device, options.small, gpu))
    ops = sorted({row.op for row in chosen})
    for op in options.ops:
        if op not in ops:
            raise ConfigError(f"bench: {unknown('op', op, ops)} (there are {', '.join(ops)})")
    if options.json:
        try:  # before anything is measured; what an earlier run left there stays until the first row
            options.json.parent.mkdir(parents=True, exist_ok=True)
            new = not options.json.exists()
            options.json.open("a").close()
            if new:
                options.json.unlink()
        except OSError as error:
            raise ConfigError(f"bench: --json {options.json}: {error.strerror}") from None
    results = {**provenance(device, argv), **({"ceilings": on_device.ceilings(device)} if gpu else {}), "rows": []}
    for row in chosen:
        if (not options.ops or row.op in options.ops) and options.dtype in (None, row.dtype_name):
            take, show = (on_device.measure, on_device.line) if gpu else (measure, line)
            results["rows"].append(take(row, device, options.seconds))
            print(show(results["rows"][-1]), flush=True)
            if options.json:  # after every row: an interrupted run keeps what it has
                options.json.write_text(json.dumps(results, indent=1) + "\n")
