"""The forward pass of generation for decoder-only models: one new token per row, with keys and values in one buffer.

    x = embed(token)                                                    (B, T, D), T = 1 after the prompt
    for every layer:   q, k, v = project(norm(x))                       k, v are written to the buffers
                       x += output(softmax(q k^T / sqrt(d)) v)
                       x += mlp(norm(x))
    logits = lm_head(norm(x))                                           of the last token only

It uses the model's own weights. A module that is more than a plain linear layer or RMSNorm (for example one with a LoRA
adapter or a hook) is called unchanged. The time saved is what transformers spends again for every token in every layer:
masks, cache objects, rotary tables, output objects. Small projections of the same input become one product with a copy
of their weights. On the CPU, if there are few rows, a whole layer of plain modules is one native call
(csrc/cpu/decode.cpp). With bf16, products are in bfloat16, as under autocast. Autocast around each forward would round
every weight again for every token, so plain modules get a rounded copy instead.
Specification: the model's own forward, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .models import learns_a_prompt, logit_factor, logit_softcap, rotary_limit, unwrapped
from .ops import _layer

SUPPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "gemma", "gemma2", "gemma3_text", "olmo2",
    "olmo3", "gpt2", "gpt_neox",
)  # fmt: skip
ATTENTION = (  # modules whose attention functions compute the architecture's own causal softmax(q k^T) v
    *(f"transformers.integrations.{kind}_attention" for kind in ("sdpa", "flash", "flex")), "rlhf_fast.packing",
)  # fmt: skip
FEW = range(1, 129)  # numbers of rows at which our products are faster than the library's: 1.2 to 3.5x on EPYC 9004
SILU = nn.SiLU, type(ACT2FN["silu"])
MAX_COPIED = 1 << 20  # weights; above this, joining products saves little time and the copy takes memory


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
    if (window := _window(config)) is not None and length > window:
        return f"its attention, or that of some layers, has a sliding window of {window} tokens"
    if getattr(config, "attn_logit_softcapping", None) and (
        config.model_type != "gemma2" or config._attn_implementation == "sdpa"
    ):
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
        if _is_altered(part):
            return f"one {type(part).__name__} has a hook or a replaced forward, which may change what it computes"
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "add_cross_attention", False):
        return "it sets reorder_and_upcast_attn or add_cross_attention, which changes its attention"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights lie on several devices"
    return None


def _window(config) -> int | None:
    """To how many of the last tokens a layer attends, the layer with the fewest; None if all attend to all."""
    kinds = None if config.model_type in ("mistral", "phi3") else getattr(config, "layer_types", None)  # they ignore it
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


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


def _is_altered(module: nn.Module) -> bool:
    """Whether a hook or a replaced forward may make it compute something else than its class does.

    Three cases are harmless. The hooks of transformers 5 only record. transformers 4 records too, and afterwards leaves
    the class's own forward on the module. The hooks of FSDP gather weights without changing them.
    """
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    makers = (getattr(hook, "__module__", None) or "" for kind in hooks for hook in kind.values())
    harmless = "transformers.", "torch.distributed.fsdp."
    own = getattr(vars(module).get("forward"), "__func__", vars(module).get("forward"))
    return own not in (None, type(module).forward) or any(not maker.startswith(harmless) for maker in makers)


def attends_in_its_own_way(model: nn.Module) -> bool:
    """Whether its attention may be something else than causal softmax(q k^T) v, for example a function registered with
    AttentionInterface or a sparse kernel from the hub. (Flash attention from the hub goes through transformers' own
    function, and is allowed.)"""
    attend = ALL_ATTENTION_FUNCTIONS.get(unwrapped(model).config._attn_implementation)  # None: the model's eager one
    return attend is not None and attend.__module__ not in ATTENTION


def is_silu(activation: nn.Module) -> bool:
    return type(activation) in SILU and not _is_altered(activation)


def gelu_in_one_pass(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation; gelu_new, for which transformers takes eight passes over memory, in one of PyTorch."""
    if type(activation) is not NewGELUActivation or _is_altered(activation):
        return activation
    return partial(nn.functional.gelu, approximate="tanh")


def gpt2_scaling(config, head_dim: int, layer: int) -> float:
    """attn.scaling in transformers 5; version 4 lacks it."""
    scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
    return scaling / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scaling


