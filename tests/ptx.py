"""Triton's interpreter, taught what our kernels need of it: inline assembly, bf16 in tl.dot, rounding to bf16, and an fma that
rounds once.

The assembly is run statement by statement on arrays of 32-bit registers; what it does not know is an error.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Registers = dict[str, np.ndarray]


def _float(bf16: np.ndarray) -> np.ndarray:
    """bf16 as the interpreter holds it, uint16, to float32."""
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def _bf16(value: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, to nearest even."""
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    halves = []
    for shift in (0, 16):
        x, y, z = (_float((t >> shift) & 0xFFFF).astype(np.float64) for t in (a, b, c))
        halves.append(_bf16(x * y + z))
    return halves[0] | (halves[1] << 16)


def _fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    x, y, z = (t.view(np.float32).astype(np.float64) for t in (a, b, c))
    return (x * y + z).astype(np.float32).view(np.uint32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(4):
        pick = int(selector.flat[0]) >> (4 * i) & 15
        if pick > 7:
            raise NotImplementedError("prmt with a sign")
        out |= (((a if pick < 4 else b) >> np.uint32(8 * (pick % 4))) & np.uint32(255)) << np.uint32(8 * i)
    return out


def _dp4a(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    left, right = (np.ascontiguousarray(t).view(np.int8).reshape(*t.shape, 4).astype(np.int32) for t in (a, b))
    return ((left * right).sum(-1, dtype=np.int32) + c.view(np.int32)).view(np.uint32)


OPS = {
    "mov.b32": lambda a: a, "mov.b16": lambda a: a, "shr.u32": lambda a, n: a >> n, "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b, "xor.b32": lambda a, b: a ^ b, "sub.u32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b, "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma_bf16x2, "fma.rn.f32": _fma_f32, "prmt.b32": _prmt, "dp4a.s32.s32": _dp4a,
}


def run(text: str, registers: Registers) -> None:
    """`text` over `registers` ($0, $1 ... and what it declares)."""
    shape = next(iter(registers.values())).shape

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.full(shape, int(word, 0), np.uint32)

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if not (words := statement.split(None, 1)) or words[0] == ".reg":
            continue
        if pair := re.match(r"\{\s*(\S+),\s*(\S+)\s*\},\s*(\S+)$", words[1].strip()):
            low, high, of = pair.groups()
            registers[low], registers[high] = value(of) & 0xFFFF, value(of) >> 16
            continue
        target, *inputs = (word.strip() for word in words[1].split(","))
        registers[target] = OPS[words[0]](*map(value, inputs))


def _words(t: Any, pack: int) -> np.ndarray:
    """The registers of an operand: one element each, zero-extended, or `pack` bytes of neighbours."""
    data = np.ascontiguousarray(t.data)
    if pack > 1:
        return data.reshape(-1).view(np.uint32)
    return data.view({2: np.uint16, 4: np.uint32}[data.itemsize]).astype(np.uint32).reshape(-1)


def create_inline_asm(self: Any, text: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int) -> Any:
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    kinds = [kind.scalar for kind in (types if isinstance(types, list | tuple) else [types])]
    count = constraints.count("=")
    registers = {f"${count + i}": _words(value, pack) for i, value in enumerate(values)}
    shape = values[0].data.shape
    run(text, registers)
    handles = []
    for i, kind in enumerate(kinds):
        dtype = np.dtype(_get_np_dtype(kind))
        if count > len(kinds):  # a register for each of `pack` neighbours
            out = np.stack([registers[f"${i * pack + j}"] for j in range(pack)], -1)
        else:
            out = registers[f"${i}"]
        out = out.view(dtype) if pack > 1 or dtype.itemsize == 4 else out.astype(np.uint16).view(dtype)
        handles.append(TensorHandle(out.reshape(shape).copy(), kind))

    class Call:
        def get_result(self, index: int) -> Any:
            return handles[index]

    return Call()


def teach() -> None:
    """Patches the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = (handle(_float(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, left, right, d, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            return handle(_bf16(source.data).astype(np.uint16), kind.scalar)
        return cast(self, source, kind)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        a, b, c = (t.data.astype(np.float64) for t in (x, y, z))
        return handle((a * b + c).astype(np.float32), z.dtype.scalar)

    builder.create_fma = create_fma
    builder.create_dot, builder.cast_impl, builder.create_inline_asm = create_dot, cast_impl, create_inline_asm
