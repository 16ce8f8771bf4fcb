"""Random models and decision tables: the guarded graph, its variants and its segments equal an interpreter.

Every part of a place is drawn. The results are equal bit for bit, or within rounding if half of a batch is computed for
both halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.passes.analysis.attention_sites import find_cores, find_shared
from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.probes import Probes, add_entropy, find_keys
from dit_rewrite.passes.analysis.site import Part, Probe, Site
from dit_rewrite.passes.analysis.spans import Stream, find_spans
from dit_rewrite.passes.rewrite.batch import batch_labels
from dit_rewrite.passes.rewrite.guarded_graph import Guidance
from tests.helpers.streams import Joint, Plain, Single
from tests.helpers.toys import Block
from tests.helpers.tracing import WIDTH, Toy, Traced, linear, mlp, norm, tokens, trace
from tests.references.oracle import Form, Rewritten

ENTROPY = torch.ops.dit_rewrite.attention_entropy.default
STEPS = 4


class Nested(nn.Module):
    """An MLP around an MLP: both sums are residual, the inner one inside the outer branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = norm(), mlp(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.outer(y + self.inner(y))


class Half(nn.Module):
    """An MLP in bfloat16 on a stream of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ff = norm(), mlp().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.norm(x).bfloat16()).float()


KINDS: dict[str, type[nn.Module]] = {"P": Plain, "M": Block, "S": Single, "N": Nested, "H": Half}


@dataclass(frozen=True)
class Model:
    """The number of joint blocks, the kinds of the image blocks after them, and whether those see the text."""

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
    """Return the spans that do not overlap earlier ones."""
    chosen: list[tuple[int, int]] = []
    for first, end in wanted:
        overlaps = any(a < first < b < end or first < a < end < b for a, b in chosen)
        if not overlaps and (first, end) not in chosen and stream.pairs(first, end) is not None:
            chosen.append((first, end))
    return chosen


class Beyond:
    """A codec that stores two tensors: the sum of an attention's output, and a difference from that and the values."""

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        total = value.sum(-1, keepdim=True)
        return value - read[2].mean(-2, keepdim=True) - total / 2, total

    def decode(self, stored: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return stored[0] + read[2].mean(-2, keepdim=True) + stored[1] / 2


class Drawn:
    """The parts of a model's places, with their probes and possible slot formats."""

    def __init__(self, of: Traced, data: st.DataObject) -> None:
        self.of, self.data = of, data
        self.gm, self.found = copied(of.gm), of.sites()
        self.static = of.captured.static
        keys, _ = find_keys(self.gm, self.found.sites, self.static)
        cores, _ = find_cores(self.gm, self.found.sites)
        shared = find_shared(self.found.sites)
        self.parts: list[Site] = [*self.found.sites, *keys, *cores, *shared, *self.spans()]

    def spans(self) -> list[Site]:
        """Draw spans that do not overlap."""
        stream, last = Stream(self.gm.graph, self.found), self.found.num_layers
        ends = self.data.draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, last)), max_size=4))
        apart = spans_apart(stream, [(min(e), max(e)) for e in ends if e[0] != e[1]])
        return find_spans(stream, {blocks: range(*blocks) for blocks in apart})[0]

    def measure(self) -> None:
        """Let spans after the first block read its change."""
        probe = Probes(self.gm, self.found, self.static).of("first_block", self.parts[0])
        behind = [s.part is Part.SPAN and s.layer > 0 and probe is not None for s in self.parts]
        self.parts = [
            replace(s, probes=(Probe("p", str(probe)),)) if b else s for s, b in zip(self.parts, behind, strict=True)
        ]

    def add_entropy(self) -> None:
        """Add the entropy of its attention to one branch."""
        at = self.data.draw(st.integers(0, len(self.found.sites) - 1))
        self.parts[at] = add_entropy(self.gm, self.parts[at], ENTROPY)

    def forms(self, halves: bool) -> dict[int, Form]:
        """Draw some parts and a slot format for each; a core is drawn with its CORE_STATE.

        Halves of the batch are drawn only on request, because they are computed in another order, so that a conversion
        may round to another number.
        """
        places = [
            i
            for i, s in enumerate(self.parts)
            if s.part is not Part.CORE_STATE and (s.part is not Part.CFG_SHARED or halves)
        ]
        chosen = self.data.draw(st.lists(st.sampled_from(places), unique=True, min_size=1))
        labels = batch_labels(self.gm.graph, 2, self.static)
        named = {node.name: label for node, label in labels.items()}
        forms: dict[int, Form] = {}
        for i in sorted(chosen):
            part = self.parts[i].part
            if part is Part.CORE:
                forms[i] = forms[i + 1] = Beyond()
            elif part is Part.CFG_SHARED:
                forms[i] = Guidance(named, 2, self.data.draw(st.sampled_from([0, 1])))
            else:
                forms[i] = self.data.draw(st.sampled_from([None] if halves else [None, None, "int8", "bf16", "fp8"]))
        return forms


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
@given(models, st.data())
def test_any_table_on_any_model(model: Model, data: st.DataObject) -> None:
    drawn = Drawn(traced(model), data)
    measured, halves = data.draw(st.booleans()), data.draw(st.booleans()) and "H" not in model.blocks
    if measured:
        drawn.measure()
    if data.draw(st.booleans()) and not halves:
        drawn.add_entropy()
    forms = drawn.forms(halves)
    rewritten = Rewritten.with_parts(drawn.of, drawn.gm, drawn.parts, forms)
    rows = st.lists(st.booleans(), min_size=len(forms), max_size=len(forms)).map(tuple)
    table = data.draw(st.lists(rows, min_size=2, max_size=STEPS))
    rewritten.check(table, measured=measured, tolerance=1e-4 if halves else 0.0)
