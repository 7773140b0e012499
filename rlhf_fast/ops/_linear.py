"""What the ops from hidden states share: the rows that count, split into chunks; the logits and gradients of a chunk.

    z = softcap(hidden @ weight.T + bias)      only one chunk at a time: (chunk, V)
    dhidden = dz @ weight,  dweight = dz.T @ hidden,  dbias = sum of dz over rows

Rows outside the mask are dropped first, so the time is proportional to the rows that count. The gradient of the logits
is written over the logits, and the gradient of the weight is accumulated over the chunks in float32 (float64 for
float64 inputs). In addition to the results the memory is one chunk (two with a softcap, unless FUSED) and, for
half-precision weights, one tile of the weight. On a GPU, PyTorch before 2.10 cannot add half-precision products to a
float32 sum: one tile at a time is multiplied, rounded to half precision, and added.

A chunk is computed in one of three ways (way_of):
FUSED     two native ops compute everything, with the softmax between the products (csrc/cpu/linear.cpp);
IN_DTYPE  on a GPU, PyTorch multiplies, and the logits have the dtype of hidden and weight, as with any lm_head. The
          products run on tensor cores, and a chunk moves 2 bytes per logit instead of 4 with float32. If the gradient
          is known in the forward, one kernel turns the logits into it (_known_gradient.py) and moves 4 bytes per logit;
WIDE      otherwise PyTorch multiplies, the logits have the accumulation dtype (float32, or float64 for float64 inputs),
          and the kernels of token_logprobs process the rows.
On a GPU only `compact` synchronises with the device: if there is a mask, it reads how many rows count.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import INTEGERS, check_positive, check_tensors, check_vocabulary, device_error, dtype_error, label_error
from ._known_gradient import PpoTokens, known_gradient
from ._layout import DTYPE_CODES, accumulation_dtype
from ._native import _C, empties
from .token_logprobs import _backward as row_backward
from .token_logprobs import _forward as row_forward

# 64 MiB are 333 rows at V = 50257. The weight-gradient product is then within 5 % of its speed at 512 rows, and a step
# needs less than a tenth of the memory of eager PyTorch at 2048 rows. Each chunk reads the weight twice and its
# gradient once, so for a large weight the chunks are larger: half the bytes of the weight, but at most MOST_ROWS.
CHUNK_BYTES, MOST_ROWS = 64 << 20, 512
LEAST_ROWS = 128  # with fewer the products slow down (EPYC 9004, MKL float32: 64 rows run at 0.8 of the speed of 256)
# On an H200 the products reach full speed at 1024 rows, and each chunk reads and writes the float32 weight gradient
# once more (1 ms at 128256 x 4096). Hence few chunks, each within half a GiB, in multiples of a cuBLAS tile.
GPU_CHUNK_BYTES, GPU_LEAST_ROWS, GPU_ROWS = 512 << 20, 1024, 128
GPU_LINE = 64  # rows of logits start at multiples of this many elements, for cuBLAS and for 16-byte loads
LANES = 16  # the logits of FUSED are transposed: (V, rows padded to a multiple of this)
TILE = 4096  # rows of a half-precision weight that are converted to float32 at a time
FUSED, IN_DTYPE, WIDE = "fused", "in dtype", "wide"
# addmm of half-precision factors onto a float32 matrix. In 2.8 and 2.9 its out= must have the dtype of the factors
# (PyTorch issue 154086, fixed by pull request 167931).
SUMS_IN_FLOAT32_SINCE = (2, 10)


class Inputs(NamedTuple):
    """The rows that count: (n, D) hidden and (n,) labels. index (n,) says which of the N rows they are (None: all)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    index: Tensor | None
    rows: int  # N
    softcap: float | None
    way: str
    weight_dtype: torch.dtype  # of the weight's gradient (gradient_dtype); autocast may have rounded the weight

    @property
    def parts(self) -> list[slice]:
        """The chunks of the n rows."""
        return chunks_of(self.labels.shape[0], self.weight, self.way)

    def take(self, x: Tensor) -> Tensor:
        """(N, ...) -> (n, ...)."""
        return x if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor) -> Tensor:
        """(n, ...) -> (N, ...), 0 in the rows that do not count."""
        if self.index is None:
            return x
        return x.new_zeros(self.rows, *x.shape[1:]).index_copy_(0, self.index, x)


