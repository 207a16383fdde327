"""The Triton kernels: for each one <name>.py.jinja, and a <name>.py that says what it fits and lists its configs as data.

A new kernel is those two files and its place in KERNELS: the order in which default mode asks them. The last one fits all.
"""

from __future__ import annotations

from aoquant_inductor.templates import gemv, int4, int4_few, int4_gemv_dynamic, linear
from aoquant_inductor.templates.kernel import Config, Default, Kernel

KERNELS: tuple[Kernel, ...] = (gemv.KERNEL, *int4_few.KERNELS, *int4.KERNELS, *linear.KERNELS)
QUANTIZING: tuple[Kernel, ...] = (gemv.DYNAMIC, int4_gemv_dynamic.KERNEL)
"""Those that quantize x themselves; none fits all."""

__all__ = ["KERNELS", "QUANTIZING", "Config", "Default", "Kernel"]
