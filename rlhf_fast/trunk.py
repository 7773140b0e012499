"""The trunk's forward pass in training: hidden states of chosen tokens only.

    x = embed(tokens)                                        (N, D), in any layout; only attend depends on it
    for every layer:   x += output(attend(norm(x)))
                       x += mlp(norm(x))                     in the last layer for the chosen tokens only
    norm(x)                                                  (M, D)

The architectures of FAMILIES in float32 on the CPU run here; all other models go through transformers. The model's own
modules do the matrix products, with LoRA adapters if it has them, under autocast in bfloat16. The steps between the
products are in float32 and take few passes over memory: those of llama are in ops/_layer.py, and so is attention. There
are two layouts: rows padded on the right (hidden_states_at, for PPO) and sequences end to end (packing.py).
Specification: the rows of models.hidden_states at the chosen positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .decoder import why_no_decoder
from .decoder_layers import (
    embedding,
    gate_kind,
    gelu_in_one_pass,
    gpt2_scaling,
    is_altered,
    norm_factor,
    rotary_kind,
    sliding_window,
)
from .models import hidden_states, unwrapped
from .ops import _layer


def hidden_states_at(model, input_ids: Tensor, positions: Tensor) -> Tensor:
    """(B, T) tokens padded on the right, (M,) indices into the B * T tokens -> (M, D), the trunk's last hidden states
    at these tokens, after its final norm."""
    if not runs_here(model):
        return hidden_states(model, input_ids).flatten(0, 1).index_select(0, positions)
    batch, width = input_ids.shape
    places, sizes = torch.arange(width), torch.full((batch,), width)
    where = places.repeat(batch), *_layer.table_of(sizes, sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
        # Padding is on the right, so the causal mask hides it.
        return _layer.packed_attention(q, k, v, *where, scale, softcap, window or width)

    return forward(unwrapped(model).base_model, input_ids.flatten(), places, positions, attend)


def runs_here(model) -> bool:
    """Whether forward() can run the model in its present state."""
    weight = model.get_input_embeddings().weight
    if why_no_decoder(model) is not None or not _layer.runs_on(weight, products=False):
        return False
    model = unwrapped(model)
    if model.config.model_type not in FAMILIES:
        return False
    family = FAMILIES[model.config.model_type](model.base_model, torch.float32)
    layer = family.layers[0]
    # FSDP's own forward gathers a layer; it runs without gradients too, for the same bits.
    return family.fits() and not isinstance(layer, FSDPModule) and not getattr(layer, "gradient_checkpointing", False)


def forward(
    trunk, input_ids: Tensor, position_ids: Tensor, read: Tensor, attend: Callable, attend_read: Callable | None = None
) -> Tensor:
    """(N,) tokens, (T,) positions, (M,) indices `read` into the tokens -> (M, D) hidden states at these tokens.

    position_ids: if T is less than N, the tokens are rows of T, and every row has these positions.
    attend(q, k, v, scale, softcap, window): (N, heads, d) each -> N * heads * d values in the same order. It decides
    which tokens attend to which: to all before them, or to the last `window`. softcap: of decoder.attention.
    attend_read: attend with the queries of the M tokens only, the only ones that the last layer needs. It requires
    T = N.
    """
    rows, count, dtype = len(input_ids), len(read), torch.float32
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.bfloat16  # of what the products read
        input_ids, read = _with_spare_rows(input_ids), _with_spare_rows(read)
    family = FAMILIES[trunk.config.model_type](trunk, dtype)
    softcap = getattr(trunk.config, "attn_logit_softcapping", None)
    x = family.embed(input_ids, position_ids)
    for i, layer in enumerate(family.layers):
        h, is_last, asked, some = family.attention_norm(layer, x), i + 1 == len(family.layers), rows, None
        if is_last:  # the other tokens are needed only for their keys and values
            x = x.index_select(0, read)
            if attend_read is not None:
                attend, asked, some = attend_read, count, read
        q, k, v = family.project(layer, i, h, some)
        q_k_v = _first(asked, q), _first(rows, k), _first(rows, v)
        attended = attend(*q_k_v, family.scaling(layer, i), softcap, sliding_window(trunk.config, i))
        attended = attended.reshape(asked, q.shape[1] * q.shape[2])
        if is_last and attend_read is None:
            attended = attended.index_select(0, read)
        elif asked < len(x):
            attended = nn.functional.pad(attended, (0, 0, 0, len(x) - asked))
        x = family.finish(layer, x, attended)
    return _first(count, family.norm(x))


class _Rotary:
    """Rotary positions, RMSNorm and a gated MLP: llama and its kin, whose differences decoder_layers.Rotary lists."""

    def __init__(self, trunk, dtype: torch.dtype):
        self.trunk, self.layers, self.dtype = trunk, trunk.layers, dtype

    def fits(self) -> bool:
        """Whether the methods below compute what the modules would."""
        drops = self.layers[0].self_attn.attention_dropout or getattr(self.trunk.config, "resid_pdrop", 0.0)
        return not (self.trunk.training and drops)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, self.angles = embedding(self.trunk)(input_ids), {}
        for kind in {rotary_kind(self.trunk, i) for i in range(len(self.layers))} - {"none"}:
            of_kind = {} if kind == "all" else {"layer_type": kind}
            turn = self.trunk.rotary_emb(x, position_ids=position_ids[None], **of_kind)
            self.angles[kind] = [part[0].contiguous() for part in turn]  # cosines and sines, (T, d) or fewer columns
        return x

    def attention_norm(self, layer, x: Tensor) -> Tensor:
        return self._normed(layer, "input_layernorm", x)

    def project(self, layer, i: int, h: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) -> queries, keys and values, (N, heads, d) in float32. some: the tokens whose queries are needed."""
        attention, turn = layer.self_attn, self.angles.get(rotary_kind(self.trunk, i))
        heads = lambda product: product.float().unflatten(-1, (-1, attention.head_dim))  # noqa: E731
        first = lambda x: x if some is None else x.index_select(0, some)  # noqa: E731
        if hasattr(attention, "qkv_proj"):
            kept = self.trunk.config.num_key_value_heads
            q, k, v = heads(self._times(attention.qkv_proj, h)).split(
                [self.trunk.config.num_attention_heads, kept, kept], 1
            )
            q = first(q)
        else:
            q = heads(self._times(attention.q_proj, first(h)))
            k, v = heads(self._times(attention.k_proj, h)), heads(self._times(attention.v_proj, h))
        if hasattr(attention, "q_norm"):  # of each head, or of all together
            q, k = (
                _rms_norm(norm, x.flatten(1).unflatten(1, (-1, len(norm.weight)))).view(x.shape)
                for norm, x in ((attention.q_norm, q), (attention.k_norm, k))
            )
        if turn is not None:
            q, k = _turned(q, *map(first, turn)), _turned(k, *turn)
        return q, k, v

    def scaling(self, layer, i: int) -> float:
        return layer.self_attn.scaling

    def finish(self, layer, x: Tensor, attended: Tensor) -> Tensor:
        """Without a norm after the MLP, post_attention_layernorm is, despite its name, the one before it."""
        after = hasattr(layer, "post_feedforward_layernorm")
        x = _added(
            layer, x, self._times(layer.self_attn.o_proj, attended), layer.post_attention_layernorm if after else None
        )
        h = self._normed(layer, "pre_feedforward_layernorm" if after else "post_attention_layernorm", x)
        return _added(layer, x, self._mlp(layer.mlp, h), layer.post_feedforward_layernorm if after else None)

    def _mlp(self, mlp, h: Tensor) -> Tensor:
        if hasattr(mlp, "gate_up_proj"):
            gate, up = (x.contiguous() for x in self._times(mlp.gate_up_proj, h).chunk(2, -1))
            activation = mlp.activation_fn
        else:
            gate, up, activation = self._times(mlp.gate_proj, h), self._times(mlp.up_proj, h), mlp.act_fn
        gate, up, kind = gate.to(self.dtype), up.to(self.dtype), gate_kind(activation)
        gated = activation(gate) * up if kind is None else _layer.glu(gate, up, kind)
        return self._times(mlp.down_proj, gated)

    def norm(self, x: Tensor) -> Tensor:
        return _rms_norm(self.trunk.norm, x)

    def _times(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x); a plain product in bfloat16 has a faster backward here."""
        plain = type(module) is nn.Linear and module.weight.dtype == torch.float32 and not is_altered(module)
        if plain and self.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return _layer.bf16_linear(x, module.weight, module.bias)
        return module(x)

    def _normed(self, layer, name: str, x: Tensor) -> Tensor:
        """x after this norm of the layer, as the products after it read it; x itself if the layer has none."""
        norm = getattr(layer, name, None)
        return x if norm is None else _rms_norm(norm, x, self.dtype)


class _GPT2:
    """Learned positions, LayerNorm and one projection to queries, keys and values."""

    def __init__(self, trunk, dtype: torch.dtype):
        self.trunk, self.layers = trunk, trunk.h

    def fits(self) -> bool:
        return not (self.trunk.training and self.layers[0].attn.attn_dropout.p)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        repeats = -(-len(input_ids) // max(len(position_ids), 1))
        positions = position_ids.repeat(repeats)[: len(input_ids)]
        return self.trunk.drop(self.trunk.wte(input_ids) + self.trunk.wpe(positions))

    def attention_norm(self, layer, x: Tensor) -> Tensor:
        return layer.ln_1(x)

    def project(self, layer, i: int, h: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = layer.attn.c_attn(h).float().view(len(h), 3, -1, layer.attn.head_dim).unbind(1)
        return q if some is None else q.index_select(0, some), k, v

    def scaling(self, layer, i: int) -> float:
        return gpt2_scaling(self.trunk.config, layer.attn.head_dim, i)

    def finish(self, layer, x: Tensor, attended: Tensor) -> Tensor:
        x, mlp = x + layer.attn.resid_dropout(layer.attn.c_proj(attended)), layer.mlp
        return x + mlp.dropout(mlp.c_proj(gelu_in_one_pass(mlp.act)(mlp.c_fc(layer.ln_2(x)))))

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.ln_f(x)


FAMILIES = {  # by model_type
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "granite"), _Rotary),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3"), _Rotary),
    "gpt2": _GPT2,
}


def _with_spare_rows(ids: Tensor) -> Tensor:
    return nn.functional.pad(ids, (0, _layer.spare_rows(len(ids))))


def _first(rows: int, x: Tensor) -> Tensor:
    return x if len(x) == rows else x[:rows]


def _rms_norm(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return _layer.rms_norm(x.reshape(-1, x.shape[-1]), *norm_factor(module), dtype).view(x.shape)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, heads, d) turned by rotary positions; if these have fewer columns, only the first ones of each head."""
    part = cos.shape[-1]
    if part == x.shape[-1]:
        return _layer.rotary(x, cos, sin)
    return torch.cat([_layer.rotary(x[..., :part].contiguous(), cos, sin), x[..., part:]], -1)


def _added(layer, x: Tensor, out: Tensor, norm: nn.Module | None) -> Tensor:
    """x plus the output of attention or MLP, which a norm or granite's factor changes before."""
    if norm is not None:
        out = _rms_norm(norm, out.float())
    factor = getattr(layer, "residual_multiplier", None)
    return x + (out if factor is None else out * factor)
