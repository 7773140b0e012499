"""`rlhf-fast info`: what is installed, how the package was built, and which kernel runs each op, and why."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ._version import __version__
from .ops import backends
from .ops._linear import sums_in_float32
from .ops._native import _C

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The system's name for the CPU. Virtual machines may give one without a number ("AMD EPYC"): then also family and
    model."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if any(c.isdigit() for c in name) or "cpu family" not in facts:
        return name
    return f"{name} (family {facts['cpu family']}, model {facts.get('model', '?')})"


def collect() -> dict:
    """Everything `rlhf-fast info --json` prints."""
    built = None
    if _C is not None:
        built = {
            "module": _C.__file__,
            "version": _C.version,
            "compiler": _C.compiler,
            "instruction_sets": dict(_C.isas()),
            "instruction_set_in_use": _C.isa(),
            "cuda": _C.cuda_version,
            "cuda_choice": _C.cuda_choice,
            "cuda_architectures": getattr(_C, "cuda_architectures", None),
        }
    usable = torch.cuda.is_available()
    return {
        "rlhf_fast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"name": cpu_name(), "torch_capability": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
        "build": built,
        "cuda": {
            "torch": torch.version.cuda,
            "usable": usable,
            "products_sum_in_float32": sums_in_float32(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if usable else [],
        },
        "backends": backends(),
    }


def render(info: dict) -> str:
    """The facts of collect() as text."""
    build = info["build"]
    lines = [
        f"rlhf_fast {info['rlhf_fast']}, Python {info['python']}, {info['platform']}",
        "  " + ", ".join(f"{name} {v or 'not installed'}" for name, v in info["packages"].items()),
        f"CPU   {info['cpu']['name']}, {info['threads']} threads",
    ]
    if build is None:
        lines.append("build no native module: run pip install . in the source tree")
    else:
        sets = ", ".join(name if ok else f"{name} (not on this CPU)" for name, ok in build["instruction_sets"].items())
        built_for = f"{build['cuda']} for {build['cuda_architectures']}"
        cuda = built_for if build["cuda"] else f"not built in ({build['cuda_choice'].removeprefix('no: ')})"
        lines.append(f"build {build['compiler']}; {sets}; in use: {build['instruction_set_in_use']}; CUDA {cuda}")
    cuda = info["cuda"]
    devices = ", ".join(cuda["devices"]) or "no device usable"
    lines.append(f"CUDA  torch was built {'for ' + cuda['torch'] if cuda['torch'] else 'without CUDA'}; {devices}")
    if cuda["torch"] and not cuda["products_sum_in_float32"]:
        lines.append("      PyTorch before 2.10: the linear ops add up the weight's gradient in separate passes")
    width = max(len(name) for name in info["backends"])
    lines.append(f"\n{'op':{width}}  cpu        cuda")
    reasons: dict[str, list[str]] = {}
    for name, devices in info["backends"].items():
        lines.append(f"{name:{width}}  {devices['cpu']['backend']:9}  {devices['cuda']['backend']}")
        for device, choice in devices.items():
            if choice["why"]:
                reasons.setdefault(f"{device}: {choice['why']}", []).append(name)
    for reason, names in reasons.items():
        lines.append(f"why not better on {reason} ({', '.join(names)})")
    return "\n".join(lines)


def main(as_json: bool = False) -> None:
    """Prints the report."""
    info = collect()
    print(json.dumps(info, indent=2) if as_json else render(info))
