"""bench_ppo.py gives both trainers the same task, and its report says what its file holds."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import bench_ppo  # noqa: E402
import ppo_report  # noqa: E402
import ppo_worker  # noqa: E402
import report  # noqa: E402
import run_report  # noqa: E402
from ppo_worker import Run  # noqa: E402

SMALL = Run(
    vocab=60, hidden=32, layers=1, batch_size=4, minibatch_size=4, micro_batch_size=2, num_ppo_epochs=1,
    prompt_length=(2, 4), response_length=6, iterations=2, num_prompts=8,
)  # fmt: skip


def test_our_run_counts_its_tokens_and_the_clock_goes_on():
    rows = ppo_worker.run_ours(SMALL)
    assert len(rows) == 2 and 0 < rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"]
    for row in rows:
        assert 4 <= row["tokens"] <= 24 and 0 <= row["reward"] <= 1
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_trl_is_given_the_same_reward():
    prompt, answer = [40, 50], [2, 3, 59, 7, 8, ppo_worker.EOS]  # good are 2 to 7
    share = ppo_worker.ShareOfGood(SMALL)
    counts = share.backbone(input_ids=torch.tensor([prompt + answer])).hidden_states[-1]
    assert share.score(counts)[0, -1].item() == pytest.approx(3 / 6)
    tokenizer = ppo_worker.make_tokenizer(SMALL.vocab)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert sum(int(word[1:]) in SMALL.good for word in text.split()) / SMALL.response_length == pytest.approx(3 / 6)
    for row in ppo_worker.make_prompts(SMALL):
        assert not set(row) & set(SMALL.good)
        assert tokenizer(" ".join(f"t{i}" for i in row))["input_ids"] == row


def race(curves):
    rows = {
        name: [[dict(zip(("cpu_seconds", "kl", "reward"), point, strict=True)) for point in run] for run in runs]
        for name, runs in curves.items()
    }
    return {
        "curves": {"cpu_seconds": rows, "kl": rows},
        "tuning": {name: {"cpu_seconds": {"0.1": 0.5, "0.2": 0.7}, "kl": {"0.1": 0.5, "0.2": 0.3}} for name in rows},
        "learning_rates": {"cpu_seconds": {"shared": 0.2, "trl": 0.1}, "kl": {"shared": 0.1, "trl": 0.2}},
        "run": {"layers": 1, "hidden": 32, "vocab": 60, "batch_size": 4, "response_length": 6, "kl_coef": 0.1},
        "cpu": "cpu", "threads": 1, "OMP_WAIT_POLICY": "PASSIVE", "packages": {"torch": "2", "trl": "1"},
        "load_average": 1.0, "commit": "abc", "date": "2026-01-01T", "command": "command",
    }  # fmt: skip


def test_the_race_is_read_where_all_runs_have_been(tmp_path):
    part = race({
        "shared": [[(0, 0, 0.0), (10, 8, 1.0)], [(0, 0, 0.0), (20, 16, 1.0)]],
        "trl": [[(0, 0, 0.0), (40, 4, 0.5)], [(0, 0, 0.0), (8, 4, 0.2)]],
    })  # fmt: skip
    where, rewards = ppo_report.together(part, "cpu_seconds", 5)
    assert where.tolist() == [0, 2, 4, 6, 8]  # nobody is asked beyond 8
    np.testing.assert_allclose(rewards["shared"][:, -1], [0.8, 0.4])
    np.testing.assert_allclose(rewards["trl"][:, -1], [0.1, 0.2])
    where, rewards = ppo_report.together(part, "kl", 3)
    np.testing.assert_allclose(where, [0, 2, 4])
    np.testing.assert_allclose(rewards["shared"][:, -1], [0.5, 0.25])
    mean, half = ppo_report.interval(np.array([[1.0], [3.0]]))
    assert mean[0] == 2 and half[0] == pytest.approx(12.706)  # t(1) sqrt(2) / sqrt(2)
    text = ppo_report.race(part)
    assert "| 8.0 CPU-seconds | 0.600 +-" in text and "equal CPU-seconds 0.2 (shared trunk), 0.1 (TRL 1.12.0)" in text
    assert "equal KL 0.1 (shared trunk), 0.2 (TRL 1.12.0)" in text
    assert bench_ppo.at_kl(part["curves"]["kl"]["trl"][0]) == 0.0  # it never had that much
    long = [{"kl": kl, "reward": kl / 100} for kl in (0.0, 12.0, 8.0, 20.0)]
    assert bench_ppo.at_kl(long) == pytest.approx(0.125)
    ppo_report.picture(part, tmp_path / "race.svg")
    assert (tmp_path / "race.svg").stat().st_size > 1000


# --- The part gpu, as far as it needs none ---


@pytest.mark.parametrize(("shape", "weights"), [("qwen2-0.5b", 494_032_768), ("smollm2-135m", 134_515_008)])
def test_a_shape_has_as_many_weights_as_the_card_of_its_model_says(shape, weights):
    run = Run(shape=shape, vocab=ppo_worker.SHAPES[shape]["vocab_size"], device="meta")
    with torch.device("meta"):
        model = ppo_worker.make_model(run)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == weights
    before = torch.get_rng_state()
    critic = ppo_worker.make_critic(run, model)
    assert critic.device.type == "meta" and torch.equal(torch.get_rng_state(), before)  # not drawn on the CPU


TINY = {"shape": "qwen2-tiny", "vocab": 40, "iterations": 1, "profile": True}


def test_a_profiled_iteration_comes_after_the_measured_ones():
    rows = ppo_worker.run_ours(Run(**{**vars(SMALL), **TINY}))
    assert len(rows) == 1
    assert rows[0]["profile"].keys() == {"rollout", "score and update"}
    for name, part in rows[0]["profile"].items():
        calls = {row["name"]: row["calls"] for row in part["host"]}
        assert part["seconds"] > 0 and part["kernels"] == [] and part["kernel_seconds"] == 0
        assert any(("Backward" in call or "linear_ppo_loss" in call) == (name != "rollout") for call in calls)
        assert [row["seconds"] for row in part["host"]] == sorted((r["seconds"] for r in part["host"]), reverse=True)


def event(key, device_type, count, cpu, device, annotation=False):
    return SimpleNamespace(
        key=key, device_type=device_type, count=count, self_cpu_time_total=cpu, self_device_time_total=device,
        is_user_annotation=annotation,
    )  # fmt: skip


def test_a_kernel_counts_once_and_an_annotation_never():
    """PyTorch lists a kernel's time with the operator that launched it, too, and spans of annotations as kernels."""
    from torch.autograd import DeviceType

    host, card = DeviceType.CPU, DeviceType.CUDA
    found = ppo_worker.shares([
        event("aten::mm", host, 3, 50, 7_000_000), event("cudaGraphLaunch", host, 254, 900, 0),
        event("gemm", card, 3, 0, 7_000_000), event("softmax", card, 9, 0, 2_000_000),
        event("Optimizer.step", card, 1, 0, 9_000_000, annotation=True),
    ])  # fmt: skip
    assert found["kernel_seconds"] == 9 and [row["name"] for row in found["kernels"]] == ["gemm", "softmax"]
    assert found["host"][0] == {"name": "cudaGraphLaunch", "calls": 254, "seconds": 900 / 1e6}
    assert found["graph_launches"] == 254


