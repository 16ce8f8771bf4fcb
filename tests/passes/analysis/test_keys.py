"""The keys and values of attention, which guards measure and policies reuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.probes import find_keys
from dit_rewrite.passes.analysis.site import Part, Site, close
from dit_rewrite.passes.rewrite.printing import op_counts
from tests.helpers.probed import of_input, values_of, weights
from tests.helpers.streams import traced
from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, heads, linear, merged, mlp, norm, tokens, trace
from tests.references.oracle import Rewritten


def keys_of(of: Traced, invariant: frozenset[int] = frozenset()) -> tuple[list[Site], list[tuple[str, RefusalReason]]]:
    found, refused = find_keys(of.gm, of.sites().sites, of.captured.static | invariant)
    return found, [(refusal.path, refusal.reason) for refusal in refused]


def cross() -> Traced:
    """Self-attention, attention to a text, and an MLP."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        x = x + m.attn(m.norm(x))
        x = x + m.cross(m.norm(x), text)
        return x + m.ff(m.norm(x))

    toy = Toy(body, norm=norm(), attn=Attention(), cross=Attention(), ff=mlp())
    return trace(toy, *[(tokens(i), tokens(9, 2, 3, WIDTH)) for i in range(4)])


def test_keys_and_values() -> None:
    """A KV site has the keys and values of an attention's core; an MLP has none and is not refused."""
    of = cross()
    found, refused = keys_of(of)
    assert [(site.name, str(site.kind), site.part) for site in found] == [
        ("attn.kv", "self", Part.KV),
        ("cross.kv", "cross", Part.KV),
    ]
    assert refused == []
    seen = values_of(of, of.gm)
    x, text = of.arguments[0][of_input(of, 0)], of.arguments[0][of_input(of, 1)]
    module = weights(of)
    normed = F.layer_norm(x, (WIDTH,), module["norm_weight"], module["norm_bias"])
    expected = [heads(F.linear(normed, module[f"attn_{p}_weight"], module[f"attn_{p}_bias"])) for p in "kv"]
    assert all(torch.equal(seen[name], tensor) for name, tensor in zip(found[0].values, expected, strict=True))
    assert [tuple(seen[name].shape) for name in found[1].values] == [(2, 2, 3, 4)] * 2
    assert torch.equal(
        seen[found[1].values[0]], heads(F.linear(text, module["cross_k_weight"], module["cross_k_bias"]))
    )


def test_invariant_keys_are_refused() -> None:
    """Trajectory-invariant keys and values of a text are hoisted, and the site is refused with that reason."""
    of = cross()
    found, refused = keys_of(of, frozenset({of_input(of, 1)}))
    assert [site.name for site in found] == ["attn.kv"]
    assert refused == [("cross", RefusalReason.TRAJECTORY_INVARIANT)]


def test_one_invariant_half() -> None:
    """If only the values depend on the step, only they are stored."""

    def body(m: Toy, x: Tensor, text: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(text)), heads(m.v(text * x[:, :3])))
        return x + m.o(merged(out))

    of = trace(Toy(body, **{name: linear() for name in "qkvo"}), (tokens(), tokens(9, 2, 3, WIDTH)))
    found, refused = keys_of(of, frozenset({of_input(of, 1)}))
    assert refused == []
    (site,) = found
    assert len(site.values) == 1
    (core,) = of.gm.graph.find_nodes(op="call_function", target=torch.ops.dit_rewrite.attention.default)
    assert site.values == (core.args[2].name,)


def test_one_tensor_as_key_and_value() -> None:
    """One tensor that is both key and value is stored once."""

    def body(m: Toy, x: Tensor) -> Tensor:
        both = heads(m.k(x))
        return x + m.o(merged(F.scaled_dot_product_attention(heads(m.q(x)), both, both)))

    of = trace(Toy(body, **{name: linear() for name in "qko"}), *[(tokens(i),) for i in range(3)])
    ((site,), refused) = keys_of(of)
    assert len(site.values) == 1 and refused == []
    rewritten = Rewritten.with_parts(of, of.gm, [*of.sites().sites, site], {0: None, 1: "int8"})
    rewritten.check([(False, False), (False, True), (True, False)])


def test_attention_by_hand_has_no_keys() -> None:
    """Two products around a softmax are attention, but there is no op with keys and values."""

    def body(m: Toy, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        return x + m.o(merged((q @ k.transpose(-1, -2)).softmax(-1) @ v))

    of = trace(Toy(body, **{name: linear() for name in "qkvo"}), (tokens(),))
    (site,) = of.sites().sites
    assert str(site.kind) == "self"
    assert keys_of(of) == ([], [(site.name, RefusalReason.NO_KEYS)])


@pytest.mark.parametrize("format", [None, "bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", ["single", "joint", "flux"])
def test_queries_are_computed(name: str, format: str | None) -> None:
    """If keys and values are reused, only their projections are dropped, and queries are computed."""
    of = traced(name)
    found, refused = keys_of(of)
    assert refused == []
    parts = [*of.sites().sites, *found]
    first = len(of.sites().sites)
    rewritten = Rewritten.with_parts(of, of.gm, parts, {i: format for i in range(first, len(parts))})
    reused = op_counts(rewritten.variant((True,) * len(found)).gm)
    counts = op_counts(of.gm)
    projections = {"single": 2, "joint": 4, "flux": 0}[name]
    if projections:
        assert counts["aten.addmm"] - reused["aten.addmm"] == projections * len(found)
    assert reused["dit_rewrite.attention"] == counts["dit_rewrite.attention"] == len(found)
    for seed in range(2):
        rewritten.check(rewritten.random_table(seed))


def test_keys_lie_within_their_branch() -> None:
    """A reused branch covers its keys and values; if only these are reused, the branch is computed."""
    of = cross()
    found, _ = keys_of(of)
    parts = close(of.gm.graph, [*of.sites().sites, *found])
    names = [site.name for site in parts]
    assert {s.name: None if s.parent is None else names[s.parent] for s in parts} == {
        "attn": None,
        "cross": None,
        "ff": None,
        "attn.kv": "attn",
        "cross.kv": "cross",
    }
    rewritten = Rewritten.with_parts(of, of.gm, parts, {i: None for i in range(5)})
    assert op_counts(rewritten.variant((False, False, False, True, True)).gm)["dit_rewrite.attention"] == 2
    assert op_counts(rewritten.variant((True, False, False, False, False)).gm)["dit_rewrite.attention"] == 1
    for seed in range(3):
        rewritten.check(rewritten.random_table(seed))
