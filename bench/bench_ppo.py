"""PPO end to end, ours against TRL 1.12.0: same Llama, prompts, reward and settings; runs take turns, each a process.

    python bench/bench_ppo.py [--part speed|speeds|grpo|large|memory|rollout|race] ... [--device cuda] [--small]

speed    response tokens per CPU-second of whole iterations: shared trunk, separate critic, TRL (its best micro-batch)
speeds   the same in bfloat16, and of a wider model in both; TRL in the precision in which it is faster
grpo     the same of GRPO against TRL 1.16 (8 responses to a prompt, one step a rollout, no KL), short and long prompts
large    speed and grpo with a model of SmolLM2 135M's shape and 16 responses
memory   peak resident memory of such a process at two vocabularies, and the memory it takes before the first step
rollout  our generation against transformers' generate(), taking turns in one process
race     reward over CPU-seconds, and over KL, from the same start; five seeds; each system with the best learning rate
         of the same grid, chosen on a seed that does not count
gpu      (alone, with --device cuda) a 0.5B Qwen2-shaped model: tokens per second of rollout, of scoring and update, and
         of whole iterations (wall clock), and peak memory, each system at its best micro-batch; a profile of ours

TRL is installed from PyPI into a folder of its own, which is only on the path of TRL's processes. CPU-seconds are those
of the process, over all threads. OMP_WAIT_POLICY=PASSIVE keeps waiting threads from using CPU time, on either side.

Results go to bench/results/ppo.json, one part at a time, and those of the part gpu to <card>-ppo.json. bench/report.py
makes the tables and the picture. `make gpu PART=bench-ppo` runs the part gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from gpu import card  # noqa: E402
from ppo_report import SYSTEMS, at, best_of, gpu_profile, gpu_rates  # noqa: E402
from ppo_worker import Run  # noqa: E402

TRL = "trl==1.12.0"
TRL_MICRO_BATCHES = (16, 64)
GPU_MICRO_BATCHES = (8, 16, 32)
GPU_SECONDS = 400  # (--seconds) after these the part gpu starts no new micro-batch, so that all fits in ten minutes
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RACE = Run(
    vocab=64, hidden=32, layers=1, batch_size=32, minibatch_size=32, micro_batch_size=32, prompt_length=(8, 8),
    iterations=20, kl_coef=0.003, num_prompts=1024, endless=True,
)  # fmt: skip
TUNING_SEED, SEEDS = 100, range(5)


def install_trl(folder: Path) -> Path:
    if not (folder / "trl").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, TRL]
        if subprocess.run(command).returncode:
            sys.exit(
                f"bench_ppo: {TRL} is not in {folder} and cannot be installed there. Where there is a network: "
                f"pip install --no-deps --target FOLDER {TRL}; then carry FOLDER here, and give it as --folder"
            )
    return folder


def environment(system: str, trl: Path, bf16: bool = False) -> dict[str, str]:
    """The environment of a process of one system. TRL 1.12.0 comes before any other TRL on the path."""
    path = [ROOT, *([trl] if system == "trl" else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    # TRL 1.12.0 leaves the precision to accelerate, which since transformers 5 is not told of PPOConfig(bf16=True).
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no"}
    # With CUDA graphs a second profiler may crash if CUPTI was torn down after the first (pytorch/pytorch#112507).
    profiler = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    return {
        **os.environ, **precision, **profiler, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONPATH": os.pathsep.join(map(str, path)),
    }  # fmt: skip


def gpu_here() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"bench_ppo: torch {torch.__version__} sees no CUDA device on this machine")
    return card(torch.cuda.get_device_name())


def check_gpu(trl: Path) -> None:
    """Exits now for what would otherwise end the part gpu after minutes."""
    import rlhf_fast

    if (backend := rlhf_fast.backends()["linear_ppo_loss"]["cuda"]["backend"]) != "native":
        sys.exit(f"bench_ppo: linear_ppo_loss would run on {backend!r}; make gpu PART=build compiles the CUDA kernels")
    code = "import torch, trl; from trl.experimental.ppo import PPOTrainer; assert trl.__version__ == '1.12.0'"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment("trl", trl), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"bench_ppo: {TRL} in {trl} cannot be imported: {last_line(done.stderr)}. make gpu PART=peers, where there "
            "is a network, installs it with what it needs (bench/gpu.py --fetch-peers, for a machine without one)"
        )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def execute(run: Run, trl: Path) -> dict:
    """Executes the run in its own process -> {"rows": [...], "peak_rss": bytes}."""
    result = execute_all([run], trl)
    return result | {"rows": result["runs"][0]}


def execute_all(runs: list[Run], trl: Path) -> dict:
    """Executes several runs of one system in one process, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        order, result = Path(folder) / "runs.json", Path(folder) / "result.json"
        order.write_text(json.dumps([asdict(run) for run in runs]))
        command = [sys.executable, "-W", "ignore", HERE / "ppo_worker.py", order, result]
        env = environment(runs[0].system, trl, runs[0].bf16)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{runs} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def steady(result: dict) -> tuple[int, float]:
    """Response tokens and CPU-seconds of all iterations except the first, which includes the setup."""
    rows = result["rows"]
    return sum(row["tokens"] for row in rows[1:]), rows[-1]["cpu_seconds"] - rows[0]["cpu_seconds"]


