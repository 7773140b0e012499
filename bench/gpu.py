"""`make gpu`: on a machine with an NVIDIA GPU, build with nvcc, run every test that needs one, and measure every op.

    make gpu                                   all parts, one after the other
    make gpu PART="build bench-logprobs"       some parts; each is stopped after ten minutes and runs alone once built
    python bench/gpu.py --dry-run FOLDER       the logic of the bench parts on a CPU, at small sizes; no measurement

Results go to bench/results/<card>-<op>.json and <card>-ppo.json, where <card> is h100 or h200, for example. A Python
whose torch sees the GPU is left unchanged: the part "peers" installs missing peers into build/peers-gpu, without their
dependencies. TRL 1.12.0, the last release with PPO, gets a folder of its own in there; without it "bench-ppo" is
skipped. On a machine without a network, copy build/peers-gpu there (`python bench/gpu.py --fetch-peers
[--for-python 3.12]` fills it), or name another folder: PEERS=folder make gpu. Each row says which peers were missing.

On a machine that is lent for minutes, accepts 64 MiB at a time, and returns only a few files (bench/notes.md has an
order for thirty minutes):
    python bench/gpu.py --fetch-peers --for-python 3.12 --pack     build/peers-gpu*.tar.xz.1of1 ..., for "peers" there
    make gpu PART="build peers test" WITHIN=560 KEEP=folder        ends by itself, with the results in one archive
    python bench/gpu.py --unpack folder/results.tar.gz             at home
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCHES = {  # in each part first the ops of op_report.REACH, as its time may end before the others
    "bench-logprobs": ("ppo_from_logits", "token_logprobs"),
    "bench-entropy": ("token_logprobs_and_entropy", "kl_divergence"),
    # linear_cross_entropy is last: quack's tuning takes minutes, as it compiles a product per configuration.
    "bench-linear": ("linear_ppo_loss", "linear_token_logprobs", "linear_cross_entropy"),
    "bench-losses": (
        "ppo_loss", "kl_penalty", "pairwise_loss", "gae", "value_loss", "dpo_loss", "ranking_loss", "masked_mean",
        "masked_whiten",
    ),
}  # fmt: skip
CUDA_ONLY = ("ppo_from_logits",)  # only CUDA has a kernel that does it in place
TESTS = {  # several parts, as compiling takes minutes, and 2^31 elements leave memory for only one process at a time
    "test": ("not compiles_to_one_graph and not 2_to_the_31", 10),
    "test-compile": ("compiles_to_one_graph", 10),
    "test-large": ("2_to_the_31", 0),
}
PPO = "bench-ppo"  # bench_ppo.py, whole iterations against TRL 1.12.0
PARTS = ("build", "peers", *TESTS, "sanitizer", *BENCHES, PPO)
LIMIT = 600  # seconds per part
GRACE = 15  # seconds between asking a process to end and killing it
PEERS = Path(os.environ.get("PEERS") or ROOT / "build" / "peers-gpu")
PIECE = 48 << 20  # bytes per piece of an archive
LARGE_PEERS = ("nvidia_cutlass_dsl", "cuda")  # nine tenths of the bytes, for quack only: an archive of its own
TRL_WITH_PPO = "trl-1.12.0"  # its own folder in PEERS, because its module is called trl like the newer one
PEER_MODULES = {  # module (or that folder): what pip installs for it in addition to torch, Triton and transformers
    "accelerate": ("accelerate",),
    "datasets": ("datasets", "dill", "multiprocess", "xxhash"),  # imports that few have installed; all of TRL needs it
    "trl": ("trl>=1.16",),
    TRL_WITH_PPO: ("trl==1.12.0",),
    "liger_kernel": ("liger-kernel",),
    "cut_cross_entropy": ("cut-cross-entropy",),
    "quack": (  # with the DSL version it requires; with 4.7 and 4.8 the linear part of 0.6.5 cannot be imported
        "quack-kernels==0.6.0", "nvidia-cutlass-dsl==4.6.0", "nvidia-cutlass-dsl-libs-base==4.6.0",
        "nvidia-cutlass-dsl-libs-core==4.6.0", "nvidia-cutlass-dsl-libs-cu{cuda}==4.6.0", "cuda-bindings",
        "cuda-pathfinder", "apache-tvm-ffi<0.2", "torch-c-dlpack-ext", "einops",
    ),
}  # fmt: skip


class Skipped(str):
    """The reason why a part, or some of it, was not done."""


class OverTime(Exception):
    pass


_deadline = float("inf")  # of the current part
_end = float("inf")  # of all parts
_keep: Path | None = None  # a folder that also gets the results, in one archive
_prefix = "*"  # of the result files' names: the card


def peer_folders() -> list[str]:
    """PEERS, and the folders within it that its .pth files would add were it a site directory. None where it was filled
    for another Python: its compiled modules would hide those of this one."""
    if not PEERS.is_dir() or _pythons(PEERS) - {sys.implementation.cache_tag}:
        return []
    return [str(PEERS), *map(str, PEERS.glob("*/dsl_packages"))]


def _pythons(folder: Path) -> set[str]:
    """The Pythons that the compiled modules in it are for, as cpython-312."""
    return {tag[0] for path in folder.rglob("*.so") if (tag := re.search(r"cpython-\d+", path.name))}


def _cleared(python: str) -> Skipped | None:
    """Empties build/peers-gpu if it was filled for another Python. A folder that the user has named is left alone."""
    if not PEERS.is_dir() or not _pythons(PEERS) - {python}:
        return None
    if PEERS != ROOT / "build" / "peers-gpu":
        return Skipped(f"{PEERS} was filled for another Python than {python}: name another folder with PEERS")
    print(f"{PEERS} was filled for another Python, and is filled anew")
    shutil.rmtree(PEERS)
    return None


def run(*command: str, **environment: str) -> int:
    """Runs a command in the root, with the peers on its path; when the part's time is up, kills all it has started."""
    print("$", " ".join(command), flush=True)
    modules = os.pathsep.join(filter(None, (str(ROOT), *peer_folders(), os.environ.get("PYTHONPATH"))))
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # for ninja and cmake
    environment = {**os.environ, "PYTHONPATH": modules, "PATH": tools, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return wait(process)
    except BaseException:  # out of time, or interrupted
        with suppress(ProcessLookupError):  # its children may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        keep_results()


def wait(process: subprocess.Popen) -> int:
    """Waits until the process or the part's time ends; on SIGINT a pytest still reports what has failed so far."""
    while (left := _deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, 5))
        keep_results()
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    raise OverTime


