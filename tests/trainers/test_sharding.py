"""Two processes (torchrun, gloo) that shard one model's layers learn what one process does, in half of the memory.

The parts that both run are in parallel_runs.py.
"""

import json
import shutil
import time

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from test_parallel import as_one_of_two, close, names, run, states

from rlhf_fast import SFTConfig, SFTTrainer, sharding
from rlhf_fast.errors import ConfigError
from rlhf_fast.models import add_lora
from rlhf_fast.trainers.checkpoints import latest_checkpoint

pytestmark = pytest.mark.skipif(
    not hasattr(sharding.FSDPModule, "set_force_sum_reduction_for_comms"), reason="needs torch 2.9"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """parallel_runs.sharded: the findings of one process, those of each of two with fsdp, and the folder."""
    path = tmp_path_factory.mktemp("sharding")
    _, (one,) = run(path / "one", "sharded", processes=1)
    _, (first, second) = run(path / "two", "sharded", "fsdp")
    return one["found"], first["found"], second["found"], path


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {name}": x for file in files for name, x in load_file(file).items()}


def assert_same(one, two):
    """Adam divides by the size of a gradient: if that is rounding error only, a weight may move either way."""
    assert one.keys() == two.keys()
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert apart.quantile(0.99) < 1e-4 and apart.max() < 2e-2


@pytest.mark.parametrize("stage", ["sft", "again", "reward", "ppo", "shared", "one_step"])
def test_sharded_layers_learn_what_one_process_does(runs, stage):
    one, first, second = (found[stage] for found in runs[:3])
    assert first["digest"] == second["digest"] and first["step"] == one["step"] > 2
    assert [found["metrics"].get("best_step") for found in (one, first)] == [2 if stage == "reward" else None] * 2
    folders = [runs[3] / name / stage for name in ("one", "two")]
    assert names(folders[0]) == names(folders[1])
    logs = [[json.loads(line) for line in (folder / "train_log.jsonl").open()] for folder in folders]
    for a, b in zip(*logs, strict=True):
        close(*({k: float("nan") if v is None else v for k, v in row.items()} for row in (a, b)))
        assert b.get("policy/first_minibatch_max_abs_log_ratio", 0.0) == 0.0
    assert_same(*map(weights, folders))


def test_a_model_that_does_not_call_its_trunk_is_sharded(tmp_path):
    run(tmp_path / "one", "opt", processes=1)
    _, (first, second) = run(tmp_path / "two", "opt", "fsdp")
    assert first == second
    assert_same(*(weights(tmp_path / name / "run") for name in ("one", "two")))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_each_process_keeps_half_of_the_layers_their_gradients_and_their_state(runs, stage):
    one, first, second = (found[stage]["kept"] for found in runs[:3])
    assert min(one) > 50_000
    for whole, *parts in zip(one, first, second, strict=True):
        assert sum(parts) == pytest.approx(whole, rel=1e-3) and max(parts) < 0.51 * whole


def test_a_layer_is_freed_after_its_forward(runs):
    """Also in the steps after an evaluation, for which all layers were whole, and before any ("again")."""
    assert [found[stage]["freed"] for found in runs[1:3] for stage in ("sft", "again")] == [[True]] * 4


def test_a_checkpoint_is_that_of_one_process(runs):
    one, two = (states(runs[3] / name / "sft") for name in ("one", "two"))
    assert list(one) == list(two) and len(one) > 10
    for place, state in one.items():
        assert state.keys() == two[place].keys()
        for name, tensor in state.items():
            torch.testing.assert_close(two[place][name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [("one", ["fsdp"]), ("two", [])])
def test_a_run_goes_on_with_or_without_sharding(runs, tmp_path, before, after):
    whole, resumed = runs[3] / before / "sft", tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    run(tmp_path, "resumed", *after, processes=2 if after else 1)
    assert_same(weights(whole), weights(resumed))


def test_processes_that_are_killed_resume_to_the_last_bit(tmp_path):
    _, whole = run(tmp_path / "whole", "with_dropout", "", "fsdp")
    run(tmp_path / "killed", "killed", "fsdp", fails=True)
    assert latest_checkpoint(tmp_path / "killed/run").name == "checkpoint-3"
    _, resumed = run(tmp_path / "killed", "with_dropout", "resume", "fsdp")
    assert resumed == whole
    one, two = (weights(tmp_path / name / "run") for name in ("whole", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_layer_that_fails_in_one_process_ends_both_and_the_last_checkpoint_is_whole(tmp_path):
    began = time.monotonic()
    said, (*_, second) = run(tmp_path, "failing_layer", fails=True)
    assert second["ended"]
    assert time.monotonic() - began < 60, "the other process waits for the layer"
    assert "OSError: the layer fails" in said
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_what_fails_in_one_process_before_the_other_gathers_layers_raises_in_both(tmp_path):
    _, found = run(tmp_path, "failing_before_layers")
    for name in ("evaluate", "_train_step"):
        messages = [process["raised"][name] for process in found]
        assert messages == [f"process 1 of 2 failed: OSError: {name} fails", f"{name} fails"]
        assert latest_checkpoint(tmp_path / name).name == "checkpoint-2"


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    data = [{"prompt": "say", "completion": "the cat"}]

    def make(**config):
        SFTTrainer(SFTConfig(str(tmp_path), **config), tiny_model(tokenizer), train_dataset=data, tokenizer=tokenizer)

    with pytest.raises(ConfigError, match="there is only one: start it with torchrun"):
        make(fsdp=True)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *arguments: None)
    monkeypatch.setattr(sharding.atexit, "register", (at_exit := []).append)
    with pytest.raises(ConfigError, match=r"adapters \(lora_r\) have few of them"):
        sharding.shard(add_lora(tiny_model(tokenizer), r=2, alpha=4))
    with pytest.raises(ConfigError, match="cannot find the layers of LlamaForCausalLM"):
        sharding.shard(tiny_model(tokenizer, num_hidden_layers=0))
    skips = tiny_model(tokenizer)
    skips.config.layerdrop = 0.1
    with pytest.raises(ConfigError, match="the model's layerdrop skips some"):
        sharding.shard(skips)
    assert set(at_exit) == {sharding._let_go}
    with monkeypatch.context() as older, pytest.raises(ConfigError, match=r"needs torch 2\.9"):
        older.delattr(sharding.FSDPModule, "set_force_sum_reduction_for_comms")
        sharding.shard(tiny_model(tokenizer))
    with monkeypatch.context() as alone, pytest.raises(ConfigError, match="alone cannot gather layers"):
        alone.setattr(sharding, "is_sharded", lambda layer: True)
        with sharding.gathered(tiny_model(tokenizer)):
            pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP: set fsdp: true"):
        make()


def test_layers_are_freed_also_where_work_with_the_whole_ones_fails(monkeypatch):
    model, calls = tiny_model(tiny_tokenizer(), num_hidden_layers=1), []
    as_one_of_two(monkeypatch, 0)
    monkeypatch.setattr(sharding, "is_sharded", lambda layer: True)
    for name in ("set_reshard_after_forward", "unshard", "reshard"):  # of FSDPModule
        record = lambda _, *given, name=name: calls.append((name, *given))  # noqa: E731
        monkeypatch.setattr(type(model.model.layers[0]), name, record, raising=False)
    with pytest.raises(ZeroDivisionError), sharding.gathered(model):
        assert calls == [("set_reshard_after_forward", False), ("unshard",)]
        calls.clear()
        1 / 0  # noqa: B018
    assert calls == [("set_reshard_after_forward", True), ("reshard",)]


def test_shares_are_filled_up_to_the_longest_and_not_further(monkeypatch):
    monkeypatch.setattr(sharding.parallel, "all_reduce_max", lambda count: count.clamp(min=3))
    assert [sharding.as_many(list(range(n)), "spare") for n in (1, 3)] == [[0, "spare", "spare"], [0, 1, 2]]
