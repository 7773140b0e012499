"""The parts of a llama layer between its matrix products (csrc/cpu/layer.cpp, attention.cpp, decode.cpp).

    rms_norm(x, w) = w x / sqrt(mean(x^2) + eps)
    rotary(x)      = (x1 cos - x2 sin, x2 cos + x1 sin), where x1 and x2 are the halves of a head
    glu(g, u)      = silu(g) u, or gelu(g) u
    packed_attention = softmax(cap(scale q k^T)) v in each sequence of a row, causal
    attend(q, ...) = softmax(cap(scale q k^T) + bias) v, with one query per row
    decode_layer   = all of these and the matrix products of a layer, for one token per row
    few_rows_linear = one such matrix product
    bf16_linear     = one in bfloat16, in training

float32 on the CPU; ask runs_on() first. Where products are in bfloat16, the result of rms_norm and all of glu may be
too, so that no pass only converts. These are not public ops: they make our own forwards fast, and they equal the
modules of transformers up to rounding. The first four are differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dispatch import is_forced
from ._layout import DTYPE_CODES
from ._native import _C


def runs_on(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,), products: bool = True) -> bool:
    """Whether the functions of this file may be used for x, whose dtype must be one of dtypes. products: also those
    with a product, which autocast asks to be in bfloat16."""
    built = hasattr(_C, "decode_layer")  # the source tree may not be built, or have an older build
    narrowed = products and torch.is_autocast_enabled("cpu")
    return built and not is_forced() and not narrowed and x.is_cpu and x.dtype in dtypes


def takes(weight: Tensor) -> bool:
    """Whether decode_layer and few_rows_linear take this weight: contiguous float32, or for a matrix also bfloat16."""
    dtypes = (torch.float32, torch.bfloat16) if weight.ndim == 2 else (torch.float32,)
    return weight.is_contiguous() and runs_on(weight, dtypes)


def spare_rows(rows: int) -> int:
    """How many rows of zeros to add before products in bfloat16 on the CPU, at most an eighth of all.

    oneDNN compiles each product for each number of rows that it meets, in 6 ms and 1 to 4 MB, and keeps the last 1024.
    Sequences of all lengths make every number different. With the spare rows there are eight from one power of two to
    the next.
    """
    return -rows % (1 << max(4, rows.bit_length() - 4))


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, D) contiguous, (D,) -> (N, D) in dtype, float32 or bfloat16."""
    return _RMSNorm.apply(x, weight, eps, dtype) if torch.is_grad_enabled() else _normed(x, weight, eps, dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    _C.rms_norm(x, weight, *x.shape, eps, DTYPE_CODES[dtype], y, scale, torch.get_num_threads())
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = x.new_empty(len(x))
        y = _normed(x, weight, eps, dtype, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        arguments = (x, weight, scale, DTYPE_CODES[grad.dtype], grad.contiguous(), *x.shape, grad_x, grad_weight)
        _C.rms_norm_backward(*arguments, torch.get_num_threads())
        return grad_x, grad_weight, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, d), contiguous within a row; cos and sin (T, d), whose halves are equal -> (N, heads, d).

    Row i has position i % T.
    """
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin, 1.0)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    rows, heads, dim = x.shape
    y = x.new_empty(x.shape)
    _C.rotary(x, x.stride(0), cos, sin, rows, len(cos), heads, dim, direction, y, torch.get_num_threads())
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _turned(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Both (N, I), float32 or bfloat16 -> (N, I) in their dtype. activation: "silu", or "gelu" in its form with tanh.
    If no gradient is needed, they may be the halves of one product."""
    gelu = activation == "gelu"
    return _GLU.apply(gate, up, gelu) if torch.is_grad_enabled() else _gated(gate, up, gelu)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    y = gate.new_empty(gate.shape)
    _C.glu(gate, up, gelu, DTYPE_CODES[gate.dtype], gate.stride(0), *gate.shape, y, torch.get_num_threads())
    return y


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _gated(gate, up, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        arguments = (gate, up, grad.contiguous(), ctx.gelu, DTYPE_CODES[gate.dtype], *gate.shape, grad_gate, grad_up)
        _C.glu_backward(*arguments, torch.get_num_threads())
        return grad_gate, grad_up, None


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, D), weight (V, D) and bias (V,) or None in float32 -> (N, V) x weight^T + bias in bfloat16, as nn.Linear
    computes it under autocast.

    Its backward transposes the gradient before it multiplies: oneDNN reads a transposed left factor at half the speed.
    """
    return _BF16Linear.apply(x.bfloat16(), weight, bias)


class _BF16Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.bfloat16()
        ctx.save_for_backward(x, narrow)
        return torch.nn.functional.linear(x, narrow, None if bias is None else bias.bfloat16())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad @ weight if of_x else None
        grad_weight = (_transposed(grad) @ x).float() if of_weight else None
        return grad_x, grad_weight, grad.sum(0, dtype=torch.float32) if of_bias else None


def _transposed(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[::-1])
    _C.transpose(x, *x.shape, y, torch.get_num_threads())
    return y


def attend(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, back: Tensor | None, shared: int, filled: int,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """q (B, H, d), contiguous within a row; buffers (B, Hk, capacity, d); bias (B, capacity) or None -> (B, H, d).

    Only the first `filled` columns of the buffers are read. The buffers and the bias may be views that leave out as
    many of the first columns. back (B,) int64 or None: the first `shared` columns of row i are read in row i - back[i];
    neighbours that share them read them together. softcap: None, or c where scores are c tanh(scale q k^T / c).
    """
    y = q.new_empty(q.shape)
    sizes = (*q.shape[:2], keys.shape[1], q.shape[2], _capacity(keys))
    threads = torch.get_num_threads()
    _C.attend(q, q.stride(0), keys, values, bias, back, shared, *sizes, filled, scale, softcap or 0.0, y, threads)
    return y


def _capacity(buffer: Tensor) -> int:
    """How many columns lie between two heads, of which the view may leave some out."""
    return buffer.stride(1) // buffer.shape[3]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, table: Tensor, families: Tensor, scale: float,
    softcap: float | None, window: int,
) -> Tensor:  # fmt: skip
    """q (M, H, d), k and v (N, G, d), each vector contiguous -> (M, H, d), causal attention in a row of sequences.

    places (M,), table (S, 6) and families (F + 1,), int64 and contiguous, are described at packed_attention in
    csrc/ops.h. window: how many keys a query sees at most, the last of them its own. softcap: as in attend.
    Under autocast in bfloat16 the factors of the products are rounded to it, on CPUs that multiply bfloat16.
    """
    dtype = DTYPE_CODES[torch.bfloat16 if products_in_bf16() else torch.float32]
    arguments = (q, k, v, places, table, families, window, scale, softcap or 0.0, dtype)
    return _PackedAttention.apply(*arguments) if torch.is_grad_enabled() else _attended(*arguments)[0]


def table_of(queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) how many each sequence has -> table and families of packed_attention, for sequences that share nothing."""
    own, none = [queries.cumsum(0) - queries, queries, tokens.cumsum(0) - tokens, tokens], torch.zeros_like(tokens)
    return torch.stack([*own, none, none], 1), torch.arange(len(tokens) + 1)


def products_in_bf16() -> bool:
    """Whether autocast asks for it."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _attended(q: Tensor, k: Tensor, v: Tensor, places, table, families, *numbers):
    y, saved = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2)
    where = (places, table, families, len(families) - 1, q.shape[1], k.shape[1], q.shape[2], *numbers)
    _C.packed_attention(q[..., 0], k[..., 0], v[..., 0], *where, y, saved, torch.get_num_threads())
    return y, saved


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, places, table, families, *numbers) -> Tensor:
        y, saved = _attended(q, k, v, places, table, families, *numbers)
        ctx.save_for_backward(q, k, v, y, saved, places, table, families)
        ctx.numbers = numbers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, y, saved, places, table, families = ctx.saved_tensors
        (tokens, key_heads, dim), heads = k.shape, q.shape[1]
        by_head = None if heads == key_heads else q.new_empty(2, tokens, heads, dim)
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        where = (places, table, families, len(families) - 1, heads, key_heads, dim, *ctx.numbers, tokens)
        views = (x[..., 0] for x in (q, k, v))
        threads = torch.get_num_threads()
        _C.packed_attention_backward(*views, y, saved, grad.contiguous(), *where, by_head, *grads, threads)
        return *grads, None, None, None, None, None, None, None


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, D), weight (V, D), bias (V,) or None, all contiguous -> (B, V) x weight^T + bias, for a few rows.

    A library would pack the weight first, which for a few rows costs as much as the product.
    """
    y = x.new_empty(len(x), len(weight))
    _C.few_rows_product(x, weight, bias, *x.shape, len(weight), y, torch.get_num_threads())
    return y


def decode_layer(
    weights: tuple[Tensor | None, ...], x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    bias: Tensor | None, back: Tensor | None, shared: int, filled: int, scale: float, eps: float,
) -> None:  # fmt: skip
    """Replaces x (B, D), one token per row, by the output of the layer. The keys and values of these tokens are written
    into column filled - 1 of the buffers.

    weights: norm, q, k, v, their biases, the norms of queries and keys, output, its bias, mlp_norm, gate, up, down, in
    the order of LayerWeights in csrc/ops.h. cos and sin (B, d) are those of the tokens' positions; the other arguments
    are as in attend. All other tensors are contiguous.
    """
    kept, dim = keys.shape[1], keys.shape[3]
    sizes = (*x.shape, len(weights[-2]), len(weights[1]) // dim, kept, dim, _capacity(keys))
    where = (x, cos, sin, keys, values, bias, back, shared)
    _C.decode_layer(weights, *where, *sizes, filled, scale, eps, torch.get_num_threads())


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, V) contiguous, (B,) float64 -> (B,) int64 tokens and float32 log-probabilities; see generation.sample."""
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    logprobs = logits.new_empty(len(logits))
    _C.sample_tokens(logits, uniforms, *logits.shape, temperature, tokens, logprobs, torch.get_num_threads())
    return tokens, logprobs
