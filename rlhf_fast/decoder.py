"""The forward pass of generation for decoder-only models: one new token per row, with keys and values in one buffer.

    x = embed(token)                                                    (B, T, D), T = 1 after the prompt
    for every layer:   q, k, v = project(norm(x))                       k, v are written to the buffers
                       x += output(softmax(q k^T / sqrt(d)) v)
                       x += mlp(norm(x))
    logits = lm_head(norm(x))                                           of the last token only

project, output and mlp are those of the model's own modules (decoder_layers.py). The time saved is what transformers
spends again for every token in every layer: masks, cache objects, rotary tables, output objects. On the CPU, if there
are few rows, a whole layer of plain modules is one native call (csrc/cpu/decode.cpp).
Specification: the model's own forward, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .decoder_layers import FEW, GPT2, NeoX, Rotary, few_rows, is_altered, product_of
from .models import learns_a_prompt, logit_factor, logit_softcap, loses_softcap, rotary_limit, unwrapped
from .ops import _layer

SUPPORTED = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "gemma", "gemma2", "gemma3_text",
    "olmo2", "olmo3", "gpt2", "gpt_neox",
)  # fmt: skip
ATTENTION = (  # modules whose attention functions compute the architecture's own causal softmax(q k^T) v
    *(f"transformers.integrations.{kind}_attention" for kind in ("sdpa", "flash", "flex")), "rlhf_fast.packing",
)  # fmt: skip


def why_no_decoder(model, length: float = math.inf) -> str | None:
    """The reason why Decoder cannot run this model; None if it can.

    length: the most tokens that a prompt has together with its answer.
    """
    if learns_a_prompt(model):
        return "its adapter adds virtual tokens to the prompt"
    model = unwrapped(model)
    config = model.config
    layers = getattr(model.base_model, "layers", getattr(model.base_model, "h", None))
    if config.model_type not in SUPPORTED or layers is None:
        return f"its architecture is {config.model_type}, not one of {', '.join(SUPPORTED)}"
    if len(layers) > config.num_hidden_layers:
        return f"its config runs only {config.num_hidden_layers} of its {len(layers)} layers"
    if attends_in_its_own_way(model):
        return f"its attention is {config._attn_implementation}, which may be any function"
    if (limit := rotary_limit(model)) is not None and length > limit:
        return f"it rescales its rotary positions beyond {limit} tokens"
    if loses_softcap(config) or (getattr(config, "attn_logit_softcapping", None) and config.model_type != "gemma2"):
        return f"{config._attn_implementation} attention does not apply the attn_logit_softcapping of its config"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    rotary = getattr(model.base_model, "rotary_emb", None)
    if config.model_type in ("gemma3_text", "olmo3") and not hasattr(rotary, "layer_types"):
        return f"{config.model_type} needs transformers 5 here"
    if any(isinstance(p, DTensor) for p in layers.parameters()):
        return "its layers are sharded (sharding.gathered makes them whole)"
    for part in _computed(model.base_model, layers):
        kind = type(part).__bases__[1] if isinstance(part, FSDPModule) else type(part)
        if kind is not nn.Dropout and not kind.__module__.startswith("transformers.models."):
            return f"its layers contain a {kind.__name__}, which is not a class of transformers"
        if is_altered(part):
            return f"one {type(part).__name__} has a hook or a replaced forward, which may change what it computes"
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "add_cross_attention", False):
        return "it sets reorder_and_upcast_attn or add_cross_attention, which changes its attention"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights lie on several devices"
    return None


def _computed(trunk: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules whose forward is not called, because this file computes the same; each before its children."""
    yield trunk
    for layer in layers:
        yield layer
        if not hasattr(layer, "self_attn"):  # gpt2, gpt_neox
            yield from (layer.attn if hasattr(layer, "attn") else layer.attention, layer.mlp)
        else:
            yield from layer.children()
            yield from (norm for name, norm in layer.self_attn.named_children() if name.endswith("_norm"))
    if hasattr(trunk, "norm"):
        yield trunk.norm


