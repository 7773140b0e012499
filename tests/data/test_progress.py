"""Data that takes long to prepare says how far it is, also where no bar can be drawn."""

import json

import pytest
from helpers import tiny_tokenizer

from rlhf_fast import parallel
from rlhf_fast.data import progress
from rlhf_fast.data.formats import comparisons, prompts, responses_to_score, sft_examples
from rlhf_fast.data.hh_rlhf import load_pairs

TOKENIZER = tiny_tokenizer()
PAIR = {"prompt": "hi ", "chosen": "hello", "rejected": "0"}


@pytest.mark.parametrize(
    ("read", "record"),
    [
        (sft_examples, {"text": "hello"}), (comparisons, PAIR), (responses_to_score, PAIR), (prompts, {"prompt": "hi"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_where_no_bar_can_be_drawn_every_so_many_records_are_a_line(read, record, rank, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 3)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    read([record] * 7, TOKENIZER, max_length=64, name="data")
    lines = ["encoding data 3/7", "encoding data 6/7"]
    assert capsys.readouterr().err.splitlines() == (lines if rank == 0 else [])


def test_lines_of_a_file_are_counted_without_their_total(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 3)
    row = {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 7)
    assert len(load_pairs(tmp_path / "pairs.jsonl")[0]) == 7
    assert capsys.readouterr().err.splitlines() == ["reading pairs 3", "reading pairs 6"]
