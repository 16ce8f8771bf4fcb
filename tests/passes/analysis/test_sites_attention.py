"""Attention branches and their kinds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_rewrite.errors import RefusalReason
from tests.helpers.tracing import WIDTH, Attention, Look, Toy, heads, linear, look, merged, mlp, norm, tokens

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().transpose(-1, -2) @ v)


def projections(names: str = "qkvo") -> dict[str, torch.nn.Module]:
    return {name: linear() for name in names}


def attend(m: Toy, core: Core, x: Tensor, source: Tensor) -> Tensor:
    return m.o(merged(core(heads(m.q(x)), heads(m.k(source)), heads(m.v(source)))))


def test_three_forms_of_a_core() -> None:
    """SDPA, two products around a softmax, and two products without one are all attention."""
    for core in (whole, by_hand, linear_attention):
        model = Toy(lambda m, x, core=core: x + attend(m, core, x, x), **projections())
        assert look(model, tokens()) == Look([("self", ("addmm",))])


def test_product_with_weights_is_no_core() -> None:
    """A product of the stream with a parameter is a projection, with any op."""
    model = Toy(lambda m, x: x + torch.bmm(m.weight.expand(2, 4, 4), x).relu(), weight=tokens(1, 4, 4))
    assert look(model, tokens()) == Look([("mlp", ("relu",))])


def test_cross_attention() -> None:
    """Keys and values from a condition alone make it cross-attention, in each form."""
    for core in (whole, by_hand, linear_attention):
        model = Toy(lambda m, x, text, core=core: x + attend(m, core, x, text), **projections())
        assert look(model, tokens(), tokens(1, 2, 3, WIDTH)) == Look([("cross", ("addmm",))])


def test_one_tensor_as_key_and_value() -> None:
    """If one tensor is key and value beside a mask from a condition, the attention is still self-attention."""

    def body(m: Toy, x: Tensor, mask: Tensor) -> Tensor:
        both = heads(m.k(x))
        return x + m.o(merged(F.scaled_dot_product_attention(heads(m.q(x)), both, both, attn_mask=mask)))

    assert look(Toy(body, **projections("qko")), tokens(), tokens(1, 4, 4)) == Look([("self", ("addmm",))])


def test_attention_mask() -> None:
    """A mask added to the scores is no residual sum."""

    def body(m: Toy, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        return x + m.o(merged((q @ k.transpose(-1, -2) + mask).softmax(-1) @ v))

    assert look(Toy(body, **projections()), tokens(), tokens(1, 4, 4)) == Look([("self", ("addmm",))])


def test_rotary_positions() -> None:
    """`q * cos + rotated(q) * sin` is no residual sum, although both summands come from the stream."""

    def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=-1)
        return q * cos + torch.cat([-second, first], dim=-1) * sin

    def body(m: Toy, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        return x + m.o(merged(whole(rotated(q, cos, sin), rotated(k, cos, sin), v)))

    model = Toy(body, **projections())
    assert look(model, tokens(), tokens(1, 4, 4), tokens(2, 4, 4)) == Look([("self", ("addmm",))])


def joined(m: Toy, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention of image and text, each with its own output projection."""
    q, k, v = (heads(torch.cat([a(x), b(text)], 1)) for a, b in ((m.q, m.text_q), (m.k, m.text_k), (m.v, m.text_v)))
    out = merged(whole(q, k, v))
    return m.o(out[:, :4].contiguous()), m.text_o(out[:, 4:].contiguous())


