"""The trunk's forward pass in training: hidden states of chosen tokens only.

    x = embed(tokens)                                        (N, D), in any layout; only attend depends on it
    for every layer:   x += output(attend(norm(x)))
                       x += mlp(norm(x))                     in the last layer for the chosen tokens only
    norm(x)                                                  (M, D)

llama, mistral, qwen2 and qwen3 in float32 on the CPU run here; all other models go through transformers. The model's
own modules do the matrix products, with LoRA adapters if it has them, under autocast in bfloat16. Every step between
the products is in float32 and one pass over memory (ops/_layer.py); so is attention, whose backward in bfloat16 takes
PyTorch twice as long. There are two layouts: rows padded on the right (hidden_states_at, for PPO) and sequences end to
end (packing.py).
Specification: the rows of models.hidden_states at the chosen positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .decoder import is_silu, why_no_decoder
from .models import hidden_states, unwrapped
from .ops import _layer


def hidden_states_at(model, input_ids: Tensor, positions: Tensor) -> Tensor:
    """(B, T) tokens padded on the right, (M,) indices into the B * T tokens -> (M, D), the trunk's last hidden states
    at these tokens, after its final norm."""
    if not runs_here(model):
        return hidden_states(model, input_ids).flatten(0, 1).index_select(0, positions)
    batch, width = input_ids.shape

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.view(batch, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        # Padding is on the right, so the causal mask hides it.
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    return llama(unwrapped(model).base_model, input_ids.flatten(), torch.arange(width), positions, attend)


def runs_here(model) -> bool:
    """Whether llama() can run the model in its present state."""
    weight = model.get_input_embeddings().weight
    if why_no_decoder(model) is not None or not _layer.runs_on(weight, products=False):
        return False
    model = unwrapped(model)
    if model.config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return False
    layer = model.base_model.layers[0]
    return not (
        isinstance(layer, FSDPModule)  # its own forward gathers it, and runs without gradients too, for the same bits
        or model.config.hidden_act != "silu"
        or not all(is_silu(layer.mlp.act_fn) for layer in model.base_model.layers)
        or getattr(layer, "gradient_checkpointing", False)
        or (model.training and layer.self_attn.attention_dropout)
    )


def llama(
    trunk, input_ids: Tensor, position_ids: Tensor, read: Tensor, attend: Callable, attend_read: Callable | None = None
) -> Tensor:
    """(N,) tokens, (T,) positions, (M,) indices `read` into the tokens -> (M, D) hidden states at these tokens.

    position_ids: if T is less than N, the tokens are rows of T, and every row has these positions.
    attend(q, k, v, scale): (N, heads, d) each -> N * heads * d values in the same order. It decides which tokens attend
    to which.
    attend_read: attend with the queries of the M tokens only, the only ones that the last layer needs. It requires
    T = N.
    """
    rows, count, dtype = len(input_ids), len(read), torch.float32
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.bfloat16  # of what the products read
        input_ids, read = _with_spare_rows(input_ids), _with_spare_rows(read)  # rotary repeats the positions for them
    x = trunk.embed_tokens(input_ids)
    cos, sin = trunk.rotary_emb(x, position_ids=position_ids[None])
    cos, sin = cos[0].contiguous(), sin[0].contiguous()  # (T, d)
    for layer in trunk.layers:
        attention, h, is_last = layer.self_attn, _norm(layer.input_layernorm, x, dtype), layer is trunk.layers[-1]
        queries, turn, asked = h, (cos, sin), rows
        if is_last:  # the other tokens are needed only for their keys and values
            x = x.index_select(0, read)
            if attend_read is not None:
                queries, *turn = (y.index_select(0, read) for y in (h, cos, sin))
                attend, asked = attend_read, count
        q, k, v = (
            project(y).float().unflatten(-1, (-1, attention.head_dim))
            for project, y in ((attention.q_proj, queries), (attention.k_proj, h), (attention.v_proj, h))
        )
        if hasattr(attention, "q_norm"):
            q, k = (_norm(norm, y) for norm, y in ((attention.q_norm, q), (attention.k_norm, k)))
        with torch.autocast("cpu", enabled=False):
            q, k = _layer.rotary(q, *turn), _layer.rotary(k, cos, sin)
            attended = attend(_first(asked, q), _first(rows, k), _first(rows, v), attention.scaling)
        attended = attended.reshape(asked, q.shape[1] * q.shape[2])
        if is_last and attend_read is None:
            attended = attended.index_select(0, read)
        elif asked < len(x):
            attended = nn.functional.pad(attended, (0, 0, 0, len(x) - asked))
        x = x + attention.o_proj(attended)
        h, mlp = _norm(layer.post_attention_layernorm, x, dtype), layer.mlp
        x = x + mlp.down_proj(_layer.swiglu(mlp.gate_proj(h).to(dtype), mlp.up_proj(h).to(dtype)))
    return _first(count, _norm(trunk.norm, x))


def _with_spare_rows(ids: Tensor) -> Tensor:
    return nn.functional.pad(ids, (0, _layer.spare_rows(len(ids))))


def _first(rows: int, x: Tensor) -> Tensor:
    return x if len(x) == rows else x[:rows]


def _norm(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return _layer.rms_norm(rows, module.weight, module.variance_epsilon, dtype).view(x.shape)
