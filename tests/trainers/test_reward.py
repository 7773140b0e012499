"""The reward model against plain PyTorch: losses by hand, one forward pass, a checkpoint others read."""

import json
import math
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import RewardConfig, RewardTrainer, models
from rlhf_fast.data.chat import encode_to_score
from rlhf_fast.data.collate import common_prefix
from rlhf_fast.data.floors import wilson_interval
from rlhf_fast.errors import ConfigError
from rlhf_fast.packing import packing
from rlhf_fast.rewards import RewardModelReward
from rlhf_fast.trainers import common


def pair(i, **columns):
    """Answers that mention the cat are better, whatever their length."""
    answers = [f"{i} the cat sat {'on the mat' * (i % 3)}", f"{i} sat {'on the mat' * ((i + 1) % 3)}"]
    prompt, (chosen, rejected) = [{"role": "user", "content": f"say {i}"}], [
        [{"role": "assistant", "content": a}] for a in answers
    ]  # fmt: skip
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def ranked(i):
    """Four answers, or three; the last two of the four are a tie."""
    answers = [f"{i} the cat sat on the mat", f"{i} the cat", f"{i} two", f"{i}"]
    if i % 2:
        return {"prompt": f"say {i}: ", "responses": answers[:3]}
    return {"prompt": f"say {i}: ", "responses": answers, "ranks": [0, 1, 2, 2]}


PAIRS, RANKED = [pair(i) for i in range(10)], [ranked(i) for i in range(7)]
SOFT = [pair(i, margin=0.1 * i, chosen_prob=1 - 0.05 * i, weight=0.5 + i) for i in range(10)]


def trainer(tmp_path, data=PAIRS, pad="<pad>", tokenizer=None, model=None, eval_dataset=None, **config):
    tokenizer = tokenizer or tiny_tokenizer(pad=pad)
    config = RewardConfig(str(tmp_path / "run"), **{"learning_rate": 1e-2, "max_length": 200, **config})
    model = model or tiny_model(tokenizer)
    return RewardTrainer(config, model, train_dataset=data, eval_dataset=eval_dataset, tokenizer=tokenizer)


def reward_alone(trainer, prompt, response):
    """One response in a batch of its own, through transformers' forward."""
    ids = torch.tensor([encode_to_score(trainer.tokenizer, prompt, response).tolist()])
    return trainer.model.eval()(ids).logits[0, 0].double()


def pairs_by_hand(trainer, data, center=0.0):
    loss = total = right = gap = 0.0
    for x in data:
        chosen, rejected = (reward_alone(trainer, x["prompt"], x[key]) for key in ("chosen", "rejected"))
        d, p, w = chosen - rejected - x.get("margin", 0.0), x.get("chosen_prob", 1.0), x.get("weight", 1.0)
        loss += w * (-p * logsigmoid(d) - (1 - p) * logsigmoid(-d) + center * (chosen + rejected) ** 2)
        right, gap, total = right + w * float(chosen > rejected), gap + w * (chosen - rejected), total + w
    return loss / total, right / total, gap / total


def ranked_by_hand(trainer, data):
    loss = right = gap = count = 0.0
    for x in data:
        rewards = [reward_alone(trainer, x["prompt"], response) for response in x["responses"]]
        ranks = x.get("ranks", range(len(rewards)))
        gaps = [
            a - b for a, i in zip(rewards, ranks, strict=True) for b, j in zip(rewards, ranks, strict=True) if i < j
        ]
        loss += sum(-logsigmoid(g) for g in gaps) / len(gaps)
        right, gap, count = right + sum(float(g > 0) for g in gaps), gap + sum(gaps), count + len(gaps)
    return loss / len(data), right / count, gap / count


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize(("data", "center"), [(PAIRS, 0.0), (SOFT, 0.01), (RANKED, 0.0)])
def test_the_loss_is_that_of_the_paper(tmp_path, data, center, pad):
    rm = trainer(
        tmp_path, data, pad, center_rewards_coefficient=center, per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    with torch.no_grad():
        loss, accuracy, margin = ranked_by_hand(rm, data) if data is RANKED else pairs_by_hand(rm, data, center)
    metrics = next(iter(rm))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(accuracy, rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(margin.item(), abs=1e-5)
    assert metrics["num_tokens"] == sum(len(r) for item in rm.items for r in item.responses)


def test_the_spread_of_the_rewards_counts_each_response_once(tmp_path):
    rm = trainer(tmp_path, RANKED, per_device_train_batch_size=len(RANKED))  # of four responses to a prompt, or three
    with torch.no_grad():
        rewards = torch.stack([reward_alone(rm, x["prompt"], r) for x in RANKED for r in x["responses"]])
    expected = {"mean": rewards.mean(), "min": rewards.min(), "max": rewards.max()}
    metrics = next(iter(rm))
    for name, value in expected.items():
        assert metrics[f"{name}_reward"].item() == pytest.approx(value.item(), abs=1e-5)
    assert metrics["reward_std"].item() == pytest.approx(rewards.std(correction=0).item(), rel=1e-4)


def test_both_rewards_of_a_pair_come_from_one_network(tmp_path):
    """In training too: dropout is off."""
    rm = trainer(tmp_path, model=tiny_model(tiny_tokenizer(), attention_dropout=0.5))
    rm.model.train()
    with torch.no_grad(), packing(rm.model):
        assert torch.equal(rm._rewards(rm.items)[0], rm._rewards(rm.items)[0])


def gradients(tmp_path, data, **sizes):
    rm = trainer(tmp_path, data, max_grad_norm=0.0, **sizes)
    seen = {}
    rm.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in rm.model.named_parameters()})
    )
    next(iter(rm))
    return seen