def _is_plain(module) -> bool:
    """Whether it is a linear layer that only multiplies by its weight and adds its bias, both of them plain tensors (a
    quantized weight is not plain)."""
    if type(module) in (_Linear, _BF16Linear):
        return True
    if type(module) is not nn.Linear or _is_altered(module):
        return False
    return all(type(x) in (Tensor, nn.Parameter) for x in (module.weight, module.bias) if x is not None)


class _Linear:
    """x weight^T + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _BF16Linear:
    """x weight^T + bias, multiplied in bfloat16. On the CPU, where our own kernels run between the products, the result
    is converted back to float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.bfloat16(), bias
        self.rounded_bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        rows, x = len(x), x.bfloat16()
        if not x.is_cuda and (spare := _layer.spare_rows(rows)):
            x = nn.functional.pad(x, (0, 0, 0, spare))
        return _widened(nn.functional.linear(x, self.weight, self.rounded_bias)[:rows])


def _widened(x: Tensor) -> Tensor:
    return x if x.is_cuda else x.float()


def _product(module: nn.Module, bf16: bool) -> Callable[[Tensor], Tensor]:
    """The module, or with bf16 a function that computes it in bfloat16."""
    if not bf16:
        return module
    if _is_plain(module):
        return _BF16Linear(module.weight, module.bias)
    if type(module) is Conv1D and not _is_altered(module):
        return _BF16Linear(module.weight.T, module.bias)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return _widened(module(x))

    return under_autocast


