"""The part of `_inductor` about Dynamo: what it knows while it calls a backend, and the guards that are ours."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

from aoquant_inductor._inductor import private, storage_id

AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = frozenset([operator.setitem, *(getattr(operator, f"i{name}") for name in AUGMENTED)])


@dataclass(frozen=True)
class Frame:
    """Where a graph comes from: the compiled object's context and module, and the frame that was traced."""

    context: object  # one per torch.compile call: what report() finds the graphs by
    root: nn.Module | None  # the compiled module: names are relative to it
    code: CodeType
    local_self: nn.Module | None


def _module_of(function: object) -> nn.Module | None:
    """The module a compiled function runs: itself, the instance of a bound method, or what wrap_inline closed over."""
    for _ in range(3):
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            inner_module = getattr(owner, "_orig_mod", owner)
            return inner_module if isinstance(inner_module, nn.Module) else owner
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            return None
        function = inner
    return None


def calling() -> tuple[object, nn.Module | None]:
    """(context, root) of the innermost torch.compile call on this thread's stack; (None, None) outside of one."""
    caller: FrameType | None = sys._getframe()
    while caller is not None:
        if caller.f_code.co_name == "compile_wrapper" and caller.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return caller.f_locals.get("self"), _module_of(caller.f_locals.get("fn"))
        caller = caller.f_back
    return None, None


def frame() -> Frame:
    """The torch.compile call whose graph a backend is given, and the frame that was traced for it."""
    (translator,) = private("torch._dynamo.symbolic_convert", "InstructionTranslator")
    root_tx = translator.current_tx().output.root_tx
    local_self = root_tx.f_locals.get("self")
    local_self = local_self if isinstance(local_self, nn.Module) else None
    context, root = calling()
    return Frame(context or root_tx.f_code, root if root is not None else local_self, root_tx.f_code, local_self)


def context_of(compiled: object) -> object | None:
    """The Frame.context of what torch.compile returned, or of a module after module.compile()."""
    context: object | None = getattr(compiled, "dynamo_ctx", None)
    if context is not None:
        return context
    call = getattr(compiled, "_compiled_call_impl", None) or compiled
    code = getattr(call, "__code__", None)
    if code is None or code.co_name != "compile_wrapper":
        return None
    cells = dict(zip(code.co_freevars, getattr(call, "__closure__", None) or (), strict=False))
    found: object | None = cells["self"].cell_contents if "self" in cells else None
    return found


def backend_of(context: object) -> object | None:
    """What torch.compile was told to compile by, options and all: equal ones share Dynamo's graphs."""
    backend: object | None = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend


def told(backend: object) -> tuple[Any, str | None] | None:
    """(options, mode) of a torch.compile by this backend; None for another one's."""
    kwargs = getattr(backend, "kwargs", {})
    ours = getattr(backend, "compiler_name", None) == "aoquant"
    return (kwargs.get("options"), kwargs.get("mode")) if ours else None


def origin_of(compiled: object) -> tuple[object, object | None, nn.Module | None] | None:
    """(context, backend, module) of what `context_of` knows."""
    context = context_of(compiled)
    return None if context is None else (context, backend_of(context), _module_of(compiled))


def users(error: Exception) -> Exception:
    """The error as Dynamo lets it through: what else a backend raises reaches the user wrapped in BackendCompilerFailed."""
    (shorten,) = private("torch._dynamo.exc", "ShortenTraceback")
    kind = type(type(error).__name__, (type(error), shorten), {"__module__": type(error).__module__})
    same: Exception = kind.__new__(kind, *error.args)
    shorten.__init__(same, *error.args, first_useful_frame=None)
    same.__dict__.update(error.__dict__)
    return same


def source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def module_name(node: fx.Node) -> str:
    """The innermost module that a node was traced in, as its place from what was compiled: `L['self'].layers.0`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def compile_lock() -> Any:
    """Held by Dynamo while it compiles, since what it patches is the process's: by whoever compiles during a call, too."""
    (lock,) = private("torch._dynamo.convert_frame", "compile_lock")
    return lock


def hides_weights() -> bool:
    """Whether Dynamo gives a backend parameters as attributes of the graph, without their modules: by Inductor's freezing."""
    (is_parameter_freezing,) = private("torch._dynamo.utils", "is_parameter_freezing")
    return bool(is_parameter_freezing())


def differentiates(gm: fx.GraphModule, trains: bool) -> bool:
    """Whether the graph takes gradients itself: torch.func's, tangents among them, and where it enables grad on its own; or, of
    one that `trains`, has what our backward does not know: torch.vmap, inference mode.
    """
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if name == "_set_grad_enabled" and node.args[:1] == (True,) and not torch.is_grad_enabled():
            return True
        if trains and name in ("_vmap_increment_nesting", "_enter_inference_mode"):
            return True
        if name in ("_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad", "requires_grad_"):
            return True
    return False


