"""The rooms of the source, what each may import, and what its files do import. tests/test_layers.py enforces the table,
and imports.py draws it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dit_rewrite", "passes", "kernels", "runtime")  # each is installed inside dit_rewrite
PASSES = ("passes.guards", "passes.capture", "passes.analysis", "passes.rewrite")
PUBLIC = ("compile", "enable", "guards", "module")  # single files of dit_rewrite that users import from
LEAVES = ("errors", "torch_compat", "decision_row")
LANGUAGE = (*LEAVES, "passes.guards", "passes.analysis", "passes.rewrite", "runtime", "policy")
COMPILER = (*LANGUAGE, "passes.pipeline", "passes.capture", "kernels", "policies", "compiler")
# what each room may import, itself aside
MAY_IMPORT = {
    "errors": (),
    "torch_compat": ("errors",),
    "decision_row": (),
    "passes.pipeline": LEAVES,
    "passes.guards": LEAVES,
    "passes.capture": (*LEAVES, "passes.pipeline"),
    "passes.analysis": (*LEAVES, "passes.pipeline", *PASSES[:2]),
    "passes.rewrite": (*LEAVES, "passes.pipeline", *PASSES[:3]),
    "kernels": LEAVES,
    "runtime": LEAVES,
    "policy": LANGUAGE[:-1],
    "policies": (*LEAVES, "passes.guards", "policy"),
    "compiler": COMPILER[:-2],
    "report": COMPILER[:-2] + ("compiler",),
    "public": (*COMPILER, "report"),
    "proof": (*COMPILER, "report", "public"),
    "search": (*COMPILER, "report", "public", "proof"),
    "analysis": (*COMPILER, "report", "public", "proof"),
    "demo": (*COMPILER, "report", "public", "proof", "search"),
    "cli": (*COMPILER, "report", "public", "proof", "search", "analysis", "demo"),
}


def module_of(path: Path) -> str:
    """The dotted name of a file within the installed package, less its first word."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "dit_rewrite" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file, which is parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, at its top or inside a function; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
    return frozenset(found)


def read_files(path: Path) -> set[str]:
    """The files of this package that a file imports; a package that is named only on the way is none of them."""
    named = {name.removeprefix("dit_rewrite.") for name in imports(path) if name.startswith("dit_rewrite.")}
    found = {name if name in FILES else name.rpartition(".")[0] for name in named} & set(FILES)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def room_of(module: str) -> str | None:
    """The room that a file belongs to; None for what stands above all rooms, such as ``__init__``."""
    if module in PUBLIC:
        return "public"
    rooms = [room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")]
    return rooms[0] if rooms else None


@cache
def edges() -> frozenset[tuple[str, str]]:
    found = ((module, other) for module, path in FILES.items() for other in read_files(path))
    return frozenset((module, other) for module, other in found if other != module)
