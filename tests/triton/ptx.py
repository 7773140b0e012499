"""Runs PTX on the CPU: the threads of a block in lockstep as numpy vectors, one block after another.

It shows what Triton's interpreter hides: fused multiply-adds, flushed subnormals, maxima that ignore NaN, the order of
reductions and scans, alignment, every access outside a tensor, and the specialisation of a launch. Instructions that
the kernels do not use are not here. ex2.approx is rounded correctly, which a GPU does not do.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import numpy as np
import torch

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"u{8 * n}": bits for n, bits in BITS.items()} | {f"b{8 * n}": bits for n, bits in BITS.items()}
TYPES |= {"s16": np.int16, "s32": np.int32, "s64": np.int64}
TYPES |= {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_}
LANES = 32
TOGETHER = ("bar", "shfl", "ldmatrix")


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
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "rcp": lambda x: ((1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64),  # 20 bits
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


class Memory:
    """The storages of the tensors that a kernel was given; any other address is an error."""

    def __init__(self):
        self.regions: list[tuple[int, np.ndarray]] = []

    def add(self, x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        if storage.nbytes():
            at = storage.data_ptr()
            self.regions.append((at, np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(at), np.uint8)))
        return x.data_ptr()

    def at(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(which of the addresses, their offsets, the bytes these count from) for each storage."""
        left = np.ones(addresses.shape, bool)
        for base, data in self.regions:
            offset = addresses.astype(np.int64) - base
            here = left & (offset >= 0) & (offset + size <= data.size)
            if here.any():
                yield np.flatnonzero(here), offset[here], data
            left &= ~here
        if left.any():
            raise IndexError(f"{left.sum()} threads access memory outside the tensors")


