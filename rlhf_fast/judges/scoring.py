"""Log-probabilities of labels. Prefixes that questions have in common are computed once.

A question is given as the tokens of prompt + label, once for each label, because the tokenizer decides where the prompt
ends and the label begins. The prefix is what its sequences share; the rest (tail) of each sequence is its label:

    log p(label) = sum_j log p(tail_j | prefix, tail_<j)

Sequences form a tree. If they share most of their tokens (few-shots before all questions; conversation and replies
before all principles), the shared part goes through the model once and all of them use its keys and values. Models
whose state is more than keys and values process every sequence whole.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..models import lm_head, unwrapped
from ..ops import linear_token_logprobs

Row = tuple[int, ...]


def encode(tokenizer, text: str, special_tokens: bool) -> list[int]:
    """Token ids of a text to be continued: with the special tokens that open a sequence, without one that closes it."""
    ids = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    return ids[:-1] if special_tokens and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


@torch.no_grad()
def label_logprobs(model, questions: Sequence[Sequence[list[int]]], tokens_per_batch: int) -> list[tuple[float, ...]]:
    """For each question the log-probability of each of its labels, in nats.

    tokens_per_batch limits rows times columns of one forward pass, including the shared part; one row always fits.
    """
    reads: dict[Row, dict[tuple[int, int], list]] = {}  # inputs -> {(position, token): [(question, label)]}
    for q, sequences in enumerate(questions):
        prefix = common_prefix(sequences)
        for label, ids in enumerate(sequences):
            if prefix == 0 or prefix == len(ids):
                raise ValueError(
                    f"label_logprobs: question {q}: needs labels that differ after a prefix, got {sequences}"
                )
            row = reads.setdefault(tuple(ids[:-1]), {})  # one-token labels of a question have one row
            for position in range(prefix, len(ids)):
                row.setdefault((position - 1, ids[position]), []).append((q, label))
    # A shared part must end before the first position that is read.
    limits = {row: min(position for position, _ in reads[row]) for row in reads}
    tree = _grow(sorted(reads), limits, 0) if _can_share(model) else _Node(0, (), sorted(reads))
    totals = [[0.0] * len(sequences) for sequences in questions]
    for rows, hidden, start in _walk(model, tree, None, tokens_per_batch):
        which = [(i, *read) for i, row in enumerate(rows) for read in reads[row]]  # (row, position, token)
        at = hidden[[i for i, _, _ in which], [position - start for _, position, _ in which]]  # (N, D)
        tokens = torch.tensor([token for _, _, token in which], device=hidden.device)
        at, weight, bias, softcap = lm_head(model, at)
        values = linear_token_logprobs(at, weight, tokens, bias=bias, softcap=softcap).tolist()
        for (i, position, token), value in zip(which, values, strict=True):
            for q, label in reads[rows[i]][position, token]:
                totals[q][label] += value
    return list(map(tuple, totals))


@dataclass
class _Node:
    """Rows that agree up to `end`. `leaves` share nothing more; `children` are nodes whose rows share more."""

    end: int
    shared: Row
    leaves: list[Row] = field(default_factory=list)
    children: list["_Node"] = field(default_factory=list)


def _grow(rows: Sequence[Row], limits: dict[Row, int], end: int) -> _Node:
    """The tree of sorted rows that agree up to `end`."""
    node, groups = _Node(end, rows[0][:end] if rows else ()), [list(rows)] if rows else []
    while groups:
        group = groups.pop()
        common = min(common_prefix((group[0], group[-1])), *(limits[row] for row in group), len(group[0]))
        saved = (len(group) - 1) * (common - end)
        # Sharing less than half of the tokens costs more calls than it saves.
        if len(group) > 1 and 2 * saved >= sum(len(row) - end for row in group):
            node.children.append(_grow(group, limits, common))
        elif len(group) == 1 or common >= min(limits[row] for row in group):
            node.leaves += group
        else:
            branches: dict[int, list[Row]] = {}
            for row in group:
                branches.setdefault(row[common], []).append(row)
            groups += branches.values()
    return node


def _walk(model, node: _Node, cache: DynamicCache | None, tokens_per_batch: int):
    """Yields (rows, hidden (B, T, D), start): hidden[:, i] belongs to position start + i of the rows."""
    for batch in _batches(node.leaves, tokens_per_batch):
        copies = None if cache is None else _copies(cache, len(batch))
        hidden = _forward(model, [row[node.end :] for row in batch], copies, node.end)
        yield batch, hidden, node.end
    for child in node.children:
        longer = DynamicCache(config=model.config) if cache is None else _copies(cache, 1)
        _forward(model, [child.shared[node.end :]], longer, node.end)
        yield from _walk(model, child, longer, tokens_per_batch)


def _forward(model, rows: Sequence[Row], cache: DynamicCache | None, start: int) -> torch.Tensor:
    """Rows that follow `start` cached tokens -> hidden (B, T, D). The cache, if there is one, grows by them.

    Rows are padded on the right, where a causal model does not see the padding, so no mask is needed.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=model.device)
    positions = torch.arange(start, start + width, device=model.device)[None].expand(len(rows), -1)
    trunk = unwrapped(model).base_model
    # transformers 5.24 renamed this argument. A forward with **kwargs would ignore the other name.
    name = "cache" if "cache" in inspect.signature(trunk.forward).parameters else "past_key_values"
    cached = {} if cache is None else {name: cache}
    return trunk(input_ids=ids, position_ids=positions, use_cache=cache is not None, **cached).last_hidden_state


def _can_share(model) -> bool:
    """Whether the model's cache consists of keys and values only, because a recurrent state (Mamba, LFM2) is
    overwritten. (transformers 4 keeps such a state outside the layers of the cache.)"""
    layers = DynamicCache(config=model.config).layers
    kinds = getattr(model.config, "layer_types", None) or ()
    return (
        {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        and {*kinds} <= {"full_attention", "sliding_attention", "chunked_attention"}
        and not getattr(unwrapped(model), "_is_stateful", False)
    )


def _copies(cache: DynamicCache, rows: int) -> DynamicCache:
    """The cache expanded to `rows` rows. Its tensors are never written to, so all rows can share them."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return copied


def _batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows in batches of similar length, each with at most `budget` cells, or with one row."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of first tokens that all have in common, which is that of the smallest and the largest. Comparing
    slices is fast, because it runs in C."""
    least, greatest = min(sequences), max(sequences)
    low, high = 0, min(len(least), len(greatest))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if least[:middle] == greatest[:middle] else (low, middle - 1)
    return low