@pytest.mark.parametrize("data", [SOFT, RANKED])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path, data):
    whole = gradients(tmp_path, data, per_device_train_batch_size=len(data))
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for size in (1, 3, 4):
        split = gradients(tmp_path, data, per_device_train_batch_size=size, gradient_accumulation_steps=12 // size)
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_that_was_interrupted_leaves_nothing_to_the_next(tmp_path):
    whole, broken = (trainer(tmp_path, max_steps=1) for _ in range(2))
    next(iter(whole))
    for p in broken.model.parameters():
        p.grad = torch.ones_like(p)
    next(iter(broken))
    assert all(torch.equal(*both) for both in zip(whole.model.parameters(), broken.model.parameters(), strict=True))


def test_evaluation_is_over_all_held_out_pairs(tmp_path):
    rm = trainer(tmp_path, PAIRS[:3], eval_dataset=SOFT, per_device_eval_batch_size=4)
    with torch.no_grad():
        loss, accuracy, margin = pairs_by_hand(rm, SOFT)
        rewards = torch.stack([reward_alone(rm, x["prompt"], x[k]) for x in SOFT for k in ("chosen", "rejected")])
    lengths = [len(r) - common_prefix(x.responses) for x in rm.eval_items for r in x.responses]  # without the prompt
    metrics = rm.evaluate()
    expected = {
        "eval_length_correlation": torch.stack([rewards, torch.tensor(lengths)]).corrcoef()[0, 1],
        "eval_loss": loss, "eval_accuracy": accuracy, "eval_margin": margin, "eval_mean_reward": rewards.mean(),
        "eval_reward_std": rewards.std(correction=0), "eval_min_reward": rewards.min(),
        "eval_max_reward": rewards.max(), "eval_num_pairs": 10,
    }  # fmt: skip
    judged = {"eval_accuracy_low", "eval_accuracy_high", "eval_ece"}
    assert (
        set(metrics) == set(expected) | judged
        and metrics["eval_accuracy_low"] <= accuracy < metrics["eval_accuracy_high"]
    )
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), abs=1e-5), name
    assert trainer(tmp_path).evaluate() == {}


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_it_learns_and_others_read_the_checkpoint(tmp_path, pad):
    rm = trainer(tmp_path, PAIRS[:8], pad, eval_dataset=PAIRS[8:], max_steps=30, num_samples=2, eval_steps=30)
    result = rm.train()
    assert result.metrics["eval_accuracy"] == 1.0 and result.metrics["eval_margin"] > 2
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    after = [row["reward"] for row in rows if row["step"] == 30]
    assert len(after) == 4 and after[0] > after[1] and after[2] > after[3]

    # Without this package: the tokenizer pads, the model pools.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    texts = [
        tokenizer.apply_chat_template(x["prompt"] + x[k], tokenize=False).removesuffix("\n")
        for x in PAIRS[8:] for k in ("chosen", "rejected")
    ]  # fmt: skip
    for side in ("right", "left"):
        tokenizer.padding_side = side
        with torch.no_grad():
            theirs = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits[
                :, 0
            ]
        assert theirs.tolist() == pytest.approx(after, abs=1e-5)

    # And as PPO uses it.
    scores = RewardModelReward.load(tmp_path / "run")(
        [x["prompt"] for x in PAIRS[8:]], [x["chosen"][0]["content"] for x in PAIRS[8:]]
    )
    assert scores.tolist() == pytest.approx(after[::2], abs=1e-6)


