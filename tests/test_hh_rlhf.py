"""hh-rlhf transcripts: the turns, and that nothing is dropped without a name."""

import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf_fast.data.hh_rlhf import LeftOut, describe, load_pairs, parse_pairs, parse_transcript

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "hh-rlhf"


def line(chosen, rejected):
    return json.dumps({"chosen": chosen, "rejected": rejected})


def test_turns_roles_and_inner_blank_lines():
    text = "\n\nHuman: Two things:\n\none\n\nAssistant: Yes.\n\nHuman:No space\n\nAssistant: Fine "
    assert parse_transcript(text) == [
        {"role": "user", "content": "Two things:\n\none"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "No space"},
        {"role": "assistant", "content": "Fine"},
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not with a Human turn"),
        ("Hi\n\nHuman: a\n\nAssistant: b", "not with a Human turn"),
        ("\n\nAssistant: b", "turn 1 is Assistant's, expected Human's"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "turn 3 is Assistant's, expected Human's"),
        ("\n\nHuman: a\n\nAssistant: ", r"turn 2 \(Assistant\) is empty"),
        ("\n\nHuman: a", "last turn is not the Assistant's"),
    ],
)
def test_text_that_is_no_dialogue_is_refused_with_its_turn(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_transcript(text)


def test_every_line_is_either_a_pair_or_named_with_its_line():
    good = line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b")
    lines = [
        good,
        "",
        "{not json",
        json.dumps({"chosen": "\n\nHuman: q\n\nAssistant: a"}),
        line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: a"),
        line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: Q\n\nAssistant: b"),
        line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant: c"),
        line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: " + "b" * 50),
        "7",
    ]
    pairs, left_out = parse_pairs(lines, max_length=20)
    assert pairs == [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]
    assert [(item.line, item.kind) for item in left_out] == [
        (3, "malformed"),
        (4, "malformed"),
        (5, "identical"),
        (6, "diverging"),
        (7, "diverging"),
        (8, "over-long"),
        (9, "malformed"),
    ]
    assert left_out[3].reason.endswith("turn 1") and left_out[4].reason.endswith("turn 2")
    assert left_out[5] == LeftOut(8, "over-long", "length 51 is over 20")
    text = describe(pairs, left_out)
    assert text.startswith("1 of 8 pairs used") and "3 malformed, on line 3, 4, 9;" in text
    assert "2 diverging, on line 6, 7;" in text and "1 over-long, on line 8;" in text
    many = [LeftOut(number, "over-long", "length 51 is over 20") for number in range(1, 5001)]
    assert "  5000 over-long, on line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4990 more; line 1:" in describe(pairs, many)


def test_a_transcript_that_goes_on_after_the_other_ends_parts_from_it_there():
    short = "\n\nHuman: a\n\nAssistant: b"
    pairs, (left_out,) = parse_pairs([line(f"{short}\n\nHuman: c\n\nAssistant: d", short)])
    assert not pairs and left_out.reason.endswith("turn 3")


def test_the_other_columns_of_a_pair_stay_but_a_prompt_is_that_of_the_transcripts():
    columns = {"source": "harmless", "margin": 1, "chosen_prob": 0.7, "weight": 2, "id": "x"}
    row = json.loads(line("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b"))
    ((pair,), _) = parse_pairs([json.dumps({**row, **columns, "prompt": "\n\nHuman: q\n\nAssistant:"})])
    assert pair == {
        **columns,
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }


def test_length_is_in_the_callers_unit_and_the_limit_itself_fits(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(line("\n\nHuman: q\n\nAssistant: one two", "\n\nHuman: q\n\nAssistant: x") + "\n")
    words = lambda messages: sum(len(m["content"].split()) for m in messages)  # noqa: E731
    assert len(load_pairs(path, max_length=3, length=words)[0]) == 1
    assert len(load_pairs(path, max_length=2, length=words)[0]) == 0


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no hh-rlhf data at {DATA}; set RLHF_FAST_DATA")
@pytest.mark.parametrize(("name", "lines"), [("train", 1850), ("eval", 231)])
def test_the_real_files_add_up(name, lines):
    pairs, left_out = load_pairs(DATA / f"{name}.jsonl.gz")
    assert len(pairs) + len(left_out) == lines
    assert len(left_out) < lines / 100
    for pair in pairs:
        assert pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"]
