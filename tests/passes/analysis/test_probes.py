"""Entropy and probes have the expected values, and the rest of the graph is unchanged."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dit_rewrite.kernels.attention_entropy  # noqa: F401  # registers the op
from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.graph import aten, copied
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.probes import Probes, add_entropy, measurable
from dit_rewrite.passes.analysis.site import Probe
from dit_rewrite.passes.guards.measurements import Measurement
from dit_rewrite.passes.rewrite.printing import op_counts
from tests.helpers.probed import of_input, values_of, weights
from tests.helpers.streams import SHAPES, Plain, traced
from tests.helpers.tracing import WIDTH, Attention, Toy, Traced, heads, linear, merged, mlp, tokens, trace
from tests.references.oracle import Rewritten, same

ENTROPY = torch.ops.dit_rewrite.attention_entropy.default


# --- entropy ----------------------------------------------------------------------------------------------------------


def entropy_by_hand(
    q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> float:
    """Compute the mean of -sum p log p over batch, heads and queries with Python loops."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    entropies = []
    for b, h in [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]:
        for i, row in enumerate(q[b, h].double().tolist()):
            scores = [scale * sum(x * y for x, y in zip(row, key, strict=True)) for key in k[b, h].double().tolist()]
            if mask is not None:
                scores = [
                    s + m for s, m in zip(scores, mask.expand(*q.shape[:3], k.shape[2])[b, h, i].tolist(), strict=True)
                ]
            if causal:
                scores = scores[: i + 1]
            total = sum(math.exp(s) for s in scores)
            entropies.append(-sum(p * math.log(p) for s in scores if (p := math.exp(s) / total) > 0))
    return sum(entropies) / len(entropies)


@pytest.mark.parametrize("kind", ["plain", "mask", "scale", "causal"])
def test_entropy(kind: str) -> None:
    """The added value is the entropy of the site's attention, and is reused with the site."""
    mask = tokens(5, 4, 4)
    given = {"plain": {}, "mask": {"attn_mask": mask}, "scale": {"scale": 0.3}, "causal": {"is_causal": True}}[kind]

    def body(m: Toy, x: Tensor) -> Tensor:
        more = {"attn_mask": m.mask} if kind == "mask" else given
        return x + m.o(merged(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), **more)))

    toy = Toy(body, mask=mask, **{name: linear() for name in "qkvo"})
    of = trace(toy, *[(tokens(i),) for i in range(3)])
    gm = copied(of.gm)
    (site,) = of.sites().sites
    measured = add_entropy(gm, site, ENTROPY)
    assert (measured.values[:-1], measured.entropy) == (site.values, len(site.values))
    rewritten = Rewritten.with_parts(of, gm, [measured], {0: "int8"})
    assert rewritten.guarded.widths == (2 + 1,), "converted numbers, their scale, and the unconverted entropy"
    for step in range(3):
        x = of.arguments[step][of_input(of, 0)]
        q, k = (heads(getattr(toy, name)(x)) for name in "qk")
        by_hand = entropy_by_hand(q, k, mask if kind == "mask" else None, given.get("scale"), kind == "causal")  # type: ignore[arg-type]
        outputs, tensors = rewritten.by_variant(step, (False,), {})
        assert tensors[0, 2].item() == pytest.approx(by_hand, rel=1e-5)
        assert tensors[0, 2].shape == ()
        assert same(outputs, list(of.returned[step])), "nothing else changed"
    assert op_counts(rewritten.variant((True,)).gm)["dit_rewrite.attention_entropy"] == 0


def test_entropy_of_two_cores() -> None:
    """The entropy of a site with two attentions is their mean."""

    def body(m: Toy, x: Tensor) -> Tensor:
        return x + m.o(m.one(x) + m.two(x))

    toy = Toy(body, one=Attention(), two=Attention(), o=linear())
    of = trace(toy, (tokens(),))
    site = of.sites().sites[-1]
    gm = copied(of.gm)
    measured = add_entropy(gm, site, ENTROPY)
    seen = values_of(of, gm)
    x = of.arguments[0][of_input(of, 0)]
    each = [entropy_by_hand(heads(part.q(x)), heads(part.k(x))) for part in (toy.one, toy.two)]
    assert seen[measured.values[-1]].item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_entropy_of_an_mlp() -> None:
    """An MLP has no entropy, and its site is unchanged."""
    of = traced("single")
    gm = copied(of.gm)
    site = next(site for site in of.sites().sites if site.name.endswith("ff"))
    assert add_entropy(gm, site, ENTROPY) is site
    assert op_counts(gm) == op_counts(of.gm)


