"""Every private symbol of torch that aoquant uses, and for which versions; nothing else imports them.

Supported: torch 2.11 to 2.15. `import aoquant_inductor` does not import this module; the first compile does, and a missing
symbol is an UnsupportedTorch that names it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

from aoquant_inductor.errors import UnsupportedTorch

SUPPORTED = ("2.11", "2.15")


def private(module: str, *names: str) -> tuple[Any, ...]:
    """The named attributes of a private module; raises UnsupportedTorch naming the first that is missing."""
    try:
        source = importlib.import_module(module)
        return tuple(getattr(source, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorch(
            f"torch {torch.__version__} has no {module}.{getattr(error, 'name', names)}; "
            f"aoquant knows torch {SUPPORTED[0]} to {SUPPORTED[1]}."
        ) from error


# ---- options -------------------------------------------------------------------------------------------------------------


def mode_options(mode: str | None) -> dict[str, Any]:
    (list_mode_options,) = private("torch._inductor", "list_mode_options")
    return dict(list_mode_options(mode)) if mode else {}


def mode_names() -> list[str]:
    (list_mode_options,) = private("torch._inductor", "list_mode_options")
    return list(list_mode_options())


@functools.cache
def config_keys() -> list[str]:
    (config,) = private("torch._inductor", "config")
    return sorted(config.get_config_copy())


def is_config_key(key: str) -> bool:
    return key.replace("-", "_") in config_keys()


def config_type(key: str) -> type | None:
    """What a value of this key has to be; None where no class says it."""
    (config,) = private("torch._inductor", "config")
    kind = config.get_type(key.replace("-", "_"))
    return kind if type(kind) is type else None


# ---- the graph we compile ------------------------------------------------------------------------------------------------


def copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A GraphModule of its own: Dynamo writes the call's bytecode from the original's placeholders."""
    env: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        if hasattr(node, "_dynamo_source"):
            env[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy, env


def static_placeholder(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    """An input whose address never changes (CUDA graphs do not copy it), with what AOTAutograd asks of an input."""
    (context,) = private("torch._guards", "TracingContext")
    (local,) = private("torch._dynamo.source", "LocalSource")
    node = graph.placeholder(name)
    node._dynamo_source = local(name)  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["example_value"] = context.get().fake_mode.from_tensor(value, static_shapes=True)
    return node


def _freezing(inner: Callable[..., Any], packs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """inner_compile that turns the first len(packs) inputs into constants of the graph and drops them from its arguments."""
    enter_freezing, record = private("torch._inductor.freezing_utils", "enter_freezing", "record_has_frozen_params")
    (replace,) = private("torch._inductor.constant_folding", "replace_node_with_constant")
    (fake_mode_of,) = private("torch._dynamo.utils", "detect_fake_mode")
    (context,) = private("torch._guards", "TracingContext")
    n = len(packs)

    def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        placeholders = gm.graph.find_nodes(op="placeholder")
        matches = len(placeholders) == len(example_inputs) and all(
            isinstance(p.meta.get("val"), torch.Tensor) and p.meta["val"].shape == t.shape and p.meta["val"].dtype == t.dtype
            for p, t in zip(placeholders, packs, strict=False)
        )
        if not matches:  # tensor subclasses among the inputs, effect tokens: the packs stay ordinary static inputs
            return inner(gm, example_inputs, **kwargs)
        with enter_freezing():
            for node, value in zip(placeholders, packs, strict=False):
                replace(gm, node, value)
            record(gm)
        gm.recompile()
        kwargs["static_input_idxs"] = [i - n for i in kwargs.get("static_input_idxs") or () if i >= n]
        rest = list(example_inputs[n:])
        fake = fake_mode_of(rest) or context.get().fake_mode
        with mock.patch.object(fake, "allow_non_fake_inputs", True):
            compiled = inner(gm, rest, **kwargs)

        def call(args: list[Any]) -> Any:
            del args[:n]
            return compiled(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    return compile_inner


@functools.cache
def _sources() -> bytes:
    """A hash of every file of this package."""
    folder = Path(__file__).parent
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).digest()


def _with_version(patches: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """The patches, with what makes Inductor's graph cache tell our versions apart: it hashes graphs and config, but neither the
    lowerings of foreign ops nor the sizes traced. A custom pass is the one thing in its key that we can own; a user's pass
    runs inside it.
    """
    (base,) = private("torch._inductor.custom_graph_pass", "CustomGraphPass")
    (config,) = private("torch._inductor", "config")
    key = "post_grad_custom_post_pass"
    theirs = patches.get(key, getattr(config, key))
    passes = [] if theirs is None else list(theirs) if isinstance(theirs, list | tuple) else [theirs]

    class Version(base):  # type: ignore[misc, valid-type]
        def __call__(self, graph: fx.Graph) -> None:
            for custom in passes:
                custom(graph)

        def uuid(self) -> Any:
            ids = [p.uuid() if hasattr(p, "uuid") else None for p in passes]
            return None if None in ids else (_sources(), variant, *ids)

    return {**patches, key: Version()}


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], packs: Sequence[torch.Tensor] = (),
    constant: bool = False, variant: str = "",
) -> Callable[..., Any]:
    """Inductor over `gm(*packs, *inputs)`; `constant` bakes the packs in (the caller passes them all the same).

    variant: what the lowerings choose by besides graph and patches.
    """
    (compile_fx,) = private("torch._inductor.compile_fx", "compile_fx")
    everything = [*packs, *inputs]
    if not packs:
        return compile_fx(gm, everything, config_patches=dict(patches))  # type: ignore[no-any-return]
    from aoquant_inductor import _inductor_machine as machine
    from aoquant_inductor._inductor_reduction import quantizing

    (functorch_config,) = private("torch._functorch", "config")
    (innermost,) = private("torch._dynamo.eval_frame", "innermost_fn")
    (inner,) = private("torch._inductor.compile_fx", "compile_fx_inner")
    inner, variant = machine.guarded(inner, packs), variant + machine.assembler(packs)
    inner = _freezing(inner, packs) if constant else inner
    # AOTAutograd's cache sees neither inner_compile nor the constants
    with functorch_config.patch(enable_autograd_cache=False), quantizing(gm.graph):
        compiled = compile_fx(gm, everything, inner_compile=inner, config_patches=_with_version(patches, variant))
    # Dynamo wraps what a backend returns in torch.compiler.disable; once is enough, and a layer costs 2 us per call.
    return innermost(compiled)  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where what we build lies: beside Inductor's own compiled code."""
    (cache_dir,) = private("torch._inductor.runtime.cache_dir_utils", "cache_dir")
    folder = Path(cache_dir()) / "aoquant"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def debug_folder() -> Path | None:
    """Where TORCH_COMPILE_DEBUG=1 collects what compilers say, else None."""
    (config,) = private("torch._inductor", "config")
    if not config.trace.enabled:
        return None
    (get_debug_dir,) = private("torch._dynamo.utils", "get_debug_dir")
    folder = Path(get_debug_dir()) / "aoquant"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def counters() -> Counter[str]:
    """What Inductor counts in this process. A graph that comes from its cache counts once more what its compile counted."""
    (dynamo,) = private("torch._dynamo.utils", "counters")
    found: Counter[str] = dynamo["inductor"]
    return found


def storage_id(tensor: torch.Tensor) -> int:
    """What tells its storage from every other one, as long as it is referred to, if only weakly."""
    return int(tensor.untyped_storage()._cdata)


def memory_is_shared(tensor: torch.Tensor) -> bool:
    """Whether anything else holds this tensor's memory: an alias, a view, a storage object."""
    (use_count,) = private("torch._C", "_storage_Use_Count")

    def holders(t: torch.Tensor) -> tuple[int, int]:
        storage = t.untyped_storage()
        return use_count(storage._cdata), sys.getrefcount(storage)

    # versions of torch differ in what a Python storage adds to the counts: compare with a tensor that is certainly alone
    mine, alone = holders(tensor), holders(torch.empty(1, device="cpu"))
    return mine[0] > alone[0] or mine[1] > alone[1]


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones whatever mode the user's call is in: they are updated in place later, and lie where
    they are told to whatever the default device is.
    """
    (no_modes,) = private("torch._C", "DisableTorchFunction")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), no_modes():
        yield
