"""Which kernel runs an op: the table (op, device) -> backend, and the two ways to call a native op.

A public function asks `op.backend(tensor)`. The backend "reference" is ops/reference.py: plain PyTorch with PyTorch's
autograd. Any other backend is a native kernel, and `op(...)` calls it in one of two ways:
    directly, for plain tensors in eager mode: one autograd.Function, or no wrapper at all if nothing requires grad;
    through torch.library in all other cases (torch.compile, fake tensors, functorch, tensor subclasses).

The kernels of a device are listed in order of preference. On a CPU the order is measured (bench/results/cpu_*.json
compare native with eager and torch.compile). On a GPU, native before triton is predicted (bench/notes.md) and not yet
measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from operator import itemgetter

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ._layout import DTYPE_CODES, accumulation_dtype
from ._statistics import Statistics

try:
    from .. import _C
except ImportError as error:  # a source tree that is not built; backends() and the errors on the CPU say so
    _C, _C_MISSING = None, str(error)
else:
    if getattr(_C, "interface", 1) != 12:  # csrc/bindings.cpp
        _C, _C_MISSING = None, "the existing one was built from another version of the source tree"

HOW_TO_BUILD = "with nvcc on PATH run pip install . in the source tree (RLHF_FAST_CUDA=1 makes a missing nvcc an error)"

_LIBRARY = torch.library.Library("rlhf_fast", "DEF")
_NO_CUDA_GRAPH = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # torch 2.6: none
_HAS_TRITON = find_spec("triton") is not None  # asked at import, because not every torch.compile can trace find_spec
_OPS: dict[str, Op] = {}
_forced: str | None = None  # the backend of use_backend


def _unavailable(device: str, backend: str) -> str | None:
    """Why a backend cannot run on this machine; None where it can."""
    if device == "cpu":
        if backend == "native" and _C is None:
            return f"rlhf_fast._C is not built ({_C_MISSING}); run pip install . in the source tree"
        if backend == "triton":
            return "Triton runs on the CPU only in its interpreter, which use_backend('triton') asks for"
    elif backend == "native":
        if _C is None or _C.cuda_version is None:
            return f"this build has no CUDA kernels; {HOW_TO_BUILD}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    elif backend == "triton" and not _HAS_TRITON:
        return "triton is not installed"
    return None


class Op:
    """One native op: its schema for torch.library, its kernels by device and backend (best first), fake and derivative.

    A kernel (and fake) may return None for an output that is not wanted. Autograd sees only the first `differentiable`
    outputs. The derivative is given in one of two forms:
        backward and setup_context, as for torch.library.register_autograd;
        gradients, {input: output}, for a loss whose kernel also computes its gradients. They are the last outputs, and
        the backward scales them. For plain tensors autograd does not see the kernel's inputs and outputs: the kernel
        runs first, and then an autograd.Function receives its loss and keeps its gradients.
    An op without a derivative is a backward op, or its inputs are detached (gae).

    statistics: names of the elements of the second output. A call then returns the first output, a dict of these, and
    the outputs between them and the gradients.
    in_c: forward and backward of Op.function in C, for the CPU's native kernel (csrc/rows.h).
    in_backward: another op's backward also calls this one. Implied for an op without a derivative.
    waits: on a GPU the op may synchronise with the device, so torch.compile must leave it out of its CUDA graphs.
    flops: the formula for torch.utils.flop_counter, of the arguments and out_val.
    """

    def __init__(
        self, schema, kernels, fake, backward=None, setup_context=None, *, gradients=None, differentiable=1,
        statistics=None, in_c=None, in_backward=False, waits=False, flops=None,
    ):  # fmt: skip
        self.name, self._schema, self._statistics = schema.split("(")[0], schema, statistics
        self.public = self.name.removesuffix("_forward").removesuffix("_backward")  # the name in messages
        self.kernels: dict[str, dict[str, Callable]] = {}
        for (device, backend), kernel in kernels.items():
            self.kernels.setdefault(device, {})[backend] = kernel
        self._chosen: dict[str, str] = {}  # device -> backend, filled on first use
        self._ready: dict[str, Callable] = {}  # device -> kernel, emptied when another backend is forced
        # The arguments that autograd sees: only those that may have a gradient, because each one costs time.
        tensors = schema.split(" -> ")[0].count("Tensor")
        shown = tuple(range(tensors) if gradients is None else gradients)
        self._shown = _several(shown)
        self._route = _route_in_backward if in_backward or backward is gradients is None else _route

        self._in_backward, self._overload = in_backward, self._digest()
        overload = f"{self.name}.{self._overload}"
        qualname = f"rlhf_fast::{overload}"
        tags = (torch.Tag.pt2_compliant_tag, *(_NO_CUDA_GRAPH if waits else ()))
        _LIBRARY.define(schema.replace(self.name, overload, 1), tags=tags)
        for device in self.kernels:
            _LIBRARY.impl(overload, lambda *args: _in_full(self.run(*args)), device.upper())
        torch.library.register_fake(qualname, lambda *args: self._run_fake(fake, args), lib=_LIBRARY)
        self._flops = flops
        self._apply = self.function = self._in_c = None
        self._knows_gradients = gradients is not None
        self._others = slice(2, min(gradients.values()) if gradients else 2)
        if gradients is not None:
            self._differentiate(qualname, *_scaled(self.public, gradients), 1)
            self._make_function(_keep_gradients, _scale_gradients, _give_gradients)
        elif backward is not None:
            once = self._differentiate(qualname, backward, setup_context, differentiable)
            self._make_function(*self._directly(backward, once, setup_context, differentiable, len(shown)))
            self._in_c = in_c
            self.follow(None)
        else:  # a backward op; without this a second derivative would silently be zero
            torch.library.register_autograd(qualname, self._refuse_gradient, lib=_LIBRARY)
        self.library_op = getattr(getattr(torch.ops.rlhf_fast, self.name), self._overload)
        _OPS[self.name] = self

    def _digest(self) -> str:
        """A digest of this schema and of those that its backward may call, which are defined before it: that of its
        backward, and the ops in_backward, with what theirs call.

        Inductor's caches on disk outlive a version of this package. They know an op by its name, and a graph in them
        also calls the backward: without the digest a graph of another version would call it with the arguments of then.
        """
        called = [op for op in _OPS.values() if op.public == self.public or op._in_backward]
        known = [*(op._overload + op._schema for op in called), self._schema]
        return "v" + blake2b("\n".join(known).encode(), digest_size=4).hexdigest()

    def _differentiate(
        self, qualname: str, backward: Callable, setup_context: Callable, differentiable: int
    ) -> Callable:
        """Registers the derivative with torch.library -> a backward whose gradients refuse a second derivative."""

        def setup(ctx, inputs, output):
            ctx.mark_non_differentiable(*output[differentiable:])
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def backward_once(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            saved = grads[-1] if isinstance(grads[-1], tuple) else ctx.saved_tensors  # csrc/rows.h may have read them
            inputs = _inputs(ctx, saved)  # now, for an in-place backward writes over what is saved
            with torch.no_grad():  # create_graph
                return _once(backward(_ReadContext(ctx, saved), *grads), inputs)

        torch.library.register_autograd(qualname, backward_once, setup_context=setup, lib=_LIBRARY)
        return backward_once

    def _directly(
        self, backward: Callable, backward_once: Callable, setup_context: Callable, differentiable: int, shown: int
    ) -> tuple[Callable, Callable, Callable]:
        """forward, backward and apply for _make_function.

        The Function is called with the arguments that autograd sees, followed by one tuple of all arguments, which
        autograd does not look into.
        """

        def forward(ctx, *given):  # with a separate setup_context apply() would inspect signatures, 25 us per call
            args = given[-1]
            outputs = self.run(*args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, outputs)
            return *outputs[:differentiable], outputs[differentiable:]  # the last is a tuple, which autograd ignores

        def backward_of_inputs(ctx, *grads):
            once = backward_once if torch.is_grad_enabled() else backward
            return *once(ctx, *grads)[:shown], None

        return forward, backward_of_inputs, backward_of_inputs

    def _make_function(self, forward: Callable, backward: Callable, apply: Callable) -> None:
        """Makes the autograd.Function of this op.

        apply: called by the engine, with the same results as backward. It saves the engine Function's own search for
        the backward, 1 us per call.
        """
        methods = {"forward": forward, "forward_in_python": forward, "backward": backward}
        methods = {name: staticmethod(method) for name, method in methods.items()}
        self.function = type(self.name, (torch.autograd.Function,), methods)
        self.function._backward_cls.direct = True  # seen as ctx.direct, see may_consume
        self.function._backward_cls.apply = apply
        # Not Function.apply, which would look at each argument for functorch; route() has ruled that out.
        self._apply = super(torch.autograd.Function, self.function).apply

    def _refuse_gradient(self, ctx, *grads):
        raise RuntimeError(f"{self.public} is differentiable once only; use_backend('reference') has no such limit")

    def _refuse_tangents(self, args):
        """Without this a forward-mode derivative would silently be zero."""
        if forward_ad._current_level >= 0 and _has_tangent(args):
            self._refuse_forward_mode()

    def _refuse_forward_mode(self):
        raise NotImplementedError(
            f"{self.public} has no forward-mode derivative (torch.func.jvp); use_backend('reference') has one"
        )

    def _refuse_functorch_gradients(self, args):
        """torch's own error would mention an autograd.Function that the user has never seen."""
        tensors = [unbatched(x) for x in args if isinstance(x, Tensor)]
        if any(x.requires_grad and functorch.is_gradtrackingtensor(x) for x in tensors):
            raise NotImplementedError(
                f"{self.public} has no derivative for torch.func (grad, vjp, jacrev); use loss.backward() or "
                "torch.autograd.grad, or use_backend('reference'), which has one"
            )

    def _refuse_sharded(self, args):
        """torch's own error would ask for all arguments to be DTensors, for which there is no kernel either."""
        for x, argument in zip(args, self.library_op._schema.arguments, strict=False):
            if type(x).__name__ == "DTensor":
                if argument.name in ("weight", "bias"):
                    advice = (
                        "Parameters that fully_shard has sharded are whole inside the forward of the module that it "
                        "was called on: call the loss there, and shard the lm_head together with that module, not by "
                        "itself"
                    )
                else:
                    advice = (
                        f"{argument.name}.full_tensor() is the whole of it, as logits need that are sharded over the "
                        "vocabulary; to_local() is the share of this process, for a loss over its own rows"
                    )
                raise TypeError(f"{self.public}: {argument.name} is a DTensor; needs a plain tensor. {advice}")

    def _be_counted(self) -> None:
        """Gives torch.utils.flop_counter the formula of this op: not at import, because that module imports Triton. A
        counter has copied the formulas when it was made, so those that count now are given it too."""
        if self._flops is None:
            return
        from torch.utils.flop_counter import flop_registry

        counters = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
        for formulas in (flop_registry, *(c.flop_registry for c in counters if hasattr(c, "flop_registry"))):
            formulas.setdefault(self.library_op.overloadpacket, self._flops)

    def __call__(self, *args):
        if is_compiling():
            if forward_ad._current_level >= 0:
                self._refuse_forward_mode()
            return self._through_library(args)
        way = self._route(*args)
        if way == _LIBRARY_OP or _jit_trace() is not None:
            self._refuse_tangents(args)
            self._refuse_functorch_gradients(args)
            self._refuse_sharded(args)
            self._be_counted()
            return self._through_library(args)
        if way != _FUNCTION or self._apply is None:
            outputs = self._run_by_name(args)
        elif self._knows_gradients:
            outputs = self._run_by_name(args)
            outputs = self._apply(*self._shown(args), outputs), *outputs[1:]
        else:
            outputs = self._apply(*self._shown(args), args)
            outputs = outputs[:-1] + outputs[-1]
        if self._statistics is None:
            return outputs
        return outputs[0], Statistics(self._statistics, outputs[1]), *outputs[self._others]

    def _through_library(self, args):
        outputs = self.library_op(*args)
        if self._statistics is None:
            return outputs
        return outputs[0], dict(zip(self._statistics, outputs[1].unbind(), strict=True)), *outputs[self._others]

    def _run_by_name(self, args):
        """run, under the name of this op in a profile. Elsewhere the dispatcher or the autograd.Function names it."""
        if not _is_profiling():
            return self.run(*args)
        with torch.profiler.record_function(self.name):
            return self.run(*args)

    def _run_fake(self, fake: Callable, args):
        self._be_counted()  # for a compiled graph, which calls the library's op
        return _in_full(fake(*args))

    def run(self, *args):
        device = device_type(args[0])
        kernel = self._ready.get(device) or self.kernel_on(device)
        try:
            return kernel(*args)
        except _NEGATED:
            return _on_resolved(kernel, *args)

    def follow(self, forced: str | None) -> None:
        """Adapts to the backend that use_backend forces from now on, or to none."""
        self._ready = {}
        if self._in_c is not None:
            python = self.function.forward_in_python, self.function.backward
            native = forced in (None, "native", "reference")  # reference: for a backward whose forward was native
            forward, self.function._backward_cls.apply = self._in_c if native else python
            self.function.forward = staticmethod(forward)

    def kernel_on(self, device: str) -> Callable:
        ready = self._ready  # read first: if another thread forces a backend meanwhile, it replaces this dict
        backend = self.backend_on(device)
        if backend == "reference":  # forced after the forward, which was native
            backend, _ = self._choose(device)
        kernel = self.kernels[device][backend]
        # Triton reads the addresses of tensors itself and does not raise _NEGATED.
        ready[device] = kernel = partial(_on_resolved, kernel) if backend == "triton" else kernel
        return kernel

    def backend(self, tensor: Tensor) -> str:
        """The backend that runs this op on the device of tensor."""
        device = device_type(tensor)
        if is_compiling() and _forced is None:  # _chosen, filled by the first call, would be a guard that then fails
            return self._choose(device)[0]
        return (self._chosen.get(device) if _forced is None else None) or self.backend_on(device)

    def backend_on(self, device: str) -> str:
        if (forced := _forced) is not None:  # read once, because another thread may end use_backend meanwhile
            if forced != "reference" and forced not in self.kernels.get(device, ()):
                raise RuntimeError(f"{self.public}: has no kernel for use_backend({forced!r}) on {device}")
            return forced
        if device not in self._chosen:
            self._chosen[device], why = self._choose(device)
            if self._chosen[device] == "reference" and torch.cuda.is_available() and not is_compiling():
                warnings.warn(f"{self.public} runs in plain PyTorch on {device}: {why}", stacklevel=4)
        return self._chosen[device]

    def _choose(self, device: str) -> tuple[str, str | None]:
        """The first available backend, and why the better ones are not available."""
        reasons = []
        for backend in self.kernels.get(device, ()):
            reason = _unavailable(device, backend)
            if reason is None:
                return backend, "; ".join(reasons) or None
            reasons.append(f"{backend}: {reason}")
        if device == "cpu" and reasons:
            raise RuntimeError(f"{self.public}: {reasons[0]}. For plain PyTorch: rlhf_fast.use_backend('reference')")
        if reasons and device == "cuda" and torch.cuda.is_available():
            if "triton" not in self.kernels[device] and _unavailable(device, "triton") is None:
                # The expensive ops have Triton kernels, and PPO should not fail because of a small op that has none.
                return "reference", f"{reasons[0]}; triton: this op has no kernel"
            raise RuntimeError(
                f"{self.public} got a CUDA tensor, and {'; '.join(reasons)}. For plain PyTorch: "
                "rlhf_fast.use_backend('reference')"
            )
        return "reference", "; ".join(reasons) or f"there is no kernel for {device} yet"


