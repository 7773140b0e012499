"""bench_trainers.py goes on only from rounds that are of one kind with those to come."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_trainers

SAME = {
    "settings": {"stage": "sft", "learning_rate": 1e-3}, "model_and_data": {"records": 7, "learned_share": 0.1},
    "machine": "a CPU", "packages": {"torch": "2.13.0"}, "commit": "abc",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "goes_on"),
    [
        ({}, True), ({"settings": {}}, False), ({"model_and_data": {"records": 8}}, False), ({"machine": "b"}, False),
        ({"packages": {"torch": "2.12.0"}}, False), ({"commit": "abd"}, False), ({"commit": "abc+"}, False),
    ],
)  # fmt: skip
def test_rounds_of_another_kind_are_measured_again(tmp_path, changed, goes_on):
    path, now, names = tmp_path / "sft.json", SAME | changed, bench_trainers.variants("sft")
    assert bench_trainers.finished(path, now, names) == {who: [] for who in names}
    rounds = {who: [{"cpu_seconds": 1.0}] for who in names}
    then = SAME | {"commit": "abc+"} if now["commit"] == "abc+" else SAME  # a changed tree is not one with itself
    path.write_text(json.dumps(then | {"rows": [{"who": who, "rounds": done} for who, done in rounds.items()]}))
    assert bench_trainers.finished(path, now, names) == (rounds if goes_on else {who: [] for who in rounds})
