"""SFT against plain PyTorch: which tokens count, how they are averaged, and that the rest changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.data.chat import encode_prompt
from rlhf_fast.errors import ConfigError
from rlhf_fast.packing import packing
from rlhf_fast.trainers import common
from rlhf_fast.trainers.checkpoints import load_checkpoint, save_checkpoint
from rlhf_fast.trainers.everywhere import Everywhere
from rlhf_fast.trainers.sft import token_statistics


def chat(i):
    question = {"role": "user", "content": f"say {'the cat ' * (i % 4)}{i}"}
    return {"messages": [question, {"role": "assistant", "content": f"{i} sat on the mat" * (1 + i % 3)}]}


DATA = [chat(i) for i in range(12)]


def trainer(tmp_path, data=DATA, pad="<pad>", tokenizer=None, model=None, eval_dataset=None, **config):
    tokenizer = tokenizer or tiny_tokenizer(pad=pad)
    config = SFTConfig(str(tmp_path / "run"), **{"learning_rate": 1e-2, "max_length": 200, **config})
    model = model or tiny_model(tokenizer)
    return SFTTrainer(config, model, train_dataset=data, eval_dataset=eval_dataset, tokenizer=tokenizer)


def by_hand(model, tokenizer, data):
    """(sum of -log p, number right, number) over the tokens of every answer and its eos, one example at a time."""
    nll, right, count = 0.0, 0, 0
    for record in data:
        text = tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text)["input_ids"]
        answer = [*tokenizer(record["messages"][1]["content"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        nll -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        right += (logits.argmax(-1) == torch.tensor(answer)).sum().item()
        count += len(answer)
    return nll, right, count


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_the_loss_is_over_answers_and_their_eos_and_nothing_else(tmp_path, pad):
    sft = trainer(tmp_path, pad=pad, per_device_train_batch_size=5, gradient_accumulation_steps=3, logging_steps=1)
    nll, right, count = by_hand(sft.model.eval(), sft.tokenizer, DATA)
    metrics = next(iter(sft))
    assert metrics["loss"].item() == pytest.approx(nll / count, rel=1e-5)
    assert metrics["mean_token_accuracy"].item() == pytest.approx(right / count)
    assert metrics["num_tokens"] == sum(map(len, sft.examples))
    assert metrics["epoch"] == 1 and metrics["learning_rate"] == pytest.approx(1e-2 / 2)  # the warm-up's only step


def gradients(tmp_path, **sizes):
    sft = trainer(tmp_path, **sizes)
    seen = {}
    sft.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in sft.model.named_parameters()})
    )
    next(iter(sft))
    return seen


def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path):
    whole = gradients(tmp_path, per_device_train_batch_size=12, max_grad_norm=0.0)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for size, steps in ((1, 12), (5, 3), (4, 3)):
        split = gradients(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_grad_norm=0.0
        )
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_step_that_was_interrupted_leaves_nothing_to_the_next(tmp_path, monkeypatch):
    """Ctrl-C in a notebook, between two micro-batches of a loop over the trainer, which then goes on."""
    whole, broken = (
        trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1) for _ in range(2)
    )
    next(iter(whole))
    calls, hidden = [], broken._response_hidden

    def interrupted(examples):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hidden(examples)

    monkeypatch.setattr(broken, "_response_hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(broken))
    next(iter(broken))
    assert torch.equal(weights(whole), weights(broken))


def test_evaluation_is_over_all_held_out_tokens(tmp_path):
    sft = trainer(tmp_path, data=DATA[:4], eval_dataset=DATA[4:], per_device_eval_batch_size=3)
    nll, right, count = by_hand(sft.model.eval(), sft.tokenizer, DATA[4:])
    metrics = sft.evaluate()
    assert metrics["eval_loss"].item() == pytest.approx(nll / count, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"].item() == pytest.approx(right / count)
    assert trainer(tmp_path).evaluate() == {}


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.5)
    sft = trainer(tmp_path, tokenizer=tokenizer, model=GPT2LMHeadModel(config), eval_dataset=DATA, learning_rate=1e-9)
    nll, _, count = by_hand(sft.model.eval(), tokenizer, DATA)
    sft.model.train()
    assert sft.evaluate()["eval_loss"].item() == pytest.approx(nll / count, rel=1e-5) and sft.model.training
    sft.batch_size = 12
    assert next(iter(sft))["loss"].item() != pytest.approx(nll / count, rel=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_it_learns_to_answer_and_to_stop(tmp_path, pad):
    data = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in (("two plus two?", "four"), ("say hello", "hello to the world"))
    ]
    sft = trainer(
        tmp_path, data=data, pad=pad, max_steps=60, eval_dataset=data, eval_steps=60, lr_scheduler_type="cosine"
    )
    result = sft.train()
    assert result.metrics["eval_mean_token_accuracy"] == 1.0 and result.metrics["eval_loss"] < 0.1
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows if row["step"] == 60] == ["four", "hello to the world"]
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert log[0]["eval_loss"] > 4 and log[0]["step"] == 0
    # The run directory is a checkpoint that transformers loads, and it stops by itself.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
    prompt = tokenizer.apply_chat_template(data[0]["prompt"], **options)
    answer = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "four<eos>"


def test_samples_answer_what_is_trained_on(tmp_path):
    """A text before messages is a user's turn; a text before a text is itself."""
    data = [
        {"prompt": "two plus two?", "completion": [{"role": "assistant", "content": "four"}]},
        {"prompt": "two plus two?", "completion": "four"},
    ]
    sft = trainer(tmp_path, data=data)
    for prompt, example in zip(sft.sample_prompts, sft.examples, strict=True):
        assert encode_prompt(sft.tokenizer, prompt) == example.input_ids[~example.response_mask].tolist()


