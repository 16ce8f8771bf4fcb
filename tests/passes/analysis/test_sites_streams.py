"""The stream of a residual sum with several early summands."""

from __future__ import annotations

from torch import Tensor, nn

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.sites import Kind
from tests.helpers.tracing import Attention, Look, Toy, look, mlp, norm, tokens, trace

SELF, MLP = ("self", ("addmm",)), ("mlp", ("addmm",))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ff = norm(), Attention(), norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


def added_twice(m: Toy, x: Tensor, control: Tensor) -> Tensor:
    x = m.one(x) + control * 0.5
    return m.two(x) + control * 0.5


def test_input_that_is_added_after_two_blocks() -> None:
    """The second sum adds an input that the stream already contains: the branches are the same as without it."""
    found = trace(Toy(added_twice, one=Block(), two=Block()), (tokens(), tokens(1))).sites()
    assert [(site.name, site.kind) for site in found.sites] == [
        ("one.attn", Kind.SELF),
        ("one.ff", Kind.MLP),
        ("two.attn", Kind.SELF),
        ("two.ff", Kind.MLP),
    ]
    assert [site.parent for site in found.sites] == [None] * 4
    assert {refusal.reason for refusal in found.refused} == {RefusalReason.NOT_FROM_STREAM}


def test_embedding_that_each_block_adds_first() -> None:
    """If the stream already contains the embedding, the embedding is not the stream."""

    def body(m: Toy, x: Tensor, embedding: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x + embedding)
        return x

    model = Toy(body, blocks=nn.ModuleList(Block() for _ in range(3)))
    assert look(model, tokens(), tokens(1)) == Look([SELF, MLP] * 3, [("input", RefusalReason.NOT_FROM_STREAM)])


def test_earlier_stream_that_is_added_again() -> None:
    """An earlier state of the stream is a summand that the stream contains, not the stream of the later block."""

    def body(m: Toy, x: Tensor) -> Tensor:
        return m.two(m.one(x) + x)

    model = Toy(body, one=Block(), two=Block())
    assert look(model, tokens()) == Look([SELF, MLP] * 2, [("input", RefusalReason.NOT_FROM_STREAM)])


def test_branch_of_a_branch_beside_it() -> None:
    """In `x + a(x) + m(a(x))` both `a` and `m` are branches of `x`."""

    def body(m: Toy, x: Tensor) -> Tensor:
        y = m.attn(x)
        return x + y + m.ff(y)

    assert look(Toy(body, attn=Attention(), ff=mlp()), tokens()) == Look([SELF, ("parallel", ("addmm",))])
