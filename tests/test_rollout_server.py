"""PPO with answers from a server: every token is of the current policy, or the server is refused."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_engine import serving
from helpers import tiny_model, tiny_tokenizer, word_tokenizer

from rlhf_fast.errors import ConfigError
from rlhf_fast.generation import generate_with_logprobs
from rlhf_fast.jobs import run_ppo
from rlhf_fast.keys import PPOJob
from rlhf_fast.models import save_model
from rlhf_fast.rollout_server import RolloutServer
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": f"say {word}"} for word in ("one", "two", "three", "four", "cat", "sat", "on", "mat")]
SETTINGS = {
    "total_episodes": 48, "batch_size": 16, "minibatch_size": 8, "response_length": 7, "num_ppo_epochs": 2,
    "temperature": 0.8, "learning_rate": 3e-3, "importance_cap": 2.0, "seed": 3,
}  # fmt: skip


def variety(prompts, responses, **columns):
    return [len(set(response)) / 10 + (sum(map(ord, response)) % 97) / 970 for response in responses]


def sharp_model(tokenizer):
    """A model far from uniform, so that temperatures differ."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def make_trainer(tmp_path, server, model=None, *, eval_dataset=None, server_options=None, **options):
    tokenizer = tiny_tokenizer()
    config = PPOConfig(**{"output_dir": str(tmp_path / "run"), **SETTINGS, **options})
    return PPOTrainer(
        config, sharp_model(tokenizer) if model is None else model, tokenizer=tokenizer, reward=variety,
        train_dataset=PROMPTS, eval_dataset=eval_dataset,
        rollout_func=RolloutServer(server.url, **{"max_tries": 2, **(server_options or {})}),
    )  # fmt: skip


def iterate(trainer):
    """-> (metrics, rollout) of every iteration."""
    seen, update = [], trainer._update
    trainer._update = lambda rollout, plan: seen.append(rollout) or update(rollout, plan)
    return [({k: float(v) for k, v in metrics.items()}, seen[-1]) for metrics in trainer]


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    with serving(sharp_model(tiny_tokenizer()), request.param) as server:
        yield server


# --- requests and answers --------------------------------------------------------------------------------------------


