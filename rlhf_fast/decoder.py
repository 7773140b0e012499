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

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .models import learns_a_prompt, rotary_limit, unwrapped
from .ops import _layer

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ATTENTION = (  # modules whose attention functions compute the architecture's own causal softmax(q k^T) v
    *(f"transformers.integrations.{kind}_attention" for kind in ("sdpa", "flash", "flex")), "rlhf_fast.packing",
)  # fmt: skip
FEW = range(1, 129)  # numbers of rows at which our products are faster than the library's: 1.2 to 3.5x on EPYC 9004
SILU = nn.SiLU, type(ACT2FN["silu"])
MAX_COPIED = 1 << 20  # weights; above this, joining products saves little time and the copy takes memory


def why_no_decoder(model) -> str | None:
    """The reason why Decoder cannot run this model; None if it can."""
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
    if rotary_limit(model) is not None:
        return "it rescales its rotary positions as the text grows"
    windows = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if windows or (config.model_type == "mistral" and config.sliding_window is not None):
        return "its attention, or that of some layers, has a sliding window"
    if any(isinstance(p, DTensor) for p in layers.parameters()):
        return "its layers are sharded (sharding.gathered makes them whole)"
    for part in _computed(model.base_model, layers):
        kind = type(part).__bases__[1] if isinstance(part, FSDPModule) else type(part)
        if not kind.__module__.startswith("transformers.models."):
            return f"its layers contain a {kind.__name__}, which is not a class of transformers"
        if _is_altered(part):
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
        if hasattr(layer, "attn"):  # gpt2
            yield from (layer.attn, layer.mlp)
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


def _is_plain(module) -> bool:
    """Whether it is a linear layer that only multiplies by its weight and adds its bias, both of them plain tensors (a
    quantized weight is not plain)."""
    if type(module) is _BF16Linear:
        return True
    if type(module) is not nn.Linear or _is_altered(module):
        return False
    return all(type(x) in (Tensor, nn.Parameter) for x in (module.weight, module.bias) if x is not None)


class _BF16Linear:
    """x weight^T + bias, multiplied in bfloat16. On the CPU, where our own kernels run between the products, the result
    is converted back to float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.bfloat16(), bias
        self.rounded_bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        return _widened(nn.functional.linear(x.bfloat16(), self.weight, self.rounded_bias))


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


def _side_by_side(*products: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that concatenates these products of the same x. Small plain products are joined into one. So are
    those in bfloat16: their weights are copies already, and become views of the joined copy."""
    copies = all(type(product) is _BF16Linear for product in products)
    small = all(map(_is_plain, products)) and sum(product.weight.numel() for product in products) <= MAX_COPIED
    if not (copies or small):
        return lambda x: torch.cat([product(x) for product in products], -1)
    weight, bias = torch.cat([product.weight for product in products]), None
    if given := [product.bias for product in products if product.bias is not None]:
        none = given[0].new_zeros
        bias = torch.cat([none(len(p.weight)) if p.bias is None else p.bias for p in products])
    if copies:
        for product, part in zip(products, weight.split([len(p.weight) for p in products]), strict=True):
            product.weight = part
        return _BF16Linear(weight, bias)
    return partial(nn.functional.linear, weight=weight, bias=bias)


def _plain_weights(layer: nn.Module, products: list[Callable]) -> tuple[Tensor | None, ...] | None:
    """The weights of a layer in the order of _layer.decode_layer; None if one of its modules is not plain."""
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


def _rms_norm(module: nn.Module):
    """transformers' RMSNorm in one call instead of seven. In half precision the module itself is called, because it
    rounds between its steps."""
    weight = module.weight
    if weight.dtype != torch.float32:
        return module

    def in_one_pass(x: Tensor) -> Tensor:
        if not _layer.runs_on(x):
            return module(x)
        return _layer.rms_norm(x.contiguous().view(-1, x.shape[-1]), weight, module.variance_epsilon).view(x.shape)

    if _layer.runs_on(weight):
        return in_one_pass
    return partial(nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=module.variance_epsilon)