def rate(result: dict) -> float:
    tokens, seconds = steady(result)
    return tokens / seconds


def speed(options) -> dict:
    return compared(Run(hidden=128, iterations=options.iterations), options, {})


def speeds(options) -> dict:
    """speed with other models and precisions. The wider, the larger the share of products, which are the same work."""
    widths = (128,) if options.small else (128, 512)
    settings = [(hidden, bf16) for hidden in widths for bf16 in (False, True) if (hidden, bf16) != (128, False)]
    result, tried = {"rows": []}, {}
    for hidden, bf16 in settings:
        result["rows"].append(compared(Run(hidden=hidden, bf16=bf16, iterations=options.iterations), options, tried))
        options.save(result)
    return result


def compared(base: Run, options, known: dict) -> dict:
    """Rounds in which all systems take turns -> medians of the rates, and of the ratios to TRL within a round.

    TRL has the micro-batch and, if ours multiplies in bfloat16, the precision with which it is faster. known holds the
    rates of TRL's settings, by width, that were tried before.
    """
    if options.small:
        base = replace(base, vocab=512, batch_size=16, minibatch_size=16, micro_batch_size=8, response_length=16)
    tried = [{"micro_batch_size": m, "bf16": bf16} for m in options.micro for bf16 in {base.bf16, False}]
    for own in tried if len(tried) > 1 else ():
        key = (base.hidden, *own.values())
        known[key] = known.get(key) or rate(execute(replace(base, system="trl", **own), options.trl))
        own["rate"] = known[key]
    best = {key: max(tried, key=lambda own: own.get("rate", 0))[key] for key in ("micro_batch_size", "bf16")}
    print(f"{base.shape}, width {base.hidden}, bf16 {base.bf16}; TRL:", tried, flush=True)
    rounds, peaks = [], []
    for i in range(options.rounds):
        names = SYSTEMS[i % 3 :] + SYSTEMS[: i % 3]
        runs = {name: replace(base, system=name) for name in names}
        runs["trl"] = replace(runs["trl"], **best)
        results = {name: execute(run, options.trl) for name, run in runs.items()}
        rounds.append({name: rate(results[name]) for name in SYSTEMS})
        peaks.append({name: results[name]["peak_rss"] for name in SYSTEMS})
        print({name: f"{r:.0f} tokens per CPU-second" for name, r in rounds[-1].items()}, flush=True)
    medians, peak = ({name: statistics.median(r[name] for r in each) for name in SYSTEMS} for each in (rounds, peaks))
    ratios = {name: statistics.median(r[name] / r["trl"] for r in rounds) for name in SYSTEMS[:2]}
    return {
        "run": asdict(base), "trl": best, "trl_tried": tried, "rounds": rounds, "tokens_per_cpu_second": medians,
        "over_trl": ratios, "peak_rss": peak,
    }  # fmt: skip


