"""Part of `_inductor`: descriptors of inputs for the tensor memory accelerator, made by the host.

A kernel that makes its own writes it to memory and waits before its first load, .4 to .8 us on an H200, in memory that
Inductor's launcher has to find. What the host makes is a parameter.
"""

from __future__ import annotations

import functools
import textwrap
from typing import Any

from aoquant_inductor._inductor import private
from aoquant_inductor._inductor_ir import product, static


@functools.cache
def kernel_type() -> Any:
    """What a template of ours makes: Inductor's kernel, whose source may ask for `described(name, rows, columns)`."""
    (kernel,) = private("torch._inductor.select_algorithm", "TritonTemplateKernel")
    argument, name_of = private("torch._inductor.codegen.common", "TMADescriptorArg", "ArgName")
    config, virtualized = private("torch._inductor", "config", "virtualized")

    def _by_others() -> bool:
        """Whether somebody else than our launcher calls the kernel; while a C++ wrapper is tuned its graph has no such flag."""
        graph = virtualized.V.graph
        return bool(
            graph.cpp_wrapper or config.cpp_wrapper or graph.fx_wrapper or config.static_launch_user_defined_triton_kernels
        )

    class Described(kernel):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._blocks: dict[str, tuple[int, int]] = {}
            self._plain = self.args.python_argdefs
            self._register_extra_template_env_fns(self.described)

        def described(self, name: str, rows: int, columns: int) -> str:
            """An expression for the descriptor of a dense input (_inductor_ir.by_tma), in blocks of rows x columns."""
            if not self._whole(self.named_input_nodes[name]) or _by_others():
                size, stride = ", ".join(self.size(name, i) for i in (0, 1)), self.stride(name, 0)
                return f"tl.make_tensor_descriptor({name}, [{size}], [{stride}, 1], [{rows}, {columns}])"
            self._blocks[name] = rows, columns
            self.args.python_argdefs = self._with_descriptors
            return f"desc_{name}"

        def _whole(self, node: Any) -> bool:
            """Whether it begins where the memory that the kernel is given does, and all of its rows are elements of that."""
            graph = virtualized.V.graph
            base = graph.get_buffer(node.get_name()).get_layout()
            enough = graph.sizevars.statically_known_geq(product(base.size), product(node.get_size()))
            return bool(static(node.get_layout().offset) == 0 and base.is_contiguous() and enough)

        def _with_descriptors(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
            """The launcher (_inductor_launcher) makes them: a caller does not pass them."""
            names, calls, signature, types = self._plain()
            more = [
                argument(f"desc_{name}", "stable", list(block), self.named_input_nodes[name].get_dtype())
                for name, block in self._blocks.items()
            ]
            return [*names, *(name_of(one.name) for one in more)], calls, [*signature, *more], types

        def jit_lines(self) -> str:
            text = textwrap.dedent(super().jit_lines())
            if not self._blocks:
                return text
            names, places = [name.name for name in self._plain()[0]], []
            for name, block in self._blocks.items():
                node = self.named_input_nodes[name]
                places.append((names.index(self.args.input_buffers[node.get_name()]), static(node.get_size()[1]), block))
            return f"from aoquant_inductor._inductor_launcher import describing\n@describing({len(names)}, {places!r})\n{text}"

    return Described
