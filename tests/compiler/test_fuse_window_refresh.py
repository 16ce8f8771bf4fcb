"""Full attention and its window's residual as one op: where the two are fused, and that both versions agree."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.testing
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.errors import OutOfResources

import dit_rewrite
from dit_rewrite import Policy, Rule, Where, WindowResidual
from dit_rewrite.compiler import fuse_window_refresh
from dit_rewrite.compiler.fuse_window_refresh import ONE, TWO, Refresh, fastest, fuse
from dit_rewrite.compiler.measured_choices import choose
from dit_rewrite.guards import step
from dit_rewrite.kernels.window_attention import window_reuse
from dit_rewrite.kernels.window_attention.libraries import available
from dit_rewrite.passes.analysis.site import Part
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.printing import op_counts

N, D = 12, 8
MASK = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.7
residual = functools.partial(window_reuse, subtract=True)
Two = Callable[..., tuple[Tensor, Tensor]]


def always(_: Refresh) -> str:
    return ONE


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


def test_only_where_it_fastest() -> None:
    gm = traced(plain, *tensors())
    assert fuse(gm, lambda _: TWO) == 0
    assert op_counts(gm)["dit_rewrite.window_reuse"] == 1


def test_on_a_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_window_refresh, "_measured", lambda *_: pytest.fail("measured"))
    gm = traced(plain, *tensors())
    assert fuse(gm, fastest) == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("by", ["flex", "flash"])
@pytest.mark.parametrize(
    "where", [{}, {"scale": 0.5}, {"window": [1, 1], "grid": [2, 5], "prefix": 2}, {"window": [1, 1], "grid": [3, 4]}]
)
def test_a_library_computes_the_window(by: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention stays as it is. FlashAttention has windows over a sequence only."""
    if by == "flash" and "grid" in where:
        return

    def two(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return kept(q, k, v, **dict(where))

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash))
    gm, inputs = traced(two, *tensors()), tensors()
    assert fuse(gm, lambda _: by) == 1
    counts = op_counts(gm)
    assert counts["dit_rewrite.window_residual"] == 1 and not counts["dit_rewrite.window_reuse"]
    for found, expected in zip(gm(*inputs), two(*inputs), strict=True):
        assert (found - expected).abs().max() < 1e-5 and expected.abs().max() > 0.1
        assert found.stride() == expected.stride()


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, window_size: tuple[int, int]) -> Tensor:
    """FlashAttention's function by its documentation: tensors are (B, N, H, d), row i sees i - left to i + right."""
    row, left, right = torch.arange(q.shape[1]), *window_size
    seen = (row[:, None] - left <= row) & (row <= row[:, None] + right)
    turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*turned, seen, scale=softmax_scale).transpose(1, 2).contiguous()


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash))
    q, k, v = (tensor.transpose(0, 1) for tensor in tensors())
    found = torch.library.opcheck(fuse_window_refresh.RESIDUAL, (q, k, v, v, "flash", (2,)))
    assert set(found.values()) == {"SUCCESS"}


def test_which_libraries_can(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 1, N, D, dtype=torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available(query, [2], 0, 0, masked=False) == ("flex",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert available(query, [2], 0, 0, masked=False) == ("flex", "flash")
    assert available(query, [2], 0, 0, masked=True) == ()
    for others in ((query.float(), [2], 0, 0), (query, [1, 2], 0, 0), (query, [2], 1, 0), (query, [2], 0, 1)):
        assert available(*others, masked=False) == ("flex",)


def test_a_library_that_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any error of it only leaves it out; one of our own ops is raised."""

    def fail() -> None:
        raise ValueError("no such head size")

    monkeypatch.setattr(triton.testing, "do_bench", lambda run, return_mode: run() or 1.0)
    monkeypatch.setenv("DIT_REWRITE_CACHE", str(tmp_path))
    assert choose("refresh", {}, {"flex": fail, TWO: lambda: None}, may_fail=("flex",)) == TWO
    with pytest.raises(ValueError, match="no such head size"):
        choose("another", {}, {ONE: fail, TWO: lambda: None}, may_fail=("flex",))


TOO_LARGE = OutOfResources(9, 8, "shared memory")


@pytest.mark.parametrize(
    ("seconds", "fused"),
    [
        ([1.0, 2.0], ONE),
        ([2.0, 1.0], TWO),
        ([TOO_LARGE, 1.0], TWO),
        ([1.0, TOO_LARGE], ONE),
        ([2.0, 2.0, 1.0], "flex"),
        ([2.0, 1.0, RuntimeError("no kernel")], TWO),
        ([TOO_LARGE] * 3, TWO),
    ],
)
def test_what_is_measured(
    seconds: list[Any], fused: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """Both versions run once on random tensors like those of the graph. One that does not fit on the device is not the
    faster one. Another process finds the choice on disk, and measures for other arguments or if the file is damaged."""
    timed: list[tuple[Tensor, ...]] = []
    left, mask = list(seconds), MASK.float().expand(2, 3, N, N)

    def do_bench(run: Callable[[], Tensor | tuple[Tensor, ...]], return_mode: str) -> float:
        found, result = left.pop(0), run()
        timed.append(result if isinstance(result, tuple) else (result,))
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setenv("DIT_REWRITE_CACHE", str(tmp_path))
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors())
    given = (q, k, v, mask) if len(seconds) == 2 else (q, k, v)
    specs = tuple(map(fuse_window_refresh._Spec.of, given))
    measured = fuse_window_refresh._measured.__wrapped__
    for _ in range(2):
        assert measured(specs, (2,), None, 0, None, 0) == fused
    strides = [[q.stride()] * 2, *[[q.stride()]] * (len(seconds) - 1)]
    assert [[t.stride() for t in results] for results in timed] == strides
    assert all(result.std() > 0.1 for results in timed for result in results)
    for arguments in [
        ((3,), None, 0, None, 0),
        ((2,), None, 1, None, 0),
        ((2,), None, 0, 0.5, 0),
        ((2,), None, 0, None, 1),
    ]:
        left += seconds
        assert measured(specs, *arguments) == fused and not left
    assert len(list(tmp_path.iterdir())) == 5
    for file in tmp_path.iterdir():
        file.write_text("{")
    left += seconds
    assert measured(specs, (2,), None, 0, None, 0) == fused and not left


@pytest.mark.parametrize("name", ["tiny", pytest.param("pixart_sigma", marks=pytest.mark.slow), "stdit"])
def test_in_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fused op writes the residual, and the next step reads it; the outputs equal those of the two ops."""
    from tests.helpers import tiny
    from tests.helpers.models import MODELS, output

    policy = Policy((Rule(step % 2 > 0, WindowResidual(0.25), Where(("self",))),))
    found: list[list[Tensor]] = []
    counts = []
    for faster in (always, lambda _: TWO):
        monkeypatch.setattr(fuse_window_refresh, "fastest", faster)
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
    chosen = fastest(
        fuse_window_refresh.match(gm.graph.find_nodes(op="call_function", target=fuse_window_refresh.REUSE)[0])
    )  # type: ignore[arg-type]
    assert fuse(gm, fastest) == (chosen != TWO)
    assert fuse_window_refresh._measured.cache_info().hits == 1
    for found, expected in zip(gm(*inputs), plain(*inputs), strict=True):
        assert (found - expected).abs().max() < 1e-3
