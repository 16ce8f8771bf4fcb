"""Window attention of the naive reference and of the Triton kernel, against the definition in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_rewrite.kernels.window_attention import window_reuse
from tests.kernels.windows import DTYPES, OPS, TOLERANCE, WINDOWS, Ops, close, expected, qkv, random, triton, visible

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 60)
LEAST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's 0/0


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """The registered ops (the naive reference on a CPU), and the Triton kernels with small tiles."""
    return OPS[request.param]


@pytest.mark.parametrize(
    ("dtype", "tokens", "where"),
    [(dtype, *case) for dtype in DTYPES for case in (WINDOWS if dtype == torch.float32 else WINDOWS[1::4])],
)
def test_definition(device: str, ops: Ops, tokens: int, where: dict[str, Any], dtype: torch.dtype) -> None:
    """The ops give O, R = O - W, and W + R (DiTFastAttn, equations 1 and 2)."""
    refresh, reuse = ops
    q, k, v = qkv(tokens, dtype=dtype, device=device)
    full, near = expected(q, k, v, **where)
    out, residual = refresh(q, k, v, **where)
    assert out.dtype == residual.dtype == dtype
    assert close(out, full, TOLERANCE[dtype]) and close(residual, full - near, TOLERANCE[dtype])
    other = random(1, 2, tokens, 16, seed=1, dtype=dtype, device=device)
    for subtract in (False, True):
        result = reuse(q, k, v, other, **where, subtract=subtract)
        wanted = other.double() + (-near if subtract else near)
        assert result.dtype == dtype and close(result, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["op", "16x32"])
@settings(max_examples=12, deadline=None)
@given(
    sizes=SIZES, prefix=st.integers(0, 20), suffix=st.integers(0, 20),
    data=st.data(),
    size=st.sampled_from([1, 16, 40]), mask=st.sampled_from(["none", "boolean", "additive", "padding", "column"]),
    scale=st.sampled_from([None, 0.5, -1.0, 0.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_window(
    device: str, name: str, sizes: list[int], prefix: int, suffix: int, data: st.DataObject, size: int, mask: str,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    """Random grids, prefixes, head sizes, masks and scales, including rows whose window is fully masked."""
    sizes = [sizes[0] * 8] if len(sizes) == 1 else sizes
    window = tuple(data.draw(st.integers(0, n - 1)) for n in sizes)
    where = {"window": window, "grid": None if len(sizes) == 1 else tuple(sizes), "prefix": prefix, "suffix": suffix}
    tokens = prefix + suffix + math.prod(sizes)
    q, k, v = qkv(tokens, size, batch=2, seed=seed, device=device)
    added = random(2, 1, tokens, tokens, seed=seed + 1, device=device)
    masks = {"boolean": added > 0.8, "additive": added, "padding": torch.zeros(tokens, device=device)}
    masks["padding"][tokens // 2 :] = -math.inf
    masks["column"] = random(tokens, 1, seed=seed, device=device)
    given = {"attn_mask": masks.get(mask), "scale": scale}
    full, near = expected(q, k, v, **given, **where)
    out, residual = OPS[name][0](q, k, v, **given, **where)
    assert close(out, full, 5e-6) and close(residual, full - near, 5e-6)
    assert close(OPS[name][1](q, k, v, residual, **given, **where), full, 5e-6)


def distance(result: Tensor, reference: Tensor) -> float:
    return (result.double() - reference).square().mean().sqrt().item()


@pytest.mark.parametrize("size", [16, 72, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_precise_as_attention(device: str, ops: Ops, size: int, dtype: torch.dtype) -> None:
    """The RMS error of O and W is at most twice that of PyTorch's attention with the same mask and dtype.

    The factor of two allows for another order of summation, and in low precision for the rounding of the weights
    before they multiply the values, which PyTorch's own GPU kernels do as well.
    """
    where = {"window": (9,), "prefix": 3}
    q, k, v = qkv(51, size, dtype=dtype, device=device)
    full, near = expected(q, k, v, **where)
    out, _ = ops[0](q, k, v, **where)
    result = ops[1](q, k, v, torch.zeros_like(q), **where)
    seen = visible(51, **where).to(device)
    assert distance(out, full) <= 2 * distance(F.scaled_dot_product_attention(q, k, v), full)
    assert distance(result, near) <= 2 * distance(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), near)


def test_default_tiles(device: str) -> None:
    """The default tile; on a GPU, every tile that autotuning tries."""
    q, k, v = qkv(70, 24, device=device)
    full, near = expected(q, k, v, window=(7,), prefix=3)
    refresh, reuse = triton()
    out, residual = refresh(q, k, v, (7,), prefix=3)
    assert close(out, full, 5e-6) and close(residual, full - near, 5e-6)
    assert close(reuse(q, k, v, residual, (7,), prefix=3), full, 5e-6)


def test_by_hand(device: str, ops: Ops) -> None:
    """A window of only the token itself returns its value; a window of all tokens leaves a residual of 0."""
    refresh, reuse = ops
    q, k, v = qkv(19, device=device)
    residual = random(1, 2, 19, 16, seed=1, device=device)
    assert torch.equal(reuse(q, k, v, residual, (0,)), v + residual)
    assert torch.equal(reuse(q, k, v, residual, (0, 0), (1, 19)), v + residual)
    assert not refresh(q, k, v, (18,))[1].any()
    assert not refresh(q, k, v, (0,), prefix=18)[1].any()  # one token after the prefix: all attend to all
    zero, ones = torch.zeros_like(q), torch.zeros_like(q)
    ones[:, :, 4] = 19  # equal scores: the mean of the 3 values within the window, or of all 19
    out, residual = refresh(zero, k, ones, (1,))
    torch.testing.assert_close(out, torch.ones_like(q))
    middle = torch.full_like(q[:, :, 3:6], 1 - 19 / 3)
    torch.testing.assert_close(residual[:, :, 3:6], middle)
    torch.testing.assert_close(residual[:, :, 6:], torch.ones_like(q[:, :, 6:]))


def test_masked_windows(device: str, ops: Ops) -> None:
    """A fully masked window gives W = 0 and R = O; a fully masked row gives O = 0."""
    q, k, v = qkv(40, device=device)
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)
    mask[10, 5:16] = False
    mask[20] = False
    for form in (mask, torch.zeros(40, 40, device=device).masked_fill(~mask, -math.inf)):
        out, residual = ops[0](q, k, v, (5,), attn_mask=form)
        assert torch.equal(residual[:, :, 10], out[:, :, 10]) and out[:, :, 10].any()
        assert not out[:, :, 20].any() and not residual[:, :, 20].any()
        window = ops[1](q, k, v, torch.zeros_like(q), (5,), attn_mask=form)
        assert not window[:, :, [10, 20]].any() and torch.isfinite(window).all()


def test_weak_windows(device: str, ops: Ops) -> None:
    """W stays accurate if all scores in the window are far below those outside it."""
    q, k, v = qkv(40, device=device)
    mask = torch.zeros(40, 40, device=device)
    mask[:, :30] = -1000
    full, near = expected(q, k, v, mask, window=(4,))
    out, residual = ops[0](q, k, v, (4,), attn_mask=mask)
    assert close(out, full, 5e-6) and close(residual, full - near, 1e-4)  # scores near 1000 are 6e-5 apart


def test_lowest_float_is_a_score(device: str, ops: Ops) -> None:
    """A row padded entirely with the lowest float32 has equal scores, as in attention."""
    q, k, v = qkv(21, device=device)
    out, _ = ops[0](q, k, v, (3,), attn_mask=torch.full((21,), LEAST, device=device))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def test_layout(device: str, ops: Ops) -> None:
    """Results have the memory layout of the query; inputs may have any strides."""
    q, k, v = qkv(20, device=device)
    for query in (q.contiguous(), q.transpose(1, 2).contiguous().transpose(1, 2), q):
        out, residual = ops[0](query, k.contiguous(), v.mT.contiguous().mT, (2,))
        strides = torch.empty_like(query).stride()
        assert out.stride() == residual.stride() == strides
        again = ops[1](query, k, v, residual.contiguous().mT.contiguous().mT, (2,))
        assert again.stride() == strides and close(again, out.double(), 5e-6)


def tiles_of(tokens: int, window: Any, grid: Any = None, prefix: int = 0, suffix: int = 0) -> list[tuple[Any, ...]]:
    """Return the tile of 16 tokens that each token belongs to: a patch of the grid, or a run of text."""
    from dit_rewrite.kernels.window_attention.patches import patch

    behind = tokens - suffix
    sizes = tuple(grid or (behind - prefix,))
    sides = patch(16, (1,) * (3 - len(sizes)) + sizes)[3 - len(sizes) :]
    assert math.prod(sides) == 16
    places = [
        tuple(x // side for x, side in zip(at, sides, strict=True)) for at in itertools.product(*map(range, sizes))
    ]
    text = [("before", i // 16) for i in range(prefix)], [("behind", i // 16) for i in range(suffix)]
    return [*text[0], *places, *text[1]]


@pytest.mark.parametrize(
    ("where", "patches"),
    [
        ({"window": (20,)}, 5),
        ({"window": (20,), "prefix": 8}, 6),
        ({"window": (20,), "prefix": 20, "suffix": 16}, 8),
        ({"window": (1, 3), "grid": (10, 16)}, 9),
        ({"window": (1, 3), "grid": (20, 8)}, 6),
        ({"window": (0, 2, 1), "grid": (2, 10, 8)}, 4),
        ({"window": (1, 0, 15), "grid": (2, 5, 16)}, 8),
    ],
)
def test_reuse_skips_far_tiles(device: str, where: dict[str, Any], patches: int) -> None:
    """A tile of queries reads only the tiles of keys that it reaches into; the test sets the others to NaN."""
    q, k, v = qkv(160, heads=1, device=device)
    near, tiles = expected(q, k, v, **where)[1], tiles_of(160, **where)
    rows = [i for i, tile in enumerate(tiles) if tile == tiles[70]]
    reached = {tiles[i] for i in visible(160, **where)[rows].any(0).nonzero().flatten().tolist()}
    away = torch.tensor([tile not in reached for tile in tiles], device=device)
    assert len(reached) == patches < len(set(tiles))
    k, v = k.clone(), v.clone()
    k[:, :, away], v[:, :, away] = math.nan, math.nan
    result = triton((16, 16))[1](q, k, v, torch.zeros_like(q), **where)
    assert close(result[:, :, rows], near[:, :, rows], 5e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("tokens", "where"), [(300, {"window": (20,)}), (264, {"window": (2, 3), "grid": (16, 16), "prefix": 8})]
)
def test_flex_attention_agrees(tokens: int, where: dict[str, Any]) -> None:
    from dit_rewrite.kernels.window_attention.flex import flex_window

    q, k, v = qkv(tokens, 64, dtype=torch.float16, device="cuda")
    near = expected(q, k, v, **where)[1]
    assert close(flex_window(tokens, **where)(q, k, v), near, TOLERANCE[torch.float16])
    assert close(window_reuse(q, k, v, torch.zeros_like(q), **where), near, TOLERANCE[torch.float16])