def test_the_embedding_of_a_reward_model_grows_for_nothing_but_a_pad_token(tmp_path):
    """A tokenizer with more tokens may be that of another model."""
    tokenizer, model = tiny_tokenizer(pad="<eos>"), tiny_model(tiny_tokenizer(pad="<eos>"))
    tokenizer.add_tokens(["<new>"])
    data, config = [{"prompt": "say ", "chosen": "cat", "rejected": "mat"}], RewardConfig(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"tokens and the model embeds 300: use the model's own tokenizer, or call"):
        RewardTrainer(config, model, train_dataset=data, tokenizer=tokenizer)


def test_soft_labels_are_learned_as_probabilities(tmp_path):
    """At the optimum sigma(r_w - r_l) is the judge's probability: 0.8 means a margin of log 4."""
    rm = trainer(tmp_path, [pair(1, chosen_prob=0.8)], max_steps=80, lr_scheduler_type="cosine")
    assert list(rm)[-1]["margin"].item() == pytest.approx(math.log(4), abs=0.02)


def test_a_frozen_trunk_stays_and_the_head_learns(tmp_path):
    rm = trainer(tmp_path, freeze_trunk=True, max_steps=20)
    before = {k: v.clone() for k, v in rm.model.state_dict().items()}
    losses = [metrics["loss"].item() for metrics in rm]
    changed = [k for k, v in rm.model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["score.weight"] and losses[-1] < losses[0]


def test_all_responses_of_a_micro_batch_share_one_forward_pass_and_those_of_a_prompt_its_tokens(tmp_path):
    """Ten pairs in two passes of five; the prompt, 40 tokens and more, is read once a pair."""
    data = [{**x, "prompt": [{"role": "user", "content": f"please say {i} " * 9}]} for i, x in enumerate(PAIRS)]
    rm = trainer(tmp_path, data, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    read = []
    rm.model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    metrics = next(iter(rm))
    shared = [common_prefix(item.responses) for item in rm.items]
    assert min(shared) > 40
    assert len(read) == 2 and sum(read) == metrics["num_tokens"] - sum(shared)


def test_a_model_that_cannot_be_packed_is_padded_and_learns_the_same(tmp_path, monkeypatch):
    packed = gradients(tmp_path, SOFT, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    monkeypatch.setattr(common, "why_not_packed", lambda model, longest, bf16: "a reason")
    with pytest.warns(UserWarning, match="batches are padded, within buckets of similar length: a reason"):
        padded = gradients(tmp_path, SOFT, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    for name, gradient in packed.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reason", [None, "a reason"])
def test_under_bf16_the_head_multiplies_in_float32(tmp_path, monkeypatch, reason):
    """Packed or padded: a reward of 8 bits near 10 is right to 0.03, and differences of rewards are what is learned."""
    monkeypatch.setattr(common, "bf16_supported", lambda device: True)
    monkeypatch.setattr(common, "packing_if_possible", lambda model, longest, bf16: reason is None)
    rm = trainer(tmp_path, bf16=True)
    with packing(rm.model, on=rm.packed):
        rewards = rm._rewards(rm.items)[0]
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


def test_only_the_last_layers_learn(tmp_path):
    rm = trainer(tmp_path, train_last_layers=1, max_steps=2)
    before = {k: v.clone() for k, v in rm.model.state_dict().items()}
    list(rm)
    changed = {k for k, v in rm.model.state_dict().items() if not torch.equal(v, before[k])}
    assert "score.weight" in changed and "model.norm.weight" in changed
    assert {k for k in before if "layers.1." in k} <= changed
    assert not {k for k in changed if "layers.0." in k or "embed" in k}
    with pytest.raises(ConfigError, match="train_last_layers = 3, and the model has 2 layers"):
        trainer(tmp_path, train_last_layers=3)
    with pytest.raises(ConfigError, match="set only one of"):
        trainer(tmp_path, train_last_layers=1, freeze_trunk=True)


@pytest.mark.parametrize(
    ("before", "now"),
    [({}, {"freeze_trunk": True}), ({"freeze_trunk": True}, {}), ({"train_last_layers": 1}, {"train_last_layers": 2})],
)
def test_a_run_resumes_with_the_part_that_it_trained(tmp_path, before, now):
    state = trainer(tmp_path, **before).state_dict() | {"step": 3}
    refusing = trainer(tmp_path, **now)
    with pytest.raises(ConfigError, match=r"resume with the same freeze_trunk, train_last_layers and lora_\*"):
        refusing.load_state_dict(state)
    assert refusing.step == 0


def test_a_run_resumes_with_the_adapters_that_it_trained(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    runs = [trainer(tmp_path, model=str(tmp_path / "base"), lora_r=r) for r in (0, 4, 8)]
    for run, other in permutations(runs, 2):
        with pytest.raises(ConfigError, match=r"the checkpoint has other .* resume with the same model, lora_r"):
            run.load_state_dict(other.state_dict())


def test_only_a_frozen_trunk_may_be_in_bfloat16(tmp_path):
    """transformers 5 loads a checkpoint in its own dtype; most steps of such weights would round to nothing."""
    half = tiny_model(tiny_tokenizer()).bfloat16()
    with pytest.raises(ConfigError, match="the model would learn in bfloat16"):
        trainer(tmp_path, model=half)
    rm = trainer(tmp_path, model=half, freeze_trunk=True, max_steps=1)
    assert rm.model.base_model.dtype == torch.bfloat16 and rm.model.score.weight.dtype == torch.float32
    before = rm.model.score.weight.detach().clone()
    next(iter(rm))
    assert (rm.model.score.weight != before).all()


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_lora_keeps_the_head(tmp_path, pad):
    """Where eos pads, the model gets a pad token, and the adapters bring the longer embedding with them."""
    tokenizer = tiny_tokenizer(pad=pad)
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "sft")
    config = RewardConfig(str(tmp_path / "run"), max_steps=20, learning_rate=1e-2, lora_r=4)
    rm = RewardTrainer(config, str(tmp_path / "sft"), train_dataset=PAIRS, eval_dataset=PAIRS, reference_dataset=PAIRS)
    result = rm.train()
    assert result.metrics["eval_accuracy"] == 1.0
    prompts, responses = zip(*((x["prompt"], x[k]) for x in PAIRS for k in ("chosen", "rejected")), strict=True)
    served = RewardModelReward.load(tmp_path / "run")
    torch.testing.assert_close(
        served(prompts, responses), RewardModelReward(rm.model, rm.tokenizer)(prompts, responses), rtol=0, atol=1e-4
    )
    critic = models.ValueModel.from_reward_model(models.load_reward_model(tmp_path / "run"))
    ids = torch.tensor(served.encode(prompts[0], responses[0]))[None]
    torch.testing.assert_close(critic(ids)[:, -1], served(prompts[:1], responses[:1]), rtol=0, atol=1e-4)
    again = RewardTrainer(RewardConfig(str(tmp_path / "again")), str(tmp_path / "run"), train_dataset=PAIRS)
    assert all("lora_" in n or "score" in n for n, p in again.model.named_parameters() if p.requires_grad)


def test_the_scale_of_the_reference_is_saved_and_applied_where_the_model_is_used(tmp_path):
    reference = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in PAIRS[:6]]
    tokenizer = tiny_tokenizer()
    config = RewardConfig(str(tmp_path / "run"), max_steps=5, learning_rate=1e-2)
    rm = RewardTrainer(
        config, tiny_model(tokenizer), train_dataset=PAIRS, reference_dataset=reference, tokenizer=tokenizer
    )
    rm.train()
    with torch.no_grad():
        raw = torch.stack([reward_alone(rm, x["prompt"], x["completion"]) for x in reference])
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["reward_mean"] == pytest.approx(raw.mean().item(), abs=1e-5)
    assert saved["reward_std"] == pytest.approx(raw.std(correction=0).item(), rel=1e-4)
    served = RewardModelReward.load(tmp_path / "run")
    scores = served([x["prompt"] for x in reference], [x["completion"] for x in reference])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(correction=0).item() == pytest.approx(1)
    # transformers' own forward stays raw, and a training that goes on from it starts without the scale.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    ids = torch.tensor([encode_to_score(tokenizer, reference[0]["prompt"], reference[0]["completion"]).tolist()])
    assert model(ids).logits.item() == pytest.approx(raw[0].item(), abs=1e-5)
    again = RewardTrainer(RewardConfig(str(tmp_path / "again")), str(tmp_path / "run"), train_dataset=PAIRS)
    assert models.reward_scale(again.model.config) == (0.0, 1.0)


def test_a_trainer_whose_model_could_not_be_saved_measures_the_same_scale_again(tmp_path, monkeypatch):
    reference = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in PAIRS[:6]]
    config, tokenizer = RewardConfig(str(tmp_path / "run"), max_steps=1, learning_rate=1e-2), tiny_tokenizer()
    rm = RewardTrainer(
        config, tiny_model(tokenizer), train_dataset=PAIRS, reference_dataset=reference, tokenizer=tokenizer
    )
    monkeypatch.setattr(rm, "save_model", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        rm.train()
    measured = models.reward_scale(rm.model.config)
    monkeypatch.undo()
    rm.train(resume=True)
    assert models.reward_scale(rm.model.config) == pytest.approx(measured) != (0.0, 1.0)


def test_samples_are_what_the_model_reads_in_training(tmp_path):
    """A record that is left out is not shown, one that is cut is scored as it was cut; better answers come first."""
    long = {"prompt": "say " * 60, "chosen": "the cat", "rejected": "sat"}
    short = {"prompt": "say 1: ", "chosen": "sat", "rejected": "the cat", "chosen_prob": 0.2}
    turned = {"prompt": "say 0: ", "responses": ["0", "0 the cat", "0 two"], "ranks": [2, 0, 1]}
    for record, texts in ((short, ["the cat", "sat"]), (turned, ["0 the cat", "0 two", "0"])):
        rm = trainer(tmp_path, [long, record], max_length=40, on_overlong="skip")
        samples = rm.samples()
        assert [(x["prompt"], x["response"]) for x in samples] == [(record["prompt"], text) for text in texts]
        alone = [float(reward_alone(rm, x["prompt"], x["response"])) for x in samples]
        assert [x["reward"] for x in samples] == pytest.approx(alone, abs=1e-5)
    rm = trainer(tmp_path, [long], max_length=40, on_overlong="keep_end", num_samples=1)
    sample, cut = rm.samples()[0], torch.tensor([rm.items[0].responses[0].tolist()])
    assert cut.shape == (1, 40) and (sample["prompt"], sample["response"]) == (long["prompt"], "the cat")
    assert sample["reward"] == pytest.approx(rm.model.eval()(cut).logits.item(), abs=1e-5)


def test_samples_gather_the_layers_once(tmp_path, monkeypatch):
    """With fsdp it takes a message to all processes for every layer."""
    rm, gathered = trainer(tmp_path, num_samples=3), []
    monkeypatch.setattr(rm, "gathered", lambda: gathered.append(1) or nullcontext())
    assert len(rm.samples()) == 6 and gathered == [1]


def test_pairs_without_a_prompt_train_and_each_is_shown_apart(tmp_path):
    """No prompt column: replies alone, or dialogues that hold it; the report shows two records, not one of four."""
    alone = [{k: x[k] for k in ("chosen", "rejected")} for x in PAIRS[:2]]
    within = [{k: x["prompt"] + x[k] for k in ("chosen", "rejected")} for x in PAIRS[:2]]
    for name, data, prompts in (("alone", alone, [[], []]), ("within", within, [x["prompt"] for x in PAIRS[:2]])):
        rm = trainer(tmp_path / name, data, max_steps=1)
        rm.train()
        samples = [json.loads(line) for line in (tmp_path / name / "run/samples.jsonl").read_text().splitlines()]
        assert [x["prompt"] for x in samples] == [prompts[0]] * 2 + [prompts[1]] * 2
        assert [x["record"] for x in samples] == [0, 0, 1, 1]
        page = (tmp_path / name / "run/report.html").read_text(encoding="utf-8")
        assert page.count("<article>") == 2


def test_the_reference_is_checked_before_training(tmp_path):
    def make(reference, tokenizer=None, **config):
        tokenizer = tokenizer or tiny_tokenizer()
        return RewardTrainer(
            RewardConfig(str(tmp_path / "run"), **config), tiny_model(tokenizer), train_dataset=[ranked(0)],
            reference_dataset=reference, tokenizer=tokenizer,
        )  # fmt: skip

    long, short = {"prompt": "say ", "completion": "cat " * 60}, {"prompt": "say ", "completion": "cat"}
    with pytest.raises(ConfigError, match="reference_dataset: 1 longer than max_length=40: record 0"):
        make([long, short], max_length=40)
    other = {"prompt": "say ", "completion": "mat"}
    skipped, cut = (make([long, short, other], max_length=40, on_overlong=x) for x in ("skip", "keep_end"))
    whole = [encode_to_score(cut.tokenizer, x["prompt"], x["completion"]).tolist() for x in (long, short, other)]
    assert [x.tolist() for x in skipped.reference] == whole[1:]
    assert [x.tolist() for x in cut.reference] == [whole[0][-40:], *whole[1:]]
    assert [report.overlong for report in skipped.reports] == [[], [(0, len(whole[0]))]]
    with pytest.raises(ConfigError, match="the longest sequence has"):
        make([{"prompt": "", "completion": "cat " * 300}, short], max_length=2000)
    for few in ([short], [short, short], [long, short]):
        with pytest.raises(ConfigError, match=r"reference_dataset: .*needs two different responses, and there is 1"):
            make(few, max_length=40, on_overlong="skip")
    with pytest.raises(ConfigError, match="no chat template"):
        make([{"messages": pair(0)["prompt"] + pair(0)["chosen"]}], tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize(("weight", "why"), [(0.0, "do not differ"), (math.nan, "are not finite")])
def test_a_reference_without_spread_leaves_the_scale(tmp_path, weight, why):
    tokenizer, config = tiny_tokenizer(), RewardConfig(str(tmp_path / "run"), max_steps=1)
    model, reference = tiny_model(tokenizer), [{"messages": x["prompt"] + x["chosen"]} for x in PAIRS]
    rm = RewardTrainer(config, model, train_dataset=PAIRS, reference_dataset=reference, tokenizer=tokenizer)
    rm.model.score.weight.data.fill_(weight)
    with pytest.warns(RuntimeWarning, match=f"the rewards of the reference set {why}"):
        rm.finish(tmp_path)
    assert models.reward_scale(rm.model.config) == (0.0, 1.0)


def test_a_run_resumed_after_its_last_line_still_judges_its_preferences(tmp_path):
    trainer(tmp_path, eval_dataset=PAIRS, max_steps=4, save_steps=4).train()
    judged = (tmp_path / "run/preferences.json").read_text()
    (tmp_path / "run/preferences.json").unlink()
    trainer(tmp_path, eval_dataset=PAIRS, max_steps=4, save_steps=4).train(resume=True)
    assert (tmp_path / "run/preferences.json").read_text() == judged


def test_a_held_out_reward_that_is_not_finite_ends_no_run(tmp_path):
    """A token of one held-out response alone embeds to NaN."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    held_out = [*PAIRS[:3], {**PAIRS[3], "chosen": [{"role": "assistant", "content": "~"}]}]
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("~")] = math.nan
    rm = trainer(tmp_path, model=model, tokenizer=tokenizer, eval_dataset=held_out, max_steps=20)
    with pytest.warns(RuntimeWarning, match="rewards of 1 of 4 held-out pairs are not finite"):
        metrics = rm.train().metrics
    assert metrics["eval_accuracy"] == 0.75 and metrics["eval_loss"] is None and metrics["eval_ece"] is not None
    judged = json.loads((tmp_path / "run/preferences.json").read_text(), parse_constant=pytest.fail)
    assert judged["not_finite"] == 1 and sum(judged["margin"]["counts"]) == 3
    assert "The margin of 1 is not finite" in (tmp_path / "run/report.html").read_text()


def test_records_that_answer_one_prompt_are_not_independent(tmp_path):
    """Three records as text, as messages beside the responses and as messages within them; two with another prompt."""

    def record(prompt, i, kind):
        user, answers = [{"role": "user", "content": prompt}], [f"{i} the cat", f"{i} sat"]
        if kind == "text":
            return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        turns = [[{"role": "assistant", "content": a}] for a in answers]
        if kind == "beside":
            return {"prompt": user, "chosen": turns[0], "rejected": turns[1]}
        return {"chosen": user + turns[0], "rejected": user + turns[1]}

    def lonely(i):  # without a prompt
        return {"chosen": f"{i} the cat", "rejected": f"{i} sat"}

    asked = [("say it", "text"), ("say it", "beside"), ("say it", "within"), ("do it", "within"), ("do it", "text")]
    data = [*(record(prompt, i, kind) for i, (prompt, kind) in enumerate(asked)), lonely(5), lonely(6)]
    rm = trainer(tmp_path, data, eval_dataset=data)
    metrics = rm.evaluate()
    assert dict(zip([i.index for i in rm.eval_items], [i.prompt for i in rm.eval_items], strict=True)) == {
        0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 5, 6: 6,
    }  # fmt: skip
    low, high = wilson_interval(metrics["eval_accuracy"], 7**2 / (3**2 + 2**2 + 1 + 1))
    assert (metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]) == (low, high)


def test_the_report_says_how_far_to_trust_it(tmp_path):
    data = [{**x, "source": "even" if i % 2 else "odd"} for i, x in enumerate(PAIRS)]
    trainer(tmp_path, data, eval_dataset=data, max_steps=20).train()
    judged = json.loads((tmp_path / "run/preferences.json").read_text())
    assert judged["pairs"] == 10 and judged["accuracy"] == 1.0
    assert {k: v["pairs"] for k, v in judged["by_source"].items()} == {"even": 5, "odd": 5}
    assert set(judged["floors"]) == {"shorter response wins", "longer response wins", "bag of words"}
    assert judged["floors"]["shorter response wins"] + judged["floors"]["longer response wins"] == 1
    page = (tmp_path / "run/report.html").read_text()
    for words in ("100.0%</b> of 10 held-out pairs", "Reliability", "Agreement by length difference", "bag of words"):
        assert words in page


def test_one_accuracy_in_training_in_evaluation_and_of_the_floors(tmp_path):
    """By the likelier side, weighted, half for a label of 1/2; the loss is that of the pair as it was given."""
    labels = [(0.1, 4.0), (0.5, 2.0), (0.9, 1.0), (0.3, 0.5)]
    data = [pair(i, chosen_prob=p, weight=w, margin=0.2) for i, (p, w) in enumerate(labels)]
    rm = trainer(tmp_path, data, eval_dataset=data)
    with torch.no_grad():
        loss = pairs_by_hand(rm, data)[0]
        gaps = [reward_alone(rm, x["prompt"], x["chosen"]) - reward_alone(rm, x["prompt"], x["rejected"]) for x in data]
    likelier = [0.5 if p == 0.5 else float((gap > 0) == (p > 0.5)) for gap, (p, _) in zip(gaps, labels, strict=True)]
    expected = sum(right * w for right, (_, w) in zip(likelier, labels, strict=True)) / 7.5
    held_out, training = rm.evaluate(), next(iter(rm))
    assert training["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert training["accuracy"].item() == pytest.approx(expected) == held_out["eval_accuracy"]
    rm.finish(tmp_path)
    floors = json.loads((tmp_path / "preferences.json").read_text())["floors"]
    # The longer one is rejected in all pairs but the third, and the likelier one in all but the second.
    assert floors["longer response wins"] == pytest.approx((4 + 2 / 2 + 1 + 0.5) / 7.5)
    assert floors["shorter response wins"] == pytest.approx(2 / 2 / 7.5)


def test_the_floors_are_of_the_records_that_are_used(tmp_path, monkeypatch):
    long = {"prompt": "say " * 60, "chosen": "the cat", "rejected": "sat"}
    records, seen = [{"prompt": f"say {i}: ", "chosen": "sat on", "rejected": "two"} for i in (1, 2)], []
    monkeypatch.setattr("rlhf_fast.trainers.reward.bag_of_words", lambda *given: seen.append(given) or 0.5)
    monkeypatch.setattr("rlhf_fast.trainers.reward.longer_wins", lambda *given: seen.append(given) or 0.5)
    options = {"max_length": 40, "on_overlong": "skip", "max_steps": 1}
    trainer(tmp_path, [long, records[0]], eval_dataset=[long, records[1]], **options).train()
    assert seen == [([records[1]],), ([records[0]], [records[1]])]


def test_the_language_model_it_starts_from_is_left_alone(tmp_path):
    tokenizer = tiny_tokenizer(pad="<eos>")
    policy = tiny_model(tokenizer)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    rm = trainer(tmp_path, tokenizer=tokenizer, model=policy, max_steps=2)
    list(rm)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert tokenizer.pad_token == "<eos>" and rm.tokenizer.pad_token == "<|pad|>"


def test_it_starts_from_a_checkpoint_of_sft_or_of_itself(tmp_path):
    tokenizer = tiny_tokenizer()
    policy = tiny_model(tokenizer)
    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "sft")
    config = RewardConfig(str(tmp_path / "run"), max_steps=1)
    first = RewardTrainer(config, str(tmp_path / "sft"), train_dataset=PAIRS)
    trunk = first.model.base_model.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in policy.base_model.state_dict().items())
    first.train()
    second = RewardTrainer(config, tmp_path / "run", train_dataset=PAIRS)
    assert torch.equal(second.model.score.weight, first.model.score.weight)


RUN = {
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
}


@pytest.mark.parametrize("data", [PAIRS, RANKED])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path, data):
    def make(name):
        return trainer(tmp_path / name, data, eval_dataset=data[:3], **RUN)

    def log_of(name):
        rows = [json.loads(line) for line in (tmp_path / name / "run/train_log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in rows]

    whole, broken = make("whole"), make("broken")
    whole.train()

    def killed(items, step=broken._train_step):
        if broken.step == 3:
            raise MemoryError("killed")
        return step(items)

    broken._train_step = killed
    with pytest.raises(MemoryError):
        broken.train()
    resumed = make("broken")
    resumed.train(resume=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)
    assert log_of("broken") == log_of("whole")


def test_a_checkpoint_of_other_labels_is_refused(tmp_path):
    state = trainer(tmp_path, SOFT).state_dict()
    trainer(tmp_path, SOFT).load_state_dict(state)
    for other in ({**SOFT[0], "weight": 2.0}, {**SOFT[0], "margin": 0.5}, pair(0, chosen_prob=0.9, weight=0.5)):
        with pytest.raises(ConfigError, match=r"trained on other data .in content"):
            trainer(tmp_path, [other, *SOFT[1:]]).load_state_dict(state)
    state = trainer(tmp_path, [ranked(0)]).state_dict()
    with pytest.raises(ConfigError, match=r"trained on other data .in content"):  # the last two are no tie now
        trainer(tmp_path, [ranked(0) | {"ranks": [0, 1, 2, 3]}]).load_state_dict(state)
    one, other = ({"prompt": "say: ", "responses": r} for r in (["a", "b<eos>say: a"], ["a<eos>say: b", "a"]))
    a, b = (trainer(tmp_path, [x]) for x in (one, other))
    assert torch.equal(*(torch.cat([*map(torch.from_numpy, x.items[0].responses)]) for x in (a, b)))
    with pytest.raises(ConfigError, match=r"trained on other data .in content"):  # the same tokens, divided otherwise
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_pairs_than_a_batch(tmp_path, count):
    rm = trainer(tmp_path, PAIRS[:count], per_device_train_batch_size=64, num_train_epochs=2.0)
    assert [metrics["num_pairs"].item() for metrics in rm] == [count, count]


def test_a_step_of_weightless_pairs_changes_nothing(tmp_path):
    rm = trainer(tmp_path, [pair(0, weight=0.0), pair(1)])
    before = rm.model.score.weight.clone()
    metrics = rm._train_step(rm.items[:1])
    assert metrics["loss"].item() == 0 and metrics["grad_norm"].item() == 0
    assert torch.equal(rm.model.score.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "train_dataset is empty"),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "has the columns prompt, completion; it needs"),
        ({"eval_dataset": [{"chosen": "a"}]}, "eval_dataset record 0 has the columns chosen"),
        ({"tokenizer": tiny_tokenizer(chat_template=None)}, "no chat template"),
        ({"max_length": 8}, r"longer than max_length=8.*on_overlong='skip' \(or, to cut them, 'keep_end'\)$"),
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient = -0.1 must be 0 or more"),
        ({"data": RANKED, "center_rewards_coefficient": 0.1}, "center_rewards_coefficient is defined for pairs"),
        ({"data": [*RANKED, pair(0, margin=1.0, chosen_prob=0.9)]}, "margin, chosen_prob is defined for pairs"),
        ({"data": [{**RANKED[0], "weight": 2.0}]}, "weight is defined for pairs"),
        ({"data": [pair(0, weight=0.0)]}, "every record has weight 0"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **change)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        trainer(tmp_path, tokenizer=tokenizer, model=model)


def test_pairs_and_two_ranked_responses_are_the_same_thing(tmp_path):
    as_ranked = [{"prompt": x["prompt"], "responses": [x["chosen"], x["rejected"]]} for x in PAIRS]
    losses = [next(iter(trainer(tmp_path, data)))["loss"] for data in (PAIRS, as_ranked)]
    assert torch.equal(*losses)
    as_ranked = [{**x, **y} for x, y in zip(SOFT, as_ranked, strict=True)]
    as_ranked = [{k: v for k, v in x.items() if k not in ("chosen", "rejected")} for x in as_ranked]
    assert torch.equal(*(next(iter(trainer(tmp_path, data)))["loss"] for data in (SOFT, as_ranked)))
    mixed = trainer(tmp_path, [*PAIRS[:4], *RANKED])  # pairs among longer lists are lists of two
    assert math.isfinite(next(iter(mixed))["loss"])


def test_values_start_from_the_trained_reward(tmp_path):
    rm = trainer(tmp_path, max_steps=2)
    list(rm)
    value = models.ValueModel.from_reward_model(rm.model)
    ids = torch.tensor([encode_to_score(rm.tokenizer, PAIRS[0]["prompt"], PAIRS[0]["chosen"]).tolist()])
    assert value(ids)[0, -1].item() == pytest.approx(
        reward_alone(rm, PAIRS[0]["prompt"], PAIRS[0]["chosen"]).item(), abs=1e-6
    )
