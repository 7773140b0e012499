"""What is learned and what is only read, found by rendering, for templates of every habit."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import CHAT_TEMPLATE, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data import chat
from rlhf_fast.data.chat import (
    ConfigError,
    check_tokenizer,
    decode_responses,
    encode_conversation,
    encode_prompt,
    encode_response,
    encode_to_score,
)  # fmt: skip
from rlhf_fast.data.formats import Prompt
from rlhf_fast.rollout import make_rollout

USER, FOUR = {"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}
AGAIN, STILL = {"role": "user", "content": "again?"}, {"role": "assistant", "content": "still four"}


def learned(tokenizer, encoded):
    """The learned stretches of a sequence, as text."""
    edges = np.flatnonzero(np.diff(np.r_[False, encoded.response_mask, False]))
    return [tokenizer.decode(encoded.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_the_response_and_its_eos_are_learned_and_nothing_else(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    (encoded,) = encode_conversation(tokenizer, [USER, FOUR])
    # The template's newline after eos is dropped, so eos is the last token.
    assert tokenizer.decode(encoded.input_ids) == "<|user|>two plus two?<|assistant|>four<eos>"
    assert learned(tokenizer, encoded) == ["four<eos>"]
    assert encoded.num_labels == len(tokenizer("four")["input_ids"]) + 1


def test_every_assistant_turn_is_learned_and_the_newline_between_is_read():
    tokenizer = tiny_tokenizer()
    (encoded,) = encode_conversation(tokenizer, [USER, FOUR, AGAIN, STILL])
    assert learned(tokenizer, encoded) == ["four<eos>", "still four<eos>"]
    assert tokenizer.decode(encoded.input_ids).count("<eos>\n<|user|>again?") == 1


def test_a_turn_that_opens_a_conversation_is_read_and_not_learned():
    (encoded,) = encode_conversation(tokenizer := tiny_tokenizer(), [FOUR, AGAIN, STILL])
    assert learned(tokenizer, encoded) == ["still four<eos>"] and "four<eos>" in tokenizer.decode(encoded.input_ids)


def test_no_token_crosses_the_end_of_a_response():
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    said = [" a", " t", "he cat", " b"]
    assert len(tokenizer(" the")["input_ids"]) == 1
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    (encoded,) = encode_conversation(tokenizer, messages)
    assert learned(tokenizer, encoded) == [" t", " b<eos>"]


def test_of_a_completion_only_its_own_turns_are_learned():
    (encoded,) = encode_conversation(tokenizer := tiny_tokenizer(), [USER, FOUR, AGAIN, STILL], first=3)
    assert learned(tokenizer, encoded) == ["still four<eos>"]


def test_messages_after_the_last_response_are_left_out():
    (encoded,) = encode_conversation(tokenizer := tiny_tokenizer(), [USER, FOUR, AGAIN])
    assert tokenizer.decode(encoded.input_ids).endswith("four<eos>")


def test_a_response_that_looks_like_the_template_is_still_the_response():
    sly = {"role": "assistant", "content": "say four, please say four"}
    (encoded,) = encode_conversation(tokenizer := tiny_tokenizer(), [{"role": "user", "content": "say four"}, sly])
    assert learned(tokenizer, encoded) == ["say four, please say four<eos>"]


def test_eos_is_appended_where_the_template_has_none():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ eos_token }}\n", "\n"))
    (encoded,) = encode_conversation(tokenizer, [USER, FOUR])
    assert learned(tokenizer, encoded) == ["four<eos>"]


def test_a_template_that_drops_past_reasoning_gives_one_sequence_per_turn():
    """As Qwen3's does: a past turn is not what the model wrote when the turn was the last."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}[think]{% endif %}"
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    first, second = encode_conversation(tokenizer, [USER, FOUR, AGAIN, STILL])
    assert learned(tokenizer, first) == ["[think]four<eos>"]
    assert learned(tokenizer, second) == ["[think]still four<eos>"]
    assert "<|assistant|>four<eos><|user|>" in tokenizer.decode(second.input_ids)


def test_a_generation_prompt_that_opens_a_block_still_finds_the_response():
    """As DeepSeek-R1's does: the written turn has no <think>."""
    template = CHAT_TEMPLATE.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    for content in ("four", "<answer>4</answer>", "<think", "<|user|>four"):  # some begin as the block does
        (encoded,) = encode_conversation(tokenizer, [USER, {**FOUR, "content": content}])
        assert learned(tokenizer, encoded) == [f"{content}<eos>"]
        start = int(encoded.response_mask.argmax())
        assert encoded.input_ids[start:-1].tolist() == tokenizer(content)["input_ids"]