def test_samples_answer_the_last_turn_of_those_that_leave_room(tmp_path):
    tokenizer = tiny_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=64))
    turns = [turn for i in (1, 2) for turn in chat(i)["messages"]]
    data = [{"prompt": "a" * n, "completion": " b"} for n in (57, 56)] + [{"messages": turns}]
    sft = trainer(tmp_path, data=data, tokenizer=tokenizer, model=model, max_length=64, sample_max_new_tokens=8)
    assert sft.sample_prompts == ["a" * 56, turns[:3]]


def test_a_date_beside_the_text_of_a_turn_does_not_end_the_run(tmp_path):
    """WildChat, say, has one in every turn; the samples are written after the last step."""
    question, answer = chat(0)["messages"]
    dated = {"messages": [question | {"timestamp": datetime(2024, 5, 1)}, answer]}
    trainer(tmp_path, data=[dated], max_steps=1, num_samples=1, sample_max_new_tokens=1).train()
    (sample,) = map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
    assert sample["prompt"] == [question | {"timestamp": "2024-05-01 00:00:00"}]


def test_text_after_text_is_learned_too(tmp_path):
    data = [{"prompt": "two plus two?", "completion": " four"}]
    tokenizer = tiny_tokenizer(chat_template=None)
    sft = trainer(tmp_path, data=data, tokenizer=tokenizer, max_steps=40, num_samples=1)
    sft.train()
    assert [row["response"] for row in sft.samples()] == [" four"]


def test_plain_text_is_learned_as_a_whole(tmp_path):
    sft = trainer(tmp_path, data=[{"text": "the cat sat"}], tokenizer=tiny_tokenizer(chat_template=None))
    (example,) = sft.examples
    assert sft.tokenizer.decode(example.input_ids) == "the cat sat<eos>" and example.response_mask.all()
    assert example.num_labels == len(example) - 1  # nothing precedes the first token


def test_perplexity_and_entropy_by_hand(tmp_path):
    sft = trainer(tmp_path, eval_dataset=DATA, logging_steps=1, per_device_train_batch_size=12)
    entropy = count = 0.0
    with torch.no_grad():
        for e in sft.examples:
            ids = torch.from_numpy(e.input_ids).long()[None]
            logprobs = sft.model(ids).logits[0, :-1][torch.from_numpy(e.response_mask)[1:]].double().log_softmax(-1)
            entropy, count = entropy - (logprobs.exp() * logprobs).sum().item(), count + len(logprobs)
    metrics = sft.evaluate()
    assert metrics["eval_entropy"].item() == pytest.approx(entropy / count, rel=1e-5)
    assert metrics["eval_perplexity"].item() == pytest.approx(math.exp(metrics["eval_loss"].item()), rel=1e-6)
    assert next(iter(sft))["entropy"].item() == pytest.approx(entropy / count, rel=1e-5)
    every_second = trainer(tmp_path, logging_steps=2, max_steps=3)
    assert ["entropy" in metrics for metrics in every_second] == [False, True, False]


