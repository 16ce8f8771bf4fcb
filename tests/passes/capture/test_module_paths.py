"""Names of sites from module paths."""

from __future__ import annotations

import pytest
from torch import fx, nn

from dit_rewrite.passes.capture import module_paths
from tests.helpers.tracing import Toy, linear, tokens, trace


def node_at(*paths: str) -> fx.Node:
    """Return a node with a stack of modules, outermost first."""
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {str(i): (path, nn.Module) for i, path in enumerate(paths)}
    return node


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self'].blocks[0].attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn']", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'][3]", "blocks.3"),
        ("", ""),
    ],
)
def test_module_path(written: str, path: str) -> None:
    """Each of Dynamo's spellings of a module gives its dotted path."""
    assert module_paths.module_path(node_at("L['self']", written)) == path


def test_module_path_without_a_stack() -> None:
    """A node without a module stack has the empty path."""
    assert module_paths.module_path(fx.Graph().placeholder("x")) == ""
    assert module_paths.module_path(node_at()) == ""


def test_module_path_of_traced_modules() -> None:
    """Lists, sequences and dictionaries of modules give dotted paths."""
    layers = nn.ModuleDict({"first": linear(), "second": nn.Sequential(linear(), nn.ReLU())})
    toy = Toy(lambda m, x: m.layers["second"](m.layers["first"](x)), layers=layers)
    graph = trace(toy, (tokens(),)).gm.graph
    paths = list(dict.fromkeys(module_paths.module_path(n) for n in graph.nodes if n.op == "call_function"))
    assert paths == ["layers.first", "layers.second.0", "layers.second.1"]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("L_self_modules_blocks_modules_0_modules_norm_parameters_weight_", "blocks_0_norm_weight"),
        ("L_self_parameters_gate_", "gate"),
        ("L_self_modules_embed_buffers_frequencies_", "embed_frequencies"),
        ("L_hidden_states_", "hidden_states"),
        ("L_inputs_0_", "inputs_0"),
        ("s77", "s77"),
    ],
)
def test_input_name(written: str, name: str) -> None:
    """Inputs have the names of the model's parameters and arguments."""
    assert module_paths.input_name(written) == name


def test_input_names_of_a_traced_graph() -> None:
    """The inputs of the captured graph have these names, without duplicates."""
    names = [node.name for node in trace(Toy(lambda m, x: m.a(x), a=linear()), (tokens(),)).captured.placeholders]
    assert sorted(names) == ["a_bias", "a_weight", "inputs_0"]


@pytest.mark.parametrize(
    ("paths", "common"),
    [
        ([], ""),
        (["blocks.0.attn.q", "blocks.0.attn.k"], "blocks.0.attn"),
        (["blocks.1.attn", "blocks.10.attn"], "blocks"),
        (["blocks.0.ff.0", "blocks.0.ff.2", "blocks.0.ff"], "blocks.0.ff"),
        (["attn", "ff"], ""),
        (["ff"], "ff"),
        (["", "ff"], ""),
    ],
)
def test_common_path(paths: list[str], common: str) -> None:
    """The common path is compared by components, not by characters."""
    assert module_paths.common_path(node_at(f"L['self'].{path}".rstrip(".")) for path in paths) == common


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.0.attn1", "transformer_blocks.0"),
        ("model.layers.12", "model.layers.12"),
        ("a.1.b.2.c", "a.1"),
        ("down.block2.attn", ""),
        ("0.attn", "0"),
        ("", ""),
    ],
)
def test_block_of(path: str, block: str) -> None:
    """A block path ends at the first component that is a number."""
    assert module_paths.block_of(path) == block


def test_unique() -> None:
    """Repeated names are numbered from the second one on, and all results differ."""
    assert module_paths.unique(["a", "b"]) == ["a", "b"]
    assert module_paths.unique(["a", "a", "b", "a"]) == ["a", "a#1", "b", "a#2"]
    assert module_paths.unique([]) == []
