"""Runs PTX on the CPU: the threads of a block in lockstep as numpy vectors, one block after another.

It shows what an interpreter of Triton and a compiler for the CPU hide: fused multiply-adds, flushed subnormals, maxima
that ignore NaN, the order of reductions and scans, alignment, and every access outside a tensor. Instructions that the
kernels do not use are not here. What PTX leaves open is for `joins` and `ex2` to say: whether a product and the sum
that it enters are rounded once where neither is .rn, and the last bits of ex2.approx.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator

import numpy as np
import torch

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"u{8 * n}": bits for n, bits in BITS.items()} | {f"b{8 * n}": bits for n, bits in BITS.items()}
TYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
TYPES |= {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_}
LANES = 32
EXCHANGES = ("shfl", "vote", "redux", "ldmatrix")  # of all lanes of a warp
WINDOW = 1 << 60  # where shared memory lies among the generic addresses


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once (nearly so in float64: 64 bits of the product)."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def exact_ex2(x: np.ndarray) -> np.ndarray:
    return np.exp2(x.astype(np.float64)).astype(x.dtype)


def approximate_ex2(x: np.ndarray) -> np.ndarray:
    """Off by as much as a GPU's may be, 2^-22 of it, by the bits of x; exact at whole numbers."""
    mixed = (x.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    error = (mixed.astype(np.float64) / 2**31 - 1) * 2**-22
    return (np.exp2(x.astype(np.float64)) * (1 + np.where(x == np.rint(x), 0, error))).astype(x.dtype)


def shifted(a: np.ndarray, by: np.ndarray, operation) -> np.ndarray:
    """A shift by all bits or more gives 0, and of a signed number what a shift by all bits but one gives."""
    bits = 8 * a.itemsize
    least = np.minimum(by, bits - 1).astype(a.dtype)
    return np.where((by >= bits) & (a.dtype.kind == "u"), 0, operation(a, least)).astype(a.dtype)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    with np.errstate(all="ignore"):
        return np.trunc(a.astype(np.longdouble) / np.where(b == 0, 1, b)).astype(a.dtype)


def bits_reversed(a: np.ndarray) -> np.ndarray:
    return sum(((a >> np.uint32(i)) & np.uint32(1)) << np.uint32(31 - i) for i in range(32)).astype(np.uint32)


def most_significant(a: np.ndarray) -> np.ndarray:
    """By how much to shift the highest 1 to the top; all ones of 0."""
    return np.where(a == 0, np.uint32(0xFFFFFFFF), 31 - np.log2(np.maximum(a, 1)).astype(np.uint32)).astype(np.uint32)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, out = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.zeros(a.shape, np.uint64)
    for i in range(4):
        byte = ((selector >> np.uint32(4 * i)) & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        out |= ((both >> byte) & np.uint64(255)) << np.uint64(8 * i)
    return out.astype(np.uint32)


OPERATIONS = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "div": quotient,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "max": np.fmax,
    "min": np.fmin, "prmt": permuted,
    "ex2": exact_ex2, "brev": bits_reversed, "bfind": most_significant, "rem": np.fmod,
    "popc": lambda a: sum((a >> np.uint32(i)) & np.uint32(1) for i in range(32)),
    "shf": lambda low, high, by: (((high.astype(np.uint64) << np.uint64(32)) | low) >> (by & 31)).astype(np.uint32),
    "dp4a": lambda a, b, c: c + sum(((a >> i) & 255) * ((b >> i) & 255) for i in np.arange(0, 32, 8, np.uint32)),
    "shl": lambda a, by: shifted(a, by, np.left_shift),
    "shr": lambda a, by: shifted(a, by, np.right_shift),
    "bfe": lambda a, first, count: (a >> first) & ((a.dtype.type(1) << count) - a.dtype.type(1)),
}  # fmt: skip
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def compared(comparison: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With a NaN only comparisons whose name ends in u, and nan, are true."""
    if a.dtype.kind != "f":
        return COMPARISONS[comparison](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if comparison in ("nan", "num"):
        return unordered ^ (comparison == "num")
    return COMPARISONS[comparison[:2]](a, b) & ~unordered | unordered & (len(comparison) == 3)


def as_bytes(number: int | float) -> bytes:
    return struct.pack("<d", number) if isinstance(number, float) else (number % 2**64).to_bytes(8, "little")


class Memory:
    """What the tensors that a kernel was given span, from the boundary of 16 bytes before; elsewhere is an error."""

    def __init__(self):
        self.regions: list[tuple[int, np.ndarray]] = []

    def add(self, x: torch.Tensor) -> int:
        if x.numel():
            at = x.data_ptr() - x.data_ptr() % 16
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            size = x.data_ptr() + (last + 1) * x.element_size() - at
            self.regions.append((at, np.frombuffer((ctypes.c_uint8 * size).from_address(at), np.uint8)))
        return x.data_ptr()

    def add_variable(self, data: np.ndarray) -> int:
        at = data.ctypes.data
        if all(at != known for known, _ in self.regions):
            self.regions.append((at, data))
        return at

    def at(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(which of the addresses, their offsets, the bytes these count from) for each tensor."""
        left = np.ones(addresses.shape, bool)
        for base, data in self.regions:
            if not left.any():
                return
            offset = addresses.astype(np.int64) - base
            here = left & (offset >= 0) & (offset + size <= data.size)
            if here.any():
                yield np.flatnonzero(here), offset[here], data
            left &= ~here
        if left.any():
            raise IndexError(f"{left.sum()} threads access memory outside the tensors")


VARIABLE = re.compile(r"(\.extern )?\.(shared|global) \.align (\d+) \.(\w+) ([\w$]+)(\[(\d*)\])?")


def kernels(ptx: str) -> dict[str, Program]:
    """{name: kernel} of a module, which share its variables in global memory."""
    variables = {}
    for external, space, align, type_, name, _, count in VARIABLE.findall(ptx):
        size = np.dtype(TYPES[type_]).itemsize * int(count or not external)
        variables[name] = (space, int(align), size, np.zeros(size, np.uint8) if space == "global" else None)
    parts = re.split(r"^(?:\.visible )?\.entry ", ptx, flags=re.MULTILINE)[1:]
    return {part[: part.index("(")]: Program(part, variables) for part in parts}


class Program:
    """A kernel's instructions, its parameters, the most threads that a block may have, and its variables."""

    def __init__(self, text: str, variables: dict[str, tuple]):
        head, body = text.split("\n{", 1)
        body = body.split("\n}\n")[0]
        self.parameters = re.findall(r"\w+_param_\d+", head)
        self.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", head)[1])
        self.instructions: list[tuple[str | None, bool, list[str], list[str]]] = []
        self.labels: dict[str, int] = {}
        used = set(re.findall(r"[\w$]+", body))
        self.variables = {name: variable for name, variable in variables.items() if name in used}
        text = ""
        for line in body.splitlines():
            line = re.sub(r"^\{ +(\.reg [^;]*;)? *|(?<=;) *\}$", "", line.split("//")[0].strip()).strip()
            if line and line not in "{}" and not line.startswith("."):
                text += line + (";" if line.endswith(":") else " ")
        for statement in text.split(";"):
            statement = " ".join(statement.split())
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
            elif statement:
                self.instructions.append(self.parsed(statement))

    @staticmethod
    def parsed(statement: str) -> tuple[str | None, bool, list[str], list[str]]:
        negated, predicate, operation, rest = re.match(r"(?:@(!?)(%\w+) )?([\w.:]+) ?(.*)", statement).groups()
        arguments = [a.strip() for a in re.split(r",(?![^{(]*[})])", rest)]
        return predicate, bool(negated), operation.split("."), arguments

    def run(self, values: list, memory: Memory, block: tuple[int, int, int], **launch) -> None:
        """values: numbers, or the bytes of a structure. launch: see Block."""
        given = dict(zip(self.parameters, values, strict=False))  # two of Triton's own are not used
        Block(self, given, memory, block, **launch).run()


class Block:
    """grid: how many blocks there are. shared: bytes of dynamic shared memory. threads: of the block, where its kernel
    does not say. joins: whether a sum is rounded once with a product that enters it, where neither is .rn."""

    def __init__(
        self, program: Program, given: dict, memory: Memory, block: tuple[int, int, int], *, shared: int,
        threads: int | None = None, grid: int = 0, joins: bool = False, ex2=exact_ex2,
    ):  # fmt: skip
        self.program, self.memory, self.joins = program, memory, joins
        self.operations = OPERATIONS | {"ex2": ex2}
        self.products: dict[str, tuple] = {}  # the factors of a register that an addition may join
        self.thread = np.arange(threads or program.threads)
        assert self.thread.size <= program.threads and self.thread.size % LANES == 0
        self.registers = {"%tid.x": self.thread.astype(np.uint32), "%ntid.x": self.filled(self.thread.size, np.uint32)}
        self.registers |= {f"%ctaid.{a}": self.filled(n, np.uint32) for a, n in zip("xyz", block, strict=True)}
        self.registers |= {"%nctaid.x": self.filled(grid, np.uint32)}
        self.symbols, end, parameters = {}, 0, b""
        for name, value in given.items():
            self.symbols[name] = len(parameters)
            value = value if isinstance(value, bytes) else as_bytes(value)
            parameters += value.ljust(-(-len(value) // 16) * 16, b"\xff")
        self.parameters = np.frombuffer(parameters, np.uint8)
        # What the launch asks for comes last. Between variables lie bytes that are nobody's.
        for name, (space, align, size, data) in sorted(program.variables.items(), key=lambda v: v[1][2] == 0):
            if space == "global":
                self.symbols[name] = memory.add_variable(data)
            else:
                self.symbols[name] = start = -(-end // max(align, 16)) * max(align, 16)
                end = start + size + (16 if size else 0)
        self.owned = np.zeros(end + shared, bool)
        for name, (space, _, size, _) in program.variables.items():
            if space == "shared":
                self.owned[self.symbols[name] : self.symbols[name] + (size or shared)] = True
        self.shared = np.full(self.owned.size // 8 * 8 + 8, 0xFF, np.uint8)  # NaN, in every dtype

    def filled(self, value, dtype) -> np.ndarray:
        return np.full(self.thread.shape, value, dtype)

    def run(self) -> None:
        """In lockstep, until a branch parts the threads."""
        instructions, at = self.program.instructions, np.zeros(self.thread.shape, np.int64)
        everybody, end = np.ones(self.thread.shape, bool), len(instructions)
        together = 0  # where all threads are, or None
        while together != end:
            if together is None:
                now, active = self.next(at)
                if now == end:
                    return
            else:
                now, active = together, everybody
            predicate, negated, operation, arguments = instructions[now]
            acting = active & (self.registers[predicate] ^ negated) if predicate else active
            leaving = acting if operation[0] in ("bra", "ret") else None
            if leaving is None and acting.any():
                self.act(operation, arguments, acting)
            if together is not None and (leaving is None or leaving.all() or not leaving.any()):
                left = leaving is not None and leaving.any()
                together = self.target(operation, arguments) if left else now + 1
                continue
            if together is not None:
                at[:] = now
            at[active] = now + 1
            if leaving is not None:
                at[leaving] = self.target(operation, arguments)
            together = int(at[0]) if (at == at[0]).all() else None

    def target(self, operation: list[str], arguments: list[str]) -> int:
        return self.program.labels[arguments[0]] if operation[0] == "bra" else len(self.program.instructions)

    def next(self, at: np.ndarray) -> tuple[int, np.ndarray]:
        """Of threads that diverged those furthest behind go on, so that they meet again; at a barrier once all others
        are there or have ended, at an exchange of a warp once all its lanes are there."""
        instructions, running = self.program.instructions, at < len(self.program.instructions)
        for now in np.unique(at[running]):
            active = at == now
            if instructions[now][2][0] == "bar" and not (active == running).all():
                continue
            if instructions[now][2][0] in EXCHANGES:
                active = np.repeat(active.reshape(-1, LANES).all(1), LANES)
                if not active.any():
                    continue
            return int(now), active
        assert not running.any(), "a barrier or an exchange that not all threads reach"
        return len(instructions), running

    def act(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        if operation[0] == "trap" or (operation[0] == "call" and "vprintf" not in arguments):
            raise AssertionError("an assertion of the kernel")
        nothing = operation[0] in ("bar", "membar", "call") or operation[:2] in (["st", "param"], ["st", "local"])
        if not nothing and "retval" not in arguments[-1]:
            self.step(operation, arguments, acting)

    def read(self, name: str, type_: str) -> np.ndarray:
        dtype = np.dtype(TYPES[type_])
        if name.startswith("%"):
            return self.registers[name].view(dtype) if name in self.registers else self.wrapped(-1, dtype)
        if name.startswith(("0f", "0d")):
            return self.filled(int(name[2:], 16), BITS[4 if name[1] == "f" else 8]).view(dtype)
        if name[0].isalpha() or name[0] in "_$":  # a variable, or the text of an assertion
            return self.wrapped(self.symbols.get(name, 0), dtype)
        return self.wrapped(int(name.rstrip("U"), 0), dtype)

    def wrapped(self, number: int, dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "b":
            return self.filled(bool(number), dtype)
        return self.filled(number % 2 ** (8 * dtype.itemsize), BITS[dtype.itemsize]).view(dtype)

    def write(self, name: str, value: np.ndarray, acting: np.ndarray) -> None:
        """A register as wide as its name says: %rs 16 bits, %r 32, %rd 64."""
        if value.dtype != bool:
            size = {"%rs": 2, "%r": 4, "%rd": 8}.get(re.match(r"[%a-z]*", name)[0], value.itemsize)
            if value.itemsize < size:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
            value = value.view(BITS[value.itemsize])
        self.products.pop(name, None)
        before = self.registers.get(name)
        self.registers[name] = value if before is None or acting.all() else np.where(acting, value, before)

    def step(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        name, type_ = operation[0], operation[-1]
        if name in ("ld", "st", "atom", "ldmatrix"):
            return getattr(self, name)(operation, arguments, acting)
        target, sources = arguments[0].split("|")[0] if name == "shfl" else arguments[0], arguments[1:]
        if name == "setp" and type_.endswith("x2"):
            return self.setp_of_pairs(operation, arguments, acting)
        if name == "mov" and "{" in target + sources[0]:
            return self.pack(target, sources[0], type_, acting)
        self.write(target, getattr(self, name, self.compute)(operation, sources), acting)
        if self.joins and operation in (["mul", "f32"], ["mul", "f64"]):
            self.products[target] = (*(self.read(s, type_) for s in sources), acting)

    def compute(self, operation: list[str], sources: list[str]) -> np.ndarray:
        name, type_ = operation[0], operation[-1]
        # The number of bits of a shift is of 32 bits, whatever is shifted.
        others = "u32" if name in ("shl", "shr", "bfe") and type_ != "pred" else type_
        values = [self.read(sources[0], type_), *(self.read(s, others) for s in sources[1:])]
        flush = "ftz" in operation and type_ == "f32"
        result = self.operations[name](*(map(flushed, values) if flush else values))
        if len(operation) == 2 and name in ("add", "sub") and not self.products.keys().isdisjoint(sources):
            return self.joined(name == "sub", sources, values, result)
        return flushed(result) if flush else result

    def joined(self, subtract: bool, sources: list[str], values: list[np.ndarray], apart: np.ndarray) -> np.ndarray:
        """An addition to a product, rounded once; of two products the second is joined."""
        x, y = values
        if sources[1] in self.products:
            a, b, where = self.products[sources[1]]
            return np.where(where, fused(-a if subtract else a, b, x), apart)
        a, b, where = self.products[sources[0]]
        return np.where(where, fused(a, b, -y if subtract else y), apart)

    def rcp(self, operation: list[str], sources: list[str]) -> np.ndarray:
        x = self.read(sources[0], operation[-1])
        if operation[1] == "rn":
            return 1 / x
        assert operation == ["rcp", "approx", "ftz", "f64"]
        return ((1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)  # 20 bits

    def mov(self, operation: list[str], sources: list[str]) -> np.ndarray:
        return self.read(sources[0], operation[-1])

    def cvta(self, operation: list[str], sources: list[str]) -> np.ndarray:
        return self.read(sources[0], operation[-1]) + np.uint64(WINDOW if operation[1] == "shared" else 0)

    def selp(self, operation: list[str], sources: list[str]) -> np.ndarray:
        a, b = (self.read(s, operation[-1]) for s in sources[:2])
        return np.where(self.read(sources[2], "pred"), a, b)

    def mul(self, operation: list[str], sources: list[str]) -> np.ndarray:
        a, b = (self.read(s, operation[-1]) for s in sources[:2])
        return a.astype(f"{a.dtype.kind}8") * b if "wide" in operation else a * b

    def mad(self, operation: list[str], sources: list[str]) -> np.ndarray:
        type_ = operation[-1].replace("32", "64") if "wide" in operation else operation[-1]
        return self.mul(operation, sources) + self.read(sources[2], type_)

    def fma(self, operation: list[str], sources: list[str]) -> np.ndarray:
        values = [self.read(s, operation[-1]) for s in sources]
        if operation[1] == "rm":  # towards -inf
            exact = np.float64(values[0]) * values[1] + values[2]
            nearest = exact.astype(np.float32)
            return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
        return flushed(fused(*map(flushed, values))) if "ftz" in operation else fused(*values)

    def setp(self, operation: list[str], sources: list[str]) -> np.ndarray:
        a, b = (self.read(s, operation[-1]) for s in sources)
        return compared(operation[1], *((widen(a), widen(b)) if operation[-1] == "bf16" else (a, b)))

    def setp_of_pairs(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        pairs = [self.read(s, "b32").view(np.uint16) for s in arguments[1:]]
        for i, target in enumerate(arguments[0].split("|")):  # of the lower half first
            halves = (np.ascontiguousarray(x[i::2]) for x in pairs)
            halves = (widen(x) if operation[-1] == "bf16x2" else x.view(np.float16) for x in halves)
            self.write(target, compared(operation[1], *halves), acting)

    def cvt(self, operation: list[str], sources: list[str]) -> np.ndarray:
        to, of = operation[-2:]
        if to.endswith("x2"):
            high, low = (self.read(s, of) for s in sources)
            halves = narrow if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            return (halves(high).astype(np.uint32) << np.uint32(16)) | halves(low)
        register = self.registers[sources[0]]
        size = np.dtype(TYPES[of]).itemsize
        x = register.astype(BITS[size]).view(TYPES[of]) if register.itemsize > size else self.read(sources[0], of)
        x = widen(x) if of == "bf16" else x
        if "sat" in operation:
            return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(TYPES[to])
        if "rzi" in operation:
            return np.trunc(x).astype(TYPES[to])
        return narrow(x.astype(np.float32)) if to == "bf16" else x.astype(TYPES[to])

    def shfl(self, operation: list[str], sources: list[str]) -> np.ndarray:
        lane, by = self.thread % LANES, self.read(sources[1], "b32").astype(np.int64)
        of = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by}[operation[2]]
        return self.read(sources[0], "b32")[self.thread - lane + np.where((of < 0) | (of >= LANES), lane, of)]

    def vote(self, operation: list[str], sources: list[str]) -> np.ndarray:
        bits = self.read(sources[0], "pred").reshape(-1, LANES) << np.arange(LANES, dtype=np.uint32)
        return np.repeat(bits.sum(1, dtype=np.uint32), LANES)

    def redux(self, operation: list[str], sources: list[str]) -> np.ndarray:
        return np.repeat(self.read(sources[0], "s32").reshape(-1, LANES).sum(1, dtype=np.int32), LANES)

    def pack(self, target: str, source: str, type_: str, acting: np.ndarray) -> None:
        names = (source if "{" in source else target).strip("{} ").replace(" ", "").split(",")
        size = np.dtype(TYPES[type_]).itemsize // len(names)
        if "{" in source:
            parts = np.stack([self.read(n, f"b{8 * size}") for n in names], axis=1)
            self.write(target, parts.view(TYPES[type_])[:, 0], acting)
        else:
            parts = self.read(source, type_)[:, None].view(BITS[size])
            for i, name in enumerate(names):
                self.write(name, np.ascontiguousarray(parts[:, i]), acting)

    def addresses(self, text: str) -> np.ndarray:
        name, _, offset = text.strip("[] ").partition("+")
        base = self.read(name.strip(), "b32" if re.match(r"%r\d", name) else "b64")
        return base.astype(np.int64) + int(offset or 0)

    def accessed(self, operation: list[str], address: str, acting: np.ndarray):
        """The size of an element, and for each memory (threads, their indices of elements, elements)."""
        size = np.dtype(TYPES[operation[-1]]).itemsize
        count = next((int(part[1]) for part in operation if re.fullmatch(r"v\d", part)), 1)
        threads = np.flatnonzero(acting)
        at = self.addresses(address)[threads]
        assert (at % (size * count) == 0).all(), f"misaligned {'.'.join(operation)}"
        if operation[1].startswith("shared") or (at >= WINDOW).all():
            at = at % WINDOW
            inside = (at >= 0) & (at + size * count <= self.owned.size)
            assert inside.all() and (self.owned[at] & self.owned[at + size * count - 1]).all(), "not of a variable"
            places = [(np.arange(at.size), at, self.shared)]
        elif operation[1] == "param":
            places = [(np.arange(at.size), at, self.parameters)]
        else:
            places = self.memory.at(at, size * count)
        for which, offset, data in places:
            yield threads[which], offset // size, data[: data.size // size * size].view(BITS[size])

    def ld(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        names, address = arguments[0].strip("{} ").replace(" ", "").split(","), arguments[1]
        places = list(self.accessed(operation, address, acting))
        for i, name in enumerate(names):
            value = self.filled(0, BITS[np.dtype(TYPES[operation[-1]]).itemsize])
            for threads, index, data in places:
                value[threads] = data[index + i]
            self.write(name, value.view(TYPES[operation[-1]]), acting)

    def st(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        names = arguments[1].strip("{} ").replace(" ", "").split(",")
        for threads, index, data in self.accessed(operation, arguments[0], acting):
            for i, name in enumerate(names):
                data[index + i] = self.read(name, operation[-1])[threads].view(data.dtype)

    def atom(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        """One thread after the other."""
        target, address, source = arguments
        operand, before = self.read(source, operation[-1]), self.filled(0, TYPES[operation[-1]])
        for threads, index, data in self.accessed(operation, address, acting):
            for thread, i in zip(threads, index, strict=True):
                before[thread] = old = data[i]
                added = old + operand[thread]
                data[i] = {"add": added, "inc": 0 if old >= operand[thread] else old + 1}[operation[2]]
        self.write(target, before, acting)

    def ldmatrix(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        """Four matrices of 8 rows of 16 bytes, at the addresses of the lanes; each lane receives four bytes of each."""
        assert operation[1:] == ["sync", "aligned", "m8n8", "x4", "shared", "b16"] and acting.all()
        lane, at = self.thread % LANES, self.addresses(arguments[1])
        words = self.shared[: self.shared.size // 4 * 4].view(np.uint32)
        for i, name in enumerate(arguments[0].strip("{} ").replace(" ", "").split(",")):
            row = at[self.thread - lane + 8 * i + lane // 4]
            assert (row % 16 == 0).all()
            self.write(name, words[row // 4 + lane % 4], acting)
