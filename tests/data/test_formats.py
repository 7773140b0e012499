"""Records in, encoded examples out; what cannot be used is refused or counted, with its index."""

import gzip
import json
import math
import tracemalloc
import warnings

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import CHAT_TEMPLATE, tiny_tokenizer
from test_chat import with_bos

from rlhf_fast.data.files import as_records, read_dataset
from rlhf_fast.data.formats import as_pairs, comparisons, prompts, responses_to_score, sft_examples
from rlhf_fast.data.sources import rows_for
from rlhf_fast.errors import ConfigError

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PAIR = {"prompt": "say hello: ", "chosen": "hello", "rejected": "0 1 2"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "hi", "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "hello"},
    ],
)
def test_every_conversational_form_of_sft_is_the_same_sequence(record):
    (example,), report = sft_examples([record], TOKENIZER, max_length=64)
    assert TOKENIZER.decode(example.input_ids) == "<|user|>hi<|assistant|>hello<eos>"
    assert TOKENIZER.decode(example.input_ids[example.response_mask]) == "hello<eos>"
    assert (report.records, report.used, report.overlong) == (1, 1, [])


def test_a_datasets_dataset_is_read_like_a_list():
    records = [{"messages": CHAT}, {"messages": CHAT}]
    from_list, _ = sft_examples(records, TOKENIZER, max_length=64)
    from_dataset, _ = sft_examples(Dataset.from_list(records), TOKENIZER, max_length=64)
    assert [e.input_ids.tolist() for e in from_dataset] == [e.input_ids.tolist() for e in from_list]


def test_a_dataset_of_several_formats_has_columns_that_are_none():
    """As datasets.concatenate_datasets makes them."""
    records = [{"messages": CHAT}, {"prompt": "hi ", "completion": "hello"}, {"text": "hello"}]
    joined = concatenate_datasets([Dataset.from_list([record]) for record in records])
    assert set(joined[0]) == {"messages", "prompt", "completion", "text"}
    for read in (sft_examples, responses_to_score):
        from_list, from_dataset = (read(rows, TOKENIZER, max_length=64)[0] for rows in (records, joined))
        assert list(map(str, from_dataset)) == list(map(str, from_list)) and len(from_list) == 3
    ranked = {"prompt": "hi ", "responses": ["a", "b", "c"]}
    demonstrations, preferences = [{"prompt": "hi ", "completion": "hello"}, {"messages": CHAT}], [PAIR, ranked]
    for read, records in ((responses_to_score, [*demonstrations, *preferences]), (comparisons, preferences)):
        joined = concatenate_datasets([Dataset.from_list([record]) for record in records])
        from_list, from_dataset = (read(rows, TOKENIZER, max_length=64)[0] for rows in (records, joined))
        assert list(map(str, from_dataset)) == list(map(str, from_list)) and from_list
    pairs = [(pair["chosen"], pair["rejected"]) for pair in as_pairs(joined)]
    assert pairs == [("hello", "0 1 2"), ("a", "b"), ("a", "c"), ("b", "c")]


def test_tables_and_subsets_of_other_libraries_are_read_like_a_list(tmp_path):
    records = [{"messages": CHAT, "n": i} for i in range(3)]
    pd.DataFrame(records).to_parquet(tmp_path / "chats.parquet")
    table = pd.read_parquet(tmp_path / "chats.parquet")
    assert isinstance(table["messages"][0], np.ndarray)
    arrow = pyarrow.Table.from_pylist(records)
    for same in (table, table.to_dict("records"), arrow, torch.utils.data.Subset(records, range(3)), iter(records)):
        assert as_records(same, "data") == records
    ranked = {"prompt": "hi ", "responses": np.array(["a", "b", "c"]), "ranks": np.array([0, 1, 1])}
    (comparison,), _ = comparisons([ranked], TOKENIZER, max_length=64)
    assert comparison.ranks == [0, 1, 1]
    numbers = {"prompt": "hi ", "vector": np.arange(3)}  # for a reward function, which gets what was given
    assert as_records([numbers], "data")[0]["vector"] is numbers["vector"]


