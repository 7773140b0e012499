"""Packing: sequences end to end in one row, without padding; attention keeps them apart.

    tokens      a0 a1 a2 a3 | b2 b3 b4 | c0 c1        (1, N)
    positions    0  1  2  3 |  2  3  4 |  0  1
    attention   a causal    | b: a0 a1 and itself | c causal

Everything except attention works token by token, so only attention needs to know where a sequence ends. It runs on one
sequence after another, and there is no N x N mask. A sequence may continue the first tokens of another (b continues
a0 a1), so the responses to one prompt share its computation. This changes no result, because under causal attention a
token does not depend on the tokens after it. For a model with flash attention, that library's own kernel for sequences
of different lengths runs instead; it does not support shared prefixes.

After the last attention no token depends on another. So if only some hidden states are read (for a reward the last
token's, for a loss the response's), the feed-forward part of the last layer runs only for these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor
from transformers import AttentionInterface

from .data.collate import Packed
from .decoder import attends_in_its_own_way, attention
from .errors import ConfigError
from .models import evaluating, loses_softcap, rotary_limit, trunk_layers, unwrapped
from .ops import _layer
from .ops._autograd import plain_in_backward
from .trunk import forward, runs_here

NAME = "rlhf_fast_packed"  # the name of packed_attention in transformers, within packing()
FLASH = ("flash_attention_2", "flash_attention_3")


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packed: Packed, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, read: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:  # fmt: skip
    """(1, H, N, d) queries, (1, G, N, d) keys and values -> (1, N, H, d); transformers defines the signature.

    read: (M,) positions in the row, in ascending order. Then the queries are those of these tokens only, (1, H, M, d),
    and the result is (1, M, H, d).
    """
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"packed attention does not support {name}")
    asked = packed.lengths if read is None else _counts(packed, read)
    places = packed.position_ids[0] if read is None else packed.position_ids[0].index_select(0, read)
    read_id = None if read is None else id(read)  # torch 2.6 does not compile id(None)
    if not dropout and _runs_natively(query, key, value, len(places), packed.position_ids.shape[1]):
        if (made := ("table", read_id)) not in packed.made:  # with `read`, so that no other tensor gets its id
            packed.made[made] = _table(packed, asked), read
        (table, families), _ = packed.made[made]
        heads = (x[0].transpose(0, 1).float() for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window or packed.position_ids.shape[1]
        return _layer.packed_attention(*heads, places, table, families, scale, softcap, window)[None], None
    keys, values = (x.split(packed.lengths, dim=2) for x in (key, value))
    outputs = []
    for i, (q, at) in enumerate(zip(query.split(asked, dim=2), places.split(asked), strict=True)):
        (parent, shared), k, v = packed.prefixes[i], keys[i], values[i]
        if shared:
            k, v = (torch.cat([x[parent][:, :, :shared], own], dim=2) for x, own in ((keys, k), (values, v)))
        mask = None
        if q.shape[2] != k.shape[2] or (sliding_window is not None and k.shape[2] > sliding_window):
            if (made := (i, read_id, sliding_window, q.dtype)) not in packed.made:
                packed.made[made] = _mask(at, k.shape[2], sliding_window, q), read
            mask, _ = packed.made[made]
        outputs.append(attention(q, k, v, mask, scaling, softcap, mask is None, dropout).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _runs_natively(query: Tensor, key: Tensor, value: Tensor, asked: int, tokens: int) -> bool:
    """Native code trusts its shapes; others (deepseek's values are shorter than its keys) are left to PyTorch, which
    computes them or says what is wrong."""
    (batch, heads, queries, dim), key_heads = query.shape, key.shape[1]
    fits = batch == 1 and queries == asked and heads % key_heads == 0
    fits = fits and key.shape == value.shape == (1, key_heads, tokens, dim)
    dtypes = (torch.float32, torch.bfloat16) if _layer.products_in_bf16() else (torch.float32,)
    fits = fits and all(_layer.runs_on(x, dtypes, products=False) and x.stride(-1) == 1 for x in (query, key, value))
    return fits and plain_in_backward(query, key, value)


def _table(packed: Packed, asked: list[int]) -> tuple[Tensor, Tensor]:
    """(S, 6), (F + 1,): the table and the families of _layer.packed_attention. asked: how many queries each sequence
    has."""
    rows, starts = [], [0, *accumulate(packed.lengths)]
    for i, (query, (parent, shared)) in enumerate(zip([0, *accumulate(asked)], packed.prefixes, strict=False)):
        family = parent if shared else i
        rows.append((family, query, asked[i], starts[i], packed.lengths[i], starts[family], shared))
    rows.sort(key=itemgetter(0))
    sizes = [len(list(members)) for _, members in groupby(rows, key=itemgetter(0))]
    return torch.tensor([row[1:] for row in rows]), torch.tensor([0, *accumulate(sizes)])


def _counts(packed: Packed, read: Tensor) -> list[int]:
    """How many of the positions `read` (M,) lie in each sequence."""
    ends = torch.tensor(packed.lengths, device=read.device).cumsum(0)
    before = torch.searchsorted(read, ends)
    return before.diff(prepend=before.new_zeros(1)).tolist()


def _mask(at: Tensor, keys: int, window: int | None, like: Tensor) -> Tensor:
    """(Q, K), added to the scores of queries at these positions: causal, and at most `window` tokens back."""
    distance = at[:, None] - torch.arange(keys, device=at.device)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


@contextmanager
def packing(*models, on: bool = True) -> Iterator[None]:
    """Put both the forward and the backward of packed_hidden_states inside. (The backward too, because activation
    checkpointing runs the layers again there.) on=False: does nothing."""
    configs = [unwrapped(model).config for model in models if on]
    before = [(config, config._attn_implementation) for config in configs]
    AttentionInterface.register(NAME, packed_attention)  # only a model whose config has this name uses it
    try:
        for config, name in before:
            config._attn_implementation = name if name in FLASH else NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def packed_hidden_states(model, packed: Packed, read: Tensor) -> Tensor:
    """(M, D): the trunk's last hidden states at the positions `read` (M,) of the row. Call it within packing(model)."""
    trunk = unwrapped(model).base_model
    if trunk.config._attn_implementation == NAME:
        if runs_here(model):
            options = {"attend": partial(_attend, packed, None), "attend_read": partial(_attend, packed, read)}
            return forward(trunk, packed.input_ids[0], packed.position_ids[0], read, **options)
        where = {"packed": packed}
    else:
        if trunk.config._attn_implementation not in FLASH:
            raise RuntimeError("packed_hidden_states: call it within packing(model), or sequences attend to each other")
        if any(shared for _, shared in packed.prefixes):
            raise NotImplementedError("flash attention runs whole sequences only: pack without shared prefixes")
        ends = torch.tensor([0, *packed.lengths]).cumsum(0).to(packed.input_ids.device, torch.int32)
        longest = max(packed.lengths)
        where = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    with _last_mlp_for(unwrapped(model), read, packed.input_ids.shape[1]):
        row = trunk(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **where)
    return row.last_hidden_state[0].index_select(0, read)


def _attend(
    packed: Packed, read: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """packed_attention for (N, heads, d) tensors, the layout of trunk.forward."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    options = {"packed": packed, "scaling": scale, "softcap": softcap, "sliding_window": window, "read": read}
    return packed_attention(None, q, k, v, None, **options)[0]


@contextmanager
def _last_mlp_for(model, read: Tensor, tokens: int) -> Iterator[None]:
    """Inside, the mlp of the last layer runs only for the tokens at positions `read` (M,); for others it returns 0."""
    layers = trunk_layers(model)
    mlp = getattr(layers[-1], "mlp", None) if len(layers) else None
    # Bloom's mlp takes the residual as a second argument and adds it itself.
    takes_x_only = mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1
    # With activation checkpointing the layer runs again in the backward, when the hooks below have been removed.
    runs_again = any(getattr(m, "gradient_checkpointing", False) for m in (model.base_model, *layers[-1:]))
    if not takes_x_only or runs_again:
        yield
        return

    def only(module, arguments):
        return (arguments[0].index_select(1, read), *arguments[1:])

    def back(module, arguments, output):
        out, *others = output if isinstance(output, tuple) else (output,)  # a mixture of experts adds router logits
        row = out.new_zeros(1, tokens, out.shape[-1]).index_copy(1, read, out)
        return (row, *others) if others else row

    hooks = [mlp.register_forward_pre_hook(only), mlp.register_forward_hook(back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def why_not_packed(model, longest: int, bf16: bool = False) -> str | None:
    """Why sequences of at most `longest` tokens cannot be packed for this model; None if they can.

    Packing must give each sequence the hidden states that it gets alone, which is tested on three short sequences.
    bf16: the model will run under autocast. (Flash attention refuses a float32 model without it.) ConfigError if the
    hidden states are not finite.
    """
    name, limit = type(unwrapped(model)).__name__, rotary_limit(model)
    if limit is not None and longest > limit:
        return (
            f"beyond {limit} tokens {name} scales its rotary positions by the longest sequence in the batch, here "
            f"{longest}; padding does not avoid this, but batch sizes of 1 do"
        )
    config = unwrapped(model).config
    implementation = config._attn_implementation
    if implementation not in FLASH and attends_in_its_own_way(model):
        return f"{name} uses {implementation} as its attention, which packed_attention would replace"
    if loses_softcap(config):
        return f"{name} by sdpa leaves out the softcap of its scores, which packed_attention would apply"
    narrow = implementation in FLASH and bf16
    try:
        together, alone = _packed_and_alone(model, narrow)
    except Exception as error:  # an architecture that was not made for this may raise anything
        return f"{name} does not run on several sequences in one row ({str(error) or repr(error)})"
    if not alone.isfinite().all():
        raise ConfigError(
            f"the outputs of {name} are not finite (NaN or inf): its weights are broken, or too large for their dtype"
        )
    tolerance = 1e-4 if alone.dtype == torch.float32 and not narrow else 5e-2
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        return f"{name} lets one sequence in a row attend to another"
    return None


@torch.no_grad()
def _packed_and_alone(model, bf16: bool) -> tuple[Tensor, Tensor]:
    """(M, D) hidden states of three short sequences, computed in one row and computed one by one. The third sequence
    begins like the second one and, except with flash attention, shares that beginning in the row."""
    trunk = unwrapped(model).base_model
    shared = 0 if trunk.config._attn_implementation in FLASH else 3
    rising = torch.arange(8, device=model.device) % unwrapped(model).get_input_embeddings().weight.shape[0]
    falling = rising.flip(0)
    sequences = [falling[:5], rising, torch.cat([rising[:3], falling[3:]])]
    packed = Packed.of(sequences, [(0, 0), (0, 0), (1, shared)])
    read = torch.arange(1, packed.input_ids.shape[1], 2, device=model.device)
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        with packing(model):
            together = packed_hidden_states(model, packed, read)
        alone = [trunk(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in sequences]
    return together, torch.cat([*alone[:2], alone[2][shared:]])[read]