# Return values of route (the way of a call) and of consume (who else holds the saved outputs), see csrc/tensor.h.
# Without the native module all calls go through torch.library.
_LIBRARY_OP, _FUNCTION = 0, 2
_is_profiling = torch._C._autograd._profiler_enabled
_jit_trace = torch._C._get_tracing_state  # torch.jit.trace would keep a kernel's results as constants
_SHARED = 0
_ONCE = "trying to differentiate twice a function of rlhf_fast; use_backend('reference') has no such limit"
_route = (lambda *arguments: _LIBRARY_OP) if _C is None else _C.route
_route_in_backward = (lambda *arguments: _LIBRARY_OP) if _C is None else _C.route_in_backward
_consume = (lambda *tensors: _SHARED) if _C is None else _C.consume
_NEGATED = () if _C is None else _C.Negated  # raised for a tensor with torch's negative bit set, such as z.conj().imag
_keep_gradients = None if _C is None else _C.keep_gradients
_give_gradients = None if _C is None else _C.give_gradients


def _scale_gradients(ctx, factor: Tensor | None, saved: tuple | None = None) -> tuple[Tensor | None, ...]:
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


def _several(places: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """An itemgetter that returns a tuple even for one place."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _on_resolved(kernel: Callable, *args, **options):
    return kernel(*[x.resolve_neg() if isinstance(x, Tensor) else x for x in args], **options)


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


def unbatched(x: Tensor) -> Tensor:
    """x without vmap's wrappers, which show neither requires_grad nor a tangent."""
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return x


@torch._disable_dynamo  # which would not see the tangents
def _has_tangent(args) -> bool:
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(unbatched(x)).tangent is not None for x in args)