def compact(
    op: str, hidden: Tensor, weight: Tensor, bias, labels: Tensor, mask: Tensor | None, softcap, rounds: bool,
    fused: bool | None = None,
) -> Inputs:  # fmt: skip
    """(N, D) hidden, (N,) labels and mask -> the rows that count. IndexError for a label outside the vocabulary.

    rounds: as in factors_of.
    """
    weight_dtype, weight = weight.dtype, rounded(weight, rounds)
    index = None if mask is None else mask.nonzero().squeeze(1)
    if index is not None and index.shape[0] == labels.shape[0]:
        index = None
    way = way_of(hidden, weight, bias, softcap, fused)
    inputs = Inputs(hidden, weight, bias, labels, index, labels.shape[0], softcap, way, weight_dtype)
    labels = inputs.take(labels).contiguous()
    if on_gpu(hidden):  # the kernel stops at a wrong label; a check here would synchronise with the device
        return inputs._replace(hidden=inputs.take(hidden), labels=labels)
    wrong = (labels < 0) | (labels >= weight.shape[0])
    if wrong.any():
        at = wrong.nonzero()[0, 0]
        raise label_error(op, labels[at], at if index is None else index[at], weight.shape[0])
    return inputs._replace(hidden=inputs.take(hidden), labels=labels)


def factors_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """hidden, weight, bias, and whether the op shall round the weight to bfloat16.

    Under autocast in bfloat16 the factors are bfloat16, as those of nn.Linear. A float32 weight is rounded inside the
    op: its gradient is then the float32 sum itself, and nothing of it is kept in bfloat16. Autocast in float16 changes
    nothing, because float16 is WIDE.
    """
    device, dtypes = hidden.device.type, {x.dtype for x in (hidden, weight, bias) if x is not None}
    if (
        device not in ("cpu", "cuda")
        or not torch.is_autocast_enabled(device)
        or torch.get_autocast_dtype(device) != torch.bfloat16
        or torch.float64 in dtypes
    ):
        return hidden, weight, bias, False
    rounds = weight.dtype == torch.float32
    return hidden.bfloat16(), weight if rounds else weight.bfloat16(), None if bias is None else bias.bfloat16(), rounds


def rounded(weight: Tensor, rounds: bool) -> Tensor:
    return weight.bfloat16() if rounds else weight


def rounded_in_float32(weight: Tensor, rounds: bool) -> Tensor:
    """The same numbers, for the reference: the backward of bfloat16() would round the gradient too, and that of this
    sum, which is exact, is 1."""
    return weight + (weight.bfloat16().float() - weight).detach() if rounds else weight


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def way_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, fused: bool | None = None
) -> str:
    """FUSED, IN_DTYPE or WIDE. float16 is WIDE, because it cannot hold a gradient divided by the number of tokens.

    fused: what is_fused returned in the forward, so that a backward reads its logits in the same layout; None: ask now.
    """
    if is_fused(hidden, weight, bias) if fused is None else fused:
        return FUSED
    same = hidden.dtype == weight.dtype != torch.float16 and (bias is None or bias.dtype == hidden.dtype)
    return IN_DTYPE if on_gpu(hidden) and same and softcap is None else WIDE


