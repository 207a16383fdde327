"""The part of `_inductor` about Dynamo: what it knows while it calls a backend, and the guards that are ours."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import fx, nn

from aoquant_inductor._inductor import private


@dataclass(frozen=True)
class Frame:
    """Where a graph comes from: the compiled object's context and module, and the frame that was traced."""

    context: object  # one per torch.compile call: what report() finds the graphs by
    root: nn.Module | None  # the compiled module: names are relative to it
    code: CodeType
    local_self: nn.Module | None
    partial: bool  # a function with graph breaks, of which this is one graph: what the others have is not known


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


def _called() -> tuple[object, object]:
    """(context, function) of the innermost torch.compile call on this thread's stack; (None, None) outside of one."""
    caller: FrameType | None = sys._getframe()
    while caller is not None:
        if caller.f_code.co_name == "compile_wrapper" and caller.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return caller.f_locals.get("self"), caller.f_locals.get("fn")
        caller = caller.f_back
    return None, None


def calling() -> tuple[object, nn.Module | None]:
    """(context, root) of the innermost torch.compile call on this thread's stack; (None, None) outside of one."""
    context, function = _called()
    return context, _module_of(function)


def frame() -> Frame:
    """The torch.compile call whose graph a backend is given, and the frame that was traced for it."""
    (translator,) = private("torch._dynamo.symbolic_convert", "InstructionTranslator")
    output = translator.current_tx().output
    code, local_self = output.root_tx.f_code, output.root_tx.f_locals.get("self")
    local_self = local_self if isinstance(local_self, nn.Module) else None
    context, function = _called()
    root = _module_of(function)
    own = getattr(function, "__code__", None)
    broken = getattr(getattr(output, "compile_subgraph_reason", None), "graph_break", False)
    partial = root is None and (broken or own is not code)
    return Frame(context or code, root if root is not None else local_self, code, local_self, partial)


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


def is_fake(value: object) -> bool:
    (fake,) = private("torch._subclasses.fake_tensor", "FakeTensor")
    return isinstance(value, fake)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """For what compiles during a call, as Dynamo does it: under its lock, since what it patches is the process's, and without
    the modes of the call, a default device say, which are not the graph's.
    """
    (lock,) = private("torch._dynamo.convert_frame", "compile_lock")
    modes, put = private("torch._dynamo.utils", "get_torch_function_mode_stack", "set_torch_function_mode_stack")
    with lock:
        found = modes()
        put([])
        try:
            yield
        finally:
            put(found)


def hides_weights() -> bool:
    """Whether Dynamo gives a backend parameters as attributes of the graph, without their modules: by Inductor's freezing, or
    its own setting.
    """
    (is_parameter_freezing,) = private("torch._dynamo.utils", "is_parameter_freezing")
    (config,) = private("torch._dynamo", "config")
    own = any(getattr(config, name, False) for name in ("prepare_freezing", "install_free_tensors"))
    return own or bool(is_parameter_freezing())


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


def guard_values(nodes: Sequence[fx.Node], holds: Callable[[Any], bool], what: str) -> None:
    """Recompile unless `holds` is true of what these placeholders are."""
    (context,) = private("torch._guards", "TracingContext")

    def build(builder: Any, guard: Any) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(holds, [what], guard.user_stack)

    for node in nodes:
        context.get().guards_context.dynamo_guards.add(node._dynamo_source.make_guard(build))  # type: ignore[attr-defined]


def graphs_left(code: CodeType) -> int:
    """How many graphs Dynamo will compile for this code after the one it is at; what comes later runs eager."""
    (entries,) = private("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")
    (config,) = private("torch._dynamo", "config")
    return int(config.recompile_limit) - len(entries(code)) - 1


def guard_training(frame: Frame) -> None:
    """Recompile when `training` of the compiled module changes: a quantized graph must not serve a training step."""
    root = frame.root
    if root is None:
        return
    (context,) = private("torch._guards", "TracingContext")
    (builder,) = private("torch._dynamo.guards", "GuardBuilder")
    local, attribute, anywhere = private("torch._dynamo.source", "LocalSource", "AttrSource", "GlobalStateSource")
    if root is frame.local_self:
        guard = attribute(local("self"), "training").make_guard(builder.CONSTANT_MATCH)
    else:  # a frame behind a graph break, a decorated forward, torch's own modules: no local of the frame is the module
        guard = anywhere().make_guard(_asks(root))
    context.get().guards_context.dynamo_guards.add(guard)


def _asks(module: nn.Module) -> Callable[[Any, Any], None]:
    """What builds a guard on `module.training`, wherever the module is."""
    alive, was = weakref.ref(module), module.training

    def holds(_: object) -> bool:
        now = alive()
        return now is None or now.training is was

    def build(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_lambda_guard(holds, [f"the compiled module's training is {was}"], guard.user_stack)

    return build