def _few_rows(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The product, by our own kernel for few rows if it is plain and on the CPU."""
    if not _is_plain(product) or not all(_layer.takes(x) for x in (product.weight, product.bias) if x is not None):
        return product

    def multiply(x: Tensor) -> Tensor:
        if len(x) in FEW and _layer.runs_on(x) and not torch.is_grad_enabled():
            return _layer.few_rows_linear(x.contiguous(), product.weight, product.bias)
        return product(x)

    return multiply


def _side_by_side(*products: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that concatenates these products of the same x. Small plain products are joined into one. So are
    those in bfloat16: their weights are copies already, and become views of the joined copy."""
    if len(products) == 1:
        return _few_rows(products[0])
    copies = all(type(product) is _BF16Linear for product in products)
    small = all(map(_is_plain, products)) and sum(product.weight.numel() for product in products) <= MAX_COPIED
    if not (copies or small):
        products = [_few_rows(product) for product in products]
        return lambda x: torch.cat([product(x) for product in products], -1)
    weight, bias = torch.cat([product.weight for product in products]), None
    if given := [product.bias for product in products if product.bias is not None]:
        none = given[0].new_zeros
        bias = torch.cat([none(len(p.weight)) if p.bias is None else p.bias for p in products])
    if copies:
        for product, part in zip(products, weight.split([len(p.weight) for p in products]), strict=True):
            product.weight = part
        return _few_rows(_BF16Linear(weight, bias))
    return _few_rows(_Linear(weight, bias))


def _plain_weights(layer: nn.Module, products: list[Callable]) -> tuple[Tensor | None, ...] | None:
    """The weights of a layer in the order of _layer.decode_layer; None if one of its modules is not plain, or if the
    layer is built otherwise than llama's."""
    others = "post_feedforward_layernorm", "residual_multiplier"
    if len(products) < 7 or any(hasattr(layer, name) for name in others) or _is_gemma_norm(layer.input_layernorm):
        return None
    attention, norms = layer.self_attn, [layer.input_layernorm, layer.post_attention_layernorm]
    q, k, v, output, *gated = products
    query_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    if not all(map(_is_plain, products)) or any(product.bias is not None for product in gated):
        return None
    if not is_silu(layer.mlp.act_fn):
        return None
    if len({norm.variance_epsilon for norm in norms + query_norms}) > 1:
        return None
    weights = (
        norms[0].weight, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias,
        *([norm.weight for norm in query_norms] or [None, None]),
        output.weight, output.bias, norms[1].weight, *(product.weight for product in gated),
    )  # fmt: skip
    given = [weight for weight in weights if weight is not None]
    return weights if all(map(_layer.takes, given)) else None


def _is_gemma_norm(module: nn.Module) -> bool:
    """Whether it multiplies by 1 + its weight."""
    return type(module).__name__.startswith("Gemma")


def _rms_norm(module: nn.Module):
    """transformers' RMSNorm in one call instead of seven. In half precision the module itself is called, because it
    rounds between its steps."""
    if _is_gemma_norm(module):
        weight, eps = 1 + module.weight, module.eps
    else:
        weight, eps = module.weight, module.variance_epsilon

    def in_one_pass(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            return module(x)
        if _layer.runs_on(x):
            return _layer.rms_norm(x.contiguous().view(-1, x.shape[-1]), weight, eps).view(x.shape)
        return nn.functional.rms_norm(x, weight.shape, weight, eps)

    return in_one_pass


def _unchanged(x: Tensor) -> Tensor:
    return x


def _norms(layer: nn.Module, bf16: bool) -> tuple[Callable, Callable, Callable, Callable]:
    """What normalises (in granite scales) the input and the output of attention, and the input and the output of the
    MLP. bf16: these outputs are products in bfloat16."""
    norms = {name: _rms_norm(norm) for name, norm in layer.named_children() if name.endswith("layernorm")}
    if "post_feedforward_layernorm" not in norms:  # llama: despite its name, post_attention_layernorm is the MLP's
        factor = getattr(layer, "residual_multiplier", None)  # granite
        after = _unchanged if factor is None else lambda x: x * factor
        return norms["input_layernorm"], after, norms["post_attention_layernorm"], after
    after = [norms["post_attention_layernorm"], norms["post_feedforward_layernorm"]]
    if bf16:
        after = [lambda x, norm=norm: norm(x.float()) for norm in after]
    before = [norms.get(name, _unchanged) for name in ("input_layernorm", "pre_feedforward_layernorm")]
    return before[0], after[0], before[1], after[1]


def _embedding(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    """The embedding, times the factor that the trunk multiplies it by."""
    embed, factor = trunk.embed_tokens, getattr(trunk, "embedding_multiplier", None)  # granite
    scales_itself = any(hasattr(module, "embed_scale") for module in embed.modules())  # adapters wrap it
    if trunk.config.model_type in ("gemma", "gemma2") and not scales_itself:  # transformers 4
        factor = torch.tensor(trunk.config.hidden_size**0.5, dtype=embed.weight.dtype)
    return embed if factor is None else lambda ids: embed(ids) * factor


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, causal: bool = False
) -> Tensor:
    """softmax(cap(scale q k^T) + mask) v, where cap(x) = softcap tanh(x / softcap). A bool mask is True where it
    attends."""
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    scores = softcap * torch.tanh(q @ k.mT * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


class _Rotary:
    """Layers with rotary positions, RMSNorm and a gated MLP: llama and its kin, which differ in

    - norms: before attention and MLP; olmo2 and olmo3 after them; gemma2 and gemma3 both. Of queries and keys: in qwen3
      and gemma3 of each head, in olmo2 and olmo3 of all heads together.
    - rotary positions: gemma3 and olmo3 have others in layers with a window; some layers of smollm3 have none; phi3 may
      turn only the first part of each head.
    - phi3 has one matrix for queries, keys and values, and one for the MLP's gate and up.
    - factors: gemma's and granite's embedding, and what granite adds to x. gemma2 caps the logits of its attention.
    """

    def __init__(self, trunk, length: int, bf16: bool):
        self.embed_tokens, self.norm, self.bf16 = _embedding(trunk), _rms_norm(trunk.norm), bf16
        self.queries, self.keys = trunk.config.num_attention_heads, trunk.config.num_key_value_heads
        self.head_dim = trunk.layers[0].self_attn.head_dim
        self.in_one_pass = _layer.runs_on(trunk.embed_tokens.weight)
        self.layers = [self._layer(trunk, i, bf16) for i in range(len(trunk.layers))]
        kinds = {layer["angles"] for layer in self.layers}
        self.angles = {kind: _angles(trunk, length, self.in_one_pass, kind) for kind in kinds}

    def _layer(self, trunk, i: int, bf16: bool) -> dict:
        layer, attention, mlp = trunk.layers[i], trunk.layers[i].self_attn, trunk.layers[i].mlp
        if hasattr(attention, "qkv_proj"):
            qkv, gate_up, activation = [attention.qkv_proj], [mlp.gate_up_proj], mlp.activation_fn
        else:
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up, activation = [mlp.gate_proj, mlp.up_proj], mlp.act_fn
        modules = *qkv, attention.o_proj, *gate_up, mlp.down_proj
        products = [_product(module, bf16) for module in modules]
        qk_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        kind = trunk.config.layer_types[i] if hasattr(trunk.rotary_emb, "layer_types") else "all"
        return {
            "norms": _norms(layer, bf16),
            "qkv": _side_by_side(*products[: len(qkv)]),
            "qk_norms": [(_rms_norm(norm), norm.weight.numel()) for norm in qk_norms if norm is not None],
            "angles": kind if getattr(attention, "use_rope", True) else "none",
            "scaling": attention.scaling,
            "softcap": getattr(attention, "attn_logit_softcapping", None),
            "output": _few_rows(products[len(qkv)]),
            "gate_up": _side_by_side(*products[len(qkv) + 1 : -1]),
            "activation": activation,
            "is_silu": is_silu(activation),
            "down": _few_rows(products[-1]),
            "weights": _plain_weights(layer, products),
            "eps": getattr(layer.post_attention_layernorm, "variance_epsilon", None),
        }

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.rotations = {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self.angles.items()}  # (N, d)
        return self.embed_tokens(ids)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) -> queries, keys and values, each (N, heads, d)."""
        heads = layer["qkv"](layer["norms"][0](x)).view(len(x), -1, self.head_dim)
        qk, v = heads.split([self.queries + self.keys, self.keys], 1)
        if self.bf16:
            qk = qk.float()
        if layer["qk_norms"]:
            normed = []
            for (norm, width), part in zip(layer["qk_norms"], qk.split([self.queries, self.keys], 1), strict=True):
                normed.append(norm(part.reshape(len(x), -1, width)).view(part.shape))
            qk = torch.cat(normed, 1)
        qk = _turned(qk, *self.rotations[layer["angles"]], self.in_one_pass)
        return *qk.to(v.dtype).split([self.queries, self.keys], 1), v

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        _, after_attention, before_mlp, after_mlp = layer["norms"]
        x = x + after_attention(layer["output"](attended))
        gate, up = layer["gate_up"](before_mlp(x)).chunk(2, -1)
        fused = self.in_one_pass and layer["is_silu"]
        gated = _layer.swiglu(gate, up) if fused else layer["activation"](gate) * up
        return x + after_mlp(layer["down"](gated))


def _angles(trunk, length: int, in_one_pass: bool, kind: str = "all") -> tuple[Tensor, Tensor]:
    """The cosines and the sines of all positions, each (length, d) or fewer columns if only these are turned, as
    _turned takes them."""
    weight = trunk.get_input_embeddings().weight
    of_kind = {"layer_type": kind} if hasattr(trunk.rotary_emb, "layer_types") else {}
    positions = torch.arange(length, device=weight.device)[None]
    # A longer text before may have rescaled "dynamic" positions. Only one below the limit undoes that.
    trunk.rotary_emb(weight[:1], position_ids=positions[:, :1], **of_kind)
    cos, sin = (x[0].contiguous() for x in trunk.rotary_emb(weight[:1], position_ids=positions, **of_kind))
    if kind == "none":
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    if not in_one_pass:  # rotate_half(x) = (-x2, x1): the sine takes the minus, and roll swaps the halves
        sin[:, : sin.shape[1] // 2].neg_()
    return cos, sin


def _turned(x: Tensor, cos: Tensor, sin: Tensor, in_one_pass: bool) -> Tensor:
    """(N, heads, d) turned by rotary positions, of which these are the (N, d) cosines and sines, or the first columns
    of them: the others stay as they are."""
    part = cos.shape[-1]
    if part < x.shape[-1]:
        return torch.cat([_turned(x[..., :part].contiguous(), cos, sin, in_one_pass), x[..., part:]], -1)
    if in_one_pass:
        return _layer.rotary(x, cos, sin)
    return torch.addcmul(x * cos[:, None], x.roll(part // 2, -1), sin[:, None])


class _NeoX:
    """The layers of gpt_neox (pythia): LayerNorm, one projection to queries, keys and values, of which positions turn
    the first part, and attention and MLP side by side."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.trunk, self.norm, self.layers = trunk, trunk.final_layer_norm, []
        self.heads, self.bf16 = trunk.config.num_attention_heads, bf16
        for block in trunk.layers:
            attention, mlp = block.attention, block.mlp
            modules = attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h
            products = (_few_rows(_product(x, bf16)) for x in modules)
            products = dict(zip(("qkv", "output", "up", "down"), products, strict=True))
            self.layers.append({"block": block, "scaling": attention.scaling, **products})
        self.in_one_pass = _layer.runs_on(trunk.embed_in.weight)
        self.angles = _angles(trunk, length, self.in_one_pass)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.rotations = [x[positions] for x in self.angles]  # (N, d or less)
        return self.trunk.embed_in(ids)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = layer["qkv"](layer["block"].input_layernorm(x)).view(len(x), self.heads, 3, -1)
        qk, v = heads[:, :, :2].transpose(1, 2).flatten(1, 2), heads[:, :, 2]
        if self.bf16:
            qk = qk.float()
        return *_turned(qk, *self.rotations, self.in_one_pass).to(v.dtype).split(self.heads, 1), v

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        block, after = layer["block"], x + layer["output"](attended)
        h = block.post_attention_layernorm(x if block.use_parallel_residual else after)
        return after + layer["down"](block.mlp.act(layer["up"](h)))


class _GPT2:
    """The layers of gpt2: learned positions, LayerNorm, one projection to q, k and v."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.trunk, self.norm, self.head_dim, self.layers = trunk, trunk.ln_f, trunk.h[0].attn.head_dim, []
        for i, block in enumerate(trunk.h):
            modules = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
            products = dict(zip(("qkv", "output", "up", "down"), (_product(x, bf16) for x in modules), strict=True))
            scaling, activation = gpt2_scaling(trunk.config, self.head_dim, i), gelu_in_one_pass(block.mlp.act)
            self.layers.append({"block": block, "scaling": scaling, "activation": activation, **products})

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.trunk.wte(ids) + self.trunk.wpe(positions)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer["qkv"](layer["block"].ln_1(x)).view(len(x), 3, -1, self.head_dim).unbind(1)

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        x, block = x + layer["output"](attended), layer["block"]
        return x + layer["down"](layer["activation"](layer["up"](block.ln_2(x))))


class Decoder:
    """Answers B prompts of up to P tokens, padded on the left: start(), then up to `room` calls of step().

    It checks nothing: call why_no_decoder(model) first, and put the model in eval mode.
    bf16: compute the products of a float32 model in bfloat16.
    On the CPU attention reads only the filled part of the buffers, and the copies of a row (repeat) share its prompt:
    one has the columns, and the others read them there. On CUDA it reads whole buffers, with a mask: shapes and
    addresses are then the same at every step, so generation.py can replay step() as a CUDA graph.
    """

    def __init__(self, model, ids: Tensor, mask: Tensor, room: int, bf16: bool = False):
        model = unwrapped(model)
        family = {"gpt2": _GPT2, "gpt_neox": _NeoX}.get(model.config.model_type, _Rotary)
        self.fixed = ids.is_cuda
        self.ids, self.prompt_mask, self.filled = ids, mask, 0
        self.capacity = ids.shape[1] + room
        bf16 = bf16 and model.get_input_embeddings().weight.dtype == torch.float32  # else it is in half precision
        self.network = family(model.base_model, self.capacity, bf16)
        self.lm_head = _few_rows(_product(model.get_output_embeddings(), bf16))
        self.factor, self.softcap = logit_factor(model.config), logit_softcap(model.config)
        self.keys: list[Tensor] = []  # per layer, (B, heads, capacity, d)
        self.values: list[Tensor] = []
        self.positions = mask.sum(1)  # (B,): position of the next token
        self.last = self.positions.cumsum(0) - 1  # (B,): each prompt's last token, among those of all prompts
        self.slot = torch.full((1,), ids.shape[1], device=ids.device)  # `filled` as a tensor, for a CUDA graph
        self.bias: Tensor | None = None  # (B, 1, 1, capacity), added to q k^T: -inf hides a column
        self.back: Tensor | None = None  # (B,): how many rows before this one the row with its prompt's columns is
        self.shared = 0  # how many columns those are

    def start(self) -> Tensor:
        """Reads the prompts -> (B, V) logits of the first answer token. Padding is computed in attention only. In the
        last layer, from attention on, only the last token of each prompt is computed."""
        ids, mask = self.ids, self.prompt_mask
        width = ids.shape[1]
        padded = not bool(mask.all())
        self.filled = width
        attend = mask.new_ones(width, width).tril() & mask[:, None, None, :] if padded else None
        if padded:  # padding attends to itself: a softmax over nothing is NaN, which would spread
            attend |= torch.eye(width, dtype=torch.bool, device=ids.device)
        positions = mask.cumsum(1) - 1
        present = mask.flatten().nonzero().squeeze(1) if padded else None
        read = partial(self._read_prompt, attend=attend, present=present)
        logits = self._forward(ids[mask], positions[mask], read)
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
        logits = self._forward(tokens, self.positions, self._read_buffers)
        self.positions += 1
        self.slot += 1
        return logits

    def repeat(self, rows: Tensor) -> None:
        """After start(): row i becomes a copy of row rows[i], so there may be more rows than before."""
        if not self.fixed and self._attends_natively(self.keys[0]):
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

    def _attends_natively(self, x: Tensor) -> bool:
        return _layer.runs_on(x) and not any(layer.get("softcap") for layer in self.network.layers)

    def _forward(self, ids: Tensor, positions: Tensor, read) -> Tensor:
        network = self.network
        x = network.embed(ids, positions)
        few = read == self._read_buffers and not self.fixed and len(x) in FEW
        few = few and _layer.runs_on(x) and not torch.is_grad_enabled()
        for i, layer in enumerate(network.layers):
            if few and layer.get("weights") is not None:
                buffers = self.keys[i], self.values[i], None if self.bias is None else self.bias[:, 0, 0]
                sizes = self.back, self.shared, self.filled, layer["scaling"], layer["eps"]
                _layer.decode_layer(layer["weights"], x, *network.rotations[layer["angles"]], *buffers, *sizes)
                continue
            attended = read(i, *network.project(layer, x), layer["scaling"], layer.get("softcap"))
            x = network.finish(layer, x if len(attended) == len(x) else x[self.last], attended)
        logits = self.lm_head(network.norm(x))
        logits = logits if self.factor == 1.0 else self.factor * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _read_prompt(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, attend: Tensor | None,
        present: Tensor | None,
    ) -> Tensor:  # fmt: skip
        shape = self.ids.shape

        def placed(x: Tensor) -> Tensor:  # (N, heads, d) -> (B, heads, T, d), 0 in padding
            if present is not None:
                x = x.new_zeros(shape.numel(), *x.shape[1:]).index_copy_(0, present, x)
            return x.view(*shape, *x.shape[1:]).transpose(1, 2)

        q, k, v = map(placed, (q, k, v))
        for buffers, new in ((self.keys, k), (self.values, v)):
            # If the whole buffer is read (fixed), its unfilled part is multiplied by 0, so it must not hold NaN.
            make = new.new_zeros if self.fixed else new.new_empty
            buffers.append(make(*new.shape[:2], self.capacity, new.shape[3]))
            buffers[i][:, :, : self.filled] = new
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        causal = attend is None
        if i + 1 == len(self.network.layers):  # only the last tokens, which see everything
            q, attend, causal, present = q[:, :, -1:], None if causal else attend[:, :, -1:], False, None
        attended = _attention(q, k, v, attend, scale, softcap, causal).transpose(1, 2).flatten(0, 1)
        return (attended if present is None else attended[present]).flatten(1)

    def _read_buffers(self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        keys, values, bias = self.keys[i], self.values[i], self.bias
        if self.fixed:
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
        else:
            keys[:, :, self.filled - 1] = k
            values[:, :, self.filled - 1] = v
            if _layer.runs_on(q) and softcap is None:
                rows = None if bias is None else bias[:, 0, 0]
                return _layer.attend(q, keys, values, rows, self.back, self.shared, self.filled, scale).flatten(1)
            keys, values = keys[:, :, : self.filled], values[:, :, : self.filled]
            bias = None if bias is None else bias[..., : self.filled]
        # Query heads that share a key head are laid out as tokens of one query, so keys and values are not repeated.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[2])
        return _attention(grouped, keys, values, bias, scale, softcap).flatten(1)


def _holders(sources: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> the first row with each source, and (B,): how many rows before each row the first with its source is."""
    first: dict[int, int] = {}
    rows = [first.setdefault(source, i) for i, source in enumerate(sources.tolist())]
    return torch.tensor(list(first.values())), torch.arange(len(rows)) - torch.tensor(rows)
