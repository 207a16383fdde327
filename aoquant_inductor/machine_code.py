"""Whether a kernel's machine code lets every wgmma keep its registers: what tells if a `carried` config may run.

On sm_90 a wgmma runs beside the instructions after it, until a `WARPGROUP.DEPBAR.LE gsb0, N` has left at most the N youngest
groups running. Until then nothing may write the registers it reads, nor touch those it writes. ptxas has to see to that, and
some versions do not where the operand from registers is made anew in a loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s*([.$\w]+):\s*$|/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][\w.]*)\s*([^;]*?)\s*;", re.M)
REGISTER = re.compile(r"\bR(\d+)\b")
# their first register is read; stores need no mention, since what they begin with is an address in brackets
ONLY_READ = {"BAR", "BRX", "CALL", "FCHK", "JMX", "NANOSLEEP", "R2P", "RET", "WARPSYNC"}
WIDE = {"CS2R", "DADD", "DFMA", "DMNMX", "DMUL", "FADD2", "FFMA2", "FMUL2", "GETLMEMBASE", "LEPC"}
UNCOMMITTED = -1

Running = dict[int, int]
"""Place of a wgmma that may be running -> how many groups at least were committed after its own."""


@dataclass(frozen=True)
class Hazard:
    """`instruction` at `address` changes, or reads too early, a register of the wgmma at `wgmma`; addresses are bytes from the
    kernel's beginning.
    """

    address: int
    instruction: str
    wgmma: int


@dataclass(frozen=True)
class _Instruction:
    address: int
    guard: str
    op: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.guard}{self.op} {', '.join(self.operands)}".strip()

    @property
    def is_wgmma(self) -> bool:
        return bool(re.match("[A-Z]GMMA", self.op))

    def written(self) -> range:
        """The registers it may write; rather too many than too few."""
        name, *words = self.op.split(".")
        # a predicate may come before the register that is written, or beside it
        first = next((o for o in self.operands if not re.fullmatch(r"!?U?P(\d|T|R)", o)), "")
        found = re.match(r"R(\d+)\b", first)
        if found is None or name in ONLY_READ or "SETP" in name:
            return range(0)
        return range(int(found.group(1)), int(found.group(1)) + self._width(name, words))

    def _width(self, name: str, words: list[str]) -> int:
        if self.is_wgmma:
            shape = next(word for word in words if "x" in word).split("x")
            return int(shape[1]) // (4 if words[-1] == "F16" else 2)
        if name.endswith("MMA") or "128" in words:
            return 4
        if name == "LDSM":
            return int(words[-1]) if words[-1].isdigit() else 1
        if "256" in words:
            return 8
        # SHF's U64 is what it reads
        wide = name in WIDE or "WIDE" in words or (name != "SHF" and {"64", "U64", "S64", "F64"} & set(words))
        return 2 if wide and "32" not in words else 1

    def read(self) -> set[int]:
        """The first of every few registers that it reads, and maybe what it writes; of a wgmma without its accumulator."""
        if self.is_wgmma:
            return set(self.operand_a())
        return {int(number) for operand in self.operands for number in REGISTER.findall(operand)}

    def operand_a(self) -> Iterable[int]:
        """Of a wgmma: four registers, or none where that side lies in shared memory; and the selectors of a sparse one."""
        if found := re.fullmatch(r"R(\d+)", self.operands[1]):
            yield from range(int(found.group(1)), int(found.group(1)) + 4)
        for operand in self.operands[3:]:
            if (found := re.fullmatch(r"R(\d+)", operand)) and operand != self.operands[0]:
                yield int(found.group(1))

    def after(self, place: int, running: Running) -> Running:
        """What may be running behind it."""
        if self.is_wgmma:
            running = {**running, place: UNCOMMITTED}
            return {i: age + 1 for i, age in running.items()} if self.operands[-1].startswith("gsb") else running
        if self.op.startswith("WARPGROUP.DEPBAR"):
            most = int(self.operands[-1], 16)
            return {i: age for i, age in running.items() if age < most}
        return running


def hazards(sass: str) -> list[Hazard]:
    """Every pair of an instruction and a wgmma whose registers it touches too early, of what `nvdisasm -c` prints, on any path
    through the code.
    """
    if "GMMA" not in sass:
        return []
    code, labels = _parse(sass)
    before: list[Running | None] = [None] * len(code)
    open_: list[tuple[int, Running]] = [(place, {}) for place in {0, *labels.values()}]
    while open_:
        place, running = open_.pop()
        if place >= len(code):
            continue
        known = before[place]
        # the youngest of all paths
        merged = running if known is None else {**known, **{i: min(age, known.get(i, age)) for i, age in running.items()}}
        if merged != known:
            before[place] = merged
            behind = code[place].after(place, merged)
            open_ += [(following, behind) for following in _following(place, code[place], labels)]
    return [
        Hazard(instruction.address, str(instruction), code[i].address)
        for instruction, running in zip(code, before, strict=True)
        for i in sorted(running or ())
        if _collide(instruction, code[i])
    ]


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and label -> place of the one behind it."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for label, address, guard, op, operands in LINE.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            listed = tuple(operand.strip() for operand in operands.replace(".reuse", "").split(",") if operand)
            code.append(_Instruction(int(address, 16), guard, op, listed))
    return code, labels


def _following(place: int, instruction: _Instruction, labels: dict[str, int]) -> list[int]:
    """The places that may run next; a call returns to the one behind it."""
    name = instruction.op.split(".")[0]
    onward = [place + 1] if instruction.guard or name not in ("EXIT", "RET") else []
    if name in ("EXIT", "RET"):
        return onward
    targets = [labels[word] for operand in instruction.operands for word in re.findall(r"[.$\w]+", operand) if word in labels]
    jumps = name in ("BRA", "BRX", "BRXU", "JMP", "JMX")
    if jumps and not targets:  # to where, the text does not say
        targets = list(labels.values())
    # a predicate may be an operand, too
    return targets if jumps and not instruction.guard and len(instruction.operands) < 2 else targets + onward


def _collide(instruction: _Instruction, wgmma: _Instruction) -> bool:
    """Whether it writes what the wgmma reads, or touches what it writes; wgmmas take turns at one accumulator."""
    writes, accumulator = set(instruction.written()), set(wgmma.written())
    touches = instruction.read() if instruction.is_wgmma else instruction.read() | writes
    return bool(writes.intersection(wgmma.operand_a()) or touches & accumulator)


def disassembler() -> str | None:
    """The path of Triton's nvdisasm."""
    try:
        from triton import knobs

        return str(knobs.nvidia.nvdisasm.path)
    except (ImportError, AttributeError, RuntimeError):
        return None


def disassemble(cubin: bytes) -> str | None:
    """What nvdisasm prints of a kernel; None where there is no nvdisasm, or it cannot read this one."""
    tool = disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            done = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            return None
    return done.stdout if re.search(r"/\*[0-9a-f]{4,}\*/", done.stdout) else None