def test_a_data_frame_may_have_gaps_and_two_calls_in_a_turn(tmp_path):
    pairs = pd.DataFrame([{"prompt": "hi ", "chosen": "a", "rejected": "b"}] * 2)
    pairs["margin"], pairs["source"] = [0.5, np.nan], [np.nan, "web"]
    items, _ = comparisons(pairs, TOKENIZER, max_length=64)
    assert [(item.margin, item.source) for item in items] == [(0.5, None), (0.0, "web")]
    calls = [{"name": "clock"}, {"name": "date"}]
    chat = [{"role": "user", "content": "now?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    pd.DataFrame([{"messages": chat}]).to_parquet(tmp_path / "chats.parquet")
    ((_, turn),) = (row["messages"] for row in as_records(pd.read_parquet(tmp_path / "chats.parquet"), "data"))
    assert turn == {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize("kind", ["list", "Dataset", "stream", "table", "DataFrame", "parquet"])
def test_a_template_sees_the_keys_of_a_turn_that_have_a_value(kind, tmp_path):
    """A table has all keys in all rows, and in all calls all arguments. Llama 3's template, for one, asks which turns
    have tool_calls."""
    calls = [[{"function": {"name": "f", "arguments": {name: "now"}}}] for name in ("zone", "year")]
    turns = [{"role": "assistant", "content": "", "tool_calls": call} for call in calls]
    rows = [{"messages": [CHAT[0], turn]} for turn in [*turns, CHAT[1]]]
    writes = "(m.tool_calls[0].function | tojson if 'tool_calls' in m else m.content)"
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("m['content']", writes))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = {
        "list": [{"messages": [turn | {"name": None} for turn in row["messages"]]} for row in rows],
        "Dataset": Dataset.from_list(rows), "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "table": pyarrow.Table.from_pylist(rows), "DataFrame": pd.DataFrame(rows),
        "parquet": pd.read_parquet(tmp_path / "rows.parquet"),
    }[kind]  # fmt: skip
    examples, _ = sft_examples(data, tokenizer, max_length=64)
    learned = [tokenizer.decode(example.input_ids[example.response_mask]) for example in examples]
    arguments = ['{"zone": "now"}', '{"year": "now"}']
    assert learned == [*(f'{{"name": "f", "arguments": {text}}}<eos>' for text in arguments), "hello<eos>"]
    assert as_records(data, "data")[2] == {"messages": CHAT}


def test_an_argument_that_is_null_in_a_list_is_written():
    call = {"function": {"name": "f", "arguments": {"zone": None}}}
    record = {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [call]}]}
    assert as_records([record], "data")[0]["messages"][1]["tool_calls"] == [call]