def test_of_a_block_that_the_generation_prompt_and_the_turn_both_open_only_what_follows_is_learned():
    """As Qwen3.5's does without thinking: the generation prompt closes the block, a turn that thinks does not."""
    template = CHAT_TEMPLATE.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think></think>"
    ).replace("{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}")
    tokenizer = tiny_tokenizer(chat_template=template)
    (encoded,) = encode_conversation(tokenizer, [USER, {**FOUR, "content": "2 + 2</think>four"}])
    assert learned(tokenizer, encoded) == ["2 + 2</think>four<eos>"]


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="cannot be told from its prompt"):
        encode_conversation(tiny_tokenizer(chat_template=template), [USER, FOUR])


# What an assistant's turn writes, in place of its content, under templates of three habits.
ANSWER = "m['content'].split('</think>')[-1]"  # as DeepSeek-R1's
STRIPPED = "m['content'] | trim"  # as Llama 3's
CALLS = "m['content'] ~ (m.tool_calls[0].function.name if m.tool_calls else '')"
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.mark.parametrize(
    ("writes", "turn", "unwritten"),
    [
        (ANSWER, {"content": "<think>2 + 2</think>\n\nfour"}, [("content", "<think>2 + 2")]),
        (ANSWER, {"content": "four"}, []),
        (STRIPPED, {"content": "<think>2 + 2</think>\n\nfour\n"}, []),
        (STRIPPED, {"content": "four", "reasoning_content": "2 + 2", "name": "x"}, [("reasoning_content", "2 + 2")]),
        (STRIPPED, {"content": "look", "tool_calls": [CALL]}, [("tool_calls", "clock")]),
        (CALLS, {"content": "look", "tool_calls": [CALL]}, []),
        (CALLS, {"content": "", "tool_calls": [CALL]}, []),
        (CALLS, {"content": "look", "reasoning_content": None, "tool_calls": None}, []),
        (STRIPPED, {"content": "look", "tool_calls": [{"function": "clock"}]}, [("tool_calls", "clock")]),
        (STRIPPED, {"content": "look", "tool_calls": [{"function": None, "name": "look"}]}, []),
        ("m['content'] | replace('4', '5')", {"content": "it is 4"}, [("content", "it is 4")]),
    ],
)
def test_what_the_template_leaves_out_of_a_response_is_told(writes, turn, unwritten):
    template = CHAT_TEMPLATE.replace("m['content']", f"({writes} if m['role'] == 'assistant' else m['content'])")
    turn = {"role": "assistant", **turn}
    (encoded,) = encode_conversation(tiny_tokenizer(chat_template=template), [USER, turn, AGAIN, STILL])
    assert encoded.unwritten == unwritten
    (encoded,) = encode_conversation(tiny_tokenizer(chat_template=template), [USER, turn, AGAIN, STILL], first=3)
    assert encoded.unwritten == []  # a turn that is only read may lose what the template takes from a past one


@pytest.mark.parametrize(
    ("writes", "turn"),
    [
        (STRIPPED, {"content": "", "tool_calls": [CALL]}),
        (ANSWER, {"content": "<think>2 + 2</think>"}),
        ("''", {"content": "four"}),
    ],
)
def test_a_response_of_which_the_template_writes_nothing_is_refused(writes, turn):
    template = CHAT_TEMPLATE.replace("m['content']", f"({writes} if m['role'] == 'assistant' else m['content'])")
    with pytest.raises(ConfigError, match=r"writes nothing of an assistant turn.* set tokenizer\.chat_template"):
        encode_conversation(tiny_tokenizer(chat_template=template), [USER, {"role": "assistant", **turn}])


def test_training_sees_the_prompt_as_generation_does():
    tokenizer = tiny_tokenizer()
    (encoded,) = encode_conversation(tokenizer, [USER, FOUR, AGAIN, STILL], first=3)
    prompt = encode_prompt(tokenizer, [USER, FOUR, AGAIN])
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert not encoded.response_mask[: len(prompt)].any() and encoded.response_mask[len(prompt) :].all()