def test_tokens_and_log_probabilities_are_those_of_the_model_that_sampled(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine, num_generations=2)
    start = copy.deepcopy(trainer.policy)
    (metrics, rollout), *_ = iterate(trainer)
    asked = [body for body in engine.asked if body["max_tokens"] == 7][:16]
    assert len({body["seed"] for body in asked}) == 16 and all(0 <= body["seed"] < 2**31 for body in asked)
    of = {body["seed"]: body for body in asked}
    replies = {}
    for seed, body in of.items():
        assert body["temperature"] == 0.8 and body["stop_token_ids"] == [trainer.tokenizer.eos_token_id]
        ids, logprobs = generate_with_logprobs(
            start, [body["prompt"]], max_new_tokens=7, eos_token_id=body["stop_token_ids"], temperature=0.8,
            generator=[torch.Generator().manual_seed(seed)],
        )  # fmt: skip
        replies[tuple(body["prompt"]), tuple(ids[0])] = logprobs[0]
    for i in range(16):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        response, mask = rollout.response_ids[i], rollout.response_mask[i]
        expected = replies[tuple(prompt), tuple(response[mask].tolist())]
        assert rollout.rollout_logprobs[i][mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert (rollout.rollout_logprobs - rollout.logprobs).abs().max() < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.0


def test_every_step_samples_from_its_own_weights(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine)
    differences = [metrics["sampling/sampling_logp_difference/max"] for metrics, _ in iterate(trainer)]
    assert len(differences) == 3 and max(differences) < 1e-4
    update = {
        "vllm": ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"],
        "sglang": ["/update_weights_from_disk"],
    }[engine.engine]
    assert [path for path, _ in engine.calls] == update * 3 and not engine.broken
    assert len(list((tmp_path / "run/rollout_weights").iterdir())) == 1  # not one model per step


def test_a_server_that_keeps_its_old_weights_shows_in_the_log(tmp_path, engine):
    """Proof that the test above would notice it."""
    engine.deaf = True
    differences = [
        metrics["sampling/sampling_logp_difference/max"] for metrics, _ in iterate(make_trainer(tmp_path, engine))
    ]
    assert differences[0] < 1e-4 and min(differences[1:]) > 1e-2


def test_adapters_go_under_a_name_of_their_own_each_time(tmp_path, engine):
    pytest.importorskip("peft")
    save_model(sharp_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "base")
    trainer = make_trainer(tmp_path, engine, str(tmp_path / "base"), lora_r=2)
    differences = [metrics["sampling/sampling_logp_difference/max"] for metrics, _ in iterate(trainer)]
    assert len(differences) == 3 and max(differences) < 1e-4
    names = [body["lora_name"] for path, body in engine.calls if path.endswith("/load_lora_adapter")]
    assert len(set(names)) == 3 and list(engine.adapters) == names[-1:]
    named = [body.get("lora_path") or body["model"] for body in engine.asked[2:]]
    assert named == [name for name in names for _ in range(16)] and not engine.broken


def test_evaluation_asks_the_same_weights_for_other_answers(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine, eval_dataset=PROMPTS[:3])
    next(iter(trainer))
    trainer.evaluate()
    loads = len(engine.calls)
    next(iter(trainer))
    assert len(engine.calls) == loads  # the next step uses the weights that evaluation sent
    seeds = [body["seed"] for body in engine.asked if body["max_tokens"] == 7]
    assert len(seeds) == len(set(seeds)) == 16 + 3 + 16


def test_it_learns_with_a_server(tmp_path):
    words = [f"w{i}" for i in range(15)]
    tokenizer = word_tokenizer(words)
    model = tiny_model(tokenizer, num_hidden_layers=1)

    def share(prompts, responses, **columns):
        return [sum(w in {"w3", "w7", "w8", "w12"} for w in r.split()) / max(1, len(r.split())) for r in responses]

    config = PPOConfig(
        output_dir=str(tmp_path), total_episodes=32 * 10, batch_size=32, minibatch_size=16, response_length=6,
        num_ppo_epochs=2, temperature=0.9, learning_rate=1e-2, kl_coef=0.01, share_trunk=True, importance_cap=2.0,
    )  # fmt: skip
    with serving(copy.deepcopy(model)) as server:
        trainer = PPOTrainer(
            config, model, tokenizer=tokenizer, reward=share, train_dataset=[{"prompt": word} for word in words],
            rollout_func=RolloutServer(server.url),
        )  # fmt: skip
        scores = [float(metrics["objective/scores"]) for metrics in trainer]
    assert scores[0] < 0.45 and sum(scores[-3:]) / 3 > 0.6


def test_weights_are_given_again_after_a_failure(tmp_path, engine):
    """The server may have been restarted with its first weights, or an update may have failed halfway."""
    trainer = make_trainer(tmp_path, engine)
    trainer.rollout_func._server.backoff = 0.01
    next(iter(trainer))
    engine.faults = ["500"] * 99
    with pytest.raises(ConfigError, match="questions in a row failed"):
        next(iter(trainer))
    engine.faults, engine.base = [], engine.first
    assert next(iter(trainer))["sampling/sampling_logp_difference/max"] < 1e-4

    trainer = make_trainer(tmp_path, engine)
    backward = trainer._backward
    halves = iter([False, True])
    trainer._backward = lambda *arguments: 1 / 0 if next(halves) else backward(*arguments)
    with pytest.raises(ZeroDivisionError):
        next(iter(trainer))
    trainer._backward = backward
    assert next(iter(trainer))["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_second_trainer_is_another_policy_at_the_same_step(tmp_path, engine):
    first, second = (make_trainer(tmp_path / name, engine) for name in ("first", "second"))
    second.rollout_func = first.rollout_func
    with torch.no_grad():
        second.policy.get_output_embeddings().weight.mul_(-1)
    for trainer in (first, second, first):
        assert next(iter(trainer))["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_second_trainer_leaves_no_adapter_of_the_first(tmp_path, engine):
    pytest.importorskip("peft")
    save_model(sharp_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "base")
    first, second = (make_trainer(tmp_path / name, engine, str(tmp_path / "base"), lora_r=2) for name in ("1", "2"))
    second.rollout_func = first.rollout_func
    for trainer in (first, second, first):
        next(iter(trainer))
        assert len(engine.adapters) == 1
    assert not engine.broken


def test_adapters_are_given_again_under_another_name(tmp_path, engine):
    pytest.importorskip("peft")
    save_model(sharp_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "base")
    trainer = make_trainer(tmp_path, engine, str(tmp_path / "base"), lora_r=2)
    engine.faults = ["400"]
    with pytest.raises(ConfigError, match="maximum context length"):
        next(iter(trainer))
    assert next(iter(trainer))["sampling/sampling_logp_difference/max"] < 1e-4 and len(engine.adapters) == 1


def test_only_directories_of_weights_are_deleted_and_one_stays(tmp_path, engine):
    mine = [tmp_path / "shared" / name for name in ("policy-sft", "policy-2")]
    for folder in mine:
        folder.mkdir(parents=True)
    weights = {"server_options": {"weights_dir": str(tmp_path / "shared")}}
    routes, engine.routes = engine.routes, ()
    for _ in range(3):  # a job that is restarted repeatedly
        with pytest.raises(ConfigError, match="did not load the policy's weights"):
            next(iter(make_trainer(tmp_path, engine, **weights)))
    engine.routes = routes
    next(iter(make_trainer(tmp_path, engine, **weights)))
    assert all(folder.exists() for folder in mine) and len(list((tmp_path / "shared").iterdir())) == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def without(*names):
    return lambda choice: {name: value for name, value in choice.items() if name not in names}


@pytest.mark.parametrize(("setting", "message"), [
    ({"mend": without("token_ids", "logprobs")}, "no token ids and log-probabilities.*0.10.2.*start it as VLLM_SER"),
    ({"mend": without("token_ids")}, "the answer has no token ids; return_token_ids needs vLLM"),
    ({"mend": without("logprobs")}, "the answer has no log-probabilities"),
    ({"raw": True}, "at temperature 1, but PPO needs those at 0.8: start it as .*--logprobs-mode processed_logprobs"),
    ({"engine": "llamacpp"}, "calls itself 'llamacpp', but only a vLLM or SGLang server can load new weights"),
    ({"engine": ["vllm"]}, "calls itself \"\\['vllm'\\]\", but only"),
    ({"engine": "x" * 2**20}, "calls itself 'x+[.]{3}', but only"),
    ({"mend": lambda choice: choice | {"logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"a": math.nan}]}}},
     "log-probabilities are not finite"),
    ({"vllm_reset_prefix_cache": lambda *_: (200, {"success": False, "why": "x" * 2**20})}, 'success":false,"why":"x+'),
    ({"routes": ()}, "did not load .* in .*policy-.*: .*/pause.*HTTP 404.*start.*VLLM_SERVER_DEV_MODE=1"),
])  # fmt: skip
def test_a_server_that_will_not_do_is_refused_before_it_samples(tmp_path, setting, message):
    with serving(sharp_model(tiny_tokenizer())) as server:
        vars(server).update(setting)
        with pytest.raises(ConfigError, match=message) as error:
            next(iter(make_trainer(tmp_path, server)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not [body for body in server.asked if body["max_tokens"] == 7]


def test_a_directory_that_the_server_cannot_read_is_named(tmp_path, engine, monkeypatch):
    monkeypatch.setattr("rlhf_fast.rollout_server.save_model", lambda *args: None)
    with pytest.raises(ConfigError, match=r"did not load .*rollout_weights/policy-\w+-0: .*read that path \(weights"):
        next(iter(make_trainer(tmp_path, engine)))
    assert not [body for body in engine.asked if body["max_tokens"] == 7]


def cut(choice):
    ids, logprobs = choice["token_ids"][:2], choice["logprobs"]["token_logprobs"][:2]
    return {**choice, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}


def on(choice):
    return {**choice, "token_ids": [1, *choice["token_ids"][1:]], "finish_reason": "length"}  # 1 is eos


@pytest.mark.parametrize(("faults", "message"), [
    (["500"] * 99, "questions in a row failed .HTTP 500: .*oops.*; no step is done yet: start the run again"),
    (["time-out"] * 3, "answers failed, the first one for prompt .*: no answer within 1 s; no step is done yet"),
    (["400"], "maximum context length is 16.*--max-model-len"),
    ([cut], "cut after 2 of 7 tokens: start the server with a longer context"),
    ([lambda choice: cut(choice) | {"finish_reason": "stop"}], r"stopped at .*ends no answer .*\(only \[1\] do\)"),
    ([on], "continues after the token 1, one of stop_token_ids"),
    ([lambda choice: choice | {"token_ids": choice["token_ids"][1:]}], r"\d tokens and \d log-probabilities"),
    ([lambda choice: choice | {"finish_reason": "abort"}] * 2 * 16, "broken off .abort"),
    ([lambda choice: cut(choice) | {"token_ids": [70_000, 1], "finish_reason": "stop"}], "the token 70000"),
])  # fmt: skip
def test_an_answer_that_will_not_do_ends_the_run_and_changes_nothing(tmp_path, faults, message):
    with serving(sharp_model(tiny_tokenizer())) as server:
        trainer = make_trainer(tmp_path, server, server_options={"timeout": 1.0} if "time-out" in faults else None)
        trainer.rollout_func._server.backoff = 0.01
        if faults[0] == "time-out":
            trainer.rollout_func._server.max_tries = 1
        before = {name: x.clone() for name, x in trainer.policy.state_dict().items()}
        server.faults = list(faults)
        with pytest.raises(ConfigError, match=message) as error:
            next(iter(trainer))
        assert "\n" not in str(error.value) and trainer.whole
        assert all(torch.equal(x, before[name]) for name, x in trainer.policy.state_dict().items())


def test_weights_that_cannot_be_written_are_refused_in_a_line(tmp_path, engine):
    (tmp_path / "file").touch()
    options = {"weights_dir": str(tmp_path / "file" / "weights")}
    with pytest.raises(ConfigError, match=r"cannot be written to .*Not a directory.*give another weights_dir") as error:
        next(iter(make_trainer(tmp_path, engine, server_options=options)))
    assert "\n" not in str(error.value)


def test_a_server_that_a_killed_run_left_paused_answers_again(tmp_path, engine):
    engine.paused = engine.engine == "vllm"
    assert next(iter(make_trainer(tmp_path, engine)))["sampling/sampling_logp_difference/max"] < 1e-4
    assert not engine.broken


def test_a_server_that_an_earlier_run_left_with_half_its_weights_gets_all_of_them_first(tmp_path, engine, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="did not load the policy's"):
        patch.setattr("rlhf_fast.rollout_server.save_model", lambda *args: None)
        next(iter(make_trainer(tmp_path, engine)))
    assert next(iter(make_trainer(tmp_path, engine)))["sampling/sampling_logp_difference/max"] < 1e-4
    assert not engine.broken


def test_a_prefix_cache_that_stays_is_no_new_policy(tmp_path):
    with serving(sharp_model(tiny_tokenizer())) as server:
        server.busy = True
        with pytest.raises(ConfigError, match=r'did not load the policy.*/reset_prefix_cache: {"success":false}'):
            next(iter(make_trainer(tmp_path, server)))
        assert server.paused and not server.asked


@pytest.mark.parametrize("raw", [False, True])
def test_a_model_that_is_sure_of_its_next_token_shows_its_temperature(tmp_path, engine, raw):
    model = sharp_model(tiny_tokenizer())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    engine.raw = raw
    trainer = make_trainer(tmp_path, engine, model)
    if raw:
        with pytest.raises(ConfigError, match="returns log-probabilities at temperature 1"):
            next(iter(trainer))
        return
    next(iter(trainer))
    probes = engine.asked[:2]
    assert [(body["temperature"], body["max_tokens"]) for body in probes] == [(0.5, 1), (2.0, 1)]


def test_a_temperature_that_the_server_does_not_take(tmp_path):
    refused = r"questions in a row failed .HTTP 400: .*must be in \[0, 2\], got 2.5"
    with serving(sharp_model(tiny_tokenizer())) as server, pytest.raises(ConfigError, match=refused):
        next(iter(make_trainer(tmp_path, server, temperature=2.5)))


def test_a_fault_that_passes_is_asked_again(tmp_path, engine):
    engine.faults = ["500", lambda choice: choice | {"finish_reason": "abort"}, lambda choice: {}]
    metrics, _ = iterate(make_trainer(tmp_path, engine, total_episodes=16))[0]
    assert len(engine.asked) == 2 + 16 + 3 and metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_server_that_is_not_there_and_one_that_goes(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine)
    next(iter(trainer))
    engine.gone = True
    with pytest.raises(ConfigError, match=r"did not load the policy.*cannot be reached.*--resume continues"):
        next(iter(trainer))
    with pytest.raises(ConfigError, match=r"127.0.0.1:\d+/v1 is not a vLLM or SGLang server: .*cannot be reached"):
        next(iter(make_trainer(tmp_path, engine)))


def test_an_address_without_v1_is_named(tmp_path, engine):
    trainer = make_trainer(tmp_path, engine)
    trainer.rollout_func = RolloutServer(engine.url.removesuffix("/v1"))
    with pytest.raises(ConfigError, match=r"is not a vLLM or SGLang server: .*HTTP 404.*the address of both ends in"):
        next(iter(trainer))


def test_without_a_cap_there_is_a_warning(tmp_path, engine):
    with pytest.warns(UserWarning, match="nothing corrects for it: set importance_cap: 2"):
        next(iter(make_trainer(tmp_path, engine, importance_cap=None)))


@pytest.mark.parametrize(("keys", "message"), [
    ({"rollout_server": "http://x/v1", "rollout_func": "a.py:f"}, "rollout_server and rollout_func both sample"),
    ({"rollout_options": {"timeout": 3}}, "rollout_options are for a rollout_server: give its URL"),
    ({"rollout_server": "http://x/v1", "rollout_options": {"concurency": 3}}, "did you mean 'concurrency'"),
])  # fmt: skip
def test_keys_that_contradict_each_other(tmp_path, keys, message):
    save_model(tiny_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "model")
    job = job_of(tmp_path, **keys)
    with pytest.raises(ConfigError, match=message):
        run_ppo(job, PPOConfig(output_dir=str(tmp_path / "run")), False)


# --- killed, and resumed ---------------------------------------------------------------------------------------------

REWARD = """
import os, signal
from pathlib import Path

def reward(prompts, responses, **columns):
    calls = Path(os.environ.get("COUNT_CALLS", os.devnull))
    if calls.name == "calls":
        calls.write_text((calls.read_text() if calls.exists() else "") + "x")
        if len(calls.read_text()) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(response)) / 10 + (sum(map(ord, response)) % 97) / 970 for response in responses]
"""
KILLED = """
import signal, sys, torch
from test_rollout_server import config_of, job_of, run_ppo
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
torch.set_num_threads(int(sys.argv[1]))
run_ppo(job_of(sys.argv[2], rollout_server=sys.argv[3]), config_of(sys.argv[2]), False)
"""


def job_of(root, **keys):
    root = Path(root)
    (root / "rewards.py").write_text(REWARD)
    (root / "prompts.jsonl").write_text("".join(f'{{"prompt": "{row["prompt"]}"}}\n' for row in PROMPTS))
    data = {"model": str(root / "model"), "train_data": str(root / "prompts.jsonl")}
    return PPOJob(**data, reward=f"{root / 'rewards.py'}:reward", **keys)


def config_of(root):
    return PPOConfig(output_dir=str(Path(root) / "run"), save_steps=1, num_samples=0, **SETTINGS)


def started(root, engine, **environment):
    """run_ppo on the model in root, in another process."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(torch.get_num_threads()), str(root), engine.url],
        env={**os.environ, "PYTHONPATH": paths, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_a_killed_run_goes_on_bit_for_bit_with_the_weights_given_again(tmp_path, engine):
    bodies = {}
    for name in ("whole", "killed"):
        root = tmp_path / name
        root.mkdir()
        save_model(sharp_model(tiny_tokenizer()), tiny_tokenizer(), root / "model")
        engine.base, engine.asked = engine.first, []
        if name == "killed":
            run = started(root, engine, COUNT_CALLS=str(root / "calls"))
            _, said = run.communicate(timeout=300)
            assert run.returncode == -signal.SIGKILL, said[-2000:]
            assert (root / "run/checkpoint-2").exists()
            engine.base, engine.asked = engine.first, []  # it has been restarted
        run_ppo(job_of(root, rollout_server=engine.url), config_of(root), name == "killed")
        bodies[name] = sorted((body["seed"], body["prompt"]) for body in engine.asked if body["max_tokens"] == 7)
        assert len(list((root / "run/rollout_weights").iterdir())) == 1
    assert len(bodies["killed"]) == 16 and [b for b in bodies["whole"] if b in bodies["killed"]] == bodies["killed"]
    ends = [(tmp_path / name / "run/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert ends[0] == ends[1]
    logs = [re.sub(r'"(timing_s/|perf/)\w+": [^,}]+', "", (tmp_path / name / "run/train_log.jsonl").read_text())
            for name in ("whole", "killed")]  # fmt: skip
    assert logs[0] == logs[1] and not engine.broken


def test_a_second_ctrl_c_waits_for_no_answer_and_leaves_the_steps_before(tmp_path):
    over = threading.Event()
    save_model(sharp_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "model")
    with serving(sharp_model(tiny_tokenizer())) as engine:
        engine.mend = lambda choice: (len(engine.asked) <= 2 + 16 or over.wait(60), choice)[1]
        run = started(tmp_path, engine)
        while len(engine.asked) <= 2 + 16:
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert any("again to stop at once" in line for line in run.stdout)
        begun = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=100)
        assert run.returncode == -signal.SIGINT and time.monotonic() - begun < 20, said[-2000:]
        engine.mend = None
        over.set()
        run_ppo(job_of(tmp_path, rollout_server=engine.url), config_of(tmp_path), True)
    assert (tmp_path / "run/model.safetensors").exists()
