"""What autograd needs from an op: a backward that may overwrite what was saved, and errors for derivatives it lacks.

An op is differentiable once, in reverse mode. Another derivative would silently be zero, or fail in functions that the
user has never seen; here it is refused with a message that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _native
from ._layout import DTYPE_CODES
from ._native import LIBRARY_OP, launch, route_in_backward

_SHARED = 0  # a return value of consume: something else holds a saved output (csrc/tensor.h)
_consume = (lambda *tensors: _SHARED) if _native._C is None else _native._C.consume
keep_gradients = None if _native._C is None else _native._C.keep_gradients
give_gradients = None if _native._C is None else _native._C.give_gradients
_ONCE = "trying to differentiate twice a function of rlhf_fast; use_backend('reference') has no such limit"


def check_unchanged(op: str, unchanged: bool) -> None:
    """Autograd notices writes in place, but not x.data = y. If y is smaller, a kernel would read past its end."""
    if not unchanged:
        raise RuntimeError(
            f"{op}: a tensor that its backward needs has another shape or dtype than in the forward; its .data was "
            "replaced, or a hook on saved tensors returned another tensor"
        )


def check_prepared(op: str, prepared: bool) -> None:
    """For a backward that needs what its forward prepares only if an input requires a gradient there."""
    if not prepared:
        raise RuntimeError(
            f"{op}: its gradient is not in this graph, because none was needed when the graph was made (by "
            "torch.export, say); make it with inputs that require a gradient, and not under torch.no_grad"
        )


def plain_in_backward(*arguments) -> bool:
    """Whether a backward may call kernels directly: plain tensors, and neither a compiler, functorch nor a mode."""
    return not is_compiling() and route_in_backward(*arguments) != LIBRARY_OP


def may_consume(ctx, grad: Tensor | None, *saved: Tensor | None) -> bool:
    """In a backward: whether saved outputs may be overwritten, because nothing else uses them and it runs only once."""
    # ctx.direct is set in Op.function. torch.library, whose ctx does not have it, makes all outputs visible.
    return getattr(ctx, "direct", False) and not is_compiling() and _consume(grad, *saved) != _SHARED


def scale_gradients(ctx, factor: Tensor | None, saved: tuple | None = None) -> tuple[Tensor | None, ...]:
    """The backward of a loss that has kept its gradients -> the gradients times the factor, and None for the outputs.

    csrc/loss.h calls it, with the saved tensors that it has read from ctx, unless it can return them unchanged.
    """
    saved = ctx.saved_tensors if saved is None else saved
    if factor is None:
        return (None,) * (len(saved) + 1)
    shared = is_compiling() or _consume(factor, *saved) == _SHARED
    with torch.no_grad():
        grads = [None if g is None else g * factor if shared else _times(g, factor) for g in saved]
    return *(_once(grads, _inputs(ctx, saved)) if torch.is_grad_enabled() else grads), None


def differentiable_once(backward: Callable) -> Callable:
    """backward(ctx, *grads), with gradients that raise an error when they are differentiated."""

    def backward_once(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        saved = grads[-1] if isinstance(grads[-1], tuple) else ctx.saved_tensors  # csrc/rows.h may have read them
        inputs = _inputs(ctx, saved)  # now, for an in-place backward writes over what is saved
        with torch.no_grad():  # create_graph
            return _once(backward(_ReadContext(ctx, saved), *grads), inputs)

    return backward_once


class _ReadContext:
    """A ctx whose saved tensors have been read: a checkpoint lets them be read only once."""

    def __init__(self, ctx, saved: tuple):
        self._ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name):
        return getattr(self._ctx, name)


def _inputs(ctx, saved: tuple) -> list[Tensor]:
    """Of a backward with create_graph: the inputs of the op that require a gradient. RuntimeError if one of them is
    neither saved nor a leaf, as in losses that keep their gradients only: then nobody could refuse later."""
    edges = [edge for edge, _ in ctx.next_functions if edge is not None]
    known = {x.grad_fn: x for x in saved if x is not None and x.grad_fn is not None}
    known |= {edge: edge.variable for edge in edges if hasattr(edge, "variable")}
    if not known.keys() >= set(edges):
        raise RuntimeError(_ONCE)
    return [known[edge] for edge in edges]


def _once(grads: tuple, inputs: list[Tensor]) -> tuple:
    """grads that raise an error when they are differentiated.

    PyTorch's once_differentiable does not do this after a plain loss.backward(): a penalty on the norm of a gradient,
    say, would silently have no derivative. Nor does it in torch.autograd.grad, which leaves out what does not lead to
    the tensors asked for: so the error leads to the inputs.
    """
    refuse = torch._C._functions.DelayedError(_ONCE, len(grads) + len(inputs))
    with torch.enable_grad():  # or it leads nowhere
        refusing = refuse(*(None if g is None else g.detach().requires_grad_() for g in grads), *inputs)
    return refusing[: len(grads)] if isinstance(refusing, tuple) else (refusing,)


def _times(g: Tensor, factor: Tensor) -> Tensor:
    """g *= factor. On a GPU the kernel for a large g finds out whether the factor is 1, and then leaves g alone; this
    needs no synchronisation."""
    large = g.is_cuda and g.numel() >= 1 << 20 and g.is_contiguous() and g.data_ptr() % 16 == 0
    if large and factor.dtype in (torch.float32, torch.float64) and _native.unavailable("cuda", "native") is None:
        launch("scale", (g, DTYPE_CODES[g.dtype], g.numel(), factor, DTYPE_CODES[factor.dtype]))
        return g
    return g.mul_(factor)


def scaled(name: str, gradients: dict[int, int]) -> tuple[Callable, Callable]:
    """backward and setup_context of a loss: output gradients[i], if it is wanted, is the gradient by input i."""

    def backward(ctx, factor, *_):
        grads = [None] * len(ctx.needs_input_grad)
        if factor is not None:
            for i, g in zip(gradients, ctx.saved_tensors, strict=True):
                if ctx.needs_input_grad[i]:
                    check_prepared(name, g is not None)
                    grads[i] = g * factor
        return tuple(grads)

    def setup_context(ctx, inputs, outputs):
        wanted = {i: outputs[o] for i, o in gradients.items()}  # torch.library has an empty tensor for None
        ctx.save_for_backward(
            *(None if inputs[i] is None or g.shape != inputs[i].shape else g for i, g in wanted.items())
        )

    return backward, setup_context


def refuse(op: str, schema: torch.FunctionSchema, args: tuple) -> None:
    """An error if these arguments of an op ask for what it does not have."""
    if forward_ad._current_level >= 0 and _has_tangent(args):  # the derivative would silently be zero
        refuse_forward_mode(op)
    tensors = [_unbatched(x) for x in args if isinstance(x, Tensor)]
    if any(x.requires_grad and functorch.is_gradtrackingtensor(x) for x in tensors):
        raise NotImplementedError(  # torch's own error would mention an autograd.Function that the user has never seen
            f"{op} has no derivative for torch.func (grad, vjp, jacrev); use loss.backward() or "
            "torch.autograd.grad, or use_backend('reference'), which has one"
        )
    for x, argument in zip(args, schema.arguments, strict=False):
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{op}: {argument.name} is a DTensor; needs a plain tensor. {_whole(argument.name)}")


def refuse_forward_mode(op: str) -> None:
    raise NotImplementedError(f"{op} has no forward-mode derivative (torch.func.jvp); use_backend('reference') has one")


def _whole(name: str) -> str:
    """What to do about a DTensor. torch's own error would ask for all to be DTensors, for which there is no kernel."""
    if name in ("weight", "bias"):
        return (
            "Parameters that fully_shard has sharded are whole inside the forward of the module that it was called on: "
            "call the loss there, and shard the lm_head together with that module, not by itself"
        )
    return (
        f"{name}.full_tensor() is the whole of it, as logits need that are sharded over the vocabulary; to_local() is "
        "the share of this process, for a loss over its own rows"
    )


@torch._disable_dynamo  # which would not see the tangents
def _has_tangent(args) -> bool:
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(_unbatched(x)).tangent is not None for x in args)


def _unbatched(x: Tensor) -> Tensor:
    """x without vmap's wrappers, which show neither requires_grad nor a tangent."""
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return x
