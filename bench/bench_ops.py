"""The rows of `rlhf-fast bench` as pytest-benchmark cases, to track our own times from commit to commit.

    pytest bench/bench_ops.py -k gae --benchmark-autosave --benchmark-compare

For comparisons with other implementations use `rlhf-fast bench`, where they take turns.
"""

import pytest
import torch

from rlhf_fast.bench.harness import OURS, synchronize
from rlhf_fast.bench.rows import all_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("row", list(all_rows(DEVICE)), ids=str)
def test_row(benchmark, row):
    ours = row.build()[OURS]

    def run():
        ours()
        synchronize(DEVICE)

    benchmark(run)