def chunks_of(rows: int, weight: Tensor, way: str) -> list[slice]:
    """The chunks of this many rows, all of one size except the last."""
    most, multiple = most_rows(weight, way), _multiple(weight, way)
    step = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    step = math.ceil(step / multiple) * multiple
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def most_rows(weight: Tensor, way: str, kept: bool = False) -> int:
    """The largest number of rows of a chunk.

    The bytes of its logits limit it; it is a multiple of the rows that the way computes at a time, and at least
    LEAST_ROWS or GPU_LEAST_ROWS. kept: the logits stay in memory after the call, and on the CPU may not exceed
    CHUNK_BYTES.
    """
    if on_gpu(weight):
        size, budget, least = weight.element_size() if way == IN_DTYPE else 4, GPU_CHUNK_BYTES, GPU_LEAST_ROWS
    else:
        size, least = accumulation_dtype(weight).itemsize, LEAST_ROWS
        large = 0 if kept else min(weight.numel() * weight.element_size() // 2, size * MOST_ROWS * weight.shape[0])
        budget = max(CHUNK_BYTES, large)
    multiple = _multiple(weight, way)
    return max(budget // (size * max(weight.shape[0], 1)) // multiple * multiple, least)


def _multiple(weight: Tensor, way: str) -> int:
    return GPU_ROWS if on_gpu(weight) else LANES if way == FUSED else 1


def is_fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, rounds: bool = False) -> bool:
    """Whether csrc/cpu/linear.cpp computes the chunks. rounds: the weight is not yet rounded to bfloat16.

    There the bits of a row depend neither on the number of threads nor on the other rows; with a library's products
    they do. So float32 and bfloat16 are fused on all CPUs on which that costs little or nothing (ours_are_fast), and
    on all others after torch.use_deterministic_algorithms(True).
    """
    computable = (
        hidden.device.type == "cpu"
        and (rounds or hidden.dtype == weight.dtype)
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and (bias is None or bias.dtype != torch.float64)
        and _C is not None
        and weight.numel() > 0
        and (weight.stride(1) == 1 or weight.shape[1] == 1)
    )
    return computable and (torch.are_deterministic_algorithms_enabled() or ours_are_fast())


def ours_are_fast() -> bool:
    """Whether the fused way takes at most a tenth longer on this CPU than PyTorch's products with our softmax between.

    Measured, as time of a step, fused divided by PyTorch's, with kernels 3 to 8 % slower than today's:
    float32 with AVX-512 on Intel CPUs, where MKL multiplies: 0.95 to 1.05 at 2048 x 256 x 50257; 1.0 to 1.12 at
        2048 x 896 x 50257 (more on a busier host) and for 256 rows of a vocabulary of 2048.
    float32 with AVX-512 on AMD CPUs, where MKL uses AVX2: 0.4 to 0.9.
    bfloat16 with AVX-512: 0.77 to 0.97 of float32 products of converted factors. With avx512_bf16 as fast as PyTorch's
        products, which use it too.
    AVX2: 0.93 to 1.06.
    bfloat16 with AMX: 0.5 to 0.67 of float32 products in the forward and bfloat16 ones in the backward, at a width of
        256 and 896 (bench/notes.md).
    Portable code is slower than a library.
    """
    return _C.isa() != "portable"


ours_are_fast._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which would import Dynamo


def logits_shape(rows: int, vocab: int, way: str) -> tuple[int, int]:
    """The shape of the memory for the logits of a chunk."""
    if way == IN_DTYPE:
        return rows, math.ceil(vocab / GPU_LINE) * GPU_LINE
    return (math.ceil(rows / LANES) * LANES if way == FUSED else rows), vocab


def logits_dtype(hidden: Tensor, way: str) -> torch.dtype:
    return hidden.dtype if way == IN_DTYPE else accumulation_dtype(hidden)


def logits_buffer(inputs: Inputs, needed: bool) -> Tensor | None:
    """Memory for the logits of the largest chunk. None if FUSED computes only statistics, which needs no logits."""
    if inputs.way == FUSED and not needed:
        return None
    most = max((p.stop - p.start for p in inputs.parts), default=0)
    shape = logits_shape(most, inputs.weight.shape[0], inputs.way)
    return torch.empty(shape, dtype=logits_dtype(inputs.hidden, inputs.way), device=inputs.hidden.device)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradient by a tensor of this dtype: float32 for float16, until the backward has multiplied by
    its factor (a loss scale). Autograd then rounds the product."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_statistics(
    buffer: Tensor | None, inputs: Inputs, part: slice, temperature: float, with_entropy: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The logits z of a chunk, in the buffer, and logprobs, entropy and saved of its rows (as in token_logprobs)."""
    if inputs.way != FUSED:
        z = write_logits(buffer, inputs, part)
        return z, *row_forward.kernel_on(z.device.type)(z, inputs.labels[part], None, temperature, with_entropy, False)
    rows = part.stop - part.start
    logprobs, saved, entropy = empties(inputs.hidden, torch.float32, rows, (rows, 2), rows if with_entropy else None)
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    _C.linear_forward(
        *product_arguments(inputs, part), bias, inputs.softcap or 0.0, inputs.labels[part], temperature, buffer,
        logprobs, entropy, saved, torch.get_num_threads(),
    )  # fmt: skip
    return buffer, logprobs, entropy, saved


def product_arguments(inputs: Inputs, part: slice) -> tuple:
    """The first arguments of both native ops (csrc/ops.h)."""
    hidden, weight = inputs.hidden[part].contiguous(), inputs.weight
    if weight.stride(1) != 1:  # under vmap one weight of a batch may have other strides than is_fused saw
        weight = weight.contiguous()
    code = DTYPE_CODES[hidden.dtype]
    return hidden, hidden.stride(0), weight, weight.stride(0), code, hidden.shape[0], *weight.shape


def chunk_logits(buffer: Tensor, inputs: Inputs, part: slice, temperature: float) -> Tensor:
    """The logits of a chunk, in the buffer: the first result of chunk_statistics."""
    if inputs.way == FUSED:
        return chunk_statistics(buffer, inputs, part, temperature, False)[0]
    return write_logits(buffer, inputs, part)


def write_logits(z: Tensor, inputs: Inputs, part: slice) -> Tensor:
    """Writes the logits of a chunk into z, in the dtype of z -> z (rows of part, V)."""
    weight = inputs.weight
    z, x = z[: part.stop - part.start, : weight.shape[0]], inputs.hidden[part].to(z.dtype)
    if inputs.way == IN_DTYPE and inputs.bias is not None:
        return torch.addmm(inputs.bias, x, weight.T, out=z)  # one rounding for product and bias
    if weight.dtype == z.dtype:
        torch.mm(x, weight.T, out=z)
    else:
        for v in range(0, weight.shape[0], TILE):
            torch.mm(x, weight[v : v + TILE].to(z.dtype).T, out=z[:, v : v + TILE])
    if inputs.bias is not None:
        z.add_(inputs.bias)
    if inputs.softcap is not None:
        z.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return z


def known_chunk_gradient(
    buffer: Tensor | None, inputs: Inputs, part: slice, temperature: float, weights: Tensor, ppo: PpoTokens | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's logits turned into their gradient, in the buffer, and the logprobs and entropies of its rows."""
    z = write_logits(buffer, inputs, part)
    return z, *known_gradient(z, inputs.labels[part], None, temperature, weights, ppo)


def takes_known_gradient(inputs: Inputs) -> bool:
    """Whether known_chunk_gradient is the way for these chunks, in an op that knows its gradient in the forward."""
    return inputs.way == IN_DTYPE and row_forward.backend_on(inputs.hidden.device.type) == "native"


class Gradients:
    """Sums the gradients of hidden, weight and bias over the chunks. `wanted` says which of them are needed.
    grad_hidden: the memory for the first; by default new memory, in gradient_dtype."""

    def __init__(self, inputs: Inputs, wanted: tuple[bool, bool, bool], grad_hidden: Tensor | None = None):
        self.inputs, self.wanted = inputs, wanted
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        dtype = accumulation_dtype(hidden)
        if grad_hidden is None:
            shape = hidden.shape if wanted[0] else 0
            grad_hidden = torch.empty(shape, dtype=gradient_dtype(hidden.dtype), device=hidden.device)
        self.hidden = grad_hidden
        # If there is only one chunk, its product writes the gradient in the weight's dtype, without a float32 sum.
        once = inputs.way != WIDE and len(inputs.parts) <= 1
        total = inputs.weight_dtype if once else dtype
        shape = weight.shape if wanted[1] else (0,)
        if total == inputs.weight_dtype:
            (self.weight,) = empties(weight, total, tuple(shape))
        else:  # not from empties: `narrowed` returns the pages of this sum to the system while it converts it
            self.weight = torch.empty(shape, dtype=total, device=hidden.device)
        self.bias = torch.zeros(bias.shape if wanted[2] else 0, dtype=dtype, device=hidden.device)
        self.beta = 0  # the first chunk overwrites the sums, the others add to them

    def add(self, z, part, temperature, saved, entropy, grad_logprobs, grad_entropy) -> None:
        """Adds the gradients of a chunk with the logits z, which are overwritten with their gradient."""
        if self.inputs.way == FUSED:
            self._add_fused(z, part, temperature, saved, entropy, grad_logprobs, grad_entropy)
            self.beta = 1
            return
        inputs, labels = self.inputs, self.inputs.labels[part]
        # The derivative of cap tanh(x / cap), by its value z.
        slope = None if inputs.softcap is None else 1 - (z / inputs.softcap).square_()
        row_backward.kernel_on(z.device.type)(
            z, labels, None, temperature, saved, entropy, grad_logprobs, grad_entropy, z
        )
        if slope is not None:
            z.mul_(slope)
        self.multiply(z, part)

    def multiply(self, z: Tensor, part: slice) -> None:
        """Adds the gradients of a chunk, given z, the gradient of its logits. Not for FUSED."""
        inputs = self.inputs
        if self.wanted[2]:
            self.bias += z.sum(0, dtype=self.bias.dtype)
        hidden, weight = inputs.hidden[part], inputs.weight
        if not half_products_are_native(hidden, weight):
            hidden = hidden.to(z.dtype)
        else:
            z = z.to(hidden.dtype)
        if self.wanted[0] and self.hidden.dtype == z.dtype == weight.dtype:
            torch.mm(z, weight, out=self.hidden[part])
        elif self.wanted[0]:
            self.hidden[part] = product(z, weight)
        if self.wanted[1]:
            self._add_weight(z, hidden)
        self.beta = 1

    def _add_fused(self, z, part, temperature, saved, entropy, grad_logprobs, grad_entropy) -> None:
        shape = (part.stop - part.start, self.inputs.hidden.shape[1])
        grad_hidden = saved.new_empty(shape) if self.wanted[0] else None
        inputs, (_, weight, bias) = self.inputs, self.wanted
        _C.linear_backward(
            *product_arguments(inputs, part), inputs.softcap or 0.0, inputs.labels[part], temperature, z, saved,
            entropy, grad_logprobs, grad_entropy, grad_hidden, self.weight if weight else None,
            DTYPE_CODES[self.weight.dtype], self.bias if bias else None, self.beta, torch.get_num_threads(),
        )  # fmt: skip
        if self.wanted[0]:
            self.hidden[part] = grad_hidden

    def _add_weight(self, dz: Tensor, x: Tensor) -> None:
        if x.dtype == self.weight.dtype:
            torch.addmm(self.weight, dz.T, x, beta=self.beta, out=self.weight)
            return
        if x.is_cuda and sums_in_float32():  # half-precision factors, float32 sum
            torch.addmm(self.weight, dz.T, x, out_dtype=self.weight.dtype, beta=self.beta, out=self.weight)
            return
        for v in range(0, self.weight.shape[0], TILE):
            tile = self.weight[v : v + TILE]
            update = torch.mm(dz[:, v : v + TILE].T, x, out=x.new_empty(tile.shape))
            if self.beta:
                tile += update
            else:
                tile.copy_(update)

    def results(self) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias; None for those that are not wanted."""
        inputs = self.inputs
        if self.beta == 0:  # there was no chunk
            self.weight.zero_()
        return (
            inputs.put(self.hidden) if self.wanted[0] else None,
            narrowed(self.weight, gradient_dtype(inputs.weight_dtype)) if self.wanted[1] else None,
            self.bias.to(gradient_dtype(inputs.bias.dtype)) if self.wanted[2] else None,
        )


@lru_cache(None)
def sums_in_float32() -> bool:
    """Whether this PyTorch, on a GPU, can add a product of half-precision factors to a float32 sum.

    With older versions each tile of the product is rounded to half precision and then added in a separate pass.
    """
    return tuple(map(int, torch.__version__.split(".")[:2])) >= SUMS_IN_FLOAT32_SINCE


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x converted to dtype. x is lost: for a large x its memory is freed while the result is written."""
    if (x.dtype, dtype) != (torch.float32, torch.bfloat16) or x.device.type != "cpu" or _C is None:
        return x.to(dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    _C.linear_narrow(x, x.numel(), out, torch.get_num_threads())
    return out


def product(dz: Tensor, weight: Tensor) -> Tensor:
    """dz @ weight. If the dtypes differ, the weight is converted tile by tile."""
    if dz.dtype == weight.dtype:
        return torch.mm(dz, weight, out=dz.new_empty(dz.shape[0], weight.shape[1]))  # autocast ignores mm with out=
    total = dz.new_zeros(dz.shape[0], weight.shape[1])
    for v in range(0, weight.shape[0], TILE):
        total.addmm_(dz[:, v : v + TILE], weight[v : v + TILE].to(dz.dtype))
    return total


def half_products_are_native(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the two gradient products run in bfloat16, with dz rounded to it, instead of float32.

    True on a GPU, and on a CPU that has instructions for bfloat16: 187 against 85 GFLOP/s per core with avx512_bf16
    (EPYC 9004), but 20 against 80 without. On a CPU the logits are always float32, because log-probabilities are
    float32 results.
    """
    if hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    return on_gpu(hidden) or torch.cpu._is_avx512_bf16_supported()


def flops_of_logits(hidden, weight, *rest, out_val=None) -> int:
    """For torch.utils.flop_counter. Counted is what the products with all logits would take in PyTorch, as for an MFU:
    masked rows too, and no logits that a backward computes again."""
    return 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1]


def flops_of_gradients(hidden, weight, *rest, out_val=None) -> int:
    grad_hidden, grad_weight, _ = rest[-3:]
    return (grad_hidden + grad_weight) * flops_of_logits(hidden, weight)


def flops_of_loss(*args, out_val=None) -> int:
    """Of a loss that computes its gradients in the forward."""
    return flops_of_logits(*args) + flops_of_gradients(*args)


def empty_gradients(hidden, weight, bias, wanted) -> tuple[Tensor | None, ...]:
    """Empty tensors like the results of Gradients.results, for fake kernels."""
    return tuple(
        x.new_empty(x.shape, dtype=gradient_dtype(x.dtype)) if want else None
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def check(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, mask, softcap) -> None:
    """Checks the inputs that the three ops from hidden states have in common."""
    check_tensors(op, optional=("bias", "mask"), hidden=hidden, weight=weight, labels=labels, bias=bias, mask=mask)
    if hidden.ndim == 0 or hidden.shape[:-1] != labels.shape or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} must be (..., D), weight {tuple(weight.shape)} (V, D), "
            f"labels {tuple(labels.shape)} (...)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be (V,) = ({weight.shape[0]},)")
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(f"{op}: mask {tuple(mask.shape)} must have the shape of labels {tuple(labels.shape)}")
    if labels.dtype not in INTEGERS:
        raise dtype_error(op, "labels", labels, "integer token ids")
    for name, t in (("weight", weight), ("labels", labels), ("bias", bias), ("mask", mask)):
        if t is not None and t.device != hidden.device:
            raise device_error(op, name, t, "hidden", hidden)
    for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):  # float8 would need its scales too
        if t is not None and t.dtype not in DTYPE_CODES:
            raise dtype_error(op, name, t)
    if softcap is not None:
        check_positive(op, "softcap", softcap)  # finite, because inf tanh(0) is NaN
    check_vocabulary(op, weight.shape[0], hidden)