def a_card_measures(monkeypatch, tmp_path):
    """bench_ppo.py's part gpu over processes that answer what a card might."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    monkeypatch.setattr(bench_ppo, "check_gpu", lambda trl: None)
    monkeypatch.setattr(bench_ppo, "install_trl", lambda folder: folder)
    ran = []

    def execute(run, trl):
        ran.append(run)
        if run.system == "trl" and run.micro_batch_size > 8:
            raise RuntimeError("[Run] failed:\n\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
        second = {"trl": 20.0, "separate": 5.0, "shared": 4.0}[run.system] - run.micro_batch_size / 16
        rows = [
            {"seconds": 30 + second * i, "generate_seconds": second / 4, "tokens": 16384} for i in range(run.iterations)
        ]
        if run.profile:
            part = {"seconds": 9.0, "kernel_seconds": 0.25, "graph_launches": 254, "host": []}
            part["kernels"] = [{"name": "gemm<1|2>", "calls": 7, "seconds": 0.2}]
            rows[-1]["profile"] = {"rollout": part, "score and update": part}
        peak = {"trl": 50, "separate": 30, "shared": 20}[run.system] * 2**30
        return {"rows": rows, "peak_allocated": peak, "peak_reserved": 2 * peak, "peak_rss": 1}

    monkeypatch.setattr(bench_ppo, "execute", execute)
    monkeypatch.setattr(bench_ppo, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_ppo.py", "--device", "cuda"])
    return ran


def test_each_system_is_measured_at_its_best_micro_batch(monkeypatch, tmp_path):
    ran = a_card_measures(monkeypatch, tmp_path)
    bench_ppo.main()
    assert [(r.system, r.micro_batch_size) for r in ran if r.system == "trl"] == [("trl", 8), ("trl", 16)]
    assert all(run.bf16 and run.device == "cuda" and run.num_ppo_epochs == 4 for run in ran)
    assert ran[-1].profile and ran[-1].micro_batch_size == 32 and not any(run.profile for run in ran[:-1])
    results = tmp_path / "bench" / "results"
    part = json.loads((results / "h200-ppo.json").read_text())["parts"]["gpu"]
    assert part["machine"] == "NVIDIA H200" and part["packages"]["trl"] == "1.12.0"
    rows = {(row["system"], row["micro_batch_size"]): row for row in part["runs"]}
    assert rows["trl", 16] == {"system": "trl", "micro_batch_size": 16, "failed": "out of memory"}
    shared = rows["shared", 32]  # 2 s: a quarter is the rollout
    rates = [shared[f"{name}tokens_per_second"] for name in ("", "rollout_", "update_")]
    assert rates == pytest.approx([16384 / 2, 16384 / 0.5, 16384 / 1.5])

    for page in (tmp_path / "README.md", tmp_path / "docs" / "ppo_speed.md"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"<!-- gpu:ppo -->\n{report.END}\n<!-- ppo:gpu -->\n{report.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "find_spec", lambda module: None)  # as on a machine with torch and little else
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert "\n| shared trunk |" + 3 * " 9.75x (H200) |" + " 0.40x (H200) |\n" in text  # 19.5 s over 2
    assert text.count(" 0.60x (H200) |") == 2  # the separate critic's memory, in both sections
    page = (tmp_path / "docs" / "ppo_speed.md").read_text()
    assert "| TRL 1.12.0 | 16 | out of memory |" in page and "| 20.0 (0.40x) | 40.0 |" in page
    assert "Rollout: 0.50 s, kernels 0.25 s, so the device waits for the host 50% of the time" in page
    assert "254 launches of a CUDA graph" in page and "| `gemm<1/2>` | 7 | 0.200 |" in page


def test_what_was_measured_is_kept_whatever_ends_the_part(monkeypatch, tmp_path):
    ran = a_card_measures(monkeypatch, tmp_path)
    answer = bench_ppo.execute

    def execute(run, trl):
        if run.system == "separate" or run.profile:
            raise RuntimeError("failed:\nValueError: something else")
        if run.micro_batch_size == stop_at:
            raise KeyboardInterrupt
        return answer(run, trl)

    stop_at = 16
    monkeypatch.setattr(bench_ppo, "execute", execute)
    with pytest.raises(KeyboardInterrupt):
        bench_ppo.main()
    part = json.loads((tmp_path / "bench" / "results" / "h200-ppo.json").read_text())["parts"]["gpu"]
    assert [row.get("failed") for row in part["runs"]] == [None, "ValueError: something else", None]
    assert "not yet measured" in ppo_report.gpu([part])
    stop_at = None
    with pytest.raises(SystemExit, match="separate: ValueError: something else; profile: ValueError: something else"):
        bench_ppo.main()
    monkeypatch.setattr(bench_ppo, "execute", answer)
    monkeypatch.setattr(bench_ppo, "GPU_SECONDS", 0)
    ran.clear()
    bench_ppo.main()  # of every system one micro-batch, and the profile, whatever the time
    assert [(run.system, run.micro_batch_size) for run in ran] == [*((s, 8) for s in bench_ppo.SYSTEMS), ("shared", 8)]


def test_what_the_part_gpu_lacks_is_said_before_it_runs(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["bench_ppo.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        bench_ppo.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends = {"linear_ppo_loss": {"cuda": {"backend": "triton"}}}
    monkeypatch.setattr("rlhf_fast.backends", lambda: backends)
    with pytest.raises(SystemExit, match="would run on 'triton'; make gpu PART=build"):
        bench_ppo.check_gpu(tmp_path)
    backends["linear_ppo_loss"]["cuda"]["backend"] = "native"
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("import nothing_of_this_name")
    with pytest.raises(SystemExit, match=r"ModuleNotFoundError: No module named 'nothing_of_this_name'.*PART=peers"):
        bench_ppo.check_gpu(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_ppo.py", "--part", "gpu"])
    with pytest.raises(SystemExit):
        bench_ppo.main()


def test_trl_1_12_comes_before_another_one_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/peers")
    assert bench_ppo.environment("trl", tmp_path)["PYTHONPATH"].split(":")[1:] == [str(tmp_path), "/peers"]
    assert bench_ppo.environment("shared", tmp_path)["PYTHONPATH"].split(":")[1:] == ["/peers"]
    assert bench_ppo.environment("trl", tmp_path, bf16=True)["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_part_of_the_race_joins_one_from_before_a_field_was_added():
    run = {name: value for name, value in vars(SMALL).items() if name not in ("bf16", "profile")}
    assert bench_ppo.same_run(json.loads(json.dumps(run)), vars(SMALL))
    assert not bench_ppo.same_run(run, vars(SMALL) | {"vocab": 61})


def test_what_an_iteration_adds_counts_from_where_its_own_process_began(monkeypatch):
    monkeypatch.setattr(ppo_report, "source", lambda part: "")
    rows = [{"vocab": 8192, "shared": 200e6, "separate": 300e6, "trl": 400e6}]
    before = {"shared": 100e6, "separate": 100e6, "trl": 200e6}
    assert "| 0.50x, 1.00x |" in ppo_report.memory({"rows": rows, "before_the_first_step": before})


def test_trl_is_compared_in_its_fastest_setting_and_precision(monkeypatch, tmp_path):
    """With bf16, ours multiplies in bfloat16, and TRL in whatever is faster for it."""
    ran = []

    def execute(run, trl):
        ran.append(run)
        rate = {"shared": 400, "separate": 300, "trl": 100 if run.bf16 else 200}[run.system] + run.micro_batch_size
        rows = [{"tokens": 100 * rate, "cpu_seconds": 100 * i} for i in range(1, run.iterations + 1)]
        return {"rows": rows, "peak_rss": 1000 + len(run.system)}

    monkeypatch.setattr(bench_ppo, "execute", execute)
    options = SimpleNamespace(
        iterations=3, rounds=2, small=False, micro=(16, 64), trl=tmp_path, save=lambda result: saved.append(result)
    )
    saved = []
    part = bench_ppo.speeds(options)
    assert part in saved
    found = [(row["run"]["hidden"], row["run"]["bf16"], row["trl"]) for row in part["rows"]]
    best = {"micro_batch_size": 64, "bf16": False}
    assert found == [(128, True, best), (512, False, best), (512, True, best)]
    assert part["rows"][0]["over_trl"] == {"shared": 416 / 264, "separate": 316 / 264}
    assert sum(run.system == "trl" for run in ran) == (4 + 2) + (2 + 2) + (2 + 2)  # those of float32 once
    assert all(run.bf16 == (run.system != "trl") for run in ran[4:10])
    monkeypatch.setattr(ppo_report, "source", lambda part: "")
    table = ppo_report.speeds(part)
    assert "| 512 | bfloat16 | 416 | 1.58x (1.58-1.58) | 1.00x | 316 |" in table
    assert "| 264 (float32, micro-batches of 64) |" in table
    speed = bench_ppo.speed(options)
    assert speed["run"]["hidden"] == 128 and "(TRL: 64, the faster of 16, 64)" in ppo_report.speed(speed)


def test_grpo_is_compared_with_both_heads_of_trl(monkeypatch, tmp_path):
    def execute(run, trl):
        rate = {"group": 400, "trl-grpo": 100, "trl-grpo-logits": 200}[run.system] + run.micro_batch_size
        rows = [{"tokens": 100 * rate, "cpu_seconds": 100 * i} for i in range(1, run.iterations + 1)]
        return {
            "rows": rows,
            "peak_rss": {"group": 300e6}.get(run.system, 600e6 if run.micro_batch_size == 16 else 2e9),
        }

    monkeypatch.setattr(bench_ppo, "execute", execute)
    options = SimpleNamespace(
        iterations=3, rounds=2, small=False, micro=(16, 64), trl=tmp_path, save=lambda result: None
    )
    part = bench_ppo.grpo(options)
    assert [row["run"]["prompt_length"] for row in part["rows"]] == [(16, 48), (192, 256)]
    assert part["rows"][0]["micro_batch_size"] == {"group": 16, "trl-grpo": 64, "trl-grpo-logits": 64}
    monkeypatch.setattr(ppo_report, "source", lambda part: "")
    part = json.loads(json.dumps(part))
    table = ppo_report.sections({"parts": {"grpo": part}}, tmp_path)["ppo:grpo"]
    assert "| 192-256 | TRL 1.16, the model's own logits | 264 | 1.58x (1.58-1.58) | 600 MB | 0.50 |" in table
    assert "(TRL: the faster of 16, 64, and the memory of the smaller peak). Median of 2 rounds" in table
    speed = bench_ppo.compared(Run(hidden=128, iterations=3), trl_as(monkeypatch, options), {})
    stages = run_report.stages([], {"parts": {"grpo": part, "speed": speed}})
    assert "| GRPO, prompts of 16 to 48 tokens | 2.5x | 1.6x | 0.50, 0.50 |" in stages
    assert "| PPO, shared trunk and separate critic | | 2.0x, 1.0x | 1.00, 1.00 |" in stages


def test_a_larger_model_has_a_row_of_each_comparison(monkeypatch, tmp_path):
    ran = []

    def execute(run, trl):
        ran.append(run)
        rates = {"shared": 30, "separate": 20, "trl": 10, "group": 60, "trl-grpo": 15, "trl-grpo-logits": 20}
        rows = [{"tokens": rates[run.system], "cpu_seconds": i} for i in range(run.iterations)]
        return {"rows": rows, "peak_rss": 3e9 if run.system.startswith("trl") else 2e9}

    monkeypatch.setattr(bench_ppo, "execute", execute)
    part = bench_ppo.large(SimpleNamespace(iterations=2, rounds=1, small=False, trl=tmp_path, save=lambda result: None))
    assert [run.system for run in ran] == ["group", "trl-grpo", "trl-grpo-logits", "shared", "separate", "trl"]
    assert {(run.shape, run.vocab) for run in ran} == {("smollm2-135m", 49_152)}
    monkeypatch.setattr(ppo_report, "source", lambda part: "")
    part = json.loads(json.dumps(part))
    table = ppo_report.sections({"parts": {"large": part}}, tmp_path)["ppo:large"]
    assert "| PPO | rlhf_fast, shared trunk | TRL 1.12.0 | 30.0 | 10.0 | 3.00x | 2.0 GB | 0.67 |" in table
    assert "| GRPO | rlhf_fast | TRL 1.16, its own head | 60.0 | 15.0 | 4.00x | 2.0 GB | 0.67 |" in table
    assert "A model of SmolLM2 135M's shape with random weights; 16 responses of 64 tokens" in table
    stages = run_report.stages([], {"parts": {"large": part}})
    assert "| PPO, shared trunk and separate critic, SmolLM2 135M's shape | | 3.0x, 2.0x | 0.67, 0.67 |" in stages
    assert "| GRPO, SmolLM2 135M's shape | 4.0x | 3.0x | 0.67, 0.67 |" in stages


def trl_as(monkeypatch, options):
    """PPO's systems at rates of 200, 100 and 100."""
    rows = {"shared": 200, "separate": 100, "trl": 100}
    result = lambda run, trl: {  # noqa: E731
        "rows": [{"tokens": rows[run.system], "cpu_seconds": i} for i in range(3)], "peak_rss": 1
    }  # fmt: skip
    monkeypatch.setattr(bench_ppo, "execute", result)
    return options


def test_trl_computes_grpo_from_logits_as_its_own_head_does_and_the_entropy_without_a_graph(monkeypatch):
    """As TRL's versions with logits did: the entropy is only logged."""
    utils, with_graph = pytest.importorskip("trl.trainer.utils"), []
    entropy = utils.entropy_from_logits
    monkeypatch.setattr(
        utils, "entropy_from_logits", lambda x: with_graph.append(torch.is_grad_enabled()) or entropy(x)
    )
    run = replace(SMALL, temperature=0.7, num_generations=2, kl_coef=0.0)
    rows = [ppo_worker.run_grpo_of_trl(replace(run, system=name)) for name in ("trl-grpo", "trl-grpo-logits")]
    assert with_graph == [False] * 4
    for own, from_logits in zip(*rows, strict=True):
        assert own["tokens"] == from_logits["tokens"] and own["reward"] == from_logits["reward"]
        assert own["entropy"] == pytest.approx(from_logits["entropy"], rel=1e-5)
