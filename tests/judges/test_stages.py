import json
import tracemalloc

import pandas as pd
import pytest

from rlhf_fast.judges.ledger import Ledger
from rlhf_fast.judges.stages import claim, finish_stage, read_items, run_stage, seed_for

ITEMS = [{"id": str(i)} for i in range(10)]


def work(batch):
    return [{"id": item["id"], "status": "ok", "text": "\u3042"} for item in batch]


def run(folder, items=ITEMS, work=work, settings=None, batch_size=3):
    with Ledger(folder) as ledger:
        return run_stage(ledger, "stage", items, work, settings=settings or {"seed": 0}, batch_size=batch_size)


def test_records_are_written_whole_and_in_order(tmp_path, capsys):
    asked = []

    def counting(batch):
        asked.append([item["id"] for item in batch])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return work(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work=counting)
    assert "stopped after 6 of 10 items" in capsys.readouterr().out and not (tmp_path / "stage.jsonl").exists()
    records = run(tmp_path, work=counting)
    assert [json.loads(line) for line in (tmp_path / "stage.jsonl").read_text().splitlines()] == records
    assert asked[3:] == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"], ["9"]]


def test_a_stage_does_not_hold_its_files_as_text(tmp_path):
    """Items and records, as one text each and again as its bytes, took more memory than the records themselves."""
    items = [{"id": str(i), "status": "ok", "prompt": "a long prompt " * 300} for i in range(500)]
    tracemalloc.start()
    records = run(tmp_path, items=items, work=list)
    finish_stage(tmp_path, records, lambda record: [record], name="rows", used=("ok",), refused=())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "stage.jsonl").stat().st_size
    assert size == (tmp_path / "rows.jsonl").stat().st_size > 2_000_000 and most < size / 2


def test_where_no_bar_can_be_drawn_each_tenth_is_a_line(tmp_path, capsys):
    run(tmp_path, items=[{"id": str(i)} for i in range(30)], batch_size=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"stage {n}/30" for n in (4, 6, 10, 12, 16, 18, 22, 24, 28, 30)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"seed": 1}}, "seed: 0 there, 1 now"),
        ({"items": ITEMS[:-1]}, "items: 10 there, 9 now"),
        ({"items": ITEMS[::-1]}, "data_sha256"),
        ({"items": [{**ITEMS[0], "prompt": "another"}, *ITEMS[1:]]}, "data_sha256"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, change, named):
    run(tmp_path)
    before = (tmp_path / "stage.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        run(tmp_path, **change)
    with pytest.raises(ValueError, match="seed: 0 there, None now"):  # a setting that is not there any more
        claim(tmp_path / "run.json", {"stage": "stage", "settings": {}})
    assert (tmp_path / "stage.jsonl").read_bytes() == before
    run(tmp_path, batch_size=4)
    assert (tmp_path / "stage.jsonl").read_bytes() == before


def test_a_batch_has_items(tmp_path):
    with pytest.raises(ValueError, match="batch_size = 0"):
        run(tmp_path, batch_size=0)


def test_a_batch_gives_a_record_for_each_item(tmp_path):
    with pytest.raises(RuntimeError, match="one record for each"):
        run(tmp_path, work=lambda batch: work(batch)[:-1])


def test_counts_add_up_or_the_stage_does_not_end(tmp_path):
    records = run(tmp_path)
    records[0]["status"], records[1]["status"] = "tie", "failed"
    stage = finish_stage(
        tmp_path, records, lambda r: [r, r], used=["ok"], refused=["tie", "failed", "odd"], name="rows"
    )
    assert stage.counts == {"inputs": 10, "ok": 8, "tie": 1, "failed": 1, "odd": 0}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(stage.rows) == 16
    assert [json.loads(line)["id"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()] == ["0", "1"]
    assert json.loads((tmp_path / "run.json").read_text())["counts"] == stage.counts
    with pytest.raises(RuntimeError, match="tie"):
        finish_stage(tmp_path, records, lambda r: [r], used=["ok"], refused=["failed"], name="rows")


def test_items_are_named_by_their_content():
    hello = [{"role": "user", "content": "hello"}]
    one, two, three, given = read_items(["hello", {"prompt": hello, "extra": 1}, "other", {"prompt": "x", "id": 7}])
    assert one["prompt"] == two["prompt"] == hello and two["id"] == one["id"] + "-2" != three["id"]
    assert given["id"] == "7" and read_items(["other"])[0]["id"] == three["id"]
    turned = {"id": 0, "prompt": [{"content": "hello", "role": "user"}]}  # 0 is an id; the order of keys makes none
    assert read_items([turned])[0]["id"] == "0" and read_items([turned | {"id": None}])[0]["id"] == one["id"]
    gaps = [{"prompt": "other", "id": None}, {"prompt": "y", "id": None}, {"prompt": "x", "id": 7}]  # as in a table
    assert [item["id"] for item in read_items(gaps)] == [three["id"], read_items(["y"])[0]["id"], "7"]


def test_rows_of_a_table_are_its_rows_and_not_the_names_of_its_columns():
    rows = [{"prompt": "a", "better": "b"}, {"prompt": "c", "better": "d"}]
    assert read_items(pd.DataFrame(rows), ("better",)) == read_items(rows, ("better",))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no rows"),
        ({"prompt": ["hello"]}, "got dict: give datasets.Dataset.from_dict of columns"),
        ("prompts.jsonl", "got str: rlhf_fast.data.files.read_dataset"),
        ([{"text": "hello"}], "row 0 has no .*prompt"),
        (["fine", {"prompt": [{"role": "assistant", "content": "hi"}]}], "row 1: .*end with a user message"),
        (
            [{"prompt": [{"role": "tool", "content": "7"}, {"role": "user", "content": "hi"}]}],
            "row 0: .*'tool'.*a role",
        ),
        (["fine", {"prompt": [{"content": "hi"}]}], "row 1: .*needs a role"),
        ([{"prompt": [{"role": "user"}]}], "row 0: .*needs .* a content of text"),
        ([{"prompt": 7}], "row 0: a message of the prompt is 7"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "row 1: id '1' occurs twice"),
    ],
)
def test_rows_that_cannot_be_used(rows, named):
    with pytest.raises(ValueError, match=named):
        read_items(rows)


def test_texts_are_text():
    with pytest.raises(ValueError, match=r"row 0: .*must be text.*'list'"):
        read_items([{"prompt": "x", "a": "one", "b": [{"role": "assistant", "content": "two"}]}], ("a", "b"))


def test_seeds_belong_to_the_item():
    seeds = {seed_for(run_seed, item, name) for run_seed in (0, 1) for item in "ab" for name in ("reply", "revision")}
    assert len(seeds) == 8 and all(0 <= s < 2**63 for s in seeds)
    assert seed_for(0, "a", "reply") == seed_for(0, "a", "reply")
