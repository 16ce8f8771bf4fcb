"""Weights that are tensor subclasses: AOTAutograd splits them, and the roles of the other inputs are still known."""

from __future__ import annotations

import pytest
from torch import nn

from tests.helpers.tracing import WIDTH, linear, tokens
from tests.passes.analysis.test_step_tables import BATCH, Denoiser, captured, table_of

quantization = pytest.importorskip("torchao.quantization")


def test_a_quantised_weight_before_the_inputs_of_the_call() -> None:
    """The modulation depends on the time and the condition, which stand behind the parts of its weight."""
    model = Denoiser(lambda m, x, t, c: m.a(x) * m.b(t + c)[:, None], a=nn.Sequential(linear()), b=linear())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    call = {"x": tokens(0), "timestep": tokens(1, BATCH, WIDTH), "condition": tokens(2, BATCH, WIDTH)}
    graph = captured(model, call)
    names = [node.name for node in graph.placeholders]
    assert [names[i] for i in sorted(graph.step | graph.conditioning)] == ["timestep", "condition"]
    assert "a_0_weight_qdata" in names and "a_0_bias" in names
    assert min(graph.step) > names.index("a_0_weight_qdata")
    assert len(graph.static) == len(names) - 3  # less the latent, the time and the condition
    (value,) = table_of(graph).values
    assert value.conditioning == ("condition",)