def stream(node: fx.Node) -> object:
    """The stream that the function itself puts a node on (`with torch.cuda.stream(s)`), as Dynamo notes from torch 2.13 on."""
    return node.meta.get("custom", {}).get("stream")


def written(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[[fx.Node], bool]:
    """Whether the graph writes to what a node is, or to a part of it. Dynamo has run it on fake tensors, whose versions count
    that, but not what is written through .data, as one of a list or in inference mode: that is found by the ops.
    """
    values = ((node, node.meta.get("example_value")) for node in gm.graph.nodes)
    fakes = {node: value for node, value in values if isinstance(value, torch.Tensor) and value.layout is torch.strided}
    storages = {node: _storage(value) for node, value in fakes.items()}
    by_op = {storages.get(one) for node in gm.graph.nodes for one in _writes_to(node)} - {None}
    many = {node: value._version for node, value in fakes.items() if not value.is_inference() and value._version > 0}
    first = _at_first(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True), storages) if many else {}
    counted = {node for node, version in many.items() if version > first.get(storages[node], 0)}
    through = by_op | {storages[node] for node in counted} - {None}
    return lambda node: node in counted or storages.get(node) in through


def _at_first(inputs: Iterable[tuple[fx.Node, object]], storages: Mapping[fx.Node, int | None]) -> dict[int | None, int]:
    """By storage, the version of inputs' fake tensors before anything ran: one that begins within its storage, or shares it
    with another, has one already.
    """
    (mode,) = private("torch._subclasses.fake_tensor", "FakeTensorMode")
    fresh = mode()
    found: dict[int | None, int] = {}
    plain = [(node, fresh.from_tensor(value)) for node, value in inputs if type(value) in (torch.Tensor, nn.Parameter)]
    for node, fake in plain:
        found[storages.get(node)] = max(int(fake._version), found.get(storages.get(node), 0))
    return found


def _storage(value: torch.Tensor) -> int | None:
    try:
        return storage_id(value)
    except NotImplementedError:  # what torch.func wraps has none
        return None


def _writes_to(node: fx.Node) -> list[fx.Node]:
    """What an op writes to, as far as its name, its `out` or its schema say."""
    if node.op not in ("call_function", "call_method"):
        return []
    name, op = str(getattr(node.target, "__name__", node.target)), node.target
    if isinstance(op, torch._ops.OpOverloadPacket):
        op = getattr(op, "default", op)
    if isinstance(op, torch._ops.OpOverload):
        arguments = op._schema.arguments
        given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
        found = [given.get(a.name) for a in arguments if a.is_write]
    elif op in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        found = [node.args[0] if node.args else None]
    else:
        found = [node.kwargs.get("out"), node.args[0] if node.kwargs.get("inplace") and node.args else None]
    flat = [one for value in found for one in (value if isinstance(value, (list, tuple)) else (value,))]
    return [one for one in flat if isinstance(one, fx.Node)]


def guard_identity(nodes: Sequence[fx.Node], instance: nn.Module | None) -> None:
    """Recompile unless these placeholders are the very objects of this call (and `instance` the traced `self`).

    The guard on `self` makes Dynamo count its recompile limit per instance instead of per code object.
    """
    (context,) = private("torch._guards", "TracingContext")
    (builder,) = private("torch._dynamo.guards", "GuardBuilder")
    (local,) = private("torch._dynamo.source", "LocalSource")
    guards = context.get().guards_context.dynamo_guards
    for node in nodes:
        guards.add(node._dynamo_source.make_guard(builder.ID_MATCH))  # type: ignore[attr-defined]
    if instance is not None:
        guards.add(local("self").make_guard(builder.ID_MATCH))


def graphs_left(code: CodeType) -> int:
    """How many graphs Dynamo will compile for this code after the one it is at; what comes later runs eager."""
    (entries,) = private("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")
    (config,) = private("torch._dynamo", "config")
    return int(config.recompile_limit) - len(entries(code)) - 1


def guard_training(instance: nn.Module | None) -> None:
    """Recompile when `self.training` of the traced frame changes: a quantized graph must not serve a training step."""
    if instance is None:
        return
    (context,) = private("torch._guards", "TracingContext")
    (builder,) = private("torch._dynamo.guards", "GuardBuilder")
    local, attribute = private("torch._dynamo.source", "LocalSource", "AttrSource")
    guard = attribute(local("self"), "training").make_guard(builder.CONSTANT_MATCH)
    context.get().guards_context.dynamo_guards.add(guard)
