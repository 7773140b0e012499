"""The trunk's forward pass for training on responses: hidden states of chosen tokens only.

    x = embed(tokens)                                        (B, T, D), right-padded, so attention is plainly causal
    for every layer:   x += output(attention(norm(x)))
                       x += mlp(norm(x))                     in the last layer of the chosen tokens only
    norm(x)                                                  (N, D)

On the CPU llama, qwen2 and qwen3 in float32 run here, over the model's own modules (LoRA adapters and all); what lies
between their matrix products takes one pass over memory each (ops/_layer.py). Everything else goes through
transformers. Specification: models.hidden_states, of which this takes the rows at positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decoder import why_not
from .models import hidden_states, unwrapped
from .ops import _layer


def hidden_states_at(model, input_ids: Tensor, positions: Tensor) -> Tensor:
    """(B, T) tokens padded on the right, (N,) indices into the B * T of them -> (N, D), the trunk's last hidden states
    there, after its final norm."""
    if _runs_here(model):
        return _llama(unwrapped(model).base_model, input_ids, positions)
    return hidden_states(model, input_ids).flatten(0, 1).index_select(0, positions)


def _runs_here(model) -> bool:
    if why_not(model) is not None or not _layer.runs_on(model.get_input_embeddings().weight):
        return False
    model = unwrapped(model)
    if model.config.model_type not in ("llama", "qwen2", "qwen3"):
        return False
    layer = model.base_model.layers[0]
    return not (
        model.config.hidden_act != "silu"
        or getattr(layer, "gradient_checkpointing", False)
        or torch.is_autocast_enabled("cpu")
        or (model.training and layer.self_attn.attention_dropout)
    )


def _llama(trunk, input_ids: Tensor, positions: Tensor) -> Tensor:
    batch, width = input_ids.shape
    x = trunk.embed_tokens(input_ids.flatten())
    cos, sin = trunk.rotary_emb(x, position_ids=torch.arange(width)[None])
    cos, sin = cos[0].contiguous(), sin[0].contiguous()  # (T, d)
    for layer in trunk.layers:
        attention, h = layer.self_attn, _norm(layer.input_layernorm, x)
        q, k, v = (
            project(h).view(len(h), -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = (_norm(norm, y) for norm, y in ((attention.q_norm, q), (attention.k_norm, k)))
        q, k, v = (
            y.view(batch, width, *y.shape[1:]).transpose(1, 2)
            for y in (_layer.rotary(q, cos, sin), _layer.rotary(k, cos, sin), v)
        )
        if q.shape[1] != k.shape[1]:
            k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
        attended = attended.transpose(1, 2).reshape(len(x), -1)
        if layer is trunk.layers[-1]:  # only keys and values of the other tokens are still needed
            x, attended = x.index_select(0, positions), attended.index_select(0, positions)
        x = x + attention.o_proj(attended)
        h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
        x = x + mlp.down_proj(_layer.swiglu(mlp.gate_proj(h), mlp.up_proj(h)))
    return _norm(trunk.norm, x)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return _layer.rms_norm(rows, module.weight, module.variance_epsilon).view(x.shape)