def grpo(options) -> dict:
    result = {"rows": []}
    for lengths in ((4, 8), (20, 24)) if options.small else ((16, 48), (192, 256)):
        base = Run(hidden=128, prompt_length=lengths, iterations=options.iterations)
        result["rows"].append(grpo_compared(base, options))
        options.save(result)
    return result


def grpo_compared(base: Run, options) -> dict:
    """Rates as in compared(), and peak memory: 8 responses to a prompt, one step a rollout, no KL. TRL with its
    defaults in what a Run does not set, and with the model's own logits in place of its head for a GPU. Both have the
    rate of the micro-batch that is faster, and the peak of the one that takes less memory: on a CPU a larger one may be
    faster by little and take twice as much."""
    base = replace(base, system="group", num_generations=8, num_ppo_epochs=1, kl_coef=0.0)
    if options.small:
        base = replace(base, vocab=512, batch_size=16, minibatch_size=16, micro_batch_size=8, response_length=16)
    runs, tried = {"group": base}, []
    for system in ("trl-grpo", "trl-grpo-logits"):
        theirs = [replace(base, system=system, micro_batch_size=size) for size in options.micro]
        runs[system] = theirs[0]
        if len(theirs) > 1:
            found = [(run.micro_batch_size, execute(run, options.trl)) for run in theirs]
            own = [{"micro_batch_size": m, "rate": rate(r), "peak_rss": r["peak_rss"]} for m, r in found]
            best = max(own, key=lambda row: row["rate"])["micro_batch_size"]
            runs[system] = replace(base, system=system, micro_batch_size=best)
            tried += [{"system": system, **row} for row in own]
    print(f"GRPO, prompts of {base.prompt_length}; TRL:", tried, flush=True)
    rounds, peaks, names = [], [], list(runs)
    for i in range(options.rounds):
        results = {name: execute(runs[name], options.trl) for name in names[i % 3 :] + names[: i % 3]}
        rounds.append({name: rate(results[name]) for name in names})
        peaks.append({name: results[name]["peak_rss"] for name in names})
        print({name: f"{r:.0f} tokens per CPU-second" for name, r in rounds[-1].items()}, flush=True)
    least = {own["system"]: own["peak_rss"] for own in sorted(tried, key=lambda own: -own["peak_rss"])}
    median = lambda each: {name: statistics.median(r[name] for r in each) for name in each[0]}  # noqa: E731
    return {
        "run": asdict(base), "micro_batch_size": {name: run.micro_batch_size for name, run in runs.items()},
        "trl_tried": tried, "rounds": rounds, "tokens_per_cpu_second": median(rounds),
        "peak_rss": median(peaks) | least,
    }  # fmt: skip


def large(options) -> dict:
    base = Run(
        shape="smollm2-135m", vocab=49_152, batch_size=16, minibatch_size=16, learning_rate=1e-5,
        iterations=options.iterations,
    )  # fmt: skip
    if options.small:
        base = replace(base, shape="qwen2-tiny")
    options.micro = (16,)  # all responses
    result = {"grpo": grpo_compared(base, options)}
    options.save(result)
    return result | {"ppo": compared(base, options, {})}


def memory(options) -> dict:
    """Peak resident memory of a process that ran one iteration of two epochs (the optimizer state exists from the
    second one on), and of a process that only set up the trainer, for each system: TRL's imports are larger."""
    base = Run(hidden=128, iterations=1, num_ppo_epochs=2)
    before = {name: execute(replace(base, system=name, iterations=0), options.trl)["peak_rss"] for name in SYSTEMS}
    rows = []
    for vocab in (512,) if options.small else (8192, 32_768):
        peaks = {name: execute(replace(base, vocab=vocab, system=name), options.trl)["peak_rss"] for name in SYSTEMS}
        rows.append({"vocab": vocab, **peaks})
        print({k: v if k == "vocab" else f"{v / 1e6:.0f} MB" for k, v in rows[-1].items()}, flush=True)
    return {"run": asdict(base), "before_the_first_step": before, "rows": rows}


