"""Where tensors are tapped: keys before or behind norm and rotation, single-stream blocks, modalities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_rewrite.analysis.modalities import Modalities
from dit_rewrite.analysis.places import Place, Places
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.rewrite.tap import Cut
from tests.helpers.tracing import (
    WIDTH,
    Attention,
    Toy,
    Traced,
    heads,
    linear,
    made_by,
    merged,
    mlp,
    norm,
    tokens,
    trace,
)


def places(made: Traced, **options: object) -> tuple[list[Place], Places]:
    finder = Places(made.captured, made.sites(), **options)  # type: ignore[arg-type]
    return finder.find(), finder


def ops(made: Traced, quantity: str, **options: object) -> list[str]:
    """The op that computes each tapped tensor of a quantity, without its views."""
    found, _ = places(made, **options)
    return [made_by(made.nodes[place.tap.read[0]]) for place in found if place.quantity == quantity]


def rotated(x: Tensor) -> Tensor:
    """A rotation as in rotary embeddings: the halves of each head change places."""
    first, second = x.chunk(2, dim=-1)
    return x * 0.8 + torch.cat([-second, first], dim=-1) * 0.6


def fused(self: Toy, x: Tensor) -> Tensor:
    """One projection for all of q, k and v; q and k have a norm and a rotation."""
    q, k, v = (heads(part) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
    q, k = (rotated(F.layer_norm(each, (WIDTH // 2,))) for each in (q, k))
    x = x + self.out(merged(F.scaled_dot_product_attention(q, k, v)))
    return x + self.mlp(self.norm(x))


def single(self: Toy, x: Tensor) -> Tensor:
    """A single-stream block: attention and MLP end in one projection."""
    y = self.norm(x)
    q, k, v = (heads(layer(y)) for layer in (self.q, self.k, self.v))
    attention = merged(F.scaled_dot_product_attention(q, k, v))
    return x + self.out(torch.cat([attention, F.gelu(self.up(y))], dim=-1))


def test_keys_are_tapped_where_it_is_said() -> None:
    made = trace(Toy(fused, qkv=linear(outer=3 * WIDTH), out=linear(), mlp=mlp(), norm=norm()), (tokens(),))
    found, _ = places(made)
    read = {str(place.quantity): made.nodes[place.tap.read[0]] for place in found}
    (core,) = [node for node in made.gm.graph.nodes if "attention" in node.name]
    assert (read["keys"], read["values"]) == core.args[1:3], "as the attention op reads them"
    assert ops(made, "keys") == ["add"], "the sum of the rotation"
    assert ops(made, "keys", keys="projection") == ["getitem"], "a part of the common projection, before the norm"
    behind, _ = places(made, keys="projection")
    key = next(made.nodes[p.tap.read[0]] for p in behind if p.quantity == "keys")
    assert tuple(key.meta["val"].shape) == tuple(core.args[1].meta["val"].shape), "followed through views to the heads"


def test_a_single_stream_block_has_its_attention_alone() -> None:
    parts = {name: linear() for name in ("q", "k", "v")}
    toy = Toy(single, **parts, up=linear(outer=2 * WIDTH), out=linear(inner=3 * WIDTH), norm=norm())
    made = trace(toy, (tokens(),))
    assert [str(site.kind) for site in made.sites().sites] == ["parallel"]
    assert ops(made, "attention") == ["attention"]
    assert ops(made, "mlp") == ["gelu"], "what goes into the common projection beside the attention"
    assert ops(made, "branch") == ["addmm"]


def test_attention_to_a_condition_that_does_not_move() -> None:
    """Its keys are the same at each step: they are not measured, and the reason is given."""

    def body(self: Toy, x: Tensor) -> Tensor:
        return x + self.attn(x, self.text)

    made = trace(Toy(body, attn=Attention(), text=tokens(1)), (tokens(),))
    found, finder = places(made)
    assert "keys" not in {str(place.quantity) for place in found}
    reasons = {refusal.path: refusal.reason for refusal in finder.refused}
    assert reasons["attn keys"] is reasons["attn values"] is RefusalReason.TRAJECTORY_INVARIANT
    assert "window" not in {str(place.quantity) for place in places(made, window=0.5)[0]}


def test_attention_without_an_attention_op() -> None:
    def body(self: Toy, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return x + self.out(scores @ self.v(x))

    made = trace(Toy(body, **{name: linear() for name in ("q", "k", "v", "out")}), (tokens(),))
    found, finder = places(made)
    assert {str(place.quantity) for place in found} == {"branch", "block", "output"}
    assert [refusal.reason for refusal in finder.refused] == [RefusalReason.NO_CORE]


def joint(self: Toy, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Two streams with one attention, the text first."""
    both = torch.cat([text, image], dim=1)
    q, k, v = (heads(layer(both)) for layer in (self.q, self.k, self.v))
    found = self.out(merged(F.scaled_dot_product_attention(q, k, v)))
    image, text = image + found[:, 3:], text + found[:, :3]
    return image + self.mlp(image), text + self.mlp(text)


def test_modalities_of_joint_attention() -> None:
    made = trace(
        Toy(joint, **{name: linear() for name in ("q", "k", "v", "out")}, mlp=mlp()), (tokens(), tokens(1, 2, 3, 8))
    )
    (core,) = [node for node in made.gm.graph.nodes if "attention" in node.name]
    known = Modalities(4, [core])
    labels, cuts = known.cuts(core, [core], 1)
    assert labels == ("all", "text", "image")
    assert cuts == (Cut(), Cut(((2, 0, 3),)), Cut(((2, 3, 4),)))
    values = [made.nodes[name] for site in made.sites().sites for name in site.values]
    assert sorted(known.cuts(value, [core], None)[0] for value in values) == [
        ("image",),
        ("image",),
        ("text",),
        ("text",),
    ]
    assert Modalities(None, [core]).cuts(core, [core], 1)[0] == ("all",)


@pytest.mark.parametrize("seed", [0, 1])
def test_keys_of_a_joint_projection_have_one_modality_each(seed: int) -> None:
    """Before the cat, image and text have projections of their own."""

    def body(self: Toy, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (heads(torch.cat([a(text), b(image)], dim=1)) for a, b in zip(self.text, self.image, strict=True))
        found = self.out(merged(F.scaled_dot_product_attention(q, k, v)))
        return image + found[:, 3:], text + found[:, :3]

    layers = torch.nn.ModuleList(linear() for _ in range(6))
    made = trace(Toy(body, text=layers[:3], image=layers[3:], out=linear()), (tokens(seed), tokens(seed, 2, 3, 8)))
    assert ops(made, "keys", keys="projection") == ["addmm", "addmm"]
    assert ops(made, "keys") == ["cat"]
