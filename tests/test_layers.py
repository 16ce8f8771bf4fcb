"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("dit_rewrite", "passes", "kernels", "runtime")
ERRORS = "dit_rewrite.errors"  # the leaf that every layer may import


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def layer_of(module: str) -> str | None:
    """The layer that a module of this package belongs to; None for other packages, and for the catalogue of errors."""
    parts = module.split(".")
    if parts[0] != "dit_rewrite" or module.startswith(ERRORS) or parts == ["dit_rewrite"]:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "dit_rewrite"


def test_layers_are_there() -> None:
    """The check reads real files."""
    assert sources("passes")
    assert sources("runtime")
    assert len(sources("dit_rewrite")) > 10


@pytest.mark.parametrize(
    ("layer", "allowed"),
    [("passes", {"passes"}), ("runtime", {"runtime"}), ("kernels", {"kernels"})],
)
def test_imports_between_layers(layer: str, allowed: set[str]) -> None:
    """`passes` and `runtime` know neither each other nor what users import; `kernels` knows none."""
    wrong = {
        (path.name, module)
        for path in sources(layer)
        for module in imports(path)
        if layer_of(module) not in {None, *allowed}
    }
    assert not wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_bare_names(layer: str) -> None:
    """Nothing is imported by its folder's bare name, which would load it a second time."""
    wrong = {(path.name, m) for path in sources(layer) for m in imports(path) if m.split(".")[0] in LAYERS[1:]}
    assert not wrong


def test_errors_are_a_leaf() -> None:
    """The catalogue of errors imports nothing of this package, and not torch."""
    assert imports(ROOT / "dit_rewrite" / "errors.py") <= {
        "__future__", "__future__.annotations", "collections.abc", "collections.abc.Iterable",
        "collections.abc.Mapping", "enum", "enum.Enum",
    }  # fmt: skip


def test_passes_know_no_device_code() -> None:
    """Passes import no Triton, no Inductor and no diffusers, and name no device's module."""
    foreign = ("triton", "diffusers", "torch.cuda", "torch._inductor", "torch.distributed", "torch.xpu", "torch.mps")
    for path in sources("passes"):
        assert not {m for m in imports(path) if m.startswith(foreign)}
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if name.startswith(foreign)}


def test_diffusers_is_imported_lazily() -> None:
    """Importing the package loads neither diffusers nor transformers: no file imports them at its top."""
    for layer in LAYERS:
        for path in sources(layer):
            top = ast.Module(
                [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))], []
            )
            names = {alias.name for node in ast.walk(top) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in ast.walk(top) if isinstance(node, ast.ImportFrom)}
            assert not {name for name in names if name.split(".")[0] in ("diffusers", "transformers")}, path