class _Rotary:
    """The layers of llama, mistral, qwen2 and qwen3: rotary positions, RMSNorm, gated MLP."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.embed_tokens, self.layers, self.norm, self.bf16 = trunk.embed_tokens, [], _rms_norm(trunk.norm), bf16
        for layer in trunk.layers:
            attention, mlp = layer.self_attn, layer.mlp
            modules = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
            products = [_product(x, bf16) for x in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            self.layers.append({
                "scaling": attention.scaling,
                "norm": _rms_norm(layer.input_layernorm),
                "qkv": _side_by_side(*products[:3]),
                "qk_norms": [_rms_norm(norm) for norm in (attention.q_norm, attention.k_norm)]
                if hasattr(attention, "q_norm") else None,
                "output": products[3],
                "mlp_norm": _rms_norm(layer.post_attention_layernorm),
                "gate_up": _side_by_side(*products[4:6]),
                "activation": mlp.act_fn,
                "down": products[6],
                "is_silu": is_silu(mlp.act_fn),
                "weights": _plain_weights(layer, products),
                "eps": layer.input_layernorm.variance_epsilon,
            })  # fmt: skip
        config = trunk.config
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = trunk.layers[0].self_attn.head_dim
        weight = trunk.embed_tokens.weight
        cos, sin = trunk.rotary_emb(weight[:1], position_ids=torch.arange(length, device=weight.device)[None])
        half = self.head_dim // 2
        self.in_one_pass = _layer.runs_on(weight)
        # rotate_half(x) = (-x2, x1): the sine takes the minus, and roll swaps the halves.
        sin = sin[0] if self.in_one_pass else torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self.cos, self.sin = cos[0].contiguous(), sin.contiguous()  # (length, d)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.rotation = self.cos[positions], self.sin[positions]  # (N, d)
        return self.embed_tokens(ids)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) -> queries, keys and values, each (N, heads, d)."""
        heads = layer["qkv"](layer["norm"](x)).view(len(x), -1, self.head_dim)
        qk, v = heads.split([self.queries + self.keys, self.keys], 1)
        if self.bf16:
            qk = qk.float()
        if layer["qk_norms"] is not None:
            parts = qk.split([self.queries, self.keys], 1)
            qk = torch.cat([norm(part) for norm, part in zip(layer["qk_norms"], parts, strict=True)], 1)
        cos, sin = self.rotation
        if self.in_one_pass:
            qk = _layer.rotary(qk, cos, sin)
        else:
            qk = torch.addcmul(qk * cos[:, None], qk.roll(self.head_dim // 2, -1), sin[:, None])
        return *qk.to(v.dtype).split([self.queries, self.keys], 1), v

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer["output"](attended)
        gate, up = layer["gate_up"](layer["mlp_norm"](x)).chunk(2, -1)
        if self.in_one_pass and layer["is_silu"]:
            return x + layer["down"](_layer.swiglu(gate, up))
        return x + layer["down"](layer["activation"](gate) * up)


class _GPT2:
    """The layers of gpt2: learned positions, LayerNorm, one projection to q, k and v."""

    def __init__(self, trunk, length: int, bf16: bool):
        self.trunk, self.norm, self.head_dim, self.layers = trunk, trunk.ln_f, trunk.h[0].attn.head_dim, []
        for i, block in enumerate(trunk.h):
            modules = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
            products = dict(zip(("qkv", "output", "up", "down"), (_product(x, bf16) for x in modules), strict=True))
            self.layers.append({"block": block, "scaling": self._scaling(trunk.config, i), **products})

    def _scaling(self, config, layer: int) -> float:  # attn.scaling in transformers 5; version 4 lacks it
        scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        return scaling / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scaling

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.trunk.wte(ids) + self.trunk.wpe(positions)

    def project(self, layer: dict, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer["qkv"](layer["block"].ln_1(x)).view(len(x), 3, -1, self.head_dim).unbind(1)

    def finish(self, layer: dict, x: Tensor, attended: Tensor) -> Tensor:
        x, block = x + layer["output"](attended), layer["block"]
        return x + layer["down"](block.mlp.act(layer["up"](block.ln_2(x))))


class Decoder:
    """Answers B prompts of up to P tokens, padded on the left: start(), then up to `room` calls of step().

    It checks nothing: call why_no_decoder(model) first, and put the model in eval mode.
    bf16: compute the products of a float32 model in bfloat16.
    On the CPU attention reads only the filled part of the buffers. On CUDA it reads all of them, with a mask: shapes
    and addresses are then the same at every step, so generation.py can replay step() as a CUDA graph.
    """

    def __init__(self, model, ids: Tensor, mask: Tensor, room: int, bf16: bool = False):
        model = unwrapped(model)
        family = _GPT2 if model.config.model_type == "gpt2" else _Rotary
        self.fixed = ids.is_cuda
        self.ids, self.prompt_mask, self.filled = ids, mask, 0
        self.capacity = ids.shape[1] + room
        bf16 = bf16 and model.get_input_embeddings().weight.dtype == torch.float32  # else it is in half precision
        self.network = family(model.base_model, self.capacity, bf16)
        self.lm_head = _product(model.get_output_embeddings(), bf16)
        self.keys: list[Tensor] = []  # per layer, (B, heads, capacity, d)
        self.values: list[Tensor] = []
        self.positions = mask.sum(1)  # (B,): position of the next token
        self.last = self.positions.cumsum(0) - 1  # (B,): each prompt's last token, among those of all prompts
        self.slot = torch.full((1,), ids.shape[1], device=ids.device)  # `filled` as a tensor, for a CUDA graph
        self.bias: Tensor | None = None  # (B, 1, 1, capacity), added to q k^T: -inf hides a column

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

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows. The buffers stay in place, and these rows move to the front of them."""
        filled = slice(self.capacity if self.fixed else self.filled)
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffer[: len(rows), :, filled] = buffer[rows, :, filled]
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
                buffers = self.keys[i], self.values[i], None if self.bias is None else self.bias[:, 0, 0]
                sizes = self.filled, layer["scaling"], layer["eps"]
                _layer.decode_layer(layer["weights"], x, *network.rotation, *buffers, *sizes)
                continue
            attended = read(i, *network.project(layer, x), layer["scaling"])
            x = network.finish(layer, x if len(attended) == len(x) else x[self.last], attended)
        x, head = network.norm(x), self.lm_head
        if few and _is_plain(head) and _layer.takes(head.weight):
            return _layer.few_rows_linear(x, head.weight, head.bias)
        return head(x)

    def _read_prompt(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, attend: Tensor | None, present: Tensor | None
    ) -> Tensor:
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
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attend, is_causal=causal, scale=scale)
        attended = attended.transpose(1, 2).flatten(0, 1)
        return (attended if present is None else attended[present]).flatten(1)

    def _read_buffers(self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values, bias = self.keys[i], self.values[i], self.bias
        if self.fixed:
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
        else:
            keys[:, :, self.filled - 1] = k
            values[:, :, self.filled - 1] = v
            if _layer.runs_on(q):
                rows = None if bias is None else bias[:, 0, 0]
                return _layer.attend(q, keys, values, rows, self.filled, scale).flatten(1)
            keys, values = keys[:, :, : self.filled], values[:, :, : self.filled]
            bias = None if bias is None else bias[..., : self.filled]
        # Query heads that share a key head are laid out as tokens of one query, so keys and values are not repeated.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[2])
        attended = nn.functional.scaled_dot_product_attention(grouped, keys, values, bias, scale=scale)
        return attended.flatten(1)
