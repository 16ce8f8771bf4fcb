"""Full attention and its window's residual as one op: where the two are fused, and that both versions agree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.testing
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.errors import OutOfResources

import dit_rewrite
from dit_rewrite import Policy, Rule, Where, WindowResidual
from dit_rewrite.compiler import fuse_window_refresh
from dit_rewrite.compiler.fuse_window_refresh import Refresh, fuse, is_faster
from dit_rewrite.guards import step
from dit_rewrite.kernels.window_attention import window_reuse
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.printing import op_counts

N, D = 12, 8
MASK = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.7
residual = functools.partial(window_reuse, subtract=True)
Two = Callable[..., tuple[Tensor, Tensor]]


def always(_: Refresh) -> bool:
    return True


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, N, D, generator=generator) for _ in range(3)]


def traced(two: Two, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(two, tracing_mode="fake")(*inputs)


def kept(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, **where: Any) -> Any:
    """The values that a computing step writes: O and R = O - W."""
    full = opaque_attention.OP(q, k, v, mask, scale=scale)
    return full, residual(q, k, v, full, where.pop("window", [2]), **where, attn_mask=mask, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return kept(q, k, v)


@pytest.mark.parametrize(
    ("two", "masks"),
    [
        (plain, []),
        (lambda q, k, v, mask: kept(q, k, v, mask), [MASK]),
        (lambda q, k, v: kept(q, k, v, scale=0.5), []),
        (lambda q, k, v: kept(q, k, v, window=[1, 1], grid=[2, 5], prefix=2), []),
        (lambda q, k, v: kept(q, k, v, window=[1, 1], grid=[2, 5], suffix=2), []),
        (lambda q, k, v: kept(q, k, k), []),
    ],
    ids=["plain", "mask", "scale", "grid behind text", "text behind grid", "keys are values"],
)
def test_one_op_gives_both(two: Two, masks: list[Tensor]) -> None:
    inputs = [*tensors(), *masks]
    gm = traced(two, *inputs)
    assert fuse(gm, always) == 1
    assert {name for name in op_counts(gm) if "window" in name or "attention" in name} == {"dit_rewrite.window_refresh"}
    for found, expected in zip(gm(*inputs), two(*inputs), strict=True):
        assert (found - expected).abs().max() < 1e-5 and expected.abs().max() > 0.1


def of_other_values(q: Tensor, k: Tensor, v: Tensor) -> Any:
    full = opaque_attention.OP(q, k, v)
    return full, residual(q, k, k, full, [2])


def of_other_queries(q: Tensor, k: Tensor, v: Tensor) -> Any:
    full = opaque_attention.OP(q, k, v)
    return full, residual(q * 2, k, v, full, [2])


def not_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A step that reuses: the window added to a residual, which is another attention here."""
    full = opaque_attention.OP(q, k, v)
    return full, window_reuse(q, k, v, full, [2])


def of_other_masks(q: Tensor, k: Tensor, v: Tensor) -> Any:
    full = opaque_attention.OP(q, k, v, q[:, :1] @ k[:, :1].mT)
    return full, residual(q, k, v, full, [2])


def of_other_scales(q: Tensor, k: Tensor, v: Tensor) -> Any:
    full = opaque_attention.OP(q, k, v, scale=0.5)
    return full, residual(q, k, v, full, [2])


def causal(q: Tensor, k: Tensor, v: Tensor) -> Any:
    full = opaque_attention.OP(q, k, v, is_causal=True)
    return full, residual(q, k, v, full, [2])


def on_something_else(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return q, residual(q, k, v, q, [2])


@pytest.mark.parametrize(
    "two",
    [of_other_values, of_other_queries, not_subtracted, of_other_masks, of_other_scales, causal, on_something_else],
)
def test_what_is_no_refresh(two: Two) -> None:
    gm = traced(two, *tensors())
    before = op_counts(gm)
    assert fuse(gm, always) == 0
    assert op_counts(gm) == before


def test_only_where_it_is_faster() -> None:
    gm = traced(plain, *tensors())
    assert fuse(gm, lambda _: False) == 0
    assert op_counts(gm)["dit_rewrite.window_reuse"] == 1


def test_on_a_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_window_refresh, "_measured", lambda *_: pytest.fail("measured"))
    gm = traced(plain, *tensors())
    assert fuse(gm, is_faster) == 0