def both_streams() -> Toy:
    def body(m: Toy, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image, words = joined(m, m.norm(x), m.norm(text))
        return x + image, text + words

    names = [prefix + name for prefix in ("", "text_") for name in "qkvo"]
    return Toy(body, norm=norm(), **{name: linear() for name in names})


def test_joint_attention() -> None:
    """A core whose output goes to two streams is one site with a value for each."""
    assert look(both_streams(), tokens(), tokens(1, 2, 3, WIDTH)) == Look([("joint", ("addmm", "addmm"))])


def test_joint_attention_whose_text_is_thrown_away() -> None:
    """If only the image is used, keys from image and text still make the site joint, with one value."""
    model = both_streams()
    model.body = lambda m, x, text: x + joined(m, m.norm(x), m.norm(text))[0]
    assert look(model, tokens(), tokens(1, 2, 3, WIDTH)) == Look([("joint", ("addmm",))])


def test_projection_of_a_slice() -> None:
    """ATen adds the bias separately if the input is not contiguous; the value is still the projection's output."""
    model = Toy(lambda m, x: x + m.o(torch.cat([x, m.q(x)], 1).relu()[:, 4:]), **projections("qo"))
    assert look(model, tokens()) == Look([("mlp", ("add",))])


def test_register_tokens() -> None:
    """Learnt tokens joined with those of the stream do not make self-attention joint."""
    model = Toy(
        lambda m, x: x + attend(m, whole, x, torch.cat([x, m.registers.expand(2, 2, WIDTH)], dim=1)),
        registers=tokens(1, 1, 2, WIDTH),
        **projections(),
    )
    assert look(model, tokens()) == Look([("self", ("addmm",))])


def test_parallel_by_cat() -> None:
    """Attention and MLP that end in one projection are one parallel site."""

    def body(m: Toy, x: Tensor) -> Tensor:
        y = m.norm(x)
        attention = merged(whole(heads(m.q(y)), heads(m.k(y)), heads(m.v(y))))
        return x + m.out(torch.cat([attention, F.gelu(m.up(y))], dim=-1))

    model = Toy(body, norm=norm(), up=linear(), out=linear(inner=2 * WIDTH), **projections("qkv"))
    assert look(model, tokens()) == Look([("parallel", ("addmm",))])


def test_parallel_by_sum_under_one_gate() -> None:
    """`x + gate * (attention + mlp)` is one parallel site with one value."""
    model = Toy(lambda m, x: x + m.gate * (m.attn(x) + m.ff(x)), attn=Attention(), ff=mlp(), gate=tokens(1, WIDTH))
    assert look(model, tokens()) == Look([("parallel", ("add",))])


def test_parallel_by_sum_of_one_fused_projection() -> None:
    """Attention and MLP that start in one projection and are summed are one parallel site."""

    def body(m: Toy, x: Tensor) -> Tensor:
        q, k, v, hidden = m.fused(x).chunk(4, dim=-1)
        return x + (m.o(merged(whole(heads(q), heads(k), heads(v)))) + m.down(F.gelu(hidden)))

    model = Toy(body, fused=linear(outer=4 * WIDTH), o=linear(), down=linear())
    assert look(model, tokens()) == Look([("parallel", ("add",))])


def test_gated_attention_is_not_parallel() -> None:
    """A gate from the stream on the attention's output belongs to the attention."""
    model = Toy(lambda m, x: x + m.o(attend(m, whole, x, x) * m.g(x).sigmoid()), g=linear(), **projections())
    assert look(model, tokens()) == Look([("self", ("addmm",))])


def test_local_enhancement_is_not_parallel() -> None:
    """A convolution of the values, added to the attention's output before its projection, belongs to the attention."""

    def body(m: Toy, x: Tensor) -> Tensor:
        v = m.v(x)
        local = m.conv(v.transpose(1, 2)).transpose(1, 2)
        return x + m.o(merged(whole(heads(m.q(x)), heads(m.k(x)), heads(v))) + local)

    model = Toy(body, conv=torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), **projections())
    assert look(model, tokens()) == Look([("self", ("addmm",))])


def test_self_and_cross_attention_of_a_block() -> None:
    """A block with self-attention, cross-attention and an MLP has one site of each kind."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x = x + m.own(m.norm(x))
        x = x + m.other(x, text)
        return x + m.ff(m.norm(x))

    model = Toy(body, norm=norm(), own=Attention(), other=Attention(), ff=mlp())
    expected = Look([(kind, ("addmm",)) for kind in ("self", "cross", "mlp")])
    assert look(model, tokens(), tokens(1, 2, 3, WIDTH)) == expected


def test_attention_without_projection_of_the_stream() -> None:
    """A core that reads the stream directly is a branch, without the copy after it; a norm beside it is refused."""
    model = Toy(lambda m, x: x + merged(by_hand(heads(x), heads(x), heads(x))) + m.norm(x), norm=norm())
    assert look(model, tokens()) == Look([("self", ("bmm",))], [("getitem", RefusalReason.NO_CONTRACTION)])
