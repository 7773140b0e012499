"""From encoded sequences to batches, in one of two layouts.

packed   all sequences end to end in one row (Packed; packing.py explains how a model reads it)
padded   one row per sequence, padded on the right. Under causal attention no token sees what follows it, so the trunk
         needs neither a mask nor position ids
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from .chat import Encoded
from .formats import PAIR_COLUMNS, Comparison


@dataclass
class Packed:
    """Sequences in one row of N tokens; sequence i has lengths[i] of them. If prefixes[i] = (j, n) with n > 0, sequence
    i begins with the first n tokens of the earlier sequence j, which are not repeated in the row."""

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64
    lengths: list[int]
    prefixes: list[tuple[int, int]]
    made: dict = field(default_factory=dict)  # by packed_attention: all layers share it, and so does the backward

    @classmethod
    def of(cls, sequences: Sequence[Tensor | np.ndarray], prefixes: list[tuple[int, int]] | None = None) -> Packed:
        """From whole sequences; the tokens of their prefixes are left out of the row. prefixes: by default none."""
        prefixes = prefixes or [(0, 0)] * len(sequences)
        own = [torch.as_tensor(s)[n:] for s, (_, n) in zip(sequences, prefixes, strict=True)]
        positions = [torch.arange(n, n + len(x), device=x.device) for x, (_, n) in zip(own, prefixes, strict=True)]
        return cls(torch.cat(own).long()[None], torch.cat(positions)[None], [len(x) for x in own], prefixes)

    def to(self, device) -> Packed:
        ids, positions = (x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids))
        return Packed(ids, positions, self.lengths, self.prefixes)


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """B sequences of tokens -> (B, T) int64 ids and their bool mask. T is the length of the longest, at least 1."""
    width = max([1, *map(len, rows)])
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[i, where] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, where] = True
    return ids, mask


def collate_sft(examples: Sequence[Encoded], pad_token_id: int, device=None) -> dict[str, Tensor]:
    """input_ids (B, T); labels (N,), the tokens to learn; positions (N,), the indices among the B * T tokens that
    predict them. We compute these on the CPU, because on a GPU training would have to synchronise to know how many
    there are."""
    input_ids, _ = pad([e.input_ids for e in examples], pad_token_id)
    response_mask, _ = pad([e.response_mask for e in examples], 0)
    positions = response_mask[:, 1:].bool().nonzero()
    flat = positions[:, 0] * input_ids.shape[1] + positions[:, 1]
    labels = input_ids[positions[:, 0], positions[:, 1] + 1]
    batch = {"input_ids": input_ids, "positions": flat, "labels": labels}
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def pack_sft(examples: Sequence[Encoded], device=None) -> tuple[Packed, dict[str, Tensor]]:
    """The examples in one row, with labels and positions (in this row) as in collate_sft."""
    mask = np.concatenate([np.r_[False, e.response_mask[1:]] for e in examples])  # nothing precedes a first token
    packed = Packed.of([e.input_ids for e in examples])
    (learned,) = torch.from_numpy(mask).nonzero(as_tuple=True)
    batch = {"positions": learned - 1, "labels": packed.input_ids[0, learned]}
    return packed.to(device), {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs indices into rows of at most `capacity` tokens by best fit decreasing: longest first, each into the fullest
    row with room for it (of equally full ones the first). A sequence over the capacity gets a row of its own."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> the rows, as a heap
    room: list[int] = []  # the keys of with_room, sorted. One per row, to insert would move millions of them each time
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, lengths[i])
        if at == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left = room[at]
            row = heappop(with_room[left])
            if not with_room[left]:
                del with_room[room.pop(at)]
        rows[row].append(i)
        left -= lengths[i]
        if left not in with_room:
            insort(room, left)
        heappush(with_room.setdefault(left, []), row)
    return rows


MIN_SHARED = 16  # tokens. In PyTorch's attention sharing needs a mask, which costs more than a shorter prefix saves


def pack_comparisons(
    items: Sequence[Comparison], width: int, device=None, *, share: bool = True
) -> tuple[Packed, dict[str, Tensor]]:
    """All responses to all B prompts in one row. share: the responses to a prompt share their common first tokens.

    The dict has last (M,), the position in the row where each response ends, and slot, ranks, ... as in
    collate_comparisons.
    """
    sequences, prefixes = [], []
    for item in items:
        first = len(sequences)
        common = min(common_prefix(item.responses), min(map(len, item.responses)) - 1) if share else 0
        common = common if common >= MIN_SHARED else 0
        sequences += item.responses
        prefixes += [(first, 0), *[(first, common)] * (len(item.responses) - 1)]
    packed = Packed.of(sequences, prefixes)
    batch = {"last": torch.tensor(packed.lengths).cumsum(0) - 1, **_comparison_columns(items, width)}
    return packed.to(device), {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def pack_sorted(sequences: Sequence[Sequence[int]], device=None) -> tuple[Packed, Tensor]:
    """Sequences in ascending order in one row, where neighbours share their common first tokens -> Packed, and last
    (M,), the position in the row where each sequence ends.

    A sequence shares with one earlier sequence, which itself shares nothing. A sequence shares nothing, so that later
    ones can share with it, if that saves more than it would save itself.
    """
    sequences = [np.asarray(s) for s in sequences]
    # with_next[i]: how many tokens i and i + 1 have in common. i and j have the least of those between them.
    with_next = [common_prefix(pair) for pair in pairwise(sequences)]
    prefixes, first, common = [], 0, 0  # common: of the sequence with `first`
    for i, sequence in enumerate(sequences):
        shared = min(common, len(sequence) - 1)
        saved_by_others = sum(max(0, n - common) for n in accumulate(with_next[i:], min))
        if shared < MIN_SHARED or saved_by_others > shared:
            first, common, shared = i, len(sequence), 0
        prefixes.append((first, shared))
        common = min([common, *with_next[i : i + 1]])
    packed = Packed.of(sequences, prefixes)
    return packed.to(device), (torch.tensor(packed.lengths).cumsum(0) - 1).to(device)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """The number of first tokens that all sequences have in common."""
    shortest = min(map(len, sequences))
    same = np.stack([s[:shortest] for s in sequences])
    differs = (same != same[0]).any(0)
    return int(differs.argmax()) if differs.any() else shortest


def collate_comparisons(items: Sequence[Comparison], pad_token_id: int, width: int, device=None) -> dict[str, Tensor]:
    """input_ids, attention_mask (N, T): all responses to all B prompts, for one forward pass. slot (B, K): which of the
    N rows is response k to prompt b. ranks (B, K): -1 where a prompt has fewer than K responses. margin, chosen_prob,
    weight (B,). K is width."""
    input_ids, attention_mask = pad([r for item in items for r in item.responses], pad_token_id)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, **_comparison_columns(items, width)}
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def _comparison_columns(items: Sequence[Comparison], width: int) -> dict[str, Tensor]:
    slot, ranks, start = [], [], 0
    for item in items:
        k = len(item.responses)
        slot.append([*range(start, start + k), *[start] * (width - k)])
        ranks.append([*item.ranks, *[-1] * (width - k)])
        start += k
    columns = {k: torch.tensor([getattr(item, k) for item in items]) for k in PAIR_COLUMNS}
    return {"slot": torch.tensor(slot), "ranks": torch.tensor(ranks), **columns}