class Program:
    """A kernel's instructions, its parameters' names and its number of threads."""

    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
        self.parameters = re.findall(r"\w+_param_\d+", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        self.instructions: list[tuple[str | None, bool, list[str], list[str]]] = []
        self.labels: dict[str, int] = {}
        text = ""
        for line in body.split("\n}\n")[0].splitlines():
            line = re.sub(r"^\{ \.reg \.b32 tmp; (.*) \}$", r"\1", line.split("//")[0].strip())
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

    def run(self, values: list, memory: Memory, block: tuple[int, int, int], shared: int) -> None:
        given = dict(zip(self.parameters, values, strict=False))  # two of Triton's own are not used
        Block(self, given, memory, block, shared).run()


class Block:
    def __init__(self, program: Program, given: dict, memory: Memory, block: tuple[int, int, int], shared: int):
        self.program, self.given, self.memory = program, given, memory
        self.thread = np.arange(program.threads)
        self.registers = {"%tid.x": self.thread.astype(np.uint32)}
        self.registers |= {f"%ctaid.{a}": self.filled(n, np.uint32) for a, n in zip("xyz", block, strict=True)}
        self.shared = np.zeros(shared, np.uint8)

    def filled(self, value, dtype) -> np.ndarray:
        return np.full(self.thread.shape, value, dtype)

    def run(self) -> None:
        """Where threads diverge, those furthest behind go on, so that they meet again; before a barrier or an exchange
        all others go on first."""
        instructions, at = self.program.instructions, np.zeros(self.thread.shape, np.int64)
        while (now := at.min()) < len(instructions):
            active = at == now
            if not active.all():
                others = (n for n in np.unique(at) if n == len(instructions) or instructions[n][2][0] not in TOGETHER)
                now = next(others, len(instructions))
                assert now < len(instructions), "a barrier or an exchange that not all threads reach"
                active = at == now
            predicate, negated, operation, arguments = instructions[now]
            acting = active & (self.registers[predicate] ^ negated) if predicate else active
            at = np.where(active, now + 1, at)
            if operation[0] == "bra":
                at = np.where(acting, self.program.labels[arguments[0]], at)
            elif operation[0] == "ret":
                at = np.where(acting, len(instructions), at)
            elif operation[0] == "call":
                raise AssertionError("an assertion of the kernel")
            elif operation[0] != "bar" and acting.any() and operation[:2] != ["st", "param"]:
                self.step(operation, arguments, acting)

    def read(self, name: str, type_: str) -> np.ndarray:
        dtype = np.dtype(TYPES[type_])
        if name.startswith("%"):
            return self.registers[name].view(dtype)
        if name.startswith(("0f", "0d")):
            return self.filled(int(name[2:], 16), BITS[4 if name[1] == "f" else 8]).view(dtype)
        if name[0].isalpha():  # shared memory, which starts at 0, or the text of an assertion
            return self.filled(0, dtype)
        number = int(name.rstrip("U"), 0)
        return self.filled(bool(number), dtype) if type_ == "pred" else self.wrapped(number, dtype)

    def wrapped(self, number: int, dtype: np.dtype) -> np.ndarray:
        return self.filled(number % 2 ** (8 * dtype.itemsize), BITS[dtype.itemsize]).view(dtype)

    def write(self, name: str, value: np.ndarray, acting: np.ndarray) -> None:
        """A register as wide as its name says: %rs 16 bits, %r 32, %rd 64."""
        if value.dtype != bool:
            size = {"%rs": 2, "%r": 4, "%rd": 8}.get(re.match(r"[%a-z]*", name)[0], value.itemsize)
            if value.itemsize < size:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
            value = value.view(BITS[value.itemsize])
        before = self.registers.get(name)
        self.registers[name] = value if before is None or acting.all() else np.where(acting, value, before)

    def step(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        name, type_ = operation[0], operation[-1]
        if name in ("ld", "st", "ldmatrix"):
            return getattr(self, name)(operation, arguments, acting)
        target, sources = arguments[0], arguments[1:]
        if name == "setp" and type_.endswith("x2"):
            return self.setp_of_pairs(operation, arguments, acting)
        if name == "mov" and "{" in target + sources[0]:
            return self.pack(target, sources[0], type_, acting)
        self.write(target, getattr(self, name, self.compute)(operation, sources), acting)

    def compute(self, operation: list[str], sources: list[str]) -> np.ndarray:
        name, type_ = operation[0], operation[-1]
        # The number of bits of a shift is of 32 bits, whatever is shifted.
        others = "u32" if name in ("shl", "shr", "bfe") and type_ != "pred" else type_
        values = [self.read(sources[0], type_), *(self.read(s, others) for s in sources[1:])]
        flush = "ftz" in operation and type_ == "f32"
        result = OPERATIONS[name](*(map(flushed, values) if flush else values))
        return flushed(result) if flush else result

    def mov(self, operation: list[str], sources: list[str]) -> np.ndarray:
        return self.read(sources[0], operation[-1])

    cvta = mov

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
        return narrow(x.astype(np.float32)) if to == "bf16" else x.astype(TYPES[to])

    def shfl(self, operation: list[str], sources: list[str]) -> np.ndarray:
        lane, by = self.thread % LANES, int(sources[1])
        lane_of = {"bfly": lane ^ by, "up": np.where(lane < by, lane, lane - by)}[operation[2]]
        return self.read(sources[0], "b32")[self.thread - lane + lane_of]

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
        base = self.read(name.strip(), "b32" if re.match(r"%r\d|global", name) else "b64")
        return base.astype(np.int64) + int(offset or 0)

    def accessed(self, operation: list[str], address: str, acting: np.ndarray):
        """The size of an element, and for each memory (threads, their indices of elements, elements)."""
        size = np.dtype(TYPES[operation[-1]]).itemsize
        count = next((int(part[1]) for part in operation if re.fullmatch(r"v\d", part)), 1)
        threads = np.flatnonzero(acting)
        at = self.addresses(address)[threads]
        assert (at % (size * count) == 0).all(), f"misaligned {'.'.join(operation)}"
        if operation[1].startswith("shared"):
            assert (at >= 0).all() and (at + size * count <= self.shared.size).all(), "outside shared memory"
            places = [(np.arange(at.size), at, self.shared)]
        else:
            places = self.memory.at(at, size * count)
        for which, offset, data in places:
            yield threads[which], offset // size, data[: data.size // size * size].view(BITS[size])

    def ld(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        names, address = arguments[0].strip("{} ").replace(" ", "").split(","), arguments[1]
        if operation[1] == "param":
            value, dtype = self.given[address.strip("[]")], TYPES[operation[-1]]
            bits = self.filled(value, np.float64).view(dtype) if isinstance(value, float) else None
            return self.write(names[0], self.wrapped(value, np.dtype(dtype)) if bits is None else bits, acting)
        places = list(self.accessed(operation, address, acting))
        for i, name in enumerate(names):
            value = self.filled(0, BITS[np.dtype(TYPES[operation[-1]]).itemsize])
            for threads, index, data in places:
                value[threads] = data[index + i]
            self.write(name, value, acting)

    def st(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        names = arguments[1].strip("{} ").replace(" ", "").split(",")
        for threads, index, data in self.accessed(operation, arguments[0], acting):
            for i, name in enumerate(names):
                data[index + i] = self.read(name, operation[-1])[threads].view(data.dtype)

    def ldmatrix(self, operation: list[str], arguments: list[str], acting: np.ndarray) -> None:
        """Four matrices of 8 rows of 16 bytes, at the addresses of the lanes; each lane receives four bytes of each."""
        assert operation[1:] == ["sync", "aligned", "m8n8", "x4", "shared", "b16"] and acting.all()
        lane, at = self.thread % LANES, self.addresses(arguments[1])
        words = self.shared[: self.shared.size // 4 * 4].view(np.uint32)
        for i, name in enumerate(arguments[0].strip("{} ").replace(" ", "").split(",")):
            row = at[self.thread - lane + 8 * i + lane // 4]
            assert (row % 16 == 0).all()
            self.write(name, words[row // 4 + lane % 4], acting)
