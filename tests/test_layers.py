"""The import rules between packages, files and layers, read from the source."""

from __future__ import annotations

import ast

import networkx as nx
import pytest

from docs.figures.rooms import FILES, FOLDERS, MAY_IMPORT, ROOT, edges, imports, room_of, tree


def test_files_are_there() -> None:
    """The checks read real files, and each file except the top-level ones is in a package."""
    assert len(FILES) > 150
    above = {module for module in FILES if room_of(module) is None}
    assert above == {"", "__main__", "passes"}
    assert {room_of(module) for module in FILES} - {None} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_between_rooms(room: str) -> None:
    """A package imports only packages below it."""
    wrong = {(a, b) for a, b in edges() if room_of(a) == room and room_of(b) not in {room, *MAY_IMPORT[room]}}
    assert not wrong


def test_no_arrow_upwards() -> None:
    """The packages that a package may import never lead back to it."""
    rooms = nx.DiGraph((room, other) for room, others in MAY_IMPORT.items() for other in others)
    assert nx.is_directed_acyclic_graph(rooms)


def test_no_cycle_between_files() -> None:
    """No file imports itself through others, not even for its types."""
    cycles = list(nx.simple_cycles(nx.DiGraph(edges())))
    assert not cycles


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_names(folder: str) -> None:
    """No import uses a folder's bare name, which would load the module a second time."""
    paths = (ROOT / folder).rglob("*.py")
    assert not {(path.name, m) for path in paths for m in imports(path) if m.split(".")[0] in FOLDERS[1:]}


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module: str) -> None:
    """A file of the package has fewer than 320 lines."""
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) < 320


def test_errors_are_a_leaf() -> None:
    """The catalogue of errors imports nothing from this package, and not torch."""
    for module, path in FILES.items():
        if room_of(module) == "errors":
            assert all(
                name.startswith("dit_rewrite.errors") for name in imports(path) if name.startswith("dit_rewrite")
            )
            assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


def test_passes_know_no_device_code() -> None:
    """Passes import no Triton, no Inductor and no diffusers, and name no device's module."""
    foreign = ("triton", "diffusers", "torch.cuda", "torch._inductor", "torch.distributed", "torch.xpu", "torch.mps")
    for path in (path for module, path in FILES.items() if module.startswith("passes")):
        assert not {m for m in imports(path) if m.startswith(foreign)}
        names = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if name.startswith(foreign)}


def test_private_torch_has_one_room() -> None:
    """Only torch_compat imports or names torch's private attributes."""
    for module, path in FILES.items():
        attributes = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
        names = imports(path) | {ast.unparse(node) for node in attributes}
        private = {name for name in names if name.startswith("torch.") and "._" in name and "__" not in name}
        assert not private or module == "torch_compat", (module, private)


def test_diffusers_is_imported_lazily() -> None:
    """Importing the package loads neither diffusers nor transformers: no file imports them at the top level."""
    for path in FILES.values():
        body = tree(path).body
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("diffusers", "transformers")}, path