def plain_in_backward(*arguments) -> bool:
    """Whether a backward may call kernels directly: plain tensors, and neither a compiler, functorch nor a mode."""
    return not is_compiling() and _route_in_backward(*arguments) != _LIBRARY_OP


def empties(like: Tensor, dtype: torch.dtype | None, *shapes) -> tuple[Tensor | None, ...]:
    """Uninitialised contiguous tensors on the device of like, one for each shape.

    A shape is a tensor (whose shape is meant), a number, or a tuple of these; None gives None. dtype None is the dtype
    in which like's values are accumulated. On a CPU the native module allocates, in a third of PyTorch's time, and
    large tensors reuse the memory of a previous step (csrc/memory.h). Tensors from there cannot grow, neither by
    resize_ nor as an out= of another shape.
    """
    made = _empties(like, -1 if dtype is None else DTYPE_CODES[dtype], *shapes)
    if made is not None:
        return made
    dtype = dtype or accumulation_dtype(like)
    return tuple(None if s is None else torch.empty(_sizes(s), dtype=dtype, device=like.device) for s in shapes)


_empties = (lambda *given: None) if _C is None else _C.empties


def _sizes(shape) -> tuple[int, ...]:
    if isinstance(shape, Tensor):
        return tuple(shape.shape)
    return tuple(n for part in shape for n in _sizes(part)) if isinstance(shape, tuple) else (shape,)


