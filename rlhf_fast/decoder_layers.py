"""The layers of generation (decoder.py), made of the weights of a model's own modules.

A family of architectures has, for one or more tokens of each row: embed(tokens, positions), for every layer
project(norm(x)) -> queries, keys and values, and finish(x, attended) -> x with the outputs of attention and MLP added,
and a last norm.

A module that is more than a plain linear layer or RMSNorm (for example one with a LoRA adapter or a hook) is called
unchanged. Small projections of the same input become one product with a copy of their weights. With bf16, products are
in bfloat16, as under autocast. Autocast around each forward would round every weight again for every token, so plain
modules get a rounded copy instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .ops import _layer

FEW = range(1, 129)  # numbers of rows at which our products are faster than the library's: 1.2 to 3.5x on EPYC 9004
# The other architectures ignore a window in their config, as a converted model may have one.
WINDOW_IN_ALL = "mistral", "phi3"  # whatever layer_types says
WINDOW_IN_SOME = "ministral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo3"
MAX_COPIED = 1 << 20  # weights; above this, joining products saves little time and the copy takes memory
GATES = {nn.SiLU: "silu", **{type(ACT2FN[name]): "gelu" for name in ("gelu_new", "gelu_pytorch_tanh")}}
GATES[type(ACT2FN["silu"])] = "silu"  # transformers' own


def is_altered(module: nn.Module) -> bool:
    """Whether a hook or a replaced forward may make it compute something else than its class does.

    Three cases are harmless. The hooks of transformers 5 only record. transformers 4 records too, and afterwards leaves
    the class's own forward on the module. The hooks of FSDP gather weights without changing them.
    """
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    makers = (getattr(hook, "__module__", None) or "" for kind in hooks for hook in kind.values())
    harmless = "transformers.", "torch.distributed.fsdp."
    own = getattr(vars(module).get("forward"), "__func__", vars(module).get("forward"))
    return own not in (None, type(module).forward) or any(not maker.startswith(harmless) for maker in makers)


def gate_kind(activation: nn.Module) -> str | None:
    """The activation as _layer.glu names it; None if it is another one."""
    return None if is_altered(activation) else GATES.get(type(activation))


def gelu_in_one_pass(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation; gelu_new, for which transformers takes eight passes over memory, in one of PyTorch."""
    return partial(nn.functional.gelu, approximate="tanh") if gate_kind(activation) == "gelu" else activation


def gpt2_scaling(config, head_dim: int, layer: int) -> float:
    """attn.scaling in transformers 5; version 4 lacks it."""
    scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
    return scaling / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scaling


def sliding_window(config, i: int) -> int | None:
    """To how many tokens one attends in layer i, itself the last of them; None: to all before it."""
    if config.model_type in WINDOW_IN_SOME:
        return config.sliding_window if config.layer_types[i] == "sliding_attention" else None
    return config.sliding_window if config.model_type in WINDOW_IN_ALL else None


def _is_plain(module) -> bool:
    """Whether it is a linear layer that only multiplies by its weight and adds its bias, both of them plain tensors (a
    quantized weight is not plain)."""
    if type(module) in (_Linear, _BF16Linear):
        return True
    if type(module) is not nn.Linear or is_altered(module):
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


def product_of(module: nn.Module, bf16: bool) -> Callable[[Tensor], Tensor]:
    """The module, or with bf16 a function that computes it in bfloat16."""
    if not bf16:
        return module
    if _is_plain(module):
        return _BF16Linear(module.weight, module.bias)
    if type(module) is Conv1D and not is_altered(module):
        return _BF16Linear(module.weight.T, module.bias)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return _widened(module(x))

    return under_autocast