def test_token_statistics_of_a_capped_head_by_hand():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    labels = torch.tensor([0, 6, 1, 1, 2])
    logprobs = (2 * torch.tanh((hidden @ weight.T + bias).double() / 2)).log_softmax(-1)
    expected = [
        -logprobs[range(5), labels].sum(), (logprobs.argmax(-1) == labels).sum(), -(logprobs.exp() * logprobs).sum()
    ]  # fmt: skip
    found = token_statistics(hidden, weight, bias, 2.0, labels)
    torch.testing.assert_close(found, torch.stack([x.double() for x in expected]), rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_and_changes_nothing(tmp_path):
    plain = gradients(tmp_path, max_grad_norm=0.0, per_device_train_batch_size=6)
    recomputed = gradients(tmp_path, max_grad_norm=0.0, per_device_train_batch_size=6, gradient_checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)
    assert trainer(tmp_path, gradient_checkpointing=True).model.model.layers[0].gradient_checkpointing


def test_bf16_is_near_and_refused_without_the_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "bf16_supported", lambda device: False)
    with pytest.raises(ConfigError, match="bf16: cpu has no bfloat16 instructions"):
        trainer(tmp_path, bf16=True)
    monkeypatch.setattr(common, "bf16_supported", lambda device: True)
    exact, rounded = (trainer(tmp_path, bf16=bf16, eval_dataset=DATA) for bf16 in (False, True))
    a, b = exact.evaluate()["eval_loss"].item(), rounded.evaluate()["eval_loss"].item()
    assert a != b and a == pytest.approx(b, rel=0.02)
    with packing(rounded.model, on=rounded.packed):
        hidden, _ = rounded._response_hidden(rounded.examples[:2])
    assert hidden.dtype == torch.bfloat16  # what the head multiplies, and what the statistics are of
    next(iter(rounded))
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
    assert (weights(rounded) - weights(exact)).abs().max() > 1e-3


def test_weights_in_bfloat16_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="the model would learn in bfloat16"):
        SFTTrainer(SFTConfig(), tiny_model(tokenizer).bfloat16(), train_dataset=DATA, tokenizer=tokenizer)


@pytest.fixture
def saved_base(tmp_path):
    tokenizer = tiny_tokenizer()
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.2}