def empty_cache() -> int:
    """Returns the memory that is kept for large CPU gradients to the system -> its size in bytes."""
    return _C.empty_cache() if hasattr(_C, "empty_cache") else 0  # the tests' emulation of a GPU has none


def device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # is_cpu takes a fifth of the time of x.device, which makes an object


def _in_full(outputs):
    """The outputs with an empty tensor for None, which torch.library does not allow."""
    if isinstance(outputs, Tensor):
        return outputs
    some = next(o for o in outputs if o is not None)
    return tuple(some.new_empty(0) if o is None else o for o in outputs)


def may_consume(ctx, grad: Tensor | None, *saved: Tensor | None) -> bool:
    """In a backward: whether saved outputs may be overwritten, because nothing else uses them and it runs only once."""
    # ctx.direct is set in Op.function. torch.library, whose ctx does not have it, makes all outputs visible.
    return getattr(ctx, "direct", False) and not is_compiling() and _consume(grad, *saved) != _SHARED


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
    if large and factor.dtype in (torch.float32, torch.float64) and _unavailable("cuda", "native") is None:
        launch("scale", (g, DTYPE_CODES[g.dtype], g.numel(), factor, DTYPE_CODES[factor.dtype]))
        return g
    return g.mul_(factor)


def _scaled(name: str, gradients: dict[int, int]) -> tuple[Callable, Callable]:
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