# --- probes -----------------------------------------------------------------------------------------------------------


def probe(of: Traced, name: str, site: int = 0, step: int = 0) -> Tensor | None:
    """Return the value of a site's probe at a step, computed by an interpreter."""
    gm = copied(of.gm)
    node = Probes(gm, of.sites(), of.captured.static).of(name, of.sites().sites[site])
    return None if node is None else values_of(of, gm, step)[node]


def block_by_hand() -> tuple[Toy, Traced]:
    """Two plain blocks after an embedding."""

    def body(m: Toy, x: Tensor) -> Tensor:
        x = m.enter(x)
        for block in m.blocks:
            x = block(x)
        return m.head(x)

    toy = Toy(body, enter=linear(), blocks=nn.ModuleList([Plain(), Plain()]), head=linear())
    return toy, trace(toy, *[(tokens(i),) for i in range(3)])


def close_to(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.allclose(found.reshape(-1), expected.reshape(-1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_probe_by_value() -> None:
    """Values of the first block's change, the input of its attention, and the stream that each site reads."""
    toy, of = block_by_hand()
    for step in range(3):
        x = toy.enter(of.arguments[step][of_input(of, 0)])
        first, second = toy.blocks
        assert close_to(probe(of, "first_block", 3, step), first(x) - x)
        assert close_to(probe(of, "first_2_blocks", 3, step), second(first(x)) - x)
        assert probe(of, "first_3_blocks", 3, step) is None, "the toy has two blocks"
        assert close_to(probe(of, "modulated_input", 3, step), first.norm(x))
        streams = [x, x + first.attn(first.norm(x)), first(x)]
        streams.append(streams[2] + second.attn(second.norm(streams[2])))
        for site, stream in enumerate(streams):
            assert close_to(probe(of, "self", site, step), stream)


@torch.no_grad()
def test_the_modulated_input_is_modulated() -> None:
    """The modulated input comes after scale and shift."""
    of = traced("single")
    found = probe(of, "modulated_input")
    module = weights(of)
    x = F.linear(of.arguments[0][of_input(of, 0)], module["enter_weight"], module["enter_bias"])
    signal = F.silu(of.arguments[0][of_input(of, 1)])
    shift, scale = F.linear(signal, module["blocks_0_modulate_weight"], module["blocks_0_modulate_bias"]).chunk(6, -1)[
        :2
    ]
    normed = F.layer_norm(x, (WIDTH,), module["blocks_0_norm_weight"], module["blocks_0_norm_bias"])
    assert close_to(found, normed * (1 + scale) + shift)


@torch.no_grad()
def test_of_two_streams_the_one_that_is_returned() -> None:
    """A joint model whose last block drops the text is measured by its image."""
    for name in ("dropped", "flux"):
        of = traced(name)
        shapes = {
            kind: tuple(found.shape)
            for kind in ("first_block", "modulated_input")
            if (found := probe(of, kind)) is not None
        }
        assert shapes["first_block"] == (2, 4, WIDTH)
        assert torch.Size(shapes["modulated_input"]).numel() == 2 * 4 * WIDTH


def test_the_larger_stream_of_a_joint_site() -> None:
    """The own stream of a joint site is its image, with 4 tokens against 3."""
    of = traced("joint")
    sites = of.sites().sites
    index = next(i for i, site in enumerate(sites) if str(site.kind) == "joint")
    assert len(sites[index].streams) == 2
    found = probe(of, "self", index)
    assert found is not None and found.numel() == 2 * 4 * WIDTH


def test_probes_that_are_not_there() -> None:
    """The first block of a post-norm model ends before its norm; a model without attention has no modulated input."""
    assert probe(traced("post-norm"), "first_block") is not None
    of = trace(Toy(lambda m, x: x + m.two(x + m.one(x)), one=mlp(), two=mlp()), (tokens(),))
    assert probe(of, "modulated_input") is None
    assert probe(of, "self") is not None


def test_latent_and_output() -> None:
    """The latent is the largest input that is no weight or conditioning; the output is the largest output.

    The latent is known before any op runs, and no site waits for the output of the same call. A part of a model has
    neither.
    """
    for name in SHAPES:
        of = traced(name)
        gm = copied(of.gm)
        site, ins = of.sites().sites[0], of.gm.graph.find_nodes(op="placeholder")
        probes = Probes(gm, of.sites(), of.captured.static)
        latent, output = (probes.measured(Measurement("similarity", p), site) for p in ("latent", "output"))
        assert isinstance(latent, Probe) and isinstance(output, Probe)
        moving = {n.name: n.meta["val"].numel() for i, n in enumerate(ins) if i not in of.captured.static}
        assert moving[latent.node] == max(moving.values())
        assert (latent.waits, latent.output) == (False, None)
        assert (output.waits, output.output) == (False, output.node)
        returned = {n.name: n.meta["val"].numel() for n in of.gm.graph.output_node().all_input_nodes}
        assert returned[output.node] == max(returned.values())
        part = Probes(gm, of.sites(), of.captured.static, whole=False)
        for statistic in (Measurement("drift", "latent"), Measurement("similarity", "output")):
            assert part.measured(statistic, site) is RefusalReason.PROBE_IN_PART
        assert isinstance(part.measured(Measurement("drift", "first_block"), site), Probe)


def test_conditioning_is_no_latent() -> None:
    """A caption may be larger than the latent, but is the same at each step."""
    of = traced("flux")
    ins = of.gm.graph.find_nodes(op="placeholder")
    first = find_latent(of.gm.graph, of.captured.static)
    assert first is not None
    second = find_latent(of.gm.graph, of.captured.static | {ins.index(first)})
    assert second is not first
    assert find_latent(of.gm.graph, frozenset(range(len(ins)))) is None


def test_what_is_put_in_changes_nothing() -> None:
    """The graph with all probes returns the outputs of the model, and the captured graph is unchanged."""
    for name in SHAPES:
        of = traced(name)
        before = of.gm.code
        gm, sites = copied(of.gm), of.sites()
        probes = Probes(gm, sites, of.captured.static)
        found = {probes.of(kind, site) for kind in ("first_block", "modulated_input", "self") for site in sites.sites}
        again = {probes.of(kind, site) for kind in ("first_block", "modulated_input", "self") for site in sites.sites}
        assert found == again, "each node is inserted once"
        gm.graph.lint()
        gm.recompile()
        assert same(list(gm(*of.arguments[0])), list(of.returned[0]))
        assert of.gm.code == before


def test_copies_have_the_same_names() -> None:
    """Nodes of a copy have the same names and meta, so its sites are those of the original."""
    of = traced("flux")
    copy = copied(of.gm)
    assert [(n.name, n.op, n.target) for n in copy.graph.nodes] == [(n.name, n.op, n.target) for n in of.gm.graph.nodes]
    assert all(a.meta.get("val") is b.meta.get("val") for a, b in zip(copy.graph.nodes, of.gm.graph.nodes, strict=True))
    assert not set(copy.graph.nodes) & set(of.gm.graph.nodes)


@pytest.mark.parametrize(
    ("value", "measured"),
    [(torch.ones(2), True), (torch.ones(2, dtype=torch.bfloat16), True), (torch.ones(2, dtype=torch.int64), False)]
    + [((torch.ones(2),), False), (3, False), (None, False)],
)
def test_measurable(value: object, measured: bool) -> None:
    assert measurable(value) is measured


def test_aten_ops_of_probes() -> None:
    """The first block's change is one subtraction."""
    of = traced("single")
    gm = copied(of.gm)
    name = Probes(gm, of.sites(), of.captured.static).of("first_block", of.sites().sites[0])
    (node,) = [n for n in gm.graph.nodes if n.name == name]
    assert node.target is aten.sub.Tensor
    assert tuple(node.meta["val"].shape) == (2, 4, WIDTH)