TOO_LARGE = OutOfResources(9, 8, "shared memory")


@pytest.mark.parametrize(
    ("seconds", "fused"), [([1.0, 2.0], True), ([2.0, 1.0], False), ([TOO_LARGE, 1.0], False), ([1.0, TOO_LARGE], True)]
)
def test_what_is_measured(
    seconds: list[Any], fused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """Both versions run once on random tensors like those of the graph. One that does not fit on the device is not the
    faster one. Another process finds the choice on disk, and measures for other arguments or if the file is damaged."""
    timed: list[tuple[Tensor, ...]] = []
    left = list(seconds)

    def do_bench(run: Callable[[], Tensor | tuple[Tensor, ...]], return_mode: str) -> float:
        found, result = left.pop(0), run()
        timed.append(result if isinstance(result, tuple) else (result,))
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setenv("DIT_REWRITE_CACHE", str(tmp_path))
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors())
    specs = tuple(map(fuse_window_refresh._Spec.of, (q, k, v, MASK.float().expand(2, 3, N, N))))
    measured = fuse_window_refresh._measured.__wrapped__
    for _ in range(2):
        assert measured(specs, (2,), None, 0, None, 0) is fused
    assert [[t.stride() for t in results] for results in timed] == [[q.stride()] * 2, [q.stride()]]
    assert all(result.std() > 0.1 for results in timed for result in results)
    for arguments in [
        ((3,), None, 0, None, 0),
        ((2,), None, 1, None, 0),
        ((2,), None, 0, 0.5, 0),
        ((2,), None, 0, None, 1),
    ]:
        left += seconds
        assert measured(specs, *arguments) is fused and not left
    assert len(list(tmp_path.iterdir())) == 5
    for file in tmp_path.iterdir():
        file.write_text("{")
    left += seconds
    assert measured(specs, (2,), None, 0, None, 0) is fused and not left


@pytest.mark.parametrize("name", ["tiny", pytest.param("pixart_sigma", marks=pytest.mark.slow), "stdit"])
def test_in_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fused op writes the residual, and the next step reads it; the outputs equal those of the two ops."""
    from tests.helpers import tiny
    from tests.helpers.models import MODELS, output

    policy = Policy((Rule(step % 2 > 0, WindowResidual(0.25), Where(("self",))),))
    found: list[list[Tensor]] = []
    counts = []
    for faster in (always, lambda _: False):
        monkeypatch.setattr(fuse_window_refresh, "is_faster", faster)
        fused = []
        monkeypatch.setattr(fuse_window_refresh, "fuse", lambda gm, how, fused=fused: fused.append(fuse(gm, how)))
        torch._dynamo.reset()
        build, inputs = (tiny.build, tiny.calls(4)) if name == "tiny" else (MODELS[name].build, MODELS[name].inputs(4))
        model = dit_rewrite.compile(build(), policy, backend="aot_eager")
        with torch.no_grad(), model.trajectory(4):
            found.append([output(model(**arguments)).clone() for arguments in inputs])
        counts.append(sum(fused))
    sites = [place.site for place in model.explain().sites]
    assert counts == [sum(site.part is Part.CORE and site.kind == "self" for site in sites), 0] and counts[0] > 1
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() < 1e-5 * two.abs().max()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_measured_on_a_gpu() -> None:
    """The faster version is chosen once, and gives O and R."""
    inputs = [tensor.cuda() for tensor in tensors()]
    gm = traced(plain, *inputs)
    chosen = is_faster(
        fuse_window_refresh.match(gm.graph.find_nodes(op="call_function", target=fuse_window_refresh.REUSE)[0])
    )  # type: ignore[arg-type]
    assert fuse(gm, is_faster) == chosen
    assert fuse_window_refresh._measured.cache_info().hits == 1
    for found, expected in zip(gm(*inputs), plain(*inputs), strict=True):
        assert (found - expected).abs().max() < 1e-3
