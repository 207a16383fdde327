"""What `import aoquant_inductor` may not do, and which of its modules may know which."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aoquant_inductor

PACKAGE = Path(aoquant_inductor.__file__).parent
PRIVATE = ("torch._inductor", "torch._dynamo", "torch._functorch", "torch._guards")
MAY_BE_PRIVATE = "_inductor"


def python(code: str) -> str:
    env = os.environ | {"PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_touches_neither_inductor_nor_cuda_and_the_backend_is_listed() -> None:
    out = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import aoquant_inductor\n"
        "new = set(sys.modules) - before\n"
        "print(sorted(m for m in new if m.split('.')[0] == 'triton' or m.startswith(('torch._inductor', 'torch._dynamo'))))\n"
        "print([m for m in sys.modules if m == 'triton' or m.startswith('torch._inductor')], torch.cuda.is_initialized())\n"
        "import torch._dynamo\n"
        "print('aoquant' in torch._dynamo.list_backends(), torch._dynamo.lookup_backend('aoquant').__module__)\n"
    )
    assert out.splitlines() == ["[]", "[] False", "True aoquant_inductor.backend"]


def test_the_backend_is_listed_when_dynamo_came_first() -> None:
    out = python(
        "import torch, torch._dynamo\ntorch._dynamo.list_backends()\nimport aoquant_inductor\n"
        "print('aoquant' in torch._dynamo.list_backends())"
    )
    assert out == "True"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """`patterns.dynamic` -> its syntax tree."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): ast.parse(f.read_text()) for f in files}


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: this test reads names"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# a module (or package) -> what it may never import, not even inside a function
NEVER = {
    "patterns": ("lowering", "lowering_cpu", "lowering_portable", "problem", "rewrite", "backend", "_inductor_ir"),
    "lowering": ("patterns", "rewrite", "backend", "weights", "api"),
    "lowering_cpu": ("patterns", "rewrite", "backend", "weights", "ops"),
    "lowering_portable": ("patterns", "rewrite", "backend", "weights", "ops"),
    "lowering_triton": ("patterns", "rewrite", "backend", "weights", "ops"),
    "templates": ("patterns", "rewrite", "backend", "weights", "ops", "lowering", "lowering_triton", "lowering_portable"),
    "rewrite": ("lowering", "lowering_cpu", "lowering_portable", "problem", "backend", "_inductor_ir"),
    "ops": ("patterns", "rewrite", "lowering", "backend", "weights", "_inductor"),
    "qparams": ("ops", "packing", "patterns", "rewrite", "lowering", "backend", "_inductor"),
    "packing": ("ops", "patterns", "rewrite", "lowering", "backend", "weights", "_inductor"),
    "weights": ("patterns", "rewrite", "lowering", "backend", "watch", "release"),
    "entry": ("patterns", "rewrite", "lowering", "backend", "weights", "watch", "release"),
    "release": ("patterns", "lowering", "backend", "runtime"),
    "scheme": ("qparams", "ops", "packing", "patterns", "rewrite", "backend", "options", "_inductor"),
    "errors": ("scheme", "options", "ops", "rewrite", "backend", "_inductor"),
    "_inductor": ("ops", "patterns", "rewrite", "lowering", "backend", "packing", "weights"),
}


@pytest.mark.parametrize("name", NEVER)
def test_direction(name: str) -> None:
    trees = {module: tree for module, tree in modules().items() if module.split(".")[0] == name}
    assert trees, f"no module {name}: correct NEVER"
    for module, tree in trees.items():
        ours = {i.removeprefix("aoquant_inductor.") for i in imports(tree) if i.startswith("aoquant_inductor.")}
        assert not {i for i in ours if i.split(".")[0] in NEVER[name]}, module


def private(tree: ast.AST) -> set[str]:
    """Private modules of torch that a module imports, names as an attribute chain, or spells in a string that is code."""
    found = {i for i in imports(tree) if i.startswith(PRIVATE)}
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= {text for text in [ast.unparse(node)] if text.startswith(PRIVATE)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= {node.value for _ in "1" if node.value.startswith(PRIVATE)}
    return found


def test_private_torch_is_named_in_the_inductor_modules_only() -> None:
    found = {name: names for name, tree in modules().items() if (names := private(tree)) and not name.startswith(MAY_BE_PRIVATE)}
    registry = {"torch._dynamo.backends.registry", "torch._dynamo.backends.registry.register_backend"}
    assert found == {"register": registry}


def test_private_sees_what_it_looks_for() -> None:
    code = "import torch\nimport torch._inductor.ir\nx = torch._dynamo.config\ny = 'torch._guards'\n"
    assert private(ast.parse(code)) == {"torch._inductor.ir", "torch._dynamo", "torch._dynamo.config", "torch._guards"}