def attends_in_its_own_way(model: nn.Module) -> bool:
    """Whether its attention may be something else than causal softmax(q k^T) v, for example a function registered with
    AttentionInterface or a sparse kernel from the hub. (Flash attention from the hub goes through transformers' own
    function, and is allowed.)"""
    attend = ALL_ATTENTION_FUNCTIONS.get(unwrapped(model).config._attn_implementation)  # None: the model's eager one
    return attend is not None and attend.__module__ not in ATTENTION


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None,
    causal: bool = False, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(cap(scale q k^T) + mask) v, where cap(x) = softcap tanh(x / softcap). A bool mask is True where it
    attends. There may be several heads of queries to one of keys."""
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        options = {"dropout_p": dropout, "is_causal": causal, "scale": scale, "enable_gqa": gqa}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)
    if gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh(q @ k.mT * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    return nn.functional.dropout(weights, dropout) @ v


class Decoder:
    """Answers B prompts of up to P tokens, padded on the left: start(), then up to `room` calls of step().

    It checks nothing: call why_no_decoder(model) first, and put the model in eval mode.
    bf16: compute the products of a float32 model in bfloat16.
    On the CPU attention reads only the filled columns of the buffers, and in a layer with a sliding window only the
    last of these. The columns of a prompt are stored once for all copies of its row (repeat). On CUDA attention reads
    whole buffers, with a mask: shapes and addresses are then the same at every step, so generation.py can replay step()
    as a CUDA graph.
    """

    def __init__(self, model, ids: Tensor, mask: Tensor, room: int, bf16: bool = False):
        model = unwrapped(model)
        family = {"gpt2": GPT2, "gpt_neox": NeoX}.get(model.config.model_type, Rotary)
        self.fixed = ids.is_cuda
        self.ids, self.prompt_mask, self.filled = ids, mask, 0
        self.capacity = ids.shape[1] + room
        weight = model.get_input_embeddings().weight
        self.native = not self.fixed and all(map(_layer.runs_on, model.parameters()))  # so are queries and keys
        self.bf16 = bf16 and weight.dtype == torch.float32  # else it is in half precision
        self.network = family(model.base_model, self.capacity, self.bf16)
        self.lm_head = few_rows(product_of(model.get_output_embeddings(), self.bf16))
        self.factor, self.softcap = logit_factor(model.config), logit_softcap(model.config)
        self.keys: list[Tensor] = []  # per layer, (B, heads, capacity, d)
        self.values: list[Tensor] = []
        self.positions = mask.sum(1)  # (B,): position of the next token
        self.last = self.positions.cumsum(0) - 1  # (B,): each prompt's last token, among those of all prompts
        self.slot = torch.full((1,), ids.shape[1], device=ids.device)  # `filled` as a tensor, for a CUDA graph
        self.bias: Tensor | None = None  # (B, 1, 1, capacity), added to q k^T: -inf hides a column
        windows = (layer.get("window") for layer in self.network.layers)
        self.window = next((window for window in windows if window is not None), None)  # a config has only one
        self.columns = torch.arange(self.capacity, device=ids.device)
        self.windowed: Tensor | None = None  # bias where a layer has the window; only if whole buffers are read
        self.back: Tensor | None = None  # (B,): how many rows before this one the row with its prompt's columns is
        self.shared = 0  # how many columns those are

    def start(self) -> Tensor:
        """Reads the prompts -> (B, V) logits of the first answer token. Padding is computed in attention, if at all. In
        the last layer, from attention on, only the last token of each prompt is computed."""
        ids, mask = self.ids, self.prompt_mask
        width = ids.shape[1]
        padded = not bool(mask.all())
        self.filled = width
        positions = (mask.cumsum(1) - 1)[mask]
        present = mask.flatten().nonzero().squeeze(1) if padded else None
        if self.native:
            read = partial(self._read_packed, places=positions, present=present)
        else:
            attend, windowed = self._prompt_masks(padded)
            read = partial(self._read_padded, attend=attend, windowed=windowed, present=present)
        logits = self._forward(ids[mask], positions, read)
        if padded or self.fixed:
            hidden = mask.new_ones(len(ids), self.capacity)
            hidden[:, :width] = mask
            if self.fixed:
                hidden[:, width:] = False  # step() opens one column at a time
            self.bias = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=ids.device)
            self.bias = self.bias.masked_fill_(~hidden, -torch.inf)[:, None, None]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """(B,) tokens -> (B, V) logits of the next ones."""
        self.filled += 1
        if self.fixed:
            self.bias.index_fill_(3, self.slot, 0.0)
            if self.window is not None:
                self.windowed = self.bias.masked_fill(self.columns <= self.slot - self.window, -torch.inf)
        logits = self._forward(tokens, self.positions, self._read_buffers)
        self.positions += 1
        self.slot += 1
        return logits

    def repeat(self, rows: Tensor) -> None:
        """After start(): row i becomes a copy of row rows[i], so there may be more rows than before."""
        if not self.fixed and _layer.runs_on(self.keys[0]):
            self.shared = self.filled
            holders, self.back = _holders(rows)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                if self.back is None:
                    buffers[i] = buffer[rows]
                    continue
                buffers[i] = buffer.new_empty(len(rows), *buffer.shape[1:])
                buffers[i][holders] = buffer[rows[holders]]
        self.positions = self.positions[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows. The buffers stay in place, and these rows move to the front of them."""
        own = slice(self.shared, self.capacity if self.fixed else self.filled)
        if self.back is not None:
            before = rows - self.back[rows]
            holders, self.back = _holders(before)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffer[: len(rows), :, own] = buffer[rows, :, own]
                if self.back is not None:
                    buffer[holders, :, : self.shared] = buffer[before[holders], :, : self.shared]
                buffers[i] = buffer[: len(rows)]
        self.positions = self.positions[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _forward(self, ids: Tensor, positions: Tensor, read) -> Tensor:
        network = self.network
        x = network.embed(ids, positions)
        few = read == self._read_buffers and not self.fixed and len(x) in FEW
        few = few and _layer.runs_on(x) and not torch.is_grad_enabled()
        for i, layer in enumerate(network.layers):
            if few and layer.get("weights") is not None:
                sizes = layer["scaling"], layer["eps"]
                _layer.decode_layer(layer["weights"], x, *network.rotations[layer["angles"]], *self._seen(i), *sizes)
                continue
            attended = read(i, *network.project(layer, x), layer["scaling"], layer.get("softcap"))
            x = network.finish(layer, x if len(attended) == len(x) else x[self.last], attended)
        logits = self.lm_head(network.norm(x))
        logits = logits if self.factor == 1.0 else self.factor * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _read_packed(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, places: Tensor,
        present: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention of all prompts end to end, without their padding. places: (N,) the position of each token."""
        self._store_prompt(self.keys, k, present)
        self._store_prompt(self.values, v, present)
        asked = tokens = self.positions
        if i + 1 == len(self.network.layers):  # only the last tokens
            q, places, asked = q[self.last], tokens - 1, torch.ones_like(tokens)
        where = places, *_layer.table_of(asked, tokens)
        window = self.network.layers[i].get("window") or self.capacity
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return _layer.packed_attention(q, k, v, *where, scale, softcap, window).flatten(1)

    def _prompt_masks(self, padded: bool) -> tuple[Tensor | None, Tensor | None]:
        """(B, 1, T, T) bool, what each token attends to, without and with the window. None: all before it."""
        mask, width = self.prompt_mask, self.prompt_mask.shape[1]
        attend = mask.new_ones(width, width).tril() & mask[:, None, None, :] if padded else None
        if padded:  # padding attends to itself: a softmax over nothing is NaN, which would spread
            attend |= torch.eye(width, dtype=torch.bool, device=mask.device)
        windowed = attend
        if self.window is not None and width > self.window:
            windowed = mask.new_ones(1, 1, width, width).tril() if attend is None else attend
            windowed = windowed.triu(1 - self.window)
        return attend, windowed

    def _read_padded(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, attend: Tensor | None,
        windowed: Tensor | None, present: Tensor | None,
    ) -> Tensor:  # fmt: skip
        attend = attend if self.network.layers[i].get("window") is None else windowed
        k, v = self._store_prompt(self.keys, k, present), self._store_prompt(self.values, v, present)
        q = self._placed(q, present)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        causal = attend is None
        if i + 1 == len(self.network.layers):  # only the last tokens, which see everything
            q, attend, causal, present = q[:, :, -1:], None if causal else attend[:, :, -1:], False, None
        attended = attention(q, k, v, attend, scale, softcap, causal).transpose(1, 2).flatten(0, 1)
        return (attended if present is None else attended[present]).flatten(1)

    def _placed(self, x: Tensor, present: Tensor | None) -> Tensor:
        """(N, heads, d) -> (B, heads, T, d), 0 in padding."""
        shape = self.ids.shape
        if present is not None:
            x = x.new_zeros(shape.numel(), *x.shape[1:]).index_copy_(0, present, x)
        return x.view(*shape, *x.shape[1:]).transpose(1, 2)

    def _store_prompt(self, buffers: list[Tensor], x: Tensor, present: Tensor | None) -> Tensor:
        """Makes a layer's buffer, which begins with x (N, heads, d) -> _placed(x)."""
        x = self._placed(x, present)
        # If the whole buffer is read (fixed), its unfilled part is multiplied by 0, so it must not hold NaN.
        make = x.new_zeros if self.fixed else x.new_empty
        buffer = make(*x.shape[:2], self.capacity, x.shape[3])
        buffer[:, :, : self.filled] = x
        buffers.append(buffer)
        return x

    def _seen(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
        """The columns that the last token of each row sees in layer i, itself the last of them: keys, values, bias,
        back, shared and filled of _layer.attend."""
        window = self.network.layers[i].get("window")
        first = 0 if window is None else max(self.filled - window, 0)
        bias = None if self.bias is None else self.bias[:, 0, 0, first:]
        buffers = self.keys[i][:, :, first:], self.values[i][:, :, first:]
        return *buffers, bias, self.back, max(self.shared - first, 0), self.filled - first

    def _read_buffers(self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        if self.fixed:
            keys, values = self.keys[i], self.values[i]
            bias = self.bias if self.network.layers[i].get("window") is None else self.windowed
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
        else:
            keys, values, bias, back, shared, filled = self._seen(i)
            keys[:, :, filled - 1] = k
            values[:, :, filled - 1] = v
            if _layer.runs_on(q):
                return _layer.attend(q, keys, values, bias, back, shared, filled, scale, softcap).flatten(1)
            keys, values = keys[:, :, :filled], values[:, :, :filled]
            bias = None if bias is None else bias[:, None, None, :filled]
        # Query heads that share a key head are laid out as tokens of one query, so keys and values are not repeated.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[2])
        return attention(grouped, keys, values, bias, scale, softcap).flatten(1)


def _holders(sources: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> the first row with each source, and (B,): how many rows before each row the first with its source is."""
    first: dict[int, int] = {}
    rows = [first.setdefault(source, i) for i, source in enumerate(sources.tolist())]
    return torch.tensor(list(first.values())), torch.arange(len(rows)) - torch.tensor(rows)
