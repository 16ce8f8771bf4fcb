"""Residual sums of hand-written blocks: which summands are sites, and which are refused with which reason."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.graph import aten
from dit_rewrite.passes.analysis.sites import Kind, find_sites
from tests.helpers.tracing import WIDTH, Attention, Look, Toy, linear, look, mlp, norm, tokens, trace

SELF, MLP = ("self", ("addmm",)), ("mlp", ("addmm",))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ff = norm(), Attention(), norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


def test_pre_norm_block() -> None:
    """Both branches of a pre-norm block are sites."""
    assert look(Block().requires_grad_(False), tokens()) == Look([SELF, MLP])


def test_names_and_layers() -> None:
    """Sites are named and numbered by the modules of their contractions."""
    model = Toy(lambda m, x: m.blocks(x), blocks=nn.Sequential(Block(), Block()))
    found = trace(model, (tokens(),)).sites()
    assert [site.name for site in found.sites] == ["blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff"]
    assert [site.layer for site in found.sites] == [0, 0, 1, 1]
    assert [site.block for site in found.sites] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert found.num_layers == 2


def test_parallel_branches_added_one_after_the_other() -> None:
    """In `(x + a(x)) + m(x)` both summands are sites of the one stream."""
    model = Toy(lambda m, x: (x + m.attn(x)) + m.ff(x), attn=Attention(), ff=mlp())
    found = trace(model, (tokens(),)).sites()
    assert [site.kind for site in found.sites] == [Kind.SELF, Kind.MLP]
    assert len({site.streams for site in found.sites}) == 1
    assert found.refused == ()


def test_parallel_branches_added_to_each_other_first() -> None:
    """In `x + (a(x) + m(x))` both summands are sites too."""
    model = Toy(lambda m, x: x + (m.attn(x) + m.ff(x)), attn=Attention(), ff=mlp())
    assert look(model, tokens()) == Look([SELF, MLP])


def test_post_norm_block() -> None:
    """A norm after each sum starts a new stream, and the branches are not nested."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = m.norm1(x + m.attn(x))
        return m.norm2(x + m.ff(x))

    model = Toy(body, norm1=norm(), norm2=norm(), attn=Attention(), ff=mlp())
    assert look(model, tokens()) == Look([SELF, MLP])
    assert [site.parent for site in trace(model, (tokens(),)).sites().sites] == [None, None]


def test_norm_after_a_branch_belongs_to_it() -> None:
    """In `x + norm(f(x))` the value is the result of the norm."""
    model = Toy(lambda m, x: x + m.norm(m.ff(x)), ff=mlp(), norm=norm())
    assert look(model, tokens()) == Look([("mlp", ("getitem",))])


def nested(m: Toy, x: Tensor) -> Tensor:
    inner = m.enter(x)
    return x + m.norm(inner + m.ff(inner))


def test_nested_branches() -> None:
    """A branch inside another is a site whose parent is the outer one."""
    model = Toy(nested, enter=linear(), ff=mlp(), norm=norm())
    assert look(model, tokens()) == Look([MLP, ("mlp", ("getitem",))])
    inner, outer = trace(model, (tokens(),)).sites().sites
    assert (inner.parent, outer.parent) == (1, None)
    assert inner.closure < outer.closure
    assert inner.flops == 2 * 2 * 8 * (8 * 16)  # two projections of 8 tokens, a multiply-add counts as two
    assert outer.flops == inner.flops + 2 * 8 * (8 * 8)


def test_three_deep() -> None:
    """The parent is the innermost enclosing site."""

    def body(m: Toy, x: Tensor) -> Tensor:
        a = m.one(x)
        b = m.two(a)
        return x + m.norm(a + m.norm(b + m.three(b)))

    model = Toy(body, one=linear(), two=linear(), three=linear(), norm=norm())
    assert [site.parent for site in trace(model, (tokens(),)).sites().sites] == [1, 2, None]


def test_branch_around_attention_and_mlp() -> None:
    """A branch that contains a block is attention and MLP at once; one that contains only attention is attention."""
    inner = Attention()

    def around_block(m: Toy, x: Tensor) -> Tensor:
        y = m.enter(x)
        y = y + m.attn(y)
        return x + m.leave(y + m.ff(y))

    def around_attention(m: Toy, x: Tensor) -> Tensor:
        y = m.norm(x)
        return x + m.norm(y + m.attn(y))

    model = Toy(around_block, enter=linear(), attn=inner, ff=mlp(), leave=linear())
    assert look(model, tokens()) == Look([SELF, MLP, ("parallel", ("addmm",))])
    model = Toy(around_attention, norm=norm(), attn=inner)
    assert look(model, tokens()) == Look([SELF, ("self", ("getitem",))])