@contextmanager
def use_backend(name: str):
    """Runs every op on one backend inside the block: "reference", "native" or "triton". Applies to all threads."""
    if name not in ("reference", "native", "triton"):
        raise ValueError(f"use_backend: {name!r} must be 'reference', 'native' or 'triton'")
    before = _forced
    _force(name)
    try:
        yield
    finally:
        _force(before)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    for op in _OPS.values():
        op.follow(name)


def is_forced() -> bool:
    """Whether use_backend is active."""
    return _forced is not None


def backends() -> dict[str, dict[str, dict[str, str | None]]]:
    """{op: {device: {"backend": which one runs, "why": why no better one does}}} for the devices "cpu" and "cuda"."""
    table = {}
    for kernel, op in sorted(_OPS.items()):
        if kernel.endswith("_backward"):  # runs on the backend of its forward
            continue
        name = op.public
        table[name] = {}
        for device in ("cpu", "cuda"):
            try:
                backend, why = op._choose(device)
            except RuntimeError as error:
                backend, why = "none", str(error)
            table[name][device] = {"backend": backend, "why": why}
    return table


def launch(op: str, arguments: tuple, scratch_rows: int | None = None) -> None:
    """Queues a CUDA op of csrc/ops.h on the current stream of the device of its first tensor."""
    device = arguments[0].device
    if scratch_rows is not None:  # freed before the kernel has run, but only later work on this stream can reuse it
        size = _C.cuda.scratch_doubles + scratch_rows
        arguments = (*arguments, torch.empty(size, dtype=torch.float64, device=device))
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        # Not torch.cuda.current_stream: 4 us for 0.2 (PyTorch pull request 78165), where a small op's call takes 20.
        error = getattr(_C.cuda, op)(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    if error:
        raise RuntimeError(f"{op}: the launch on {device} failed with cudaError_t {error}{_meaning(error)}")


def _meaning(error: int) -> str:
    if error >= 700 and error != 701:  # CUDA reports that a kernel has failed in the next call, whichever it is
        return ", from a kernel that ran before this one; CUDA_LAUNCH_BLOCKING=1 finds out which"
    if error == 209:
        return f": this build has code only for {_C.cuda_architectures} (RLHF_FAST_CUDA_ARCHITECTURES)"
    return f": the driver is older than CUDA {_C.cuda_version}, which built the kernels" if error == 35 else ""


def native(
    op: str, arguments: Callable, *, scratch: bool, triton: str | None = None
) -> dict[tuple[str, str], Callable]:
    """The kernels of an op. arguments(*args) returns the arguments that csrc/ops.h lists for it, and its outputs.

    scratch: the CUDA kernel needs scratch memory. triton: the module of rlhf_fast.kernels that has a function named op.
    """

    kernel = getattr(_C, op, None)

    def cpu(*args):
        given, outputs = arguments(*args)
        kernel(*given, torch.get_num_threads())
        return outputs

    def cuda(*args):
        given, outputs = arguments(*args)
        launch(op, given, max(args[0].shape[0], 1) if scratch else None)
        return outputs

    def in_triton(*args):
        given, outputs = arguments(*args)
        with torch.no_grad(), torch.cuda.device_of(args[0]):
            getattr(import_module(f"rlhf_fast.kernels.{triton}"), op)(*given)
        return outputs

    kernels = {("cpu", "native"): cpu, ("cuda", "native"): cuda}
    if triton is not None:
        kernels |= {("cpu", "triton"): in_triton, ("cuda", "triton"): in_triton}
    return kernels
