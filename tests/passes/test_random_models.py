"""Small models and decision tables at random: the guarded graph, its variants and its segments all agree, bit for bit,
with an interpreter of the captured graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.passes.parts import Probes, add_entropy, copied, find_keys
from dit_rewrite.passes.site import Part, Site
from dit_rewrite.passes.spans import Stream, find_spans
from tests.passes.oracle import Rewritten
from tests.passes.streams import Joint, Plain, Single
from tests.passes.toys import Block
from tests.passes.tracing import WIDTH, Toy, Traced, linear, mlp, norm, tokens, trace

ENTROPY = torch.ops.dit_rewrite.attention_entropy.default
STEPS = 4


class Nested(nn.Module):
    """An MLP around an MLP: both sums are residual, the inner one within the outer's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = norm(), mlp(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.outer(y + self.inner(y))


class Half(nn.Module):
    """An MLP in bfloat16 around which the stream stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ff = norm(), mlp().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.norm(x).bfloat16()).float()


KINDS: dict[str, type[nn.Module]] = {"P": Plain, "M": Block, "S": Single, "N": Nested, "H": Half}


@dataclass(frozen=True)
class Model:
    """How many blocks of joint attention, which blocks follow on the image alone, and whether they see the text."""

    joint: int
    blocks: str
    sequence: bool
    head: bool

    def build(self) -> Toy:
        def body(m: Toy, x: Tensor, text: Tensor, signal: Tensor) -> Tensor:
            x = m.enter(x)
            for block in m.joint:
                x, text = block(x, text)
            if self.sequence:
                x = torch.cat([text, x], dim=1)
            for block in m.blocks:
                x = block(x, signal) if isinstance(block, Block) else block(x)
            x = x[:, 3:] if self.sequence else x
            return m.out(x) if self.head else x

        blocks = nn.ModuleList(KINDS[kind]() for kind in self.blocks)
        joint = nn.ModuleList(Joint() for _ in range(self.joint))
        return Toy(body, enter=linear(), joint=joint, blocks=blocks, out=linear())


@cache
def traced(model: Model) -> Traced:
    shapes = ((2, 4, WIDTH), (2, 3, WIDTH), (2, 1, WIDTH))
    return trace(model.build(), *[tuple(tokens(9 * k + i, *s) for i, s in enumerate(shapes)) for k in range(STEPS)])


# few, so that each is traced once for many tables
models = st.builds(
    Model,
    st.integers(0, 2),
    st.sampled_from(["P", "M", "PM", "NP", "SS", "MMH", "PHN", "MM"]),
    st.booleans(),
    st.booleans(),
)


def spans_apart(stream: Stream, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that are spans and do not overlap the ones before."""
    chosen: list[tuple[int, int]] = []
    for first, end in wanted:
        overlaps = any(a < first < b < end or first < a < end < b for a, b in chosen)
        if not overlaps and (first, end) not in chosen and stream.pairs(first, end) is not None:
            chosen.append((first, end))
    return chosen


@settings(max_examples=15, deadline=None)
@given(models, st.data())
def test_any_table_on_any_model(model: Model, data: st.DataObject) -> None:
    of = traced(model)
    gm, found = copied(of.gm), of.sites()
    stream = Stream(gm.graph, found)
    ends = st.tuples(st.integers(0, found.num_layers), st.integers(0, found.num_layers))
    drawn = data.draw(st.lists(ends, max_size=4))
    spans, _ = find_spans(stream, spans_apart(stream, [(min(e), max(e)) for e in drawn if e[0] != e[1]]))
    keys, _ = find_keys(gm, found.sites, of.captured.static)
    parts: list[Site] = [*found.sites, *keys, *spans]
    measured = data.draw(st.booleans())
    if measured:
        probe = Probes(gm, found, of.captured.static).of("first_block", parts[0])
        behind = [s.part is Part.SPAN and s.layer > 0 and probe is not None for s in parts]
        parts = [replace(s, probes=(("p", str(probe)),)) if b else s for s, b in zip(parts, behind, strict=True)]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(found.sites) - 1))
        parts[at] = add_entropy(gm, parts[at], ENTROPY)
    chosen = data.draw(st.lists(st.sampled_from(range(len(parts))), unique=True, min_size=1))
    stores = {i: data.draw(st.sampled_from([None, None, "int8", "bf16", "fp8"])) for i in chosen}
    rewritten = Rewritten.with_parts(of, gm, parts, stores)
    rows = st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)).map(tuple)
    rewritten.check(data.draw(st.lists(rows, min_size=2, max_size=STEPS)), measured=measured)