def keep_results() -> None:
    """Writes all result files into one archive. It is complete at any time, whatever ends the run."""
    if _keep is None:
        return
    _keep.mkdir(parents=True, exist_ok=True)
    part = _keep / ".results.tar.gz"
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted((ROOT / "bench" / "results").glob(f"{_prefix}-*.json")):
            archive.add(path, path.name)
    part.replace(_keep / "results.tar.gz")


def unpack_results(archive: Path) -> int:
    """Extracts the files into bench/results and rebuilds the tables, on the machine with the repository."""
    with tarfile.open(archive) as files:
        files.extractall(ROOT / "bench" / "results", filter="data")
        print("\n".join(files.getnames()))
    return run(sys.executable, "bench/report.py")


def card(name: str) -> str:
    """NVIDIA H200 -> h200; NVIDIA H100 80GB HBM3 -> h100; GeForce RTX 4090 -> geforce-rtx-4090."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    return re.sub(r"^([a-z]+\d+[a-z]?)-.*", r"\1", words)


def build() -> int:
    import torch

    here = "{}{}-real".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    error = run(
        sys.executable, "setup.py", "build_ext", "--inplace", RLHF_FAST_CUDA="1", RLHF_FAST_CUDA_ARCHITECTURES=here
    )
    return error or run(sys.executable, "-c", "from rlhf_fast.info import main; main()")


def missing_peers() -> list[str]:
    folders = peer_folders()
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    invalidate_caches()
    there = {TRL_WITH_PPO: bool(folders) and (PEERS / TRL_WITH_PPO / "trl").is_dir()}
    return [module for module in PEER_MODULES if not there.get(module, module != TRL_WITH_PPO and find_spec(module))]


def fetch_peers(folder: Path, modules: list[str], python: str | None = None) -> int | Skipped:
    """Installs modules into `folder` one by one, without dependencies, so that the installed torch is kept."""
    import torch

    other = ("--python-version", python, "--only-binary=:all:") if python else ()
    for module in modules:
        packages = [name.format(cuda=(torch.version.cuda or "13").split(".")[0]) for name in PEER_MODULES[module]]
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10", "--no-deps")
        to = folder / module if module == TRL_WITH_PPO else folder
        run(*pip, *other, "--upgrade", "--target", str(to), *packages)
    absent = [name for name in modules if not (folder / name).exists()] if python else missing_peers()
    return Skipped(f"without {', '.join(absent)}") if absent else 0


def pack_peers() -> list[Path]:
    """Packs PEERS into two archives, split into pieces: the small peers, and what only quack needs. Takes minutes."""
    pieces = []
    for name, large in ((PEERS.name, False), (f"{PEERS.name}-large", True)):
        with tempfile.TemporaryFile() as whole:
            with tarfile.open(fileobj=whole, mode="w:xz", preset=3) as archive:
                for path in sorted(PEERS.iterdir()):
                    if (path.name in LARGE_PEERS) == large:
                        archive.add(path, path.name, filter=lambda x: None if "__pycache__" in x.name else x)
            count = max(1, -(-whole.tell() // PIECE))
            whole.seek(0)
            for old in PEERS.parent.glob(f"{name}.tar.xz.*"):
                old.unlink()
            for i in range(1, count + 1):
                pieces.append(PEERS.parent / f"{name}.tar.xz.{i}of{count}")
                pieces[-1].write_bytes(whole.read(PIECE))
    return pieces


def unpack_peers() -> None:
    """Unpacks the archives that pack_peers made elsewhere and whose pieces are all here."""
    for first in sorted(PEERS.parent.glob(f"{PEERS.name}*.tar.xz.1of*")):
        stem, count = first.name.rsplit(".1of", 1)
        pieces = [first.with_name(f"{stem}.{i}of{count}") for i in range(1, int(count) + 1)]
        if all(piece.is_file() for piece in pieces):
            with tempfile.TemporaryFile() as whole:
                for piece in pieces:
                    whole.write(piece.read_bytes())
                whole.seek(0)
                with tarfile.open(fileobj=whole, mode="r:xz") as archive:
                    archive.extractall(PEERS, filter="data")


def test(part: str) -> int:
    chosen, processes = TESTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-m", "gpu", "-k", chosen]
    command += ["-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):  # a kernel that hangs ends only the process of its test
        command += ["--timeout", "240", "--timeout-method", "thread"]
    if processes and find_spec("xdist"):
        command += ["-n", str(processes)]
    # Each of these processes compiles for itself: by default it would start as many that compile as there are cores.
    return run(*command, "tests/cuda/test_device.py", OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")


def sanitize() -> int | Skipped:
    """Runs every op on small shapes under compute-sanitizer: invalid memory accesses, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return Skipped("compute-sanitizer not found")
    errors = 0
    # Calls of the runtime that fail and are handled are PyTorch's and cuBLAS's own affair.
    for check in (("memcheck", "--report-api-errors", "no"), ("racecheck",)):
        errors |= run(
            tool, "--tool", *check, "--error-exitcode", "9", "--kernel-name", "kns=rlhf", sys.executable,
            "tests/cuda/small_calls.py", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    return errors


def from_root(path: Path) -> str:
    """A path in a command, which the result file will name: that of a machine is none to repeat."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def bench(part: str, folder: Path, prefix: str, *options: str) -> int:
    errors = 0
    for op in BENCHES[part]:
        if "--as-gpu" in options and op in CUDA_ONLY:
            continue
        output = from_root(folder / f"{prefix}-{op}.json")
        errors |= run(sys.executable, "-m", "rlhf_fast", "bench", op, "--seconds", "1.5", "--json", output, *options)
    return errors


def bench_ppo(folder: Path, prefix: str, *options: str) -> int | Skipped:
    trl = PEERS / TRL_WITH_PPO
    if not (trl / "trl").is_dir():
        return Skipped(
            f"needs TRL 1.12.0 in {trl}: make gpu PART=peers where there is a network; else python bench/gpu.py "
            f"--fetch-peers on a machine that has one, and carry its {PEERS.name} here (PEERS=folder for another place)"
        )
    output = from_root(folder / f"{prefix}-ppo.json")
    if (left := _deadline - time.monotonic()) < LIMIT - 5:  # the profile comes last and takes at most two minutes
        options += ("--seconds", str(max(0, int(left) - 150)))
    return run(sys.executable, "bench/bench_ppo.py", "--folder", from_root(trl), "--json", output, *options)


def run_part(part: str, name: str) -> int | Skipped:
    if part == "build":
        return build()
    if part == "peers":
        unpack_peers()
        return _cleared(sys.implementation.cache_tag) or fetch_peers(PEERS, missing_peers())
    if part in TESTS:
        return test(part)
    if part == "sanitizer":
        return sanitize()
    to = ROOT / "bench" / "results", card(name), "--device", "cuda"
    return bench_ppo(*to) if part == PPO else bench(part, *to)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--fetch-peers", action="store_true", help=f"only fill {PEERS.name}, with or without a GPU")
    parser.add_argument("--for-python", metavar="3.12", help="Python version of the machine that will use the peers")
    parser.add_argument("--pack", action="store_true", help="with --fetch-peers: pack them into archives, in pieces")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write the results there, as results.tar.gz")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="for all parts; what does not fit is not begun")
    parser.add_argument("--unpack", type=Path, metavar="ARCHIVE", help="only unpack a results.tar.gz into place")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="the bench parts on a CPU, results in FOLDER")
    options = parser.parse_args(argv)
    if options.unpack:
        return unpack_results(options.unpack)
    if options.dry_run:
        if ROOT in options.dry_run.resolve().parents:
            parser.error("a dry run measures nothing; its FOLDER must lie outside the repository")
        small = ("--device", "cpu", "--as-gpu", "--small")
        codes = [bench(part, options.dry_run, "dry-run", *small) for part in options.part if part in BENCHES]
        print(f"left out, as CUDA's kernels alone do it: {', '.join(CUDA_ONLY)}")
        if PPO in options.part:
            outcome = bench_ppo(options.dry_run, "dry-run", "--part", "gpu", "--small")
            codes.append(bool(outcome))
            print(f"== {PPO}: skipped: {outcome}" if isinstance(outcome, Skipped) else f"== {PPO}: {outcome}")
        return max(codes, default=0)
    if options.fetch_peers:
        wanted = "cpython-" + (options.for_python or "{}.{}".format(*sys.version_info)).replace(".", "")
        outcome = _cleared(wanted) or fetch_peers(PEERS, list(PEER_MODULES), options.for_python)
        print(outcome or f"peers: all in {PEERS}")
        for piece in pack_peers() if options.pack else ():
            print(f"{piece} {piece.stat().st_size / 2**20:.1f} MiB")
        return int(bool(outcome))
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}", flush=True)
    global _end, _keep, _prefix
    _end = time.monotonic() + (options.within or float("inf"))
    _keep, _prefix = options.keep and options.keep.resolve(), card(name)
    outcomes = {}
    for part in options.part:  # a part that fails does not stop the others
        outcomes[part] = outcome = timed(part, name)
        print(f"== {part}: {outcome}", flush=True)
        if part == "build" and outcome.failed:
            break
    print("\n".join(f"{part:16} {outcome}" for part, outcome in outcomes.items()))
    # Every row says which peers were missing, so a skipped "peers" is no failure; any other skipped part is.
    return int(any(o.failed or (o.skipped and part != "peers") for part, o in outcomes.items()))


class Outcome(NamedTuple):
    failed: str  # "" if it did not fail
    skipped: str
    seconds: float

    def __str__(self) -> str:
        word = f"FAILED{self.failed}" if self.failed else f"skipped: {self.skipped}" if self.skipped else "passed"
        return f"{word} {self.seconds:6.0f} s"


def timed(part: str, name: str) -> Outcome:
    """Runs a part within its time limit."""
    global _deadline
    start = time.monotonic()
    until = _end - GRACE - 5
    _deadline = min(start + LIMIT, until)
    if until - start < 10:
        return Outcome(": not begun, the time of all parts is over", "", 0.0)
    try:
        result = run_part(part, name)
        failed, skipped = ("", result) if isinstance(result, Skipped) else ("!" if result else "", "")
    except OverTime:
        failed, skipped = f": stopped after {time.monotonic() - start:.0f} s", ""
    finally:
        _deadline = float("inf")
    return Outcome(failed, skipped, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
