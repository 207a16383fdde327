"""machine_code on a few lines of SASS; test_machine_offline.py has whole kernels."""

from __future__ import annotations

import re

import pytest

from aoquant_inductor.machine_code import Hazard, hazards

WGMMA = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0"  # reads R8 to R11, writes R24 to R55
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"


def sass(*lines: str) -> str:
    """What nvdisasm -c prints; a line that ends in a colon is a label."""
    addresses = iter(range(0, 16 * len(lines), 16))
    head = "\t.target\tsm_90a\n.text.kernel:\n        .type kernel,@function\n"
    text = [line if line.endswith(":") else f"        /*{next(addresses):04x}*/                   {line} ;" for line in lines]
    return head + "\n".join(text) + "\n"


def touched(*lines: str) -> list[str]:
    return [hazard.instruction for hazard in hazards(sass(*lines))]


WRITES = """
MOV R8, R2 | MOV R11, RZ | @P0 MOV R9, R2 | @!UP1 IMAD.MOV.U32 R10, RZ, RZ, 0x43 | S2R R8, SR_TID.X | I2FP.F32.S32 R9, R2
LDS R11, [R2] | LDS.64 R10, [R2] | LDS.128 R8, [R2+UR5+0x400] | LDS.U.128 R8, [R2] | LDG.E.128 R8, desc[UR4][R2.64], !P0
LDG.E.U16.CONSTANT R9, desc[UR4][R2.64] | LDG.E.LTC128B.64 R10, desc[UR4][R2.64] | LDC.64 R10, c[0x0][0x228]
LDSM.16.M88.4 R8, [R3] | LDSM.16.MT88.2 R10, [R3] | IMAD.WIDE R10, R2, R3, R4 | IMAD.WIDE.U32 R8, R2.reuse, R3, R4
CS2R R8, SRZ | DFMA R10, R2, R4, R6 | F2F.F64.F32 R8, R2 | HMMA.16816.F32.BF16 R8, R2, R4, R8 | MOV R55, R2
IADD3 R9, P1, R2, R3, RZ | LOP3.LUT P0, R8, R2, 0xff, RZ, 0xc0, !PT | SHFL.BFLY PT, R9, R2, 0x2, 0x1f | P2R R8, PR, RZ, 0x7f
VOTE.ANY R8, PT, P0 | ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR4][R2.64], R5 | HGMMA.64x16x16.F32.BF16 R8, R60, gdesc[UR8], R8, gsb0
FMUL R2, R2, R24 | STG.E.128 desc[UR4][R2.64], R52 | HGMMA.64x16x16.F32.BF16 R64, R24, gdesc[UR8], R64, gsb0
"""
LEAVES = """
MOV R12, R8 | MOV R7, R9 | LDS R7, [R8] | LDS.64 R6, [R2] | LDS.128 R4, [R8] | LDS.128 R12, [R2] | LDSM.16.M88.4 R4, [R3]
LDSM.16.MT88.2 R6, [R3] | LDSM.16.M88 R7, [R3] | IMAD.WIDE R6, R2, R3, R4 | CS2R R6, SRZ | CS2R.32 R7, SR_CLOCKLO | SHF.L.U64.HI R7, R2, 0x3, R3
LDG.E.LTC128B R7, desc[UR4][R2.64] | HMMA.16816.F32.BF16 R4, R8, R2, R4 | MOV R56, R2 | @!PT LDS RZ, [RZ] | NOP
ISETP.GE.AND P0, PT, R8, 0x400, PT | @P1 ISETP.NE.U32.AND.EX P0, PT, R9, RZ, PT, P0 | PLOP3.LUT P4, PT, PT, PT, UP0, 0x80, 0x0
FSETP.GT.AND P0, PT, R8, R9, PT | FCHK P0, R8, R9 | R2P PR, R8, 0x7f | R2UR UR4, R8 | UMOV UR8, 0x0 | S2UR UR9, SR_CTAID.X
STS.128 [R8], R8 | STG.E.128 desc[UR4][R2.64], R8 | STSM.16.MT88.4 [R8], R8 | RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R8
LDGSTS.E.BYPASS.128 [R8], desc[UR12][R8.64], !P0 | LDGDEPBAR | DEPBAR.LE SB0, 0x3 | BAR.SYNC.DEFER_BLOCKING R8, R9
HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 | HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0
WARPGROUP.ARRIVE
"""


def listed(text: str) -> list[str]:
    return [word.strip() for line in text.strip().splitlines() for word in line.split("|")]


@pytest.mark.parametrize("instruction", listed(WRITES))
def test_what_touches_a_running_wgmma(instruction: str) -> None:
    assert touched(WGMMA, instruction) == [re.sub(r"\.reuse", "", instruction)]
    assert "HGMMA" in instruction or touched(instruction, WGMMA) == [], "it was there before"
    assert touched(WGMMA, WAIT.format(0), instruction) == []