def test_lora_learns_saves_its_adapters_alone_and_resumes_to_the_last_bit(tmp_path, saved_base):
    def make(name):
        config = SFTConfig(str(tmp_path / name), learning_rate=1e-2, **LORA, **RUN)
        return SFTTrainer(config, saved_base, train_dataset=DATA, eval_dataset=DATA[:3])

    whole = make("whole")
    dropout, scaling = {}, {}
    for name, module in whole.model.named_modules():
        if hasattr(module, "lora_dropout"):
            dropout[name], scaling[name] = module.lora_dropout["default"].p, module.scaling["default"]
    assert {*dropout.values()} == {LORA["lora_dropout"]} and {*scaling.values()} == {8.0 / 4}
    before = {name: p.clone() for name, p in whole.model.named_parameters()}
    whole.train()
    changed = {name for name, p in whole.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed == {name for name in before if "lora_" in name}
    assert (tmp_path / "whole/adapter_model.safetensors").exists()
    assert not (tmp_path / "whole/model.safetensors").exists()

    stopped = make("stopped")
    for _ in zip(range(3), stopped, strict=False):
        pass
    save_checkpoint(stopped, tmp_path / "stopped", None, Everywhere(stopped).state)
    resumed = make("stopped")
    load_checkpoint(resumed, tmp_path / "stopped/checkpoint-3")
    list(resumed)
    assert torch.equal(weights(resumed), weights(whole))
    # And a directory of adapters is a model like any other, here to go on from.
    again = SFTTrainer(SFTConfig(str(tmp_path / "more")), str(tmp_path / "whole"), train_dataset=DATA)
    assert torch.equal(weights(again), weights(whole))


def test_the_best_is_one_of_the_checkpoints_that_are_there(tmp_path):
    """load_best_model_at_end is set on resume only: the best step so far has left no checkpoint."""
    setting = {"learning_rate": 3.0, "max_steps": 12, "eval_steps": 2, "save_steps": 4, "save_total_limit": 1,
               "lr_scheduler_type": "constant", "eval_dataset": DATA[:3], "per_device_train_batch_size": 2}  # fmt: skip
    broken = trainer(tmp_path, **setting)

    def killed(batch, step=broken._train_step):
        if broken.step == 9:
            raise KeyboardInterrupt  # not an Exception, after which the run keeps its last step
        return step(batch)

    broken._train_step = killed
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    losses = {row["step"]: row["eval_loss"] for row in log_of(tmp_path) if "eval_loss" in row}
    lost = min((2, 4, 6), key=losses.get)
    assert losses[lost] < losses[8] and {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-8"}
    with (
        pytest.warns(UserWarning, match="differs in load_best_model_at_end"),
        pytest.warns(UserWarning, match=f"best evaluation, step {lost} .* is gone or damaged; .* there: step 8"),
    ):
        result = trainer(tmp_path, **setting, load_best_model_at_end=True).train(resume=True)
    losses = {row["step"]: row["eval_loss"] for row in log_of(tmp_path) if "eval_loss" in row}
    best = min((8, 10, 12), key=losses.get)
    assert result.metrics["best_step"] == best and result.metrics["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_the_best_model_is_kept_also_over_a_resume(tmp_path):
    """The rate is so high that it gets worse: the best of three evaluations is not the last."""
    setting = {"learning_rate": 0.3, "max_steps": 6, "eval_steps": 2, "save_total_limit": 1,
               "lr_scheduler_type": "constant", "load_best_model_at_end": True,
               "eval_dataset": DATA[:3], "per_device_train_batch_size": 2}  # fmt: skip
    whole = trainer(tmp_path / "whole", **setting)
    result = whole.train()
    losses = {row["step"]: row["eval_loss"] for row in log_of(tmp_path / "whole") if "eval_loss" in row and row["step"]}
    best = min(losses, key=losses.get)
    assert len(losses) == 3 and best != 6
    assert result.metrics["best_step"] == best and result.metrics["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert whole.evaluate()["eval_loss"].item() == pytest.approx(losses[best], rel=1e-6)

    broken = trainer(tmp_path / "broken", **setting, save_steps=5)

    def killed(batch, step=broken._train_step):
        if broken.step == 5:
            raise MemoryError("killed")
        return step(batch)

    broken._train_step = killed
    with pytest.raises(MemoryError):
        broken.train()
    resumed = trainer(tmp_path / "broken", **setting, save_steps=5)
    resumed.train(resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    for change, message in (
        ({"eval_dataset": None}, "needs an eval_dataset"),
        ({"metric_for_best_model": "eval_los"}, "'eval_los' is not among eval_loss, eval_perplexity"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path / "refused", **setting | change).train()


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_examples_than_a_batch(tmp_path, count):
    sft = trainer(tmp_path, data=DATA[:count], per_device_train_batch_size=64, num_train_epochs=3.0)
    assert [metrics["epoch"] for metrics in sft] == [1, 2, 3]


def weights(sft):
    return torch.cat([p.detach().flatten() for p in sft.model.parameters()])


def log_of(tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in rows]


RUN = {
    "max_steps": 7,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_steps": 2,
    "save_steps": 3,
}


def test_a_killed_run_resumes_to_the_last_bit(tmp_path):
    """With dropout, so that the generators have to come back as well."""

    def make(name):
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, attention_dropout=0.2)
        return trainer(tmp_path / name, tokenizer=tokenizer, model=model, eval_dataset=DATA[:3], **RUN)

    whole = make("whole")
    whole.train()
    broken = make("broken")

    def killed(batch, step=broken._train_step):
        if broken.step == 5:
            raise MemoryError("killed")
        return step(batch)

    broken._train_step = killed
    with pytest.raises(MemoryError):
        broken.train()
    resumed = make("broken")
    assert not torch.equal(weights(resumed), weights(whole))
    resumed.train(resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trainers.test_sft import trainer
sft = trainer(Path(sys.argv[2]), max_steps=400, per_device_train_batch_size=2)
step = sft._train_step
sft._train_step = lambda batch: (time.sleep(0.05), step(batch))[1]  # 20 s in all: the signal comes in the middle
print(sft.train().interrupted)
"""


def test_ctrl_c_loses_nothing(tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(tests.parent), os.environ.get("PYTHONPATH")]))
    log = tmp_path / "run/train_log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tests), str(tmp_path)], env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "nothing is lost" in output and output.endswith("True\n"), output
    done = len(log_of(tmp_path))
    assert 3 <= done < 400

    # The same run without the interruption, and both a little further.
    setting = {"max_steps": 400, "per_device_train_batch_size": 2}
    resumed, whole = trainer(tmp_path, **setting), trainer(tmp_path / "whole", **setting)
    load_checkpoint(resumed, tmp_path / f"run/checkpoint-{done}")
    for sft, steps in ((resumed, 3), (whole, done + 3)):
        for _ in zip(range(steps), sft, strict=False):
            pass
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "train_dataset is empty"),
        ({"data": [{"body": "hi"}]}, "has the columns body"),
        ({"eval_dataset": [{"body": "hi"}]}, "eval_dataset record 0 has the columns body"),
        ({"tokenizer": tiny_tokenizer(chat_template=None)}, "no chat template"),
        ({"max_length": 10}, r"longer than max_length=10.*on_overlong='skip'"),
        ({"model": tiny_model(tiny_tokenizer(), max_position_embeddings=8)}, "8 positions: lower max_length"),
        ({"learning_rate": 0.0}, "SFTConfig.learning_rate"),
        ({"per_device_train_batch_size": 0}, "SFTConfig.per_device_train_batch_size"),
        ({"lr_scheduler_type": "polynomial"}, "must be one of 'linear', 'cosine', 'constant'"),
        ({"on_overlong": "truncate"}, "must be one of 'error', 'skip'"),
        ({"load_best_model_at_end": True, "eval_steps": 2}, r"needs an eval_dataset \(eval_data\) and eval_steps"),
        ({"load_best_model_at_end": True, "eval_steps": 0, "eval_dataset": DATA}, "needs an eval_dataset"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **change)
    assert not (tmp_path / "run").exists()


def test_what_was_left_out_is_on_record(tmp_path, capsys):
    data = [*DATA, chat(2) | {"messages": [*chat(2)["messages"], *chat(3)["messages"] * 9]}]
    sft = trainer(tmp_path, data=data, on_overlong="skip", max_steps=1)
    sft.train()
    assert "train_dataset: 12 of 13 records used; 1 longer than max_length=200: record 12" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "run/data.json").read_text())
    assert report["records"] == 13 and report["overlong"][0][0] == 12


@pytest.mark.parametrize(
    ("policy", "kept"), [("keep_start", "<|user|>say the cat 1<|assistant|>"), ("keep_end", "mat<eos>")]
)
def test_what_is_cut_is_counted(tmp_path, policy, kept, capsys):
    whole = trainer(tmp_path, data=[chat(1)] * 2).examples[0]
    limit = len(whole) - 4
    sft = trainer(tmp_path, data=[chat(1)] * 2, on_overlong=policy, max_length=limit, max_steps=1)
    text = sft.tokenizer.decode(sft.examples[0].input_ids)
    assert len(sft.examples[0]) == limit and (text.startswith(kept) if policy == "keep_start" else text.endswith(kept))
    sft.train()
    said = f"2 of 2 records used, 2 of them cut to max_length={limit} (8 tokens)"
    assert said in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "run/data.json").read_text())
    assert report["truncated"] == [[0, len(whole)], [1, len(whole)]] and not report["overlong"]
    # Cut to the prompt alone there is nothing to learn, and that is not called a use of the record.
    with pytest.raises(ConfigError, match="Raise max_length"):
        trainer(tmp_path, data=[chat(1)], on_overlong="keep_start", max_length=4)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path, **RUN).train()
    with pytest.raises(ConfigError, match="trained on other data"):
        trainer(tmp_path, data=DATA[:7], **RUN).train(resume=True)


def test_a_checkpoint_of_other_data_of_the_same_lengths_is_refused(tmp_path):
    said = {"prompt": "say 1 ", "completion": "one cat"}
    state = trainer(tmp_path, data=[said]).state_dict()
    trainer(tmp_path, data=[said]).load_state_dict(state)
    for other in ({**said, "completion": "two cat"}, {"prompt": "say 1 one", "completion": " cat"}):
        resumed = trainer(tmp_path, data=[other])
        assert resumed.lengths == state["lengths"].tolist()
        with pytest.raises(ConfigError, match=r"trained on other data .in content"):
            resumed.load_state_dict(state)