def test_stream_kept_in_fp32() -> None:
    """Casts around the sum and the gate are ignored: the value is the low-precision output of the branch."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = (x.float() + m.attn(m.norm(x)).float() * m.gate).type_as(x)
        return (x.float() + m.ff(m.norm(x)).float() * m.gate).type_as(x)

    model = Toy(body, attn=Attention(), ff=mlp(), norm=norm()).bfloat16()
    model.gate = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    traced = trace(model, (tokens().bfloat16(),))
    found = traced.sites()
    assert look(model, tokens().bfloat16()) == Look([SELF, MLP])
    assert [traced.nodes[site.values[0]].meta["val"].dtype for site in found.sites] == [torch.bfloat16] * 2


def test_lora_is_part_of_its_projection() -> None:
    """`base(x) + B(A(x))` is no residual sum. Within a branch it is neither a site nor a refusal."""

    def body(m: Toy, x: Tensor) -> Tensor:
        hidden = m.base(x) + m.up(m.down(x))
        return x + m.out(hidden.relu())

    model = Toy(body, base=linear(), down=linear(outer=2), up=linear(inner=2), out=linear())
    assert look(model, tokens()) == Look([MLP])
    assert look(Toy(lambda m, x: m.base(x) + m.up(m.down(x)), **dict(model.named_children())), tokens()) == Look([])


def test_lora_on_the_last_projection() -> None:
    """If a projection with LoRA ends the branch, their sum is the value."""

    def body(m: Toy, x: Tensor) -> Tensor:
        hidden = m.enter(x).relu()
        return x + (m.base(hidden) + m.up(m.down(hidden)) * 2.0)

    model = Toy(body, enter=linear(), base=linear(), down=linear(outer=2), up=linear(inner=2))
    assert look(model, tokens()) == Look([("mlp", ("add",))])


def test_positional_add() -> None:
    """A sum with a parameter, or with an input that does not depend on the other summand, is no residual sum."""
    model = Toy(lambda m, x, y: m.out((m.embed(x) + m.position) + y), embed=linear(), out=linear(), position=tokens(1))
    assert look(model, tokens(), tokens(2)) == Look([])


def test_controlnet_add() -> None:
    """A summand from outside, as ControlNet adds it, is refused; the branches beside it are found."""
    model = Toy(lambda m, x, control: (x + m.ff(x)) + control, ff=mlp())
    assert look(model, tokens(), tokens(1)) == Look([MLP], [("input", RefusalReason.NOT_FROM_STREAM)])


def test_branch_without_contraction() -> None:
    """`x + norm(x)` has no contraction and is no site."""
    assert look(Toy(lambda m, x: x + m.norm(x), norm=norm()), tokens()) == Look(
        [], [("getitem", RefusalReason.NO_CONTRACTION)]
    )


def test_bias_adds() -> None:
    """A bias is no summand, whether in addmm or added separately."""
    model = Toy(
        lambda m, x: m.plain(m.biased(x)) + m.bias, biased=linear(), plain=linear(bias=False), bias=tokens(1, 8)
    )
    assert look(model, tokens()) == Look([])


def test_bias_of_the_last_projection() -> None:
    """A bias that is added to a branch's output is part of the value, not a refused summand."""
    model = Toy(lambda m, x: x + (m.plain(x) + m.bias), plain=linear(bias=False), bias=tokens(1, 8))
    assert look(model, tokens()) == Look([("mlp", ("add",))])


def test_input_beside_a_branch() -> None:
    """An input that is added to a branch's output is refused and not part of the value."""
    model = Toy(lambda m, x, control: x + (m.ff(x) + control), ff=mlp())
    assert look(model, tokens(), tokens(1)) == Look([MLP], [("input", RefusalReason.NOT_FROM_STREAM)])


def test_no_residual() -> None:
    """A model without sums has no sites and no refusals."""
    assert look(Toy(lambda m, x: m.ff(x), ff=mlp()), tokens()) == Look([])


def test_convolution_branch() -> None:
    """A convolution counts as a contraction."""
    model = Toy(lambda m, x: x + m.conv(x.relu()), conv=nn.Conv2d(3, 3, 3, padding=1))
    assert look(model, tokens(0, 2, 3, 4, 4)) == Look([("mlp", ("convolution",))])


def test_integer_product_branch() -> None:
    """A product of 8-bit integers, as in dynamic quantisation, is a contraction with FLOPs."""

    def body(m: Toy, x: Tensor) -> Tensor:
        rows = (x * 10).round().to(torch.int8).flatten(0, 1)
        return x + (torch._int_mm(rows, m.weight).float() * 0.01).view_as(x)

    model = Toy(body)
    model.register_buffer("weight", torch.ones(WIDTH, WIDTH, dtype=torch.int8))
    (site,) = trace(model, (tokens(),)).sites().sites
    assert (site.kind, site.flops) == (Kind.MLP, 2 * (2 * 4) * WIDTH * WIDTH)


