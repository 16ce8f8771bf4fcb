"""Toy denoisers with different residual streams: one, two joined, reshaped, skip connections, norms."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.site import Found, Site
from dit_rewrite.passes.analysis.spans import Stream, find_spans
from tests.helpers.toys import STEPS, Block
from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, heads, linear, merged, mlp, norm, tokens, trace
from tests.references.oracle import Rewritten

TEXT = (2, 3, WIDTH)  # different from the image's 4 tokens


class Plain(nn.Module):
    """Pre-norm attention and MLP without a gate, so that the sums contain only branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.ff = norm(), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ff(self.norm(x))


class Joint(nn.Module):
    """Joint attention of image and text, then an MLP of each; with `last` the text is dropped."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear() for _ in range(4))
        self.text_q, self.text_k, self.text_v, self.text_o = (linear() for _ in range(4))
        self.norm, self.ff, self.text_ff, self.last = norm(), mlp(), mlp(), last

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = self.norm(x), self.norm(text)
        q, k, v = (
            heads(torch.cat([m(a), n(b)], 1))
            for m, n in ((self.q, self.text_q), (self.k, self.text_k), (self.v, self.text_v))
        )
        out = merged(F.scaled_dot_product_attention(q, k, v))
        image, words = out.split([a.shape[1], b.shape[1]], dim=1)
        x = x + self.o(image)
        x = x + self.ff(self.norm(x))
        if self.last:
            return x, None
        text = text + self.text_o(words)
        return x, text + self.text_ff(self.norm(text))


class Single(nn.Module):
    """Attention and MLP in one projection, as in FLUX's single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = norm(), linear(), linear(), linear()
        self.enter, self.leave = linear(), linear(inner=2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = merged(F.scaled_dot_product_attention(heads(self.q(y)), heads(self.k(y)), heads(self.v(y))))
        return x + self.leave(torch.cat([out, F.gelu(self.enter(y))], dim=-1))


def single(layers: int = 3) -> Toy:
    """One stream: a linear embedding of the latent, blocks modulated by a signal, a head."""

    def body(m: Toy, x: Tensor, signal: Tensor) -> Tensor:
        x = m.enter(x)
        for block in m.blocks:
            x = block(x, signal)
        return m.head(m.norm(x))

    blocks = nn.ModuleList(Block() for _ in range(layers))
    return Toy(body, enter=linear(), blocks=blocks, norm=norm(), head=linear())


def joint(layers: int = 2, dropped: bool = False) -> Toy:
    """Two streams; with `dropped` the last block drops the text."""

    def body(m: Toy, x: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        x, text = m.enter(x), m.text_enter(text)
        for block in m.blocks:
            x, text = block(x, text)
        return (m.head(x),) if dropped else (m.head(x), text)

    blocks = nn.ModuleList(Joint(last=dropped and i == layers - 1) for i in range(layers))
    return Toy(body, enter=linear(), text_enter=linear(), blocks=blocks, head=linear())


def flux(split: bool = False, doubles: int = 2, singles: int = 3) -> Toy:
    """Joint blocks, then single blocks over text and image as one sequence, from which the image is sliced."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x, text = m.enter(x), m.text_enter(text)
        for block in m.blocks:
            x, text = block(x, text)
        y = torch.cat([text, x], dim=1)
        for block in m.singles:
            y = block(y)
        return m.head(y.split([3, 4], dim=1)[1] if split else y[:, text.shape[1] :])

    blocks = nn.ModuleList(Joint() for _ in range(doubles)), nn.ModuleList(Single() for _ in range(singles))
    return Toy(body, enter=linear(), text_enter=linear(), blocks=blocks[0], singles=blocks[1], head=linear())


def latte() -> Toy:
    """Alternating blocks over space (samples x frames, by tokens) and time (samples x tokens, by frames)."""

    def body(m: Toy, x: Tensor) -> Tensor:
        samples, frames, count, width = x.shape
        x = m.enter(x).flatten(0, 1)
        for i, block in enumerate(m.blocks):
            x = block(x)
            x = x.unflatten(0, (samples, count if i % 2 else frames)).transpose(1, 2).flatten(0, 1)
        return m.head(x)

    return Toy(body, enter=linear(), blocks=nn.ModuleList(Plain() for _ in range(4)), head=linear())


def post_norm() -> Toy:
    """The stream is normalised after each sum, so no residual stream runs from block to block."""

    def body(m: Toy, x: Tensor) -> Tensor:
        for part, after in zip(m.blocks, m.norms, strict=True):
            x = after(x + part(x))
        return m.head(x)

    blocks = nn.ModuleList([Attention(), mlp(), mlp()])
    return Toy(body, blocks=blocks, norms=nn.ModuleList(norm() for _ in range(3)), head=linear())


def skipping() -> Toy:
    """As in U-Nets, the last of three blocks also reads the output of the first one."""

    def body(m: Toy, x: Tensor) -> Tensor:
        first = x = m.blocks[0](x)
        x = m.blocks[1](x)
        x = m.mix(torch.cat([x, first], dim=-1))
        return m.head(m.blocks[2](x))

    blocks = nn.ModuleList(Plain() for _ in range(3))
    return Toy(body, blocks=blocks, mix=linear(inner=2 * WIDTH), head=linear())


def added_skip() -> Toy:
    """As `skipping`, but the output is added to the stream."""

    def body(m: Toy, x: Tensor) -> Tensor:
        first = x = m.blocks[0](x)
        x = m.blocks[1](x)
        return m.head(m.blocks[2](x + first))

    return Toy(body, blocks=nn.ModuleList(Plain() for _ in range(3)), head=linear())


SHAPES = {
    "single": (single, ((2, 4, WIDTH), (2, 1, WIDTH))),
    "joint": (joint, ((2, 4, WIDTH), TEXT)),
    "dropped": (lambda: joint(dropped=True), ((2, 4, WIDTH), TEXT)),
    "flux": (flux, ((2, 4, WIDTH), TEXT)),
    "flux split": (lambda: flux(split=True), ((2, 4, WIDTH), TEXT)),
    "latte": (latte, ((2, 3, 4, WIDTH),)),
    "post-norm": (post_norm, ((2, 4, WIDTH),)),
    "skipping": (skipping, ((2, 4, WIDTH),)),
    "added skip": (added_skip, ((2, 4, WIDTH),)),
}
_traced: dict[str, Traced] = {}


def traced(name: str) -> Traced:
    """Return a toy's graph, called with other inputs at every step; traced once per process."""
    if name not in _traced:
        build, shapes = SHAPES[name]
        calls = [tuple(tokens(10 * step + i, *shape) for i, shape in enumerate(shapes)) for step in range(STEPS)]
        _traced[name] = trace(build(), *calls)
    return _traced[name]


def stream_of(name: str) -> Stream:
    """Return its residual stream."""
    return Stream(traced(name).gm.graph, traced(name).sites())


def with_spans(
    of: Traced,
    spans: Sequence[tuple[int, int]],
    branches: bool = True,
    formats: Sequence[str | None] = (None,),
    stack: Collection[int] | None = None,
) -> Rewritten:
    """Guard these spans (or spans of a stack's blocks) and all branches. The slots get `formats` in turn."""
    gm = copied(of.gm)
    found: Found = of.sites()
    sites, refused = find_spans(
        Stream(gm.graph, found), {span: range(*span) if stack is None else stack for span in spans}
    )
    assert not refused
    parts: list[Site] = [*found.sites, *sites]
    chosen = range(len(parts)) if branches else range(len(found.sites), len(parts))
    return Rewritten.with_parts(of, gm, parts, {i: formats[i % len(formats)] for i in chosen})
