"""From encoded sequences to batches. Everything here pads on the right: under causal attention no token then sees
padding, so the trunk needs no mask, and positions are simply counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .chat import Encoded
from .formats import Comparison


def pad_right(sequences: Sequence[np.ndarray], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """B sequences -> (B, T) int64 tokens, (B, T) bool mask; T is the longest of them."""
    lengths = torch.tensor([len(s) for s in sequences])
    input_ids = torch.full((len(sequences), int(lengths.max())), pad_token_id)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence)
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]


def collate_sft(examples: Sequence[Encoded], pad_token_id: int, device=None) -> dict[str, Tensor]:
    """input_ids, attention_mask (B, T); for the N learned tokens: positions (N,) into the flat (B * T) tokens that
    predict them, and labels (N,). Found here on the CPU, so that training never asks the device how many there are."""
    input_ids, attention_mask = pad_right([e.input_ids for e in examples], pad_token_id)
    response_mask, _ = pad_right([e.response_mask for e in examples], 0)
    positions = response_mask[:, 1:].bool().nonzero()
    flat = positions[:, 0] * input_ids.shape[1] + positions[:, 1]
    labels = input_ids[positions[:, 0], positions[:, 1] + 1]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "positions": flat, "labels": labels}
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def collate_comparisons(items: Sequence[Comparison], pad_token_id: int, width: int, device=None) -> dict[str, Tensor]:
    """input_ids, attention_mask (N, T) of all responses of all B prompts, for one forward pass; slot (B, K): which of
    the N is response k of prompt b; ranks (B, K), -1 where a prompt has fewer; margin, chosen_prob, weight (B,).
    K is width."""
    input_ids, attention_mask = pad_right([r for item in items for r in item.responses], pad_token_id)
    slot, ranks, start = [], [], 0
    for item in items:
        k = len(item.responses)
        slot.append([*range(start, start + k), *[start] * (width - k)])
        ranks.append([*item.ranks, *[-1] * (width - k)])
        start += k
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "slot": torch.tensor(slot),
        "ranks": torch.tensor(ranks),
        **{k: torch.tensor([getattr(item, k) for item in items]) for k in ("margin", "chosen_prob", "weight")},
    }
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}