def test_a_token_across_prompt_and_response_is_broken_there():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("the")["input_ids"]) == 1  # "th" + "e" would be one token
    encoded = encode_response(tokenizer, "th", "e")
    assert encoded.input_ids.tolist() == [*encode_prompt(tokenizer, "th"), *tokenizer("e")["input_ids"], 1]
    assert learned(tokenizer, encoded) == ["e<eos>"]


@pytest.mark.parametrize("response", ["four", "four<eos>", "four<eos>\n"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_eos_ends_a_text_exactly_once(pad, response):
    tokenizer = tiny_tokenizer(pad=pad)
    encoded = encode_response(tokenizer, "two plus two? ", response)
    assert encoded.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert learned(tokenizer, encoded) == ["four<eos>"]


def with_bos(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("prompt", ["two plus two?", "<bos>two plus two?"])
def test_text_gets_the_tokenizers_bos_once_and_no_eos_before_the_response(prompt):
    tokenizer = with_bos(tiny_tokenizer())
    encoded = encode_response(tokenizer, prompt, "four")
    assert tokenizer.decode(encoded.input_ids) == "<bos>two plus two?four<eos>"
    assert encode_prompt(tokenizer, prompt) == encoded.input_ids[: -encoded.num_labels].tolist()
    assert encode_to_score(tokenizer, prompt, "four").tolist() == encoded.input_ids.tolist()


def test_a_bos_that_the_tokenizer_does_not_write_is_not_added():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    assert encode_prompt(tokenizer, "two plus two?") == tokenizer("two plus two?")["input_ids"]


@pytest.mark.parametrize("text", ["two plus two?four", "<bos>two plus two?four"])
def test_text_without_a_prompt_has_one_bos_too_and_it_is_not_learned(text):
    tokenizer = with_bos(tiny_tokenizer())
    encoded = encode_response(tokenizer, "", text)
    assert tokenizer.decode(encoded.input_ids) == "<bos>two plus two?four<eos>"
    assert encoded.num_labels == len(encoded) - 1


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [([USER], [FOUR]), ([USER], "four"), ("two plus two?", [FOUR]), (None, [USER, FOUR])],
)
def test_what_is_scored_ends_in_its_only_eos(pad, prompt, response):
    tokenizer = tiny_tokenizer(pad=pad)
    ids = encode_to_score(tokenizer, prompt, response)
    assert tokenizer.decode(ids) == "<|user|>two plus two?<|assistant|>four<eos>"


def test_what_is_scored_keeps_a_response_that_the_template_does_not_end():
    """The earlier turn has the only eos: cutting there would lose the answer that is to be scored."""
    template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{% if not loop.last %}{{ eos_token }}{% endif %}")
    tokenizer = tiny_tokenizer(chat_template=template)
    ids = encode_to_score(tokenizer, [USER, FOUR, AGAIN], [STILL])
    assert tokenizer.decode(ids).endswith("four<eos><|user|>again?<|assistant|>still four<eos>")


def test_a_tokenizer_that_cannot_do_the_work_is_refused_with_the_way_out():
    tokenizer = tiny_tokenizer(chat_template=None)
    check_tokenizer(tokenizer, conversational=False)
    with pytest.raises(ConfigError, match=r"set tokenizer\.chat_template"):
        check_tokenizer(tokenizer, conversational=True)
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template, .*: set tokenizer\.chat_template$"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"set tokenizer\.pad_token = tokenizer\.eos_token"):
        check_tokenizer(tokenizer, conversational=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"set tokenizer\.eos_token"):
        check_tokenizer(tokenizer, conversational=False)


def sentencepiece_tokenizer(kind):
    """A space is part of the word behind it, and the first word has one too, in the two ways that files say so."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n"], show_progress=False
    )
    tokenizer.train_from_iterator(["two plus two is four . say it"] * 9, trainer)
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["metaspace", "llama"])
def test_a_reward_model_reads_the_tokens_that_the_policy_wrote(kind):
    tokenizer, text = sentencepiece_tokenizer(kind), "two plus  two is fours . say it"
    ids = encode_to_score(tokenizer, None, text).tolist()  # the last is eos
    for cut in range(1, len(ids)):  # behind <s>, within words, between two spaces
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        for tokens, engine in ((ids[:cut], {}), (ids[:1], {"prompt_ids": [ids[:cut]]})):
            rollout = make_rollout(tokenizer, [Prompt(prompt, tokens, {})], [ids[cut:]], **engine)
            assert prompt + rollout.responses[0] == text
        assert encode_to_score(tokenizer, prompt, rollout.responses[0]).tolist() == ids


@pytest.mark.parametrize("kind", ["metaspace", "llama"])
def test_a_response_that_goes_on_within_a_word_or_behind_a_space_gets_no_space_of_its_own(kind):
    tokenizer, text = sentencepiece_tokenizer(kind), "two plus  two is fours . say it"
    for cut in range(len(text)):
        prompt, response = text[:cut], text[cut:]
        encoded = encode_response(tokenizer, prompt, response)
        before, ids = (encoded.input_ids[mask].tolist() for mask in (~encoded.response_mask, encoded.response_mask))
        assert before == encode_prompt(tokenizer, prompt)
        assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
        assert decode_responses(tokenizer, [prompt], [before], [ids]) == [response]


def test_responses_of_byte_level_tokenizers_and_of_conversations_are_decoded_alone():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in (" four", "four", "é☃", " two plus")]
    ids.append(ids[2][1:])  # begins within a character
    alone = tokenizer.batch_decode(ids)
    for prompt in ("say ☃", "the cat ", "", "<|assistant|>"):
        before = encode_prompt(tokenizer, prompt)
        assert decode_responses(tokenizer, [prompt] * 5, [before] * 5, ids) == alone
    half = tokenizer("é")["input_ids"]
    assert decode_responses(tokenizer, ["?"], [half[:1]], [[*half[1:], 70]]) == [tokenizer.decode([*half[1:], 70])]
    llama = sentencepiece_tokenizer("llama")
    before, four = encode_prompt(llama, "is"), encode_response(llama, "is", " four").input_ids[-2:]
    assert decode_responses(llama, [[USER], "is"], [before] * 2, [four] * 2) == ["four", " four"]


def test_a_response_behind_a_character_spelled_in_bytes_keeps_its_own_bytes():
    """Llama 2 and Mistral spell rare characters so, and line breaks too."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({x: i for i, x in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    llama = sentencepiece_tokenizer("llama").backend_tokenizer
    tokenizer.normalizer, tokenizer.decoder = llama.normalizer, llama.decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    for prompt in ("x☃", "☃🙂", "\n", "x"):
        for response in ("\nx", "☃", " x", "x\n"):
            ids = encode_response(tokenizer, prompt, response)
            before, after = ids.input_ids[~ids.response_mask].tolist(), ids.input_ids[ids.response_mask].tolist()
            assert decode_responses(tokenizer, [prompt], [before], [after], [2]) == [response]


@pytest.mark.parametrize(
    ("ends", "stops"),
    [("<eos>\n", ["<eos>"]), ("<|user|>\n", ["<eos>"]), ("<|user|>\n", ["<eos>", "<|user|>"]), ("###\n\n", ["<eos>"])],
    ids=["eos", "a special token and a line break", "a declared end of turn", "text"],
)
@pytest.mark.parametrize("answer", ["four", "four\n", "", " four "])
def test_an_answer_is_what_the_template_was_given_whatever_it_writes_before_eos(ends, stops, answer):
    """So a reward model reads the answer of a policy as it read it in its training."""
    template = f"{{% for m in messages %}}<|{{{{ m['role'] }}}}|>{{{{ m['content'] }}}}{ends}{{% endfor %}}"
    tokenizer = tiny_tokenizer(chat_template=template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    stops = tokenizer.convert_tokens_to_ids(stops)
    (encoded,) = encode_conversation(tokenizer, [USER, {"role": "assistant", "content": answer}])
    ids = encoded.input_ids[encoded.response_mask].tolist()
    ids = ids[: 1 + min(ids.index(stop) for stop in stops if stop in ids)]
    before = encode_prompt(tokenizer, [USER])
    assert decode_responses(tokenizer, [[USER]] * 2, [before] * 2, [ids, ids[:-1]], stops)[0] == answer


def test_an_answer_to_messages_that_the_template_lets_nobody_answer_is_decoded_as_it_is():
    refuses = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}"
    tokenizer = tiny_tokenizer(chat_template=refuses)
    ids = tokenizer("four\n<eos>")["input_ids"]
    assert decode_responses(tokenizer, [[USER]], [[5]], [ids], [tokenizer.eos_token_id]) == ["four\n"]


def conversation(turns):
    """Of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": f"the cat {i}"} for i in range(turns)]


def test_a_conversation_of_many_turns_is_tokenized_once_and_not_once_per_turn(monkeypatch):
    """A hundred turns of 200 words took 6 seconds."""
    tokenizer, read = tiny_tokenizer(), []
    call = type(tokenizer).__call__

    def counted(self, text, **options):
        read.extend([text] if isinstance(text, str) else text)
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    (encoded,) = encode_conversation(tokenizer, conversation(100))
    assert learned(tokenizer, encoded) == [f"the cat {i}<eos>" for i in range(1, 100, 2)]
    assert sum(map(len, read)) < 3 * len(tokenizer.decode(encoded.input_ids))


def test_the_special_tokens_are_looked_up_once_for_all_conversations_and_again_when_one_is_added(monkeypatch):
    tokenizer, looked_up = tiny_tokenizer(), []
    kind, added = type(tokenizer), type(tokenizer).added_tokens_decoder
    monkeypatch.setattr(kind, "added_tokens_decoder", property(lambda x: looked_up.append(1) or added.fget(x)))
    for turns in range(2, 20, 2):
        encode_conversation(tokenizer, conversation(turns))
    assert len(looked_up) == 1
    tokenizer.add_tokens(AddedToken("dog", normalized=False))
    encode_conversation(tokenizer, conversation(4))
    ids, marks = chat._marks(tokenizer, "a dog")
    assert ids[-1] == len(tokenizer) - 1 and marks == [(0, 0, 0), (5, 2, len(ids) - 1)]


def split_plainly(tokenizer, text, cuts):
    """_split, with every beginning tokenized from the first character."""
    whole, *befores = chat._tokenize_all(tokenizer, [text, *(text[:cut] for cut in cuts)])
    if any(before != whole[: len(before)] for before in befores):
        return [befores[0], *(chat._continue(tokenizer, text[a:b]) for a, b in pairwise([*cuts, len(text)]))]
    return [whole[a:b] for a, b in pairwise([0, *map(len, befores), len(whole)])]


def with_added(tokenizer):
    """With tokens that take what is beside them, or overlap, or are found only in what the normalizer has made."""
    plain = {"normalized": False, "special": True}
    tokenizer.add_tokens([
        AddedToken("<l>", lstrip=True, **plain), AddedToken("<r>", rstrip=True, **plain),
        AddedToken("<w>", single_word=True, **plain), AddedToken("<n>", normalized=True),
        AddedToken("<r><", **plain), AddedToken("\n\n", normalized=False), AddedToken("cat", normalized=False),
    ])  # fmt: skip
    return tokenizer


def lowercase_tokenizer():
    """Of words, in lower case: the text <EOS> becomes the special token only once it is normalized."""
    words = ["<unk>", "<eos>", "the", "cat", "e", "th", "x", "<", ">", "|", "user"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


SPLITS = {
    "byte level": tiny_tokenizer, "metaspace": lambda: sentencepiece_tokenizer("metaspace"),
    "llama": lambda: sentencepiece_tokenizer("llama"), "words": lowercase_tokenizer,
}  # fmt: skip
SPLITS = {kind: make() for kind, make in SPLITS.items()} | {
    f"{kind}, more tokens": with_added(make()) for kind, make in SPLITS.items()
}
PIECES = [
    "<|user|>", "<|assistant|>", "<eos>", "<EOS>", "<s>", "</s>", "<unk>", "<l>", "<r>", "<w>", "<n>", "<r><", "<|us",
    " ", "  ", "\n", "\n\n", "the", "th", "e", " cat", "two", "is four .", "é🙂", "▁", "<", ">", "x", "",
]  # fmt: skip


@pytest.mark.parametrize("kind", SPLITS)
@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=12), places=st.lists(st.integers(0, 60), min_size=1, max_size=6)
)
@example(pieces=["the", "<|us", "er|>", "the"], places=[6, 8])  # within a special token
@example(pieces=["<r>", "\n\n", "the"], places=[4, 5, 8])
def test_the_pieces_of_a_text_are_those_that_tokenizing_every_beginning_would_give(kind, pieces, places):
    text = "".join(pieces)
    cuts = sorted(min(place, len(text)) for place in places)
    assert chat._split(SPLITS[kind], text, cuts) == split_plainly(SPLITS[kind], text, cuts)
