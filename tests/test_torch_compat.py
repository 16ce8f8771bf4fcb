"""A private name that torch no longer has raises an error; it never counts as an answer."""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dit_rewrite import torch_compat
from dit_rewrite.errors import TorchChanged
from dit_rewrite.torch_compat.names import PRIVATE, Private, find


def seen_by(look: Callable[[fx.GraphModule], Any]) -> Any:
    """The result of `look` on a graph that Dynamo captured, during compilation."""
    found = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(look(gm))
        return gm.forward

    model = torch.nn.Linear(2, 2)
    torch.compile(model, backend=backend)(torch.ones(1, 2))
    return found[0]


def test_a_graph_of_this_torch_answers() -> None:
    assert seen_by(torch_compat.parameter_names) == {"weight", "bias"}
    assert seen_by(torch_compat.is_broken) is False
    assert seen_by(lambda _: torch_compat.is_compiling())
    assert seen_by(lambda _: torch_compat.compile_id()) is not None
    assert not torch_compat.is_compiling() and torch_compat.compile_id() is None


def test_a_graph_without_what_dynamo_notes_is_no_answer() -> None:
    """Not "no parameters", which would make weights data, nor "unbroken", which would make a part the whole model."""
    bare = fx.GraphModule({}, fx.Graph())
    with pytest.raises(TorchChanged, match=r"has no .*dynamo_flat_name_to_original_fqn"):
        torch_compat.parameter_names(bare)
    with pytest.raises(TorchChanged, match="compile_subgraph_reason"):
        torch_compat.is_broken(bare)
    bare.compile_subgraph_reason = types.SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(TorchChanged, match="graph_break"):
        torch_compat.is_broken(bare)


@pytest.mark.parametrize(
    ("owner", "name", "ask"),
    [
        (TracingContext, "try_get", torch_compat.static_inputs),
        (CompileContext, "current_compile_id", torch_compat.compile_id),
        (CompileContext, "try_get", torch_compat.is_compiling),
        (ShapeEnv, "guards", lambda: torch_compat.size_guards(torch_compat.FakeTensorMode(shape_env=ShapeEnv()))),
    ],
)
def test_a_renamed_attribute_is_said(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, ask: Callable[[], object]
) -> None:
    if name == "guards":  # an attribute of its objects
        monkeypatch.setattr(owner, "__init__", lambda self: None)
    else:
        monkeypatch.delattr(owner, name)
    with pytest.raises(TorchChanged, match=name):
        ask()


NAMES = [name for name in PRIVATE if name.startswith("torch.")]


@pytest.mark.parametrize("name", NAMES)
def test_each_private_name_is_there(name: str) -> None:
    """Where torch lacks one, this test names it before a user's model fails."""
    assert find(name) is not None


@pytest.mark.parametrize("name", NAMES)
def test_an_error_says_what_is_not_possible_without_a_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    monkeypatch.delattr(importlib.import_module(module), attribute)
    with pytest.raises(TorchChanged) as raised:
        find(name)
    api = PRIVATE[name]
    said = str(raised.value)
    assert f"has no {name}, without which dit_rewrite cannot {api.without}. torch {api.versions} has it." in said


def test_each_private_name_has_its_versions() -> None:
    """The table has the names that the functions use, and no others, each with a range that includes this torch."""
    files = [path for path in Path(torch_compat.__file__).parent.glob("*.py") if path.name != "names.py"]
    trees = [ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    texts = {str(node.value) for tree in trees for node in tree if isinstance(node, ast.Constant)}
    assert {text for text in texts if re.fullmatch(r"(torch|[A-Z]\w+)(\.\w+)+", text)} == set(PRIVATE)
    here = tuple(map(int, torch.__version__.split(".")[:2]))
    for api in PRIVATE.values():
        first, last = (tuple(map(int, version.split("."))) for version in api.versions.split(" to "))
        assert first <= here <= last


def test_without_metadata_the_weights_are_not_known() -> None:
    """Outside of AOTAutograd nothing marks the inputs that are weights."""
    with pytest.raises(TorchChanged, match="fw_metadata"):
        torch_compat.static_inputs()


def test_a_missing_module_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIVATE, "torch._moved.thing", Private("2.11 to 2.14", "move"))  # type: ignore[misc]
    with pytest.raises(TorchChanged, match=r"torch\._moved\.thing"):
        find("torch._moved.thing")