def rollout(options) -> dict:
    """CPU-seconds for the same prompts: medians over rounds, and medians of the ratios within a round. In bfloat16
    transformers gets a model of that dtype, which is faster than autocast."""
    import copy

    import torch
    from ppo_worker import make_model, make_prompts
    from transformers import GenerationConfig

    from rlhf_fast.data.collate import pad
    from rlhf_fast.generation import generate_tokens

    torch.set_num_threads(1)
    rows = []
    shapes = [(128, 8192, 64, False), (128, 8192, 8, False), (256, 32_768, 32, False), (512, 32_768, 128, False)]
    if torch.cpu._is_avx512_bf16_supported():
        shapes += [(hidden, vocab, batch, True) for hidden, vocab, batch, _ in shapes]
    for hidden, vocab, batch, bf16 in shapes:
        run = Run(hidden=hidden, vocab=vocab)
        model, prompts = make_model(run).eval(), make_prompts(run)[:batch]
        alone = copy.deepcopy(model).bfloat16() if bf16 else model
        ids, mask = pad(prompts, 0, left=True)
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        config = GenerationConfig(max_new_tokens=run.response_length, eos_token_id=1, pad_token_id=0, **sampling)

        def ours(model=model, prompts=prompts, run=run, bf16=bf16):
            generate_tokens(model, prompts, max_new_tokens=run.response_length, eos_token_id=1, bf16=bf16)

        def theirs(model=alone, ids=ids, mask=mask, config=config, **more):
            with torch.no_grad():
                return model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config, **more)

        def trls(theirs=theirs):  # as TRL calls it, keeping the logits of every token
            torch.stack(theirs(return_dict_in_generate=True, output_scores=True).scores, 1)

        functions = {"ours": ours, "generate": theirs, "TRL's call of generate": trls}
        samples = {name: [] for name in functions}
        for i in range(1 + options.rounds):
            for name, function in functions.items():
                start = time.process_time()
                function()
                if i:
                    samples[name].append(time.process_time() - start)
        row = {"hidden": hidden, "vocab": vocab, "batch": batch, "bf16": bf16, "response_length": run.response_length}
        row["cpu_seconds"] = {name: statistics.median(values) for name, values in samples.items()}
        row["over_ours"] = {
            name: statistics.median(t / o for t, o in zip(values, samples["ours"], strict=True))
            for name, values in samples.items()
        }
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows}


def race(options) -> dict:
    """Curves of (CPU-seconds, reward, KL) for each seed. Two systems run at the same time, one core each.

    There are two questions: reward at equal CPU-seconds, and reward at equal KL. For each question a system uses the
    learning rate that does best on a seed that does not count, in about the same time.
    """
    base = replace(RACE, iterations=3) if options.small else RACE
    tuning, rates, curves = {}, {axis: {} for axis in QUESTIONS}, {axis: {} for axis in QUESTIONS}

    def compete(name: str) -> None:
        # Ours gets enough iterations to take about as long as TRL; only the time that both reach is compared.
        iterations = base.iterations * (1 if name == "trl" else options.longer)
        mine = replace(base, system=name, iterations=iterations)
        if options.learning_rate is None:
            tried = [replace(mine, learning_rate=lr, seed=TUNING_SEED) for lr in LEARNING_RATES]
            runs = execute_all(tried, options.trl)["runs"]
            tuning[name] = {
                axis: {str(run.learning_rate): answer(rows) for run, rows in zip(tried, runs, strict=True)}
                for axis, answer in QUESTIONS.items()
            }
            print(name, "by learning rate:", tuning[name], flush=True)
        for axis in QUESTIONS:
            found = tuning.get(name, {}).get(axis)
            rates[axis][name] = float(max(found, key=found.get)) if found else options.learning_rate
        ran = {}
        for axis, rate in ((axis, rates[axis][name]) for axis in QUESTIONS):
            if rate not in ran:
                runs = [replace(mine, learning_rate=rate, seed=seed) for seed in SEEDS]
                ran[rate] = [
                    [{k: row[k] for k in ("cpu_seconds", "reward", "kl")} for row in rows]
                    for rows in execute_all(runs, options.trl)["runs"]
                ]
                ends = [{k: round(v, 3) for k, v in rows[-1].items()} for rows in ran[rate]]
                print(name, f"at {rate:g} ends at", ends, flush=True)
            curves[axis][name] = ran[rate]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compete, options.system or SYSTEMS))
    return {"run": asdict(base), "tuning": tuning, "learning_rates": rates, "curves": curves}