def test_value_that_is_read_twice() -> None:
    """A value with another reader is a site, and its producers belong to its closure."""

    def body(m: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.ff(m.norm(x))
        return x + y, y.mean()

    traced = trace(Toy(body, ff=mlp(), norm=norm()), (tokens(),))
    (site,) = traced.sites().sites
    assert {"native_layer_norm", "addmm", "relu", "addmm_1"} <= site.closure
    assert "mean" not in site.closure


def test_producer_that_is_read_outside() -> None:
    """A norm with another reader is not in the closure; the nodes after it are."""

    def body(m: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = m.norm(x)
        return x + m.ff(normed), normed

    (site,) = trace(Toy(body, ff=mlp(), norm=norm()), (tokens(),)).sites().sites
    assert "native_layer_norm" not in site.closure
    assert {"addmm", "relu", "addmm_1"} <= site.closure


def test_value_that_is_a_view_of_a_larger_buffer() -> None:
    """A value that is half of a projection's output has the bytes of the whole storage."""
    model = Toy(lambda m, x: x + m.wide(x).chunk(2, -1)[0], wide=linear(outer=2 * WIDTH))
    assert look(model, tokens()) == Look([("mlp", ("getitem",))])
    (site,) = trace(model, (tokens(),)).sites().sites
    assert site.bytes == 4 * (2 * 4 * 16)
    (whole,) = trace(Toy(lambda m, x: x + m.ff(x), ff=mlp()), (tokens(),)).sites().sites
    assert whole.bytes == 4 * (2 * 4 * 8)


@pytest.mark.parametrize("about_elements", [False, True])
def test_an_assertion_about_a_size_takes_no_costs_from_a_site(about_elements: bool) -> None:
    """A reusing step drops it, and with it the first product of the branch. One about elements keeps that product."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    hidden = graph.call_function(aten.mm.default, (x, weight))
    size = graph.call_function(aten.sym_size.int, (hidden, 0))
    read = graph.call_function(aten.sum.default, (hidden,)) if about_elements else size
    check = graph.call_function(operator.ge, (read, 0))
    graph.call_function(aten._assert_scalar.default, (check, "negative"))
    value = graph.call_function(aten.mm.default, (hidden, weight))
    total = graph.call_function(aten.add.Tensor, (x, value))
    graph.output((total,))
    for node in (x, weight, hidden, value, total, *([read, check] if about_elements else ())):
        node.meta["val"] = torch.empty(2, 2, device="meta")
    (site,) = find_sites(fx.GraphModule({}, graph), frozenset({1})).sites
    assert site.closure == {value.name}
    assert site.skipped == ({value.name} if about_elements else {value.name, hidden.name})
    assert site.flops == (1 if about_elements else 2) * 2 * 2 * 2 * 2


def test_halves_that_go_to_two_streams() -> None:
    """Two slices of one MLP's output are one site with two values."""

    def body(m: Toy, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        y = m.ff(torch.cat([text, x], dim=1))
        return x + y[:, 3:], text + y[:, :3]

    model = Toy(body, ff=mlp())
    assert look(model, tokens(), tokens(1, 2, 3, WIDTH)) == Look([("mlp", ("slice", "slice"))])


def test_values_that_share_and_feed_each_other() -> None:
    """If three streams share a projection and one value feeds another's branch, each value is a site of its own."""

    def body(m: Toy, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = m.shared(torch.cat([x, y, z], dim=-1))
        first = m.a(shared)
        second = m.b(shared)
        third = m.c(shared * second)
        return x + first, y + second, z + third

    model = Toy(body, shared=linear(inner=3 * WIDTH), a=linear(), b=linear(), c=linear())
    refused = [("addmm", RefusalReason.ENTANGLED)] * 3
    assert look(model, tokens(), tokens(1), tokens(2)) == Look([MLP, MLP, MLP], refused)


def test_values_that_share_in_a_chain() -> None:
    """If the first branch shares with the second and the second with the third, all three are one site."""

    def body(m: Toy, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = m.left(x + y + z), m.right(x * y * z)
        return x + m.a(left), y + m.b(left * right), z + m.c(right)

    model = Toy(body, left=linear(), right=linear(), a=linear(), b=linear(), c=linear())
    assert look(model, tokens(), tokens(1), tokens(2)) == Look([("mlp", ("addmm", "addmm", "addmm"))])


def test_groups_that_wait_for_each_other() -> None:
    """Two pairs that each share a projection and feed each other are split into single sites."""

    def body(m: Toy, x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        left, right = m.left(torch.cat([x, w], dim=-1)), m.right(torch.cat([y, z], dim=-1))
        first, fourth = m.a(left), m.d(right)
        return x + first, w + m.b(left * fourth), y + m.c(right * first), z + fourth

    parts = {name: linear() for name in "abcd"}
    model = Toy(body, left=linear(inner=2 * WIDTH), right=linear(inner=2 * WIDTH), **parts)
    inputs = [tokens(seed) for seed in range(4)]
    assert look(model, *inputs) == Look([MLP] * 4, [("addmm", RefusalReason.ENTANGLED)] * 4)
