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
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from importlib import import_module
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import _autograd, _native
from ._native import FUNCTION, LIBRARY_OP, NEGATED, device_type, launch, route, route_in_backward
from ._statistics import Statistics

_LIBRARY = torch.library.Library("rlhf_fast", "DEF")
_NO_CUDA_GRAPH = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []  # torch 2.6: none
_OPS: dict[str, Op] = {}
_forced: str | None = None  # the backend of use_backend
_is_profiling = torch._C._autograd._profiler_enabled
_jit_trace = torch._C._get_tracing_state  # torch.jit.trace would keep a kernel's results as constants


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
        self._route = route_in_backward if in_backward or backward is gradients is None else route

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
            self._differentiate(qualname, *_autograd.scaled(self.public, gradients), 1)
            self._make_function(_autograd.keep_gradients, _autograd.scale_gradients, _autograd.give_gradients)
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

        once = _autograd.differentiable_once(backward)
        torch.library.register_autograd(qualname, once, setup_context=setup, lib=_LIBRARY)
        return once

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
                _autograd.refuse_forward_mode(self.public)
            return self._through_library(args)
        way = self._route(*args)
        if way == LIBRARY_OP or _jit_trace() is not None:
            _autograd.refuse(self.public, self.library_op._schema, args)
            self._be_counted()
            return self._through_library(args)
        if way != FUNCTION or self._apply is None:
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
        except NEGATED:
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
        # Triton reads the addresses of tensors itself and does not raise NEGATED.
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
            reason = _native.unavailable(device, backend)
            if reason is None:
                return backend, "; ".join(reasons) or None
            reasons.append(f"{backend}: {reason}")
        if device == "cpu" and reasons:
            raise RuntimeError(f"{self.public}: {reasons[0]}. For plain PyTorch: rlhf_fast.use_backend('reference')")
        if reasons and device == "cuda" and torch.cuda.is_available():
            if "triton" not in self.kernels[device] and _native.unavailable(device, "triton") is None:
                # The expensive ops have Triton kernels, and PPO should not fail because of a small op that has none.
                return "reference", f"{reasons[0]}; triton: this op has no kernel"
            raise RuntimeError(
                f"{self.public} got a CUDA tensor, and {'; '.join(reasons)}. For plain PyTorch: "
                "rlhf_fast.use_backend('reference')"
            )
        return "reference", "; ".join(reasons) or f"there is no kernel for {device} yet"


def _several(places: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """An itemgetter that returns a tuple even for one place."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _on_resolved(kernel: Callable, *args, **options):
    return kernel(*[x.resolve_neg() if isinstance(x, Tensor) else x for x in args], **options)


def _in_full(outputs):
    """The outputs with an empty tensor for None, which torch.library does not allow."""
    if isinstance(outputs, Tensor):
        return outputs
    some = next(o for o in outputs if o is not None)
    return tuple(some.new_empty(0) if o is None else o for o in outputs)


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


def native(
    op: str, arguments: Callable, *, scratch: bool, triton: str | None = None
) -> dict[tuple[str, str], Callable]:
    """The kernels of an op. arguments(*args) returns the arguments that csrc/ops.h lists for it, and its outputs.

    scratch: the CUDA kernel needs scratch memory. triton: the module of rlhf_fast.kernels that has a function named op.
    """

    kernel = getattr(_native._C, op, None)

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