def late(rows: list[dict]) -> float:
    """The mean reward of the last quarter of the iterations."""
    return statistics.fmean(row["reward"] for row in rows[-max(1, len(rows) // 4) :])


def at_kl(rows: list[dict]) -> float:
    """The reward at KL_OF_TUNING nats; 0 if the run does not get there."""
    if max(row["kl"] for row in rows) < KL_OF_TUNING:
        return 0.0
    return float(at(rows, "kl", [KL_OF_TUNING])[0])


QUESTIONS = {"cpu_seconds": late, "kl": at_kl}
KL_OF_TUNING = 15.0  # nats per response; about where a third of a response is right


def gpu(options) -> dict:
    """A 0.5B Qwen2-shaped model with random weights: 64 prompts of 128 tokens, 256 tokens of answer, bfloat16 products
    in training on both sides. Runs each system at every micro-batch that memory and time allow."""
    base = Run(
        shape="qwen2-0.5b", vocab=151_936, prompt_length=(128, 128), response_length=256, batch_size=64,
        minibatch_size=64, iterations=3, learning_rate=3e-6, device=options.device, bf16=True,
    )  # fmt: skip
    sizes = GPU_MICRO_BATCHES
    if options.small:
        small = {"prompt_length": (8, 8), "response_length": 8, "batch_size": 8, "minibatch_size": 8, "num_prompts": 16}
        base, sizes = replace(base, shape="qwen2-tiny", vocab=256, iterations=2, bf16=False, **small), (2, 4)
    if options.device == "cuda":
        check_gpu(options.trl)
    start, took, runs = time.perf_counter(), {}, []
    result = {"run": asdict(base), "runs": runs, "profile": None}
    for size, name in ((size, name) for size in sizes for name in SYSTEMS):
        spent = time.perf_counter() - start
        row = {"system": name, "micro_batch_size": size}
        if any("failed" in r for r in runs if r["system"] == name):
            continue  # a larger micro-batch needs even more memory
        if name in took and spent + took[name] > options.seconds:
            row["failed"] = f"not tried: {options.seconds} s were over"
        else:
            row |= attempt(replace(base, system=name, micro_batch_size=size), options.trl)
            took[name] = time.perf_counter() - start - spent
        runs.append(row)
        options.save(result)  # saved now, whatever ends the part later
        print(gpu_rates(row), flush=True)
    broken = [f"{r['system']}: {r['failed']}" for r in runs if not r.get("failed", "not").startswith(EXPECTED)]
    if ours := best_of(runs, "shared"):
        run = replace(base, micro_batch_size=ours["micro_batch_size"], iterations=1, profile=True)
        try:
            result["profile"] = execute(run, options.trl)["rows"][-1]["profile"]
            options.save(result)
            print(gpu_profile(result), flush=True)
        except RuntimeError as error:
            broken.append(f"profile: {last_line(str(error))}")
    if broken:
        sys.exit(f"bench_ppo: {'; '.join(broken)}")
    return result


EXPECTED = ("not", "out of memory")  # how reasons for a row without figures begin that do not make the part fail


def attempt(run: Run, trl: Path) -> dict:
    """What one process measured: medians over its iterations except the first. {"failed": why} if the run failed."""
    try:
        result = execute(run, trl)
    except RuntimeError as error:
        memory = "out of memory" in str(error) or "OutOfMemoryError" in str(error)
        return {"failed": "out of memory" if memory else last_line(str(error))}
    rows = result["rows"]
    rates = {"rollout_tokens_per_second": [], "update_tokens_per_second": [], "tokens_per_second": []}
    for before, row in pairwise(rows):
        seconds, rollout = row["seconds"] - before["seconds"], row["generate_seconds"]
        for name, part in zip(rates, (rollout, seconds - rollout, seconds), strict=True):  # update includes scoring
            rates[name].append(row["tokens"] / part)
    peaks = {name: result.get(name) for name in ("peak_allocated", "peak_reserved", "peak_rss")}
    return {name: statistics.median(values) for name, values in rates.items()} | peaks | {"iterations": rates}


PARTS = {
    "speed": speed, "speeds": speeds, "grpo": grpo, "large": large, "memory": memory, "rollout": rollout, "race": race,
    "gpu": gpu,
}  # fmt: skip


def saver(part: str, options) -> Callable[[dict], None]:
    """Returns save(result), which writes a part and its provenance, and keeps the other parts of the file."""
    import torch

    from rlhf_fast.bench.harness import provenance

    about = provenance(torch.device(options.device), [])
    about |= {"command": " ".join(["python", "bench/bench_ppo.py", *sys.argv[1:]]), "threads": 1,
              "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    if part not in ("grpo", "large"):  # "large" has both versions
        about["packages"]["trl"] = TRL.split("==")[1]
    results = json.loads(options.json.read_text()) if options.json.exists() else {"parts": {}}
    before = results["parts"].get(part, {})

    def save(result: dict) -> None:
        more = {}
        if part == "race" and options.system and "run" in before and same_run(before["run"], result["run"]):
            result["tuning"] = before["tuning"] | result["tuning"]
            for key in ("learning_rates", "curves"):
                result[key] = {axis: before[key][axis] | result[key][axis] for axis in QUESTIONS}
            more = {"command": f"{before['command']}; {about['command']}"}
        results["parts"][part] = {**about, **more, **result}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")

    return save


def same_run(a: dict, b: dict) -> bool:
    """Equal settings. A file may be older than some of Run's fields, which then have their defaults."""
    whole = lambda run: json.loads(json.dumps(asdict(Run(**run))))  # noqa: E731
    return whole(a) == whole(b)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/bench_ppo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the part gpu, alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers" / "trl-1.12.0", help="where TRL goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="per speed run; the first one does not count")
    parser.add_argument(
        "--system", action="append", choices=SYSTEMS, help="only this one in the race; the others keep their results"
    )
    parser.add_argument("--learning-rate", type=float, help="in the race, instead of the best one of the grid")
    parser.add_argument("--longer", type=int, default=5, help="iterations of ours per iteration of TRL in the race")
    parser.add_argument("--seconds", type=int, default=GPU_SECONDS, help="limit of the part gpu, without profile")
    parser.add_argument("--small", action="store_true", help="small shapes: a trial run, not a measurement")
    parser.add_argument("--json", type=Path, help="result file (default: bench/results/ppo.json or <card>-ppo.json)")
    options = parser.parse_args()
    options.micro = TRL_MICRO_BATCHES[:1] if options.small else TRL_MICRO_BATCHES
    if options.device == "cuda" and options.part not in (None, ["gpu"]):
        parser.error("--device cuda is for the part gpu alone")
    if "gpu" in (options.part or ()) and options.device == "cpu" and not (options.small and options.json):
        parser.error("the part gpu needs --device cuda; on a CPU only its logic can run, with --small and --json")
    name = f"{gpu_here()}-ppo.json" if options.device == "cuda" else "ppo.json"
    options.json = options.json or ROOT / "bench" / "results" / name
    options.trl = install_trl(options.folder.resolve())
    for part in options.part or (["gpu"] if options.device == "cuda" else [p for p in PARTS if p != "gpu"]):
        options.save = saver(part, options)
        options.save(PARTS[part](options))


if __name__ == "__main__":
    main()
