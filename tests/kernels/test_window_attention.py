"""Window attention of the naive reference and of the Triton kernel, against the definition in float64."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.window_attention import naive, paper_window, window_flops, window_refresh, window_reuse
from dit_rewrite.kernels.window_attention.geometry import make_window
from tests.kernels.largest_tensor import LargestTensor

KERNELS = Path(__file__).parents[2] / "kernels"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LEAST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's 0/0
Ops = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]
WINDOWS: list[tuple[int, dict[str, Any]]] = [
    (50, {"window": (6,)}),
    (75, {"window": (0,)}),
    (61, {"window": (9,), "prefix": 5}),
    (63, {"window": (1, 2), "grid": (7, 9)}),
    (70, {"window": (1, 0), "grid": (7, 9), "prefix": 7}),
    (66, {"window": (0, 1, 1), "grid": (3, 4, 5), "prefix": 6}),
    (60, {"window": (2, 1, 4), "grid": (3, 4, 5)}),
    (60, {"window": (0, 3, 1), "grid": (1, 12, 5)}),
    (60, {"window": (2, 0, 0), "grid": (60, 1, 1)}),
    (61, {"window": (9,), "suffix": 5}),
    (96, {"window": (2, 3), "grid": (7, 9), "suffix": 33}),
    (70, {"window": (1, 0), "grid": (7, 7), "prefix": 17, "suffix": 4}),
    (150, {"window": (1, 2, 3), "grid": (5, 5, 5), "prefix": 16, "suffix": 9}),
]


def triton(block: tuple[int, int] | None = None) -> Ops:
    """Return the kernels as functions with the arguments of the ops; `block` is (queries, keys) of a tile."""
    from dit_rewrite.kernels.window_attention.launch import Tile, launch_refresh, launch_reuse

    tile = None if block is None else Tile(*block)

    def arguments(
        query: Tensor, window: Any, grid: Any = None, prefix: int = 0, attn_mask: Any = None, scale: Any = None,
        suffix: int = 0,
    ):  # fmt: skip
        return make_window("test", query.shape[2], window, grid, prefix, suffix), attn_mask, scale

    def refresh(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return launch_refresh(query, key, value, *arguments(query, *args, **kwargs), tile=tile)

    def reuse(
        query: Tensor, key: Tensor, value: Tensor, residual: Tensor, *args: Any, subtract: bool = False, **kwargs: Any
    ) -> Tensor:
        return launch_reuse(query, key, value, residual, *arguments(query, *args, **kwargs), subtract, tile=tile)

    return refresh, reuse


OPS = {"op": (window_refresh, window_reuse), "16x32": triton((16, 32))}


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """The registered ops (the naive reference on a CPU), and the Triton kernels with small tiles."""
    return OPS[request.param]


@functools.cache
def visible(
    tokens: int, window: tuple[int, ...], grid: tuple[int, ...] | None = None, prefix: int = 0, suffix: int = 0
) -> Tensor:
    """Return which keys are in the window of each query, from a loop over all pairs."""
    places = list(itertools.product(*map(range, grid or (tokens - prefix - suffix,))))
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        seen[prefix + i, prefix + j] = all(abs(x - y) <= w for x, y, w in zip(a, b, window, strict=True))
    return seen


def expected(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **where: Any
) -> tuple[Tensor, Tensor]:
    """Compute O and W in float64; fully masked rows are 0."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.where(attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    near = scores.where(visible(query.shape[2], **where).to(query.device), -math.inf)
    out, window = ((s.softmax(-1).where((s > -math.inf).any(-1, keepdim=True), 0) @ value) for s in (scores, near))
    return out, window


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def qkv(tokens: int, size: int = 16, batch: int = 1, heads: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (batch, heads, tokens, size) as views of one fused projection."""
    query, key, value = random(batch, tokens, 3, heads, size, **options).unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def close(result: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool(((result.double() - reference).abs() <= tolerance * (1 + reference.abs())).all())


@pytest.mark.parametrize(
    ("dtype", "tokens", "where"),
    [(dtype, *case) for dtype in DTYPES for case in (WINDOWS if dtype == torch.float32 else WINDOWS[::3])],
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
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), prefix=st.integers(0, 20), suffix=st.integers(0, 20),
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
    q, k, v = qkv(75, size, dtype=dtype, device=device)
    full, near = expected(q, k, v, **where)
    out, _ = ops[0](q, k, v, **where)
    result = ops[1](q, k, v, torch.zeros_like(q), **where)
    seen = visible(75, **where).to(device)
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


def test_tuning_depends_on_every_argument() -> None:
    """Only the values of the scale and the signs are not part of the key."""
    pytest.importorskip("triton")
    from dit_rewrite.kernels.window_attention.launch import KEY
    from dit_rewrite.kernels.window_attention.triton_kernel import window_kernel

    tensors = {"query", "key", "value", "mask", "residual", "out"}
    parameters = inspect.signature(window_kernel.fn).parameters.values()
    constants = {p.name for p in parameters if p.annotation == "tl.constexpr"}
    numbers = {p.name for p in parameters} - tensors - constants
    assert numbers - set(KEY) == {"scale", "turn", "sign"} and set(KEY) - numbers <= constants


def test_nothing_is_tuned_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that is new inside a capture takes the first tile; one that was called before is tuned already."""
    pytest.importorskip("triton")
    from dit_rewrite.kernels.window_attention import launch

    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert launch._fixed_tile("before", False) is None
    capturing[0] = True
    assert launch._fixed_tile("before", False) is None
    assert launch._fixed_tile("inside", False) == launch.TILES[0]
    assert launch._fixed_tile("inside", True) == launch.WIDE_TILES[0]
    capturing[0] = False
    assert launch._fixed_tile("inside", False) is None


def test_naive_reuse_skips_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive reference multiplies only keys in the window of a block, and never allocates all scores."""
    monkeypatch.setattr(naive, "ROWS", 16)
    q, k, v = qkv(1000, 1, heads=1)
    shape = make_window("test", 1000, (20,), None, 0)
    with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
        naive.window_reuse(q, k, v, q, shape, None, None)
    multiplied = sum(min(1000, start + 16 + 20) - max(0, start - 20) for start in range(0, 992, 16)) * 16
    multiplied += 8 * (8 + 20)
    assert counter.get_total_flops() == 2 * 2 * multiplied
    with LargestTensor() as refresh:
        naive.window_refresh(q, k, v, shape, torch.zeros(1000), None)
    assert largest.numel <= refresh.numel == 16 * 1000


@pytest.mark.parametrize(("tokens", "where"), WINDOWS)
def test_flops(tokens: int, where: dict[str, Any]) -> None:
    """Reuse counts 4 d per visible pair; refresh counts full attention plus 2 d per visible pair."""
    q, k, v = qkv(tokens, 8, batch=2, heads=3)
    pairs = int(visible(tokens, **where).sum())
    assert window_flops(q.shape, k.shape, **where) == 4 * 8 * (2 * 3) * pairs
    with FlopCounterMode(display=False) as counter:
        window_reuse(q, k, v, q, **where)
    assert counter.get_total_flops() == 4 * 8 * (2 * 3) * pairs
    with FlopCounterMode(display=False) as counter:
        window_refresh(q, k, v, **where)
    assert counter.get_total_flops() == 8 * (2 * 3) * (4 * tokens**2 + 2 * pairs)


def test_paper_window() -> None:
    """An eighth of the tokens on each side: 2/8 of the matrix minus two corners of 1/128 each, 23.4 %."""
    shape = (1, 1, 4096, 64)
    assert paper_window(4096) == (512,)
    assert window_flops(shape, shape, paper_window(4096)) / (4 * 64 * 4096**2) == pytest.approx(30 / 128, abs=1 / 4096)


QUERY = torch.ones(1, 2, 12, 8)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("window", {"window": (12,)}),
        ("window", {"window": (-1,)}),
        ("window", {"window": (1, 4), "grid": (3, 4)}),
        ("window", {"window": (1,), "grid": (3, 4)}),
        ("window", {"window": (1, 1)}),
        ("window", {"window": (6,), "prefix": 6}),
        ("grid", {"window": (1, 1), "grid": (3, 5)}),
        ("grid", {"window": (1, 1), "grid": (3, 4), "prefix": 2}),
        ("grid", {"window": (1, 1), "grid": (-3, -4)}),
        ("grid", {"window": (1, 1, 0, 0), "grid": (3, 4, 1, 1)}),
        ("prefix", {"window": (0,), "prefix": 12}),
        ("prefix", {"window": (0,), "prefix": -1}),
        ("suffix", {"window": (0,), "suffix": -1}),
        ("suffix", {"window": (0,), "prefix": 6, "suffix": 6}),
        ("query.ndim", {"query": QUERY[0]}),
        ("query.dtype", {"query": QUERY.int()}),
        ("key.shape", {"key": QUERY[:, :, :6]}),
        ("value.shape", {"value": QUERY[..., :4]}),
        ("value.dtype", {"value": QUERY.half()}),
        ("key.device", {"key": QUERY.to("meta")}),
        ("attn_mask.shape", {"attn_mask": torch.ones(12, 11)}),
        ("attn_mask.dtype", {"attn_mask": torch.ones(12, 12, dtype=torch.int64)}),
    ],
)
def test_mismatch(name: str, given: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "key": QUERY, "value": QUERY, "window": (1,), **given}
    with pytest.raises(BadOpArgument, match=f"window_refresh: {name}="):
        window_refresh(**arguments)
    with pytest.raises(BadOpArgument, match=f"window_reuse: {name}="):
        window_reuse(residual=QUERY, **arguments)


@pytest.mark.parametrize("residual", [QUERY[:, :1], QUERY.double(), QUERY.to("meta")])
def test_residual_mismatch(residual: Tensor) -> None:
    with pytest.raises(BadOpArgument, match="window_reuse: residual"):
        window_reuse(QUERY, QUERY, QUERY, residual, (1,))


def test_registration() -> None:
    """`opcheck` accepts the schema, the fake implementation (strides included) and the dispatch."""
    q, k, v = qkv(12)
    for where in ({"window": (2,)}, {"window": (1, 2), "grid": (2, 5), "prefix": 2, "attn_mask": torch.zeros(12)}):
        refresh, reuse = torch.ops.dit_rewrite.window_refresh.default, torch.ops.dit_rewrite.window_reuse.default
        assert set(torch.library.opcheck(refresh, (q, k, v), where).values()) == {"SUCCESS"}
        assert set(torch.library.opcheck(reuse, (q, k, v, v), where).values()) == {"SUCCESS"}


def test_compiled() -> None:
    """The ops compile without a graph break and equal eager mode."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, residual = window_refresh(query * 2, key, value, (1, 2), grid=(3, 4))
        return out + window_reuse(query, key, value, residual, (1, 2), grid=(3, 4))

    q, k, v = qkv(12)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v), step(q, k, v))


@pytest.mark.parametrize("name", ["relative_l1", "attention_entropy", "window_attention"])
def test_import_under_another_name_fails(name: str) -> None:
    """Importing an op file under another module name fails, because it would register the ops twice."""
    with pytest.raises(ImportError, match="dit_rewrite.kernels"):
        runpy.run_path(str(KERNELS / name / "op.py"), run_name=f"kernels.{name}.op")


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
