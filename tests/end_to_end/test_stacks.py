"""First-block caching of diffusers' classes whose main stack is not all of their blocks, at toy size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import dit_rewrite
from dit_rewrite import Policy, Rule, Where
from dit_rewrite.errors import RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.policies import FirstBlockCache
from tests.helpers.drawn import falling, prepare, rising
from tests.helpers.streams import Plain
from tests.helpers.tracing import WIDTH

STEPS = 3
Inputs = Callable[[Generator], dict[str, Any]]


@dataclass(frozen=True)
class Class:
    """A class of diffusers: how to build and call it, the input that changes, and the span behind the first block of
    its main stack."""

    name: str
    config: dict[str, Any]
    inputs: Inputs
    span: str
    latent: str = "hidden_states"
    time: str = "timestep"

    def build(self) -> torch.nn.Module:
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        return prepare(getattr(diffusers, self.name)(**self.config), torch.float32)

    def calls(self) -> list[dict[str, Any]]:
        """The calls of one trajectory, whose latent changes by little."""
        fixed = self.inputs(Generator().manual_seed(0))
        moved = [_moved(fixed[self.latent], i) for i in range(STEPS)]
        times = rising(STEPS, 1.0) if self.latent == "x" else falling(STEPS)
        return [
            {**fixed, self.latent: latent, self.time: time[:1], "return_dict": False}
            for latent, time in zip(moved, times, strict=True)
        ]


def _moved(latent: Any, by: int) -> Any:
    return [_moved(x, by) for x in latent] if isinstance(latent, list) else latent + 0.01 * by * latent.flip(-1)


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def z_image(g: Generator) -> dict[str, Any]:
    return {"x": [normal(g, 4, 1, 8, 8)], "cap_feats": [normal(g, 13, 16)]}


def lumina(g: Generator) -> dict[str, Any]:
    text = {"encoder_hidden_states": normal(g, 1, 8, 16), "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool)}
    return {"hidden_states": normal(g, 1, 4, 8, 8), **text}


def fibo(g: Generator) -> dict[str, Any]:
    text = {"encoder_hidden_states": normal(g, 1, 6, 16), "text_encoder_layers": [normal(g, 1, 6, 8) for _ in range(4)]}
    return {"hidden_states": normal(g, 1, 16, 4), "img_ids": normal(g, 16, 3), "txt_ids": normal(g, 6, 3), **text}


def stable_audio(g: Generator) -> dict[str, Any]:
    condition = {"encoder_hidden_states": normal(g, 1, 4, 16), "global_hidden_states": normal(g, 1, 1, 24)}
    return {"hidden_states": normal(g, 1, 4, 8), "rotary_embedding": (normal(g, 9, 4), normal(g, 9, 4)), **condition}


def vace(g: Generator) -> dict[str, Any]:
    condition = {"encoder_hidden_states": normal(g, 1, 6, 16), "control_hidden_states": normal(g, 1, 12, 1, 8, 8)}
    return {"hidden_states": normal(g, 1, 4, 1, 8, 8), **condition}


CLASSES = [
    Class(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1,
            "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
        },
        z_image,
        "layers.1",
        "x",
        "t",
    ),
    Class(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2), "axes_lens": (64, 64, 64), "cap_feat_dim": 16,
        },
        lumina,
        "layers.1",
    ),
    Class(
        "BriaFiboTransformer2DModel",
        {
            "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "text_encoder_dim": 8, "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        fibo,
        "transformer_blocks.1..single_transformer_blocks.1",
    ),
    Class(
        "StableAudioDiTModel",
        {
            "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 16,
            "global_states_input_dim": 24, "cross_attention_input_dim": 16,
        },
        stable_audio,
        "transformer_blocks.1",
    ),
    Class(
        "WanVACETransformer3DModel",
        {
            "num_attention_heads": 1, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 16, "ffn_dim": 16, "num_layers": 3, "rope_max_seq_len": 32, "vace_layers": [0, 2],
            "vace_in_channels": 12,
        },
        vace,
        "blocks.1..blocks.2",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CLASSES, ids=[case.name for case in CLASSES])
def test_first_block_cache(case: Class) -> None:
    """All blocks of the main stack behind its first one are one span; it is exact, and is reused where the rule
    permits."""
    model, calls, policy = case.build(), case.calls(), FirstBlockCache(threshold=1e9)
    found = dit_rewrite.verify(copy.deepcopy(model), calls, policy, backend="aot_eager")
    assert found.exact, found
    assert (found.reused, found.sites) == (STEPS - 1, 1)
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
    with torch.no_grad():
        compiled(**calls[0])
    spans = [place.site.name for place in compiled.explain().sites if place.site.part is Part.SPAN]
    assert spans == [case.span]
    reasons = {refusal.reason for refusal in compiled.explain().refused}
    assert (RefusalReason.OTHER_STACK in reasons) == (case.name != "BriaFiboTransformer2DModel")


class Halves(torch.nn.Module):
    """Two blocks, a graph break, and one or two more."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(8, WIDTH)
        self.first = torch.nn.ModuleList(Plain() for _ in range(2))
        self.second = torch.nn.ModuleList(Plain() for _ in range(behind))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.first:
            x = block(x)
        torch._dynamo.graph_break()
        for block in self.second:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("behind", "reused", "reasons"),
    [
        (2, 2, [RefusalReason.SPAN_PER_GRAPH, RefusalReason.SPAN_PER_GRAPH]),
        (1, 1, [RefusalReason.SPAN_PER_GRAPH, RefusalReason.NO_BLOCKS]),
    ],
)
def test_a_break_between_blocks(behind: int, reused: int, reasons: list[RefusalReason]) -> None:
    """Each graph decides about its own blocks behind its first one, and reports this; or reports that it has only
    one."""
    model, policy = Halves(behind).eval().requires_grad_(False), FirstBlockCache(threshold=1e9)
    calls = [{"x": normal(Generator().manual_seed(i), 2, 4, 8)} for i in range(STEPS)]
    found = dit_rewrite.verify(copy.deepcopy(model), calls, policy, backend="aot_eager")
    assert found.exact, found
    assert (found.reused, found.sites) == ((STEPS - 1) * reused, reused)
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
    with torch.no_grad():
        compiled(**calls[0])
    spoken = [refusal.reason for refusal in compiled.explain().refused if refusal.path.startswith("stack")]
    assert spoken == reasons


def test_spans_of_numbered_blocks_in_a_part() -> None:
    """A part of a model does not know which blocks have these numbers."""
    policy = Policy((Rule(step > 0, where=Where(span="stack", layers=(0, 2))),))
    compiled = dit_rewrite.compile(Halves(2).eval().requires_grad_(False), policy, backend="aot_eager")
    with torch.no_grad():
        compiled(normal(Generator(), 2, 4, 8))
    assert {refusal.reason for refusal in compiled.explain().refused} >= {RefusalReason.SPAN_IN_PART}
    assert not any(place.site.part is Part.SPAN for place in compiled.explain().sites)