@pytest.mark.parametrize("instruction", listed(LEAVES))
def test_what_does_not(instruction: str) -> None:
    assert touched(WGMMA, instruction) == []


@pytest.mark.parametrize(
    ("op", "last"),
    [("HGMMA.64x64x16.F16", 39), ("HGMMA.64x64x16.F32.TF32", 55), ("IGMMA.64x64x32.S8.S8", 55), ("QGMMA.64x64x32.F32.E4M3.E4M3", 55)],
)
def test_every_kind_of_wgmma(op: str, last: int) -> None:
    wgmma = f"{op} R24, R8, gdesc[UR8], R24, gsb0"
    moves = [f"MOV R{register}, RZ" for register in (7, 8, 11, 12, 23, 24, last, last + 1)]
    assert touched(wgmma, *moves) == [move for move in moves if int(re.findall(r"\d+", move)[0]) in (8, 11, 24, last)]
    from_memory = f"{op} R24, gdesc[UR8], R24, gsb0"
    assert touched(from_memory, *moves) == [moves[5], moves[6]]
    assert touched("HGMMA.SP.64x64x32.F32.BF16 R24, R8, gdesc[UR8], R24, R2, 0x0, gsb0", "MOV R2, RZ") == ["MOV R2, RZ"]


def test_a_hazard_says_where() -> None:
    text = sass("NOP", WGMMA, "@P0 MOV R9, R2")
    assert hazards(text) == [Hazard(0x20, "@P0 MOV R9, R2", 0x10)]
    assert hazards(sass("MOV R9, R2")) == hazards("") == []


def test_a_wait_leaves_the_youngest_groups() -> None:
    a, b, c = (f"HGMMA.64x64x16.F32.BF16 R24, R{r}, gdesc[UR8], R24, gsb0" for r in (8, 12, 16))
    moves = [f"MOV R{r}, RZ" for r in (8, 12, 16)]
    assert touched(a, b, c, WAIT.format(1), *moves) == moves[2:]
    assert touched(a, b, c, WAIT.format(2), *moves) == moves[1:]
    assert touched(a, WAIT.format(1), b, WAIT.format(1), *moves) == [moves[1]]
    # without gsb0 a wgmma belongs to the group of the next that has it
    assert touched(a, b.removesuffix(", gsb0"), c, WAIT.format(1), *moves) == moves[1:]
    assert touched(a, b.removesuffix(", gsb0"), WAIT.format(0), *moves) == [moves[1]]


LOOP = [".L_x_0:", "PRMT R8, R2, 0x4140, R3", "WARPGROUP.ARRIVE", WGMMA, "{}", "@P0 BRA `(.L_x_0)", WAIT.format(0), "EXIT"]


@pytest.mark.parametrize(("wait", "found"), [(WAIT.format(1), 1), (WAIT.format(0), 0), ("NOP", 1)])
def test_a_loop_writes_what_its_last_round_reads(wait: str, found: int) -> None:
    assert touched(*(line.format(wait) for line in LOOP)) == ["PRMT R8, R2, 0x4140, R3"] * found


def test_sets_of_registers_that_take_turns() -> None:
    """As a right loop does: two sets, and a wait for one before the other is made."""
    loop = [".L_x_0:", "MOV R8, R2", WGMMA, WAIT.format(1), "MOV R12, R2", WGMMA.replace("R8", "R12"), WAIT.format(1), "BRA `(.L_x_0)"]
    assert touched(*loop) == []
    assert touched(*(line for i, line in enumerate(loop) if i != 3)) == ["MOV R12, R2"]


def test_every_path_counts() -> None:
    wait = WAIT.format(0)
    around = [WGMMA, "@P0 BRA `(.L_x_1)", wait, ".L_x_1:", "MOV R8, R2"]
    assert touched(*around) == ["MOV R8, R2"]
    assert touched(WGMMA, "@P0 BRA `(.L_x_1)", wait, "BRA `(.L_x_2)", ".L_x_1:", wait, ".L_x_2:", "MOV R8, R2") == []
    assert touched(WGMMA, "BRA.U UP0, `(.L_x_1)", "MOV R8, R2", ".L_x_1:", wait) == ["MOV R8, R2"]
    assert touched(WGMMA, "BRA `(.L_x_1)", "MOV R8, R2", ".L_x_1:", wait) == [], "nothing leads there"
    assert touched(WGMMA, "EXIT", "MOV R8, R2") == []
    assert touched(WGMMA, "@P0 EXIT", "MOV R8, R2") == ["MOV R8, R2"]
    assert touched(WGMMA, "CALL.REL.NOINC `(.L_x_1)", wait, "EXIT", ".L_x_1:", "MOV R8, R2", "RET.REL.NODEC R20 `(kernel)") == ["MOV R8, R2"]
    assert touched(".L_x_1:", "MOV R8, R2", WGMMA, "BRX R4 -0x10") == ["MOV R8, R2"], "it may go anywhere"
    assert touched(WGMMA, ".L_x_0:", "BRA `(.L_x_0)", "MOV R8, R2") == []
