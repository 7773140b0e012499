"""How far the preparation of data is, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from tqdm.auto import tqdm

from .. import parallel

EVERY = 10_000  # records, a few seconds of tokenizing


def progress(records: Iterable, what: str) -> Iterator:
    """The records, one after another, behind a progress bar. Where there is no terminal (a batch job), it writes a line
    every 10,000 records instead. Of several processes the first one shows its own."""
    first = parallel.rank() == 0
    bar = tqdm(records, what, leave=False, disable=None if first else True)
    for done, record in enumerate(bar, 1):
        yield record
        if bar.disable and first and done % EVERY == 0:
            print(f"{what} {done}" + (f"/{bar.total}" if bar.total else ""), file=sys.stderr, flush=True)