def test_a_turn_that_only_calls_a_tool_may_have_no_content():
    """As OpenAI's format has it; the template then writes the call."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("m['content']", "m.content ~ m.tool_calls[0].name"))
    empty = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    (wanted,), _ = sft_examples([{"messages": [CHAT[0] | {"tool_calls": [{}]}, empty]}], tokenizer, max_length=64)
    for turn in (empty | {"content": None}, {k: v for k, v in empty.items() if k != "content"}):
        record = {"messages": [CHAT[0] | {"tool_calls": [{}]}, turn]}
        (example,), _ = sft_examples([record], tokenizer, max_length=64)
        assert example.input_ids.tolist() == wanted.input_ids.tolist()
        assert tokenizer.decode(example.input_ids[example.response_mask]) == "clock<eos>"
        assert record["messages"][1] is turn  # what was given is as it was


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "train_dataset is empty"),
        ({"train": Dataset.from_list([{"text": "a"}])}, r"got dict: give one of its datasets \(train\)"),
        ({"a": [{"text": "a"}], "b": [{"text": "b"}]}, r"got dict: give one of its datasets \(a, b\)"),
        ({"text": ["a"]}, "got dict: give datasets.Dataset.from_dict of columns"),
        (None, "must be a list of dicts or a datasets.Dataset, got NoneType"),
        ("data.jsonl", "got str: rlhf_fast.data.files.read_dataset reads files"),
        (["text"], "record 0 must be a dict, got str"),
        ([{"messages": CHAT}, {"body": "hi"}], "record 1 has the columns body; it needs"),
        ([{"prompt": "hi"}], "record 0 has the columns prompt; it needs"),
        ([{"text": b"hi", "messages": None}], r"columns text \(bytes\), messages \(NoneType\); it needs"),
        ([{"messages": "hi there"}, {"messages": 3}], "record 0: 'messages' must be a list"),
        ([{"messages": CHAT}, {"messages": [{"role": "user"}]}], "record 1: 'messages' must be a list"),
        ([{"messages": CHAT[:1]}], "record 0 has no response"),
    ],
)
def test_sft_data_in_the_wrong_form_is_refused_by_its_index(dataset, message):
    with pytest.raises(ConfigError, match=message):
        sft_examples(dataset, TOKENIZER, max_length=64)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a"}, "record 0 has the columns chosen; it needs"),
        ({**PAIR, "rejected": None}, r"'rejected' must be text or a list.* got None"),
        ({**PAIR, "prompt": 3}, "messages, got 3"),
        ({**PAIR, "source": 3}, "'source', by which evaluation is split, must be text, got 3"),
        ({**PAIR, "chosen_prob": 1.5}, r"chosen_prob must be in \[0, 1\]"),
        ({**PAIR, "weight": -1}, "weight 0 or more"),
        ({"prompt": "p", "responses": ["only one"]}, "a list of at least two"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0]}, "not all the same"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "each of the 2 responses a rank"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, -1]}, "0 for the best"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [True, False]}, "must be whole numbers"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": 1}, "must be whole numbers"),
    ],
)
def test_comparisons_in_the_wrong_form_are_refused_by_their_index(record, message):
    with pytest.raises(ConfigError, match=message):
        comparisons([record], TOKENIZER, max_length=64)


def test_too_long_records_are_refused_or_skipped_but_always_named():
    records = [{"prompt": "a", "completion": "b" * n} for n in (3, 90, 4, 80)]
    with pytest.raises(
        ConfigError, match=r"2 longer than max_length=20: record 1 \(\d+ tokens\), 3 .*on_overlong='skip'"
    ):
        sft_examples(records, TOKENIZER, max_length=20)
    examples, report = sft_examples(records, TOKENIZER, max_length=20, on_overlong="skip")
    assert len(examples) == report.used == 2 and report.records == 4
    assert [i for i, _ in report.overlong] == [1, 3]
    assert str(report).startswith("train_dataset: 2 of 4 records used; 2 longer than max_length=20: record 1 (")
    with pytest.raises(ConfigError, match="Raise max_length"):
        sft_examples(records, TOKENIZER, max_length=2, on_overlong="skip")


def test_a_pair_is_as_long_as_its_longer_response():
    pairs = [PAIR, {**PAIR, "rejected": "9 " * 60}, {**PAIR, "chosen": "9 " * 60}]
    items, report = comparisons(pairs, TOKENIZER, max_length=30, on_overlong="skip")
    assert len(items) == 1 and [i for i, _ in report.overlong] == [1, 2]


def test_the_columns_of_a_pair_arrive():
    (item,), _ = comparisons([{**PAIR, "margin": 0.5, "chosen_prob": 0.8, "weight": 2}], TOKENIZER, max_length=30)
    assert [TOKENIZER.decode(r) for r in item.responses] == ["say hello: hello<eos>", "say hello: 0 1 2<eos>"]
    assert (item.ranks, item.margin, item.chosen_prob, item.weight) == ([0, 1], 0.5, 0.8, 2.0)


def test_the_likelier_response_comes_first_and_two_ranked_ones_are_a_pair():
    """p sigma(r_w - r_l - m) and (1 - p) sigma(r_l - r_w + m) is symmetric under w <-> l, p -> 1 - p, m -> -m."""
    extra = {"margin": 0.5, "chosen_prob": 0.25, "weight": 2}
    ranked = {"prompt": PAIR["prompt"], "responses": [PAIR["rejected"], PAIR["chosen"]], "ranks": [1, 0]}
    for record in (PAIR, ranked):
        (item,), _ = comparisons([{**record, **extra}], TOKENIZER, max_length=30)
        assert [TOKENIZER.decode(r) for r in item.responses] == ["say hello: 0 1 2<eos>", "say hello: hello<eos>"]
        assert (item.ranks, item.margin, item.chosen_prob, item.weight) == ([0, 1], -0.5, 0.75, 2.0)
        (row,) = as_pairs([{**record, **extra}])
        assert [row[k] for k in ("chosen", "rejected", "chosen_prob", "weight")] == ["hello", "0 1 2", 0.25, 2]


def test_the_prompt_may_be_inside_chosen_and_rejected():
    chosen, rejected = CHAT, [CHAT[0], {"role": "assistant", "content": "0"}]
    (inside,), _ = comparisons([{"chosen": chosen, "rejected": rejected}], TOKENIZER, max_length=30)
    record = {"prompt": CHAT[:1], "chosen": chosen[1:], "rejected": rejected[1:]}
    (outside,), _ = comparisons([record], TOKENIZER, max_length=30)
    assert [r.tolist() for r in inside.responses] == [r.tolist() for r in outside.responses]


SYSTEM = {"role": "system", "content": "be kind"}
AGAIN, STILL = {"role": "user", "content": "again?"}, {"role": "assistant", "content": "hey"}


@pytest.mark.parametrize(
    ("prompt", "whole", "learned"),
    [
        ("hi", CHAT, ["hello<eos>"]),  # HuggingFaceH4/ultrafeedback_binarized
        (" hi\n", CHAT, ["hello<eos>"]),
        ("hi", [SYSTEM, *CHAT], ["hello<eos>"]),
        ("hi", [*CHAT, AGAIN, STILL], ["hello<eos>", "hey<eos>"]),
        ("again?", [*CHAT, AGAIN, STILL], ["hey<eos>"]),
        (CHAT[:1], CHAT, ["hello<eos>"]),
        (CHAT[:1], [{**turn, "name": None} for turn in CHAT], ["hello<eos>"]),  # as a table has them
        (CHAT[:1], [SYSTEM, *CHAT], ["hello<eos>"]),
        ([*CHAT, AGAIN], [*CHAT, AGAIN, STILL], ["hey<eos>"]),
        ([STILL, AGAIN], [STILL, AGAIN, CHAT[1]], ["hello<eos>"]),  # both begin with the assistant's turn
    ],
)
def test_a_prompt_that_the_responses_repeat_is_read_once(prompt, whole, learned):
    pair, said = {"chosen": whole, "rejected": [*whole[:-1], {**whole[-1], "content": "0"}]}, {"prompt": prompt}
    ranked = {"responses": [pair["chosen"], pair["rejected"]]}
    for form in (pair, ranked):
        ((once,), _), ((both,), _) = (comparisons([x], TOKENIZER, max_length=64) for x in (form, {**form, **said}))
        assert [r.tolist() for r in both.responses] == [r.tolist() for r in once.responses]
        once, both = (responses_to_score([x], TOKENIZER, max_length=64)[0] for x in (form, {**form, **said}))
        assert [r.tolist() for r in both] == [r.tolist() for r in once]
    (example,), _ = sft_examples([{**said, "completion": whole}], TOKENIZER, max_length=64)
    assert TOKENIZER.decode(example.input_ids) == TOKENIZER.decode(once[0])
    edges = np.flatnonzero(np.diff(np.r_[False, example.response_mask, False]))
    spans = zip(edges[::2], edges[1::2], strict=True)
    assert [TOKENIZER.decode(example.input_ids[a:b]) for a, b in spans] == learned


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        (
            "hi",
            [CHAT[1], CHAT[0], STILL],
            "<|user|>hi<|assistant|>hello<eos>\n<|user|>hi<|assistant|>hey<eos>",
        ),
        ([SYSTEM], CHAT, "<|system|>be kind<|user|>hi<|assistant|>hello<eos>"),
        (CHAT, [AGAIN, STILL], "<|user|>hi<|assistant|>hello<eos>\n<|user|>again?<|assistant|>hey<eos>"),
    ],
)
def test_a_response_of_several_turns_may_go_on_from_the_prompt(prompt, response, text):
    (ids,), _ = responses_to_score([{"prompt": prompt, "response": response}], TOKENIZER, max_length=64)
    assert TOKENIZER.decode(ids) == text


def test_records_that_share_no_more_than_a_system_prompt_ask_different_things():
    pair = {"chosen": [SYSTEM, *CHAT], "rejected": [SYSTEM, AGAIN, STILL]}
    items, _ = comparisons([pair, pair], TOKENIZER, max_length=64)
    assert [item.prompt for item in items] == [0, 1]


def test_a_conversation_that_ends_with_the_users_turn_is_no_response():
    for record in ({"messages": [*CHAT, AGAIN]}, {"prompt": "hi", "response": [*CHAT[1:], AGAIN]}):
        with pytest.raises(ConfigError, match=r"record 0: what is to be scored ends with a user turn \('again\?'\)"):
            responses_to_score([record], TOKENIZER, max_length=64)
    pair = {"prompt": "hi", "chosen": CHAT[1:], "rejected": [*CHAT[1:], AGAIN]}
    with pytest.raises(ConfigError, match="record 0: what is to be scored ends with a user turn"):
        comparisons([pair], TOKENIZER, max_length=64)


@pytest.mark.parametrize("prompt", ["hello?", "", [SYSTEM, CHAT[0]], CHAT])
def test_a_whole_conversation_beside_another_prompt_is_refused(prompt):
    record = {"prompt": prompt, "chosen": CHAT, "rejected": CHAT}
    with pytest.raises(ConfigError, match="record 0: the response begins like a whole conversation"):
        comparisons([record], TOKENIZER, max_length=64)
    with pytest.raises(ConfigError, match="record 0: the response begins like a whole conversation"):
        responses_to_score([record], TOKENIZER, max_length=64)
    with pytest.raises(ConfigError, match="record 0: the response begins like a whole conversation"):
        sft_examples([{"prompt": prompt, "completion": CHAT}], TOKENIZER, max_length=64)


def test_a_question_that_no_column_prompt_gives_is_not_left_out():
    for key in ("question", "instruction", "input"):  # Intel/orca_dpo_pairs has the first, beside a system column
        pair = {"chosen": "Four.", "rejected": "Five.", key: "two plus two?"}
        answer = {"response": "Four.", key: "two plus two?"}
        with pytest.raises(ConfigError, match=f"record 0 has no 'prompt', but a column '{key}' .* rename it"):
            comparisons([pair], TOKENIZER, max_length=64)
        for record in (pair, answer):
            with pytest.raises(ConfigError, match=f"record 0 has no 'prompt', but a column '{key}' .* rename it"):
                responses_to_score([record], TOKENIZER, max_length=64)
        whole = {**pair, "chosen": "two plus two? Four.", "rejected": "two plus two? Five."}
        for record in (whole, {**pair, "prompt": "two plus two? "}, {**pair, key: ""}):
            comparisons([record], TOKENIZER, max_length=64)
        responses_to_score([{"text": "Q: 2 + 2? A: 4", key: "2+2?"}], TOKENIZER, max_length=64)


def test_ranked_responses_are_ordered_best_first():
    record = {"prompt": "p ", "responses": ["bad", "good", "fine", "also good"], "ranks": [2, 0, 1, 0]}
    (item,), _ = comparisons([record], TOKENIZER, max_length=30)
    assert [TOKENIZER.decode(r) for r in item.responses] == [
        f"p {x}<eos>" for x in ("good", "also good", "fine", "bad")
    ]
    assert item.ranks == [0, 0, 1, 2]
    rows = as_pairs([{"prompt": "p", "responses": ["c", "a", "b"], "ranks": [1, 0, 0], "id": 7}])
    assert [(row["chosen"], row["rejected"], row["id"]) for row in rows] == [("a", "c", 7), ("b", "c", 7)]  # no ties


def test_files_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([PAIR]))
    assert read_dataset(tmp_path / "a.jsonl") == [PAIR, PAIR]
    assert read_dataset(str(tmp_path / "a.json")) == [PAIR]
    assert read_dataset([PAIR]) == [PAIR]
    with pytest.raises(ConfigError, match="does not exist"):
        read_dataset(tmp_path / "b.jsonl")


def test_a_split_is_what_follows_the_last_colon_of_a_name_and_no_script_is_run(monkeypatch):
    asked = []

    def load_dataset(name, split, trust_remote_code):
        assert trust_remote_code is False  # None: datasets 3 asks on the terminal about a script in a directory
        asked.append((name, split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf://datasets/org/name", "hf://datasets/org/name:test", "org/name:test", "D:\\data\\x"):
        read_dataset(source)
    assert asked == [
        ("hf://datasets/org/name", "train"), ("hf://datasets/org/name", "test"), ("org/name", "test"),
        ("D:\\data\\x", "train"),
    ]  # fmt: skip


def test_tables_and_directories_are_read_through_datasets(tmp_path, monkeypatch):
    rows = Dataset.from_list([PAIR, {**PAIR, "chosen": "yes"}])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_csv(tmp_path / "a.csv")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("a.parquet", "a.csv", "saved", "splits", "a.jsonl.gz"):
        assert list(read_dataset(tmp_path / name)) == list(rows), name
    assert list(read_dataset(f"{tmp_path / 'splits'}:test")) == list(rows)[1:]
    with pytest.raises(ConfigError, match="cannot be loaded: Unknown split"):
        read_dataset(f"{tmp_path / 'splits'}:validation")
    with pytest.raises(ConfigError, match="does not exist"):
        read_dataset(tmp_path / "b.parquet")
    (tmp_path / "hub").mkdir()  # load_dataset takes the name of a dataset, or of such a folder
    for split in ("train", "test"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert list(read_dataset("hub")) == [{"prompt": "train"}]
    assert list(read_dataset("hub:test")) == [{"prompt": "test"}]
    assert list(read_dataset("hub:train[:100%]+test")) == [{"prompt": "train"}, {"prompt": "test"}]
    with pytest.raises(ConfigError, match="hub:validation"):
        read_dataset("hub:validation")
    (tmp_path / "c.parquet").write_text("no table")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        read_dataset(tmp_path / "c.parquet")
    (tmp_path / "c.csv").write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(ConfigError, match=r"c\.csv' cannot be loaded: .*Expected 2 fields in line 3, saw 3$"):
        read_dataset(tmp_path / "c.csv")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("no data")
    for source in ("notes", "notes:test"):
        with pytest.raises(ConfigError, match=rf"'{source}' cannot be loaded: a directory must hold data files, or"):
            read_dataset(source)
    (tmp_path / "script.py").touch()
    for source in ("script.py", "script.py:test"):
        with pytest.raises(ConfigError, match=rf"'{source}' is a script"):
            read_dataset(source)
    (tmp_path / "table.tsv").touch()
    for source in ("table.tsv", "table.tsv:test"):
        with pytest.raises(ConfigError, match=rf"'{source}' has an ending that is not read: give .* \.jsonl\.gz, "):
            read_dataset(source)  # the hub is not asked for it


def test_a_prompt_that_is_answered_already_is_refused():
    """Generation would put a second turn of the assistant behind the first."""
    with pytest.raises(ConfigError, match="train_dataset record 1: its prompt ends with an assistant turn"):
        prompts([{"prompt": CHAT[:1]}, {"prompt": CHAT}], TOKENIZER, max_length=64)


def test_a_cut_pair_still_answers_the_same(tmp_path):
    """Both responses lose the same beginning; where they differ there, the pair is left out."""
    long = {"prompt": "0 1 2 3 4 5 6 7 8 9 ", "chosen": "the cat sat on", "rejected": "no"}
    (whole,), _ = comparisons([long], TOKENIZER, max_length=99)
    limit = len(whole) - 3
    apart = {**long, "rejected": "x" + long["rejected"], "prompt": None, "chosen": long["prompt"] + long["chosen"]}
    (item,), report = comparisons([long, apart], TOKENIZER, max_length=limit, on_overlong="keep_end")
    assert [r.tolist() for r in item.responses] == [r[3:].tolist() for r in whole.responses]
    assert report.truncated == [(0, len(whole))] and report.tokens_cut == 3 and [i for i, _ in report.overlong] == [1]
    assert str(report).startswith(
        f"train_dataset: 1 of 2 records used, 1 of them cut to max_length={limit} (3 tokens);"
    )


def test_what_is_as_long_as_allowed_is_whole_and_a_cut_keeps_the_bos():
    tokenizer, pair = with_bos(tiny_tokenizer()), {"prompt": "0 1 2 3 4 ", "chosen": "the cat", "rejected": "no"}
    record = {"prompt": pair["prompt"], "completion": pair["chosen"]}
    for read, row, ids_of in (
        (sft_examples, record, lambda example: [example.input_ids.tolist()]),
        (responses_to_score, record, lambda response: [response.tolist()]),
        (comparisons, pair, lambda item: [r.tolist() for r in item.responses]),
    ):
        (whole,), report = read([row], tokenizer, max_length=len(read([row], tokenizer, max_length=99)[0][0]))
        assert (report.used, report.truncated) == (1, [])
        (again,), report = read([row], tokenizer, max_length=report.max_length, on_overlong="keep_end")
        assert ids_of(again) == ids_of(whole) and report.truncated == []
        (cut,), report = read([row], tokenizer, max_length=len(whole) - 3, on_overlong="keep_end")
        assert ids_of(cut) == [ids[:1] + ids[4:] for ids in ids_of(whole)]
        assert report.truncated == [(0, len(whole))] and report.tokens_cut == 3


def test_a_record_of_several_sequences_is_as_long_as_the_longest():
    """This template writes a mark into the last turn only, so each turn is learned from a text of its own."""
    mark = "{% if m['role'] == 'assistant' and loop.last %}!{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ m['content'] }}", mark + "{{ m['content'] }}"))
    record = {"messages": CHAT * 2}
    first, second = sft_examples([record], tokenizer, max_length=99)[0]
    assert len(first) < len(second)
    with pytest.raises(ConfigError, match=rf"record 0 \({len(second)} tokens\)"):
        sft_examples([record], tokenizer, max_length=len(first))


def test_a_cut_that_leaves_nothing_to_learn_leaves_the_record_out():
    records = [{"prompt": "0 1 2 3 4 5 6 7 8 9 ", "completion": "the cat"}, {"prompt": "0 ", "completion": "no"}]
    examples, report = sft_examples(records, TOKENIZER, max_length=8, on_overlong="keep_start")
    assert len(examples) == report.used == 1 and [i for i, _ in report.overlong] == [0] and not report.truncated


def test_a_token_takes_four_bytes_in_every_kind_of_example():
    (sft,), _ = sft_examples([{"prompt": "say ", "completion": "hello"}], TOKENIZER, max_length=64)
    (pair,), _ = comparisons([PAIR], TOKENIZER, max_length=64)
    (scored,), _ = responses_to_score([{"text": "hello"}], TOKENIZER, max_length=64)
    (prompt,), _ = prompts([{"prompt": "say hello"}], TOKENIZER, max_length=64)
    arrays = [sft.input_ids, *pair.responses, scored, prompt.tokens]
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_as_records_reads_an_iterator_once():
    assert as_records(iter([PAIR]), "data") == [PAIR]


def test_a_json_row_ends_at_a_newline_only_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\x85",\r"completion": "c"}\n\n'.encode())
    assert read_dataset(path) == [{"prompt": "a\u2028b\x85", "completion": "c"}]
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        read_dataset(path)
    for value in ("9" * 5000, "[" * 100_000 + "]" * 100_000):  # JSON, but more than Python reads
        path.write_text('{"text": "a"}\n' + value, encoding="utf-8")
        with pytest.raises(ConfigError, match="line 2: cannot be read"):
            read_dataset(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_reading_lines_takes_little_more_memory_than_the_records(tmp_path, name):
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.writelines(json.dumps({"text": "a" * 1000}) + "\n" for _ in range(3000))
    tracemalloc.start()
    try:
        records = read_dataset(tmp_path / name)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(records) == 3000 and peak < 1.2 * left


def test_one_list_and_a_record_per_line_are_told_apart(tmp_path):
    """Much data that is called .json has a record per line, and some .jsonl is one list."""
    row = json.dumps({"text": "a"})
    for name, text, advice in (
        ("rows.json", f"{row}\n{row}\n", "with a record per line it is a .jsonl"),
        ("list.jsonl", f"[\n{row}\n]", "each line must be a whole record"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"not JSON .*{advice}"):
            read_dataset(tmp_path / name)


def test_a_directory_may_be_named_as_a_file(tmp_path):
    rows = Dataset.from_list([PAIR])
    for name, save in (("a.parquet", rows.to_parquet), ("a.csv", rows.to_csv), ("a.jsonl", rows.to_json)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / f"part-0.{name[2:]}")
        assert list(read_dataset(tmp_path / name)) == [PAIR], name


def test_a_cache_that_cannot_be_written_is_told_from_the_data(tmp_path, monkeypatch):
    """As in a container whose user has no home."""
    Dataset.from_list([PAIR]).to_csv(tmp_path / "a.csv")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home/datasets")
    (tmp_path / "home").touch()
    with pytest.raises(ConfigError, match=r"a\.csv' cannot be loaded: .*home.*set HF_HOME to a directory"):
        read_dataset(tmp_path / "a.csv")


def test_a_file_may_begin_with_a_byte_order_mark_and_one_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "é"}\n', encoding="utf-8-sig")
    assert read_dataset(path) == [{"text": "é"}]
    for encoding in ("latin-1", "utf-16"):
        path.write_text('{"text": "é"}\n', encoding=encoding)
        with pytest.raises(ConfigError, match="is not UTF-8"):
            read_dataset(path)


def test_a_gzip_that_was_cut_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    for content in (gzip.compress(b'{"text": "a"}\n' * 9)[:20], b'{"text": "a"}\n'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.jsonl\.gz cannot be read"):
            read_dataset(path)


def test_half_a_character_is_refused_by_its_index():
    half = json.loads(r'"well \ud83d"')  # an emoji that was cut
    for record in (
        {"text": half},
        {"prompt": "a", "completion": half},
        {"messages": [*CHAT[:1], {**CHAT[1], "content": half}]},
    ):
        with pytest.raises(ConfigError, match=r"record 0: .* has half a character .* after 'well '"):
            sft_examples([record], TOKENIZER, max_length=64)


def test_what_would_train_on_something_else_is_refused():
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    with pytest.raises(ConfigError, match="record 0: 'messages': the content of a user turn must be text, got None"):
        sft_examples([{"messages": [{**user, "content": None}, assistant]}], TOKENIZER, max_length=50)
    for key, value in (("margin", math.nan), ("margin", "a"), ("weight", math.inf)):
        with pytest.raises(ConfigError, match=f"'{key}' must be a finite number"):
            comparisons([{"prompt": "a", "chosen": "b", "rejected": "c", key: value}], TOKENIZER, max_length=50)


def test_what_only_a_chat_template_could_read_is_refused():
    tools = {"tools": [{"name": "clock"}]}
    with pytest.raises(ConfigError, match="record 0: 'tools' is not passed to the chat template"):
        sft_examples([{"messages": CHAT, **tools}], TOKENIZER, max_length=64)
    with pytest.raises(ConfigError, match="record 0: 'tools' is not passed to the chat template"):
        comparisons([{**PAIR, **tools}], TOKENIZER, max_length=64)
    with pytest.raises(ConfigError, match="record 0: 'tools' is not passed to the chat template"):
        responses_to_score([{"messages": CHAT, **tools}], TOKENIZER, max_length=64)
    sft_examples([{"messages": CHAT, "tools": None}, {"messages": CHAT, "tools": []}], TOKENIZER, max_length=64)


@pytest.mark.parametrize(
    ("writes", "reason"),
    [
        ("m.tool_calls[0].function.name + m.tool_calls[0].function.arguments", 'can only concatenate str .not "dict"'),
        ("raise_exception('no tools here')", "no tools here"),
    ],
)
def test_what_a_chat_template_refuses_is_named_by_its_record_with_the_way_on(writes, reason):
    """DeepSeek-V3's adds the arguments of a call as text."""
    tokenizer = tiny_tokenizer(
        chat_template=CHAT_TEMPLATE.replace("{{ m['content'] }}", f"{{{{ {writes} if m.tool_calls else m.content }}}}")
    )
    call = {**CHAT[1], "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]}
    told = rf"record 1: the chat template refuses .*{reason}.* roles are user, assistant.*'hi'\. Change the messages"
    for encode, good, bad in (
        (sft_examples, {"messages": CHAT}, {"messages": [CHAT[0], call]}),
        (responses_to_score, {"messages": CHAT}, {"messages": [CHAT[0], call]}),
        (comparisons, {"chosen": CHAT, "rejected": CHAT}, {"chosen": CHAT, "rejected": [CHAT[0], call]}),
        (prompts, {"prompt": CHAT[:1]}, {"prompt": [CHAT[0], call, CHAT[0]]}),
    ):
        with pytest.raises(ConfigError, match=told):
            encode([good, bad], tokenizer, max_length=64)


def test_what_a_chat_template_leaves_out_is_warned_of_once_with_a_count():
    said = {"reasoning_content": "a greeting", "tool_calls": [{"function": {"name": "clock"}}]}
    records = [{"messages": [CHAT[0], {**CHAT[1], **{k: said[k] for k in keys}}]} for keys in ([], list(said), said)]
    with pytest.warns(UserWarning) as caught:
        sft_examples(records, TOKENIZER, max_length=64)
    for key, warning in zip(said, caught, strict=True):
        assert f"train_dataset: in 2 of 3 records the chat template leaves out {key!r}" in str(warning.message)
    assert "in record 1 'a greeting'" in str(caught[0].message)
    records[2]["messages"][1]["content"] = ""
    records[2]["messages"][1].pop("reasoning_content")
    with pytest.raises(ConfigError, match="record 2: the chat template writes nothing of an assistant turn"):
        sft_examples(records, tiny_tokenizer(), max_length=64)


def test_what_a_chat_template_leaves_out_of_what_is_scored_is_warned_of_once_with_a_count():
    system = {"role": "system", "content": "call the clock"}
    call = {**CHAT[1], "tool_calls": [{"function": {"name": "clock"}}]}
    past = {**STILL, "reasoning_content": "a word"}  # which templates take from it by design
    records = [
        {"prompt": [*CHAT[:1], past, AGAIN], "chosen": CHAT[1:], "rejected": "no"},
        {"prompt": [system, *CHAT[:1]], "chosen": [call], "rejected": "no"},
        {"chosen": [system, *CHAT], "rejected": [system, CHAT[0], past, AGAIN, call]},
        PAIR,
    ]
    for encode, name in ((comparisons, "train_dataset"), (responses_to_score, "reference_dataset")):
        with pytest.warns(UserWarning) as caught:
            encode(records, TOKENIZER, max_length=64)
        (told,) = (str(warning.message) for warning in caught)
        assert f"{name}: in 2 of 4 records the chat template leaves out 'tool_calls' of an assistant turn" in told
        assert "so it is not scored: in record 1 'clock'" in told


def test_empty_responses_and_pairs_without_a_difference_are_warned_of(recwarn):
    tokenizer = tiny_tokenizer()
    turns = [{"content": " "}, {"content": "hello", "tool_calls": None}, {"content": "", "tool_calls": None}]
    rows = [{"messages": [CHAT[0], {"role": "assistant", **turn}]} for turn in turns]
    sft_examples([*rows, {"prompt": "a", "completion": ""}], tokenizer, max_length=99)
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    comparisons([{**same, "rejected": "c"}, same, {"prompt": "a", "responses": list("ddd")}], tokenizer, max_length=99)
    told = [str(w.message) for w in recwarn if "the first is" in str(w.message)]
    assert told == [
        "train_dataset: the response is empty in 3 of 4 records, the first is 0: from these the model learns to end at "
        "once",
        "train_dataset: all responses are the same in 2 of 3 records, the first is 1: these say nothing of what is "
        "better",
    ]


def test_reward_functions_see_the_same_columns_for_every_prompt():
    rows, _ = prompts([{"prompt": "a"}, {"prompt": "b", "gold": 3}], TOKENIZER, max_length=50)
    assert [p.columns for p in rows] == [{"gold": None}, {"gold": 3}]
    with pytest.raises(ConfigError, match="has the column 'responses'"):
        prompts([{"prompt": "a", "responses": ["b"]}], TOKENIZER, max_length=50)


def test_each_stage_gets_its_form_of_the_rows_of_a_source(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}
    ranked = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    kept = [
        {"prompt": "p", "chosen": "c", "completion": "d"},
        {"prompt": "p", "chosen": "c", "messages": CHAT},
        {"chosen": "text", "rejected": "t"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (pair, ranked, *kept)))
    assert rows_for("reward", str(path))[0] == [pair, ranked, *kept]
    assert rows_for("sft", str(path))[0] == [{"prompt": "p", "completion": "c"}, ranked, *kept]
    prompts = [{"prompt": "p", "source": "s"}, {"prompt": "p"}, {"prompt": "p", "completion": "d"}]
    assert rows_for("ppo", str(path))[0] == [*prompts, {"prompt": "p", "messages": CHAT}, kept[2]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_transcripts_are_found_and_limited_in_every_kind_of_file(tmp_path, name):
    said = "\n\nHuman: a\n\nAssistant: "
    rows = [{"chosen": f"{said}b", "rejected": f"{said}c"}, {"chosen": f"{said}{'b' * 9}", "rejected": f"{said}c"}]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows))
    (row,), (left_out,) = rows_for("reward", str(path), max_length=5)
    assert row["chosen"] == [{"role": "assistant", "content": "b"}] and left_out.kind == "over-long"


def test_a_generation_prompt_that_no_turn_begins_with_is_told():
    """As DeepSeek-R1's: trained without <think>, the model would answer behind one."""
    opens = CHAT_TEMPLATE.replace("prompt %}<|assistant|>", "prompt %}<|assistant|><think>\n")
    records = [{"messages": CHAT}, {"messages": CHAT * 2}, {"prompt": "hi", "completion": "hello"}]
    with pytest.warns(UserWarning) as told:
        sft_examples(records, tiny_tokenizer(chat_template=opens), max_length=64)
    (message,) = (str(warning.message) for warning in told)
    assert "in 2 of 3 records the chat template does not write what its generation prompt ends with" in message
    assert "in record 0 '<think>'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sft_examples(records, TOKENIZER, max_length=64)