def few_rows(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
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
        return few_rows(products[0])
    copies = all(type(product) is _BF16Linear for product in products)
    small = all(map(_is_plain, products)) and sum(product.weight.numel() for product in products) <= MAX_COPIED
    if not (copies or small):
        products = [few_rows(product) for product in products]
        return lambda x: torch.cat([product(x) for product in products], -1)
    weight, bias = torch.cat([product.weight for product in products]), None
    if given := [product.bias for product in products if product.bias is not None]:
        none = given[0].new_zeros
        bias = torch.cat([none(len(p.weight)) if p.bias is None else p.bias for p in products])
    if copies:
        for product, part in zip(products, weight.split([len(p.weight) for p in products]), strict=True):
            product.weight = part
        return few_rows(_BF16Linear(weight, bias))
    return few_rows(_Linear(weight, bias))


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
    if gate_kind(layer.mlp.act_fn) != "silu":
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


def norm_factor(module: nn.Module) -> tuple[Tensor, float]:
    """What a RMSNorm multiplies by, and its epsilon."""
    if _is_gemma_norm(module):
        return 1 + module.weight, module.eps
    return module.weight, module.variance_epsilon


def _rms_norm(module: nn.Module):
    """transformers' RMSNorm in one call instead of seven. In half precision the module itself is called, because it
    rounds between its steps."""
    weight, eps = norm_factor(module)

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


def embedding(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    """The embedding, times the factor that the trunk multiplies it by."""
    embed, factor = trunk.embed_tokens, getattr(trunk, "embedding_multiplier", None)  # granite
    scales_itself = any(hasattr(module, "embed_scale") for module in embed.modules())  # adapters wrap it
    if trunk.config.model_type in ("gemma", "gemma2") and not scales_itself:  # transformers 4
        factor = torch.tensor(trunk.config.hidden_size**0.5, dtype=embed.weight.dtype)
    return embed if factor is None else lambda ids: embed(ids) * factor


def rotary_kind(trunk: nn.Module, i: int) -> str:
    """Which rotary positions layer i has: the name of its kind of layer if they differ by kind, or "all" or "none"."""
    if not getattr(trunk.layers[i].self_attn, "use_rope", True):
        return "none"
    return trunk.config.layer_types[i] if hasattr(trunk.rotary_emb, "layer_types") else "all"


class Rotary:
    """Layers with rotary positions, RMSNorm and a gated MLP: llama and its kin, which differ in

    - norms: before attention and MLP; olmo2 and olmo3 after them; gemma2 and gemma3 both. Of queries and keys: in qwen3
      and gemma3 of each head, in olmo2 and olmo3 of all heads together.
    - rotary positions: gemma3 and olmo3 have others in layers with a window; some layers of smollm3 have none; phi3 may
      turn only the first part of each head.
    - phi3 has one matrix for queries, keys and values, and one for the MLP's gate and up.
    - factors: gemma's and granite's embedding, and what granite adds to x. gemma2 caps the logits of its attention.
    """

    def __init__(self, trunk, length: int, bf16: bool):
        self.embed_tokens, self.norm, self.bf16 = embedding(trunk), _rms_norm(trunk.norm), bf16
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
        products = [product_of(module, bf16) for module in modules]
        qk_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return {
            "norms": _norms(layer, bf16),
            "qkv": _side_by_side(*products[: len(qkv)]),
            "qk_norms": [(_rms_norm(norm), norm.weight.numel()) for norm in qk_norms if norm is not None],
            "angles": rotary_kind(trunk, i),
            "scaling": attention.scaling,
            "window": sliding_window(trunk.config, i),
            "softcap": getattr(attention, "attn_logit_softcapping", None),
            "output": few_rows(products[len(qkv)]),
            "gate_up": _side_by_side(*products[len(qkv) + 1 : -1]),
            "activation": activation,
            "gate_kind": gate_kind(activation) if self.in_one_pass else None,
            "down": few_rows(products[-1]),
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
        kind = layer["gate_kind"]
        gated = layer["activation"](gate) * up if kind is None else _layer.glu(gate, up, kind)
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


class NeoX:
    """The layers of gpt_neox (pythia): LayerNorm, one projection to queries, keys and values, of which positions turn
    the first part, and attention and MLP side by side."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.trunk, self.norm, self.layers = trunk, trunk.final_layer_norm, []
        self.heads, self.bf16 = trunk.config.num_attention_heads, bf16
        for block in trunk.layers:
            attention, mlp = block.attention, block.mlp
            modules = attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h
            products = (few_rows(product_of(x, bf16)) for x in modules)
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


class GPT2:
    """The layers of gpt2: learned positions, LayerNorm, one projection to q, k and v."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.trunk, self.norm, self.head_dim, self.layers = trunk, trunk.ln_f, trunk.h[0].attn.head_dim, []
        for i, block in enumerate(trunk.h):
            modules = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
            products = dict(zip(("qkv", "output", "up", "down"), (product_of(x, bf16) for x in modules), strict=True))
            scaling, activation = gpt2_scaling(trunk.config, self.head_dim, i), gelu_in_one_pass(block.mlp.act)
            self.layers.append({"block": block, "scaling": scaling, "activation": activation, **products})

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.trunk.wte(ids) + self.trunk.wpe(positions)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer["qkv"](layer["block"].ln_1(x)).view(len(x), 3, -1, self.head_dim).unbind(1)

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        x, block = x + layer["output"](attended), layer["block"]
        return x + layer["down"](layer["activation"](layer["up"](block.ln_2(x))))
