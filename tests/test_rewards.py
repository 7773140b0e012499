import asyncio
import signal
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_fast import rewards
from rlhf_fast.data.collate import pack_sorted
from rlhf_fast.errors import ConfigError
from rlhf_fast.models import add_lora, load_reward_model, set_reward_scale
from rlhf_fast.packing import packed_hidden_states
from rlhf_fast.rewards import RewardModelReward, WeightedReward, compute_scores, make_reward, score_components

CHAT = [{"role": "user", "content": "hello there"}]


def length(prompts, responses, **columns):
    return [len(response) for response in responses]


@pytest.fixture
def reward_model(tokenizer):
    torch.manual_seed(1)
    model = load_reward_model(tiny_model(tokenizer), tokenizer)
    set_reward_scale(model, 0.0, 1.0)  # as RewardTrainer does
    return model


@pytest.fixture
def word_tokenizer():
    """Whole words instead of the byte pairs of the policy's: other ids, lengths, template and eos."""
    vocabulary = {
        word: i for i, word in enumerate(["[end]", "[unk]", "[pad]", "U", "A", "hello", "there", "fine", "no"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]", unk_token="[unk]", pad_token="[pad]")
    fast.chat_template = (
        "{% for m in messages %}{{ 'U' if m['role'] == 'user' else 'A' }} {{ m['content'] }} {% endfor %}"
    )
    return fast


def test_a_reward_model_reads_the_dialogue_in_its_own_template_up_to_one_eos(tokenizer, reward_model):
    reward = RewardModelReward(reward_model, tokenizer)
    text = "<|user|>hello there<|assistant|>hi<eos>"
    assert tokenizer.decode(reward.encode(CHAT, "hi")).startswith(text)
    assert reward.encode(CHAT, "hi")[-1] == tokenizer.eos_token_id
    assert reward.encode("a b", " c").tolist() == [*tokenizer("a b c")["input_ids"], tokenizer.eos_token_id]


def test_scores_are_float32_whatever_the_default_dtype(tokenizer, reward_model):
    reward = WeightedReward([(RewardModelReward(reward_model, tokenizer), 1.0), (length, 0.5)])
    before = compute_scores(reward, ["a ", "b "], ["c", "d e"], {})
    torch.set_default_dtype(torch.float64)
    try:
        after = compute_scores(reward, ["a ", "b "], ["c", "d e"], {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.dtype == torch.float32 and torch.equal(after, before)


def test_a_reward_model_from_elsewhere_reads_what_its_template_writes(word_tokenizer):
    model = load_reward_model(tiny_model(word_tokenizer), word_tokenizer)
    reward = RewardModelReward(model, word_tokenizer)
    messages = [*CHAT, {"role": "assistant", "content": "fine"}]
    ids = word_tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
    assert word_tokenizer.convert_ids_to_tokens(ids[0]) == ["U", "hello", "there", "A", "fine"]
    torch.testing.assert_close(reward([CHAT], ["fine"])[0], model(input_ids=ids).logits[0, 0])
    assert reward.encode("hello ", "fine").tolist() == [5, 7, 0]  # eos alone ends text
    set_reward_scale(model, 0.0, 1.0)
    assert reward.encode(CHAT, "fine").tolist() == [*ids[0].tolist(), 0]
    word_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        reward([CHAT], ["fine"])


def test_what_the_template_leaves_out_of_a_response_is_warned_of_once(tokenizer, reward_model, recwarn):
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    reward = RewardModelReward(reward_model, tokenizer)
    reward([CHAT] * 2, ["hi", ""])
    assert not recwarn
    for more in ([], ["hi"]):  # Python itself shows an equal message only once
        reward([CHAT] * (3 + len(more)), ["hi", "<think>so</think>hi", "<think>a</think>", *more])
    (told,) = (text for w in recwarn if "leaves out" in (text := str(w.message)))
    assert told.startswith("reward_model: in 2 of 3 responses the chat template leaves out 'content'")


def test_scores_are_those_of_transformers_one_row_at_a_time(tokenizer, reward_model):
    reward = RewardModelReward(reward_model, tokenizer, batch_size=2)
    responses = ["hi", "a much longer answer than the others", "", "no", "the cat sat"]
    scores = reward([CHAT] * 5, responses)
    for score, response in zip(scores, responses, strict=True):
        ids = torch.from_numpy(reward.encode(CHAT, response))[None]
        torch.testing.assert_close(score, reward_model(input_ids=ids).logits[0, 0])
    assert len(set(scores.tolist())) == 5 and not scores.requires_grad
    for layer in reward_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    reward_model.train()
    assert torch.equal(reward([CHAT] * 5, responses), scores) and reward_model.training
    with pytest.raises(ConfigError, match=r"has 257 tokens and .* has 256 positions: score shorter responses"):
        reward.score([[5], [5] * 257])


def test_scores_of_many_responses_are_those_of_each_alone_and_a_prompt_is_read_once(
    tokenizer, reward_model, monkeypatch
):
    draw = np.random.default_rng(0)
    prompts = [f"say {'the cat sat on ' * int(draw.integers(0, 9))}{i}: " for i in range(7) for _ in range(5)]
    responses = ["mat " * int(draw.integers(0, 12)) + str(draw.integers(9)) for _ in prompts]
    reward = RewardModelReward(reward_model, tokenizer, batch_size=16)
    alone = torch.cat([reward([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    read = []
    monkeypatch.setattr(rewards, "pack_sorted", lambda *a: read.append(pack_sorted(*a)) or read[-1])
    torch.testing.assert_close(reward(prompts, responses), alone)
    tokens = sum(map(len, map(reward.encode, prompts, responses)))
    assert len(read) == 3 and sum(packed.input_ids.numel() for packed, _ in read) < 0.5 * tokens


def test_sorting_many_responses_takes_about_as_much_memory_as_they_do(tokenizer, reward_model, monkeypatch):
    draw = np.random.default_rng(0)
    # Equal for a while, beginnings of others, and above one and two bytes.
    rows = [np.r_[[7] * 150, draw.integers(254, 258, draw.integers(0, 90))].astype(np.int32) for _ in range(500)]
    given = []
    monkeypatch.setattr(rewards, "batches", lambda order, *_: given.extend(order) or ())
    reward = RewardModelReward(reward_model, tokenizer)
    assert reward._can_pack()
    tracemalloc.start()
    try:
        reward.score(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given == sorted(range(500), key=lambda i: rows[i].tolist())
    assert peak < 1.5 * sum(row.nbytes for row in rows)


@pytest.mark.parametrize("broken", ["hook", "not finite", "empty"])
def test_what_cannot_be_packed_is_padded(tokenizer, reward_model, monkeypatch, broken):
    monkeypatch.setattr(rewards, "pack_sorted", None)
    rows = [[5, 6, 7], [5, 6, 7, 8]]
    if broken == "hook":  # sees rows, and in a packed one the tokens of others
        reward_model.model.layers[0].register_forward_hook(lambda module, x, out: out + x[0].mean(1, keepdim=True))
    elif broken == "not finite":
        torch.nn.init.constant_(reward_model.model.norm.weight, torch.nan)
    else:
        rows.append([])
    scores = RewardModelReward(reward_model, tokenizer).score(rows)
    assert scores.isnan().any() == (broken == "not finite") and len(scores) == len(rows)
    if broken == "empty":
        alone = [reward_model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows[:2]]
        torch.testing.assert_close(scores[:2], torch.stack(alone))


def test_threads_score_one_after_the_other(tokenizer, reward_model, monkeypatch):
    """A model packs in a mode of its own: else threads leave it to each other halfway, and packed for good."""
    rows, inside, most = [[5, 6, 7], [5, 6, 7, 8]], [], []
    reward, attention = RewardModelReward(reward_model, tokenizer), reward_model.config._attn_implementation
    expected = reward.score(rows)

    def slow(*arguments):
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        found = packed_hidden_states(*arguments)
        inside.pop()
        return found

    monkeypatch.setattr(rewards, "packed_hidden_states", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(reward.score, [rows] * 3))
    assert most == [1, 1, 1] and reward_model.config._attn_implementation == attention
    for scores in found:
        assert torch.equal(scores, expected)


def test_a_batch_of_none_is_refused(tokenizer, reward_model):
    with pytest.raises(ConfigError, match="batch_size = -1 must be 1 or more"):
        RewardModelReward(reward_model, tokenizer, batch_size=-1)


def test_a_reward_model_may_have_another_tokenizer(tokenizer, word_tokenizer):
    model = load_reward_model(tiny_model(word_tokenizer), word_tokenizer)
    set_reward_scale(model, 0.0, 1.0)
    reward = RewardModelReward(model, word_tokenizer)
    assert word_tokenizer.convert_ids_to_tokens(reward.encode(CHAT, "fine")) == [
        "U",
        "hello",
        "there",
        "A",
        "fine",
        "[end]",
    ]
    ids = torch.tensor([[3, 5, 6, 4, 7, 0]])
    torch.testing.assert_close(reward([CHAT], ["fine"])[0], model(input_ids=ids).logits[0, 0])
    rewards.check_room(reward, tokenizer, CHAT, 1000)  # of the policy's tokens, which are not these
    # The policy's tokenizer would read past its embedding, which nobody should enlarge for that.
    with pytest.raises(ConfigError, match=r"the model embeds 9, .*, or RewardModelReward\(model, its own tok"):
        make_reward(model, tokenizer)


def test_a_saved_reward_model_brings_its_tokenizer(tmp_path, word_tokenizer):
    model = load_reward_model(tiny_model(word_tokenizer), word_tokenizer)
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    loaded = make_reward(tmp_path, tokenizer=tiny_tokenizer())
    torch.testing.assert_close(loaded([CHAT], ["no"]), RewardModelReward(model, word_tokenizer)([CHAT], ["no"]))


def test_a_weighted_list_is_the_weighted_sum(tokenizer, reward_model):
    reward = make_reward([(reward_model, 2.0), (length, -0.5)], tokenizer)
    responses = ["one", "two words"]
    expected = 2.0 * RewardModelReward(reward_model, tokenizer)([CHAT] * 2, responses) - 0.5 * torch.tensor([3.0, 9.0])
    torch.testing.assert_close(reward([CHAT] * 2, responses), expected)


def test_no_part_of_a_list_takes_the_name_of_another():
    parts = [lambda p, r, i=i, **columns: [10.0**i] * len(r) for i in range(4)]
    for part, name in zip(parts, ("r", "r_3", "r", "r"), strict=True):
        part.__name__ = name
    total, scores = score_components(make_reward([(part, 1.0) for part in parts], None), ["p"], ["a"], {})
    assert total.tolist() == [1111.0] and list(scores) == ["r", "r_3", "r_4", "r_5"]


def test_a_part_of_weight_0_is_looked_at_and_not_added():
    unsure = lambda prompts, responses, **columns: [float("nan")] * len(responses)  # noqa: E731
    total, parts = score_components(make_reward([(length, 2.0), (unsure, 0.0)], None), ["p", "q"], ["a", "bc"], {})
    assert total.tolist() == [2.0, 4.0] and parts["<lambda>"].isnan().all()
    assert compute_scores(make_reward([(unsure, 0)], None), ["p"], ["a"], {}).tolist() == [0.0]


async def _slow_length(prompts, responses, **columns):
    await asyncio.sleep(0.2)
    return [len(response) for response in responses]


def test_async_rewards_run_beside_each_other_and_every_part_is_told_apart():
    begun = []

    async def beside_another():
        begun.append(1)
        while len(begun) < 2:  # if they ran in turn, the first would wait for ever
            await asyncio.sleep(0.001)

    async def async_length(prompts, responses, **columns):
        await asyncio.wait_for(beside_another(), timeout=60)
        return [len(response) for response in responses]

    async def constant(prompts, responses, **columns):
        await asyncio.wait_for(beside_another(), timeout=60)
        return [1.0] * len(responses)

    reward = make_reward([(async_length, 2.0), (constant, -1.0), (length, 1.0), (length, 0.5)], None)
    total, parts = score_components(reward, ["p", "q"], ["a", "bcd"], {})
    assert total.tolist() == [2.0 - 1.0 + 1.5, 6.0 - 1.0 + 4.5]
    assert {name: scores.tolist() for name, scores in parts.items()} == {
        "async_length": [1.0, 3.0], "constant": [1.0, 1.0], "length": [1.0, 3.0], "length_4": [1.0, 3.0],
    }  # fmt: skip

    async def notebook():  # an event loop is running already
        return compute_scores(constant, ["p"], ["a"], {})

    assert asyncio.run(notebook()).tolist() == [1.0]


def test_what_belongs_to_an_event_loop_lives_from_one_call_to_the_next():
    gate = asyncio.Semaphore(1)  # like a limit on requests, or an HTTP client

    async def limited(prompts, responses, **columns):
        async with gate:
            await asyncio.sleep(0.01)
        return [1.0] * len(responses)

    both = make_reward([(limited, 1.0), (limited, 1.0)], None)  # one has to wait, which binds the semaphore to the loop

    async def outer(prompts, responses, **columns):
        return compute_scores(_slow_length, prompts, responses, {})  # would wait for the loop that it blocks

    async def notebook():
        return compute_scores(both, ["p"], ["a"], {}).tolist()

    for _ in range(2):
        assert compute_scores(both, ["p"], ["a"], {}).tolist() == [2.0] == asyncio.run(notebook())
        assert compute_scores(outer, ["p"], ["a"], {}).tolist() == [1.0]


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
def test_an_async_reward_that_fails_ends_the_others(error):
    ended = threading.Event()

    async def fails(prompts, responses, **columns):
        await asyncio.sleep(0.01)
        raise error("away")

    async def never(prompts, responses, **columns):
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    with pytest.raises(error, match="away"):
        compute_scores(make_reward([(fails, 1.0), (never, 1.0)], None), ["p"], ["a"], {})
    assert ended.wait(60) and compute_scores(_slow_length, ["p"], ["a"], {}).tolist() == [1.0]


def test_ctrl_c_ends_the_wait_for_an_async_reward():
    ended = threading.Event()

    async def never(prompts, responses, **columns):
        threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        compute_scores(never, ["p"], ["a"], {})
    assert ended.wait(5)


def test_columns_reach_the_function():
    def matches(prompts, responses, answer, **columns):
        return [float(r == a) for r, a in zip(responses, answer, strict=True)]

    columns = {"answer": ["4", "5"], "source": ["x", "y"]}
    assert compute_scores(WeightedReward([(matches, 1.0)]), ["2+2", "2+3"], ["4", "4"], columns).tolist() == [1.0, 0.0]


def test_what_a_reward_does_to_its_arguments_reaches_no_other():
    """An answer is often appended to its prompt, to put the whole dialogue to a judge."""
    seen = []

    def judge(prompts, responses, tag, **columns):
        for prompt, response in zip(prompts, responses, strict=True):
            prompt.append({"role": "assistant", "content": response})
            prompt[0]["content"] += "!"
        seen.append((prompts, [*responses], [*tag]))
        responses.clear()
        tag.clear()
        return [1.0, 2.0]

    chat = [dict(CHAT[0])]
    prompts, responses, columns = [chat, chat], ["fine", "no"], {"tag": ["x", "y"]}  # two answers to one prompt
    assert compute_scores(WeightedReward([(judge, 1.0), (judge, 1.0)]), prompts, responses, columns).tolist() == [2, 4]
    asked = {"role": "user", "content": CHAT[0]["content"] + "!"}
    whole = [[asked, {"role": "assistant", "content": text}] for text in ("fine", "no")]
    assert seen == [(whole, ["fine", "no"], ["x", "y"])] * 2
    assert (prompts, responses, columns) == ([CHAT, CHAT], ["fine", "no"], {"tag": ["x", "y"]})


@pytest.mark.parametrize(("values", "message"), [([1.0], r"shape \(1,\) for 2"), ([[1.0, 2.0]], "shape")])
def test_a_wrong_answer_of_a_reward_is_refused_by_name(values, message):
    def broken(prompts, responses, **columns):
        return values

    with pytest.raises(ValueError, match=f"'broken'.*{message}"):
        compute_scores(broken, ["x", "y"], ["a", "b"], {})


def test_what_is_no_reward_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="got int"):
        make_reward(3, tokenizer)


def test_a_language_model_is_no_reward_and_never_gets_a_random_head(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for spec in (model, tmp_path):
        with pytest.raises(ConfigError, match=r"has no scalar head.*train it first, or give a function"):
            make_reward(spec, tokenizer)
    with pytest.raises(ConfigError, match="Linear has no scalar head"):
        make_reward(torch.nn.Linear(2, 2), tokenizer)


def test_a_reward_model_under_adapters_is_no_function(tokenizer, reward_model):
    pytest.importorskip("peft")
    whole = make_reward(reward_model, tokenizer)(["a "], ["b"])
    reward = make_reward(add_lora(reward_model, r=2, alpha=4.0), tokenizer)
    assert isinstance(reward, RewardModelReward) and torch.equal(reward(["a "], ["b"]), whole)


@pytest.mark.parametrize("returned", [None, [None, None], ["a", "b"]])
def test_a_reward_that_returns_no_numbers_is_named(returned):
    def odd(prompts, responses, **columns):
        return returned

    with pytest.raises(ConfigError, match="'odd' must return one number for each response"):
        compute_scores(odd, ["p", "q"], ["a", "b"], {})


def test_the_one_response_without_a_number_is_named():
    """TRL allows None for a response. The message listed all 512 entries, and not which one was wrong."""

    def some(prompts, responses, **columns):
        return [0.5] * 300 + [None] + [0.5] * 211

    with pytest.raises(ConfigError, match=r"got None for response 300$"):
        compute_scores(some, ["p"] * 512, ["a"] * 512, {})


def test_a_reward_beyond_every_float_is_named():
    with pytest.raises(ConfigError, match="reward 'huge' returned a number too large for a float"):
        compute_scores(make_huge(10**5000), ["p"], ["a"], {})
    assert compute_scores(make_huge(10**300), ["p"], ["a"], {}).isinf().all()  # the run skips it


def make_huge(number):
    def huge(prompts, responses, **columns):
        return [number] * len(responses)

    return huge


def test_a_reward_may_be_an_array_that_was_turned_around():
    turned = lambda prompts, responses, **columns: np.arange(len(responses))[::-1]  # noqa: E731
    assert compute_scores(turned, ["p"] * 3, ["a"] * 3, {}).tolist() == [2.0, 1.0, 0.0]


def test_a_reward_brings_no_graph():
    assert not compute_scores(lambda p, r: torch.ones(1, requires_grad=True), ["p"], ["a"], {}).requires_grad


def test_a_list_of_rewards_that_is_no_list_of_pairs_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"a list of rewards must be \[\(reward, weight\), ...\]"):
        make_reward([(length, "heavy")], tokenizer)
    for spec in ([], [length, length]):
        with pytest.raises(ConfigError, match="a list of rewards"):
            make_reward(spec, tokenizer)
    with pytest.raises(ConfigError, match=r"got a list of Linear, float$"):  # a model's class, not its repr
        make_reward([torch.nn.Linear(2, 2), 0.5], tokenizer)


def test_a_model_whose_outputs_are_not_finite_is_asked_once_if_it_can_be_packed(tokenizer, reward_model, monkeypatch):
    asked = []

    def broken(*_):
        asked.append(1)
        raise ConfigError("the outputs are not finite")

    monkeypatch.setattr(rewards, "why_not_packed", broken)
    reward = RewardModelReward(reward_model, tokenizer)
    for _ in range(2):
        assert reward(["a"], ["b"]).isfinite().all()
    assert len(asked) == 1
