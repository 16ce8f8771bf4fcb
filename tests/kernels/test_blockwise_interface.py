"""Interface of blockwise attention: state size, reset, registration, compilation, errors, and the cost model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dit_rewrite.kernels.blockwise_attention as package
from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.blockwise_attention import blockwise_attention, new_state, state_bytes

INF = math.inf


def qkv(n: int, m: int, d: int) -> list[Tensor]:
    return [torch.randn(2, 2, rows, d, generator=Generator().manual_seed(i)) for i, rows in enumerate((n, m, m))]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("shape", "m", "block", "tile"), [((2, 3, 70, 24), 50, 16, 32), ((1, 1, 5, 16), 3, 3, 128)])
def test_bytes(shape: tuple[int, ...], m: int, block: int, tile: int, static: bool) -> None:
    b, h, n, d = shape
    q, k = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(b, h, m, d, dtype=torch.bfloat16)
    state = new_state(q, k, k, block, tile, kv_static=static)
    tiles, blocks = math.ceil(n / tile), math.ceil(m / block)
    pair = tile * (8 + 2 * d) + 4 * (2 * d + 1) + 1 + (0 if static else 4 * (2 * d + 2))
    rest = tiles * 2 * tile * d * 2 + blocks * 2 * 4 * (2 * d + 1) + (0 if static else 2 * m * d * 2)
    expected = b * h * (tiles * blocks * pair + rest) + 4 * 8 + 4
    assert sum(x.untyped_storage().nbytes() for x in state.tensors) == expected
    assert state_bytes(shape, k.shape, q.dtype, block, tile, kv_static=static) == expected


def test_reset() -> None:
    """After a reset the op gives the results of a new state."""
    q, k, v = qkv(20, 20, 16)
    for static in (True, False):
        state = new_state(q, k, v, 10, 16, kv_static=static)
        blockwise_attention(q, k, v, state, threshold=INF, block=10, bound="sound", kv_static=static)
        package.reset(state, -k, 2 * v)
        out, _ = blockwise_attention(q, -k, 2 * v, state, threshold=INF, block=10, bound="sound", kv_static=static)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, -k, 2 * v), atol=4e-6, rtol=0)
        new = new_state(q, -k, 2 * v, 10, 16, kv_static=static)
        assert torch.equal(state.k_stats, new.k_stats) and torch.equal(state.v_stats, new.v_stats)
        assert state.counters.tolist() == [16, 16, 4 * 400, 4 * 400]


@pytest.mark.parametrize("certify", [False, True])
def test_registration(certify: bool) -> None:
    q, k, v = qkv(20, 20, 16)
    mask = torch.ones(20, dtype=torch.bool)
    for given_mask, static in ((mask, True), (None, False)):
        state = new_state(q, k, v, 10, 16, kv_static=static)
        blockwise_attention(q, k, v, state, threshold=0.0, block=10, bound="sound", kv_static=static)
        args = (q, k, v, state.tensors, given_mask, 0.1, 10, "sound", 0.25, static, certify)
        assert set(torch.library.opcheck(torch.ops.dit_rewrite.blockwise_attention, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """The compiled op updates the state in place and equals eager mode, also with infinite thresholds."""
    q, k, v = qkv(20, 20, 16)
    eager, compiled = (new_state(q, k, v, 10, 16) for _ in range(2))

    @torch.compile(backend=backend, fullgraph=True)
    def step(q: Tensor, state: package.State) -> tuple[Tensor, Tensor]:
        options = {"threshold": INF, "block": 10, "bound": "sound", "certify": True}
        out, error = blockwise_attention(q * 1.0, k, v, state, **options)
        return out + 0.0, error

    for change in (0.0, 0.5):
        expected = blockwise_attention(q + change, k, v, eager, threshold=INF, block=10, bound="sound", certify=True)
        for a, b in zip(step(q + change, compiled), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert compiled.counters.tolist() == eager.counters.tolist() == [16, 32, 1600, 3200]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("block", {"block": 0}),
        ("block", {"block": 21}),
        ("block", {"block": 5}),
        ("threshold", {"threshold": math.nan}),
        ("bound", {"bound": "best"}),
        ("bound", {"bound": "paper", "kv_static": False}),
        ("scale", {"scale": INF}),
        ("state.", {"kv_static": False}),
        ("keep", {"keep": 9}),
        ("keep", {"keep": 20}),
        ("q.shape[2]", {"q": torch.zeros(2, 2, 21, 16)}),
        ("k.shape[2]", {x: torch.zeros(2, 2, 19, 16) for x in "kv"}),
        ("state.", {"q": torch.zeros(1, 2, 20, 16), "k": torch.zeros(1, 2, 20, 16), "v": torch.zeros(1, 2, 20, 16)}),
        ("q.dtype", {"q": torch.zeros(2, 2, 20, 16, dtype=torch.float64)}),
        ("q.dtype", {x: torch.zeros(2, 2, 20, 16, dtype=torch.float16) for x in "qkv"}),
        ("q.shape", {"q": torch.zeros(2, 20, 16)}),
        ("q.shape", {"q": torch.zeros(2, 2, 0, 16)}),
        ("q.shape[-1]", {x: torch.zeros(2, 2, 20, 8) for x in "qkv"}),
        ("q.shape[-1]", {x: torch.zeros(2, 2, 20, 257) for x in "qkv"}),
        ("k.shape", {"k": torch.zeros(2, 1, 20, 16)}),
        ("v.shape", {"v": torch.zeros(2, 2, 19, 16)}),
        ("k.device", {"k": torch.zeros(2, 2, 20, 16, device="meta")}),
        ("attn_mask.shape", {"attn_mask": torch.zeros(3, 20)}),
        ("attn_mask.dtype", {"attn_mask": torch.zeros(20, 20, dtype=torch.int64)}),
    ],
)
def test_errors(name: str, changes: dict) -> None:
    q, k, v = qkv(20, 20, 16)
    state = new_state(q, k, v, 10, 16)
    static = changes.get("bound") != "paper"
    arguments = {"q": q, "k": k, "v": v, "threshold": 0.1, "block": 10, "bound": "sound", **changes}
    state = state if static else new_state(q, k, v, 10, 16, kv_static=False)
    with pytest.raises(BadOpArgument, match=rf"blockwise_attention: {name}".replace("[", r"\[")):
        blockwise_attention(state=state, **arguments)


@pytest.mark.parametrize("tile", [8, 24, 0])
def test_invalid_tiles(tile: int) -> None:
    q, k, v = qkv(20, 20, 16)
    with pytest.raises(BadOpArgument, match="tile"):
        new_state(q, k, v, 10, tile)


def test_arithmetic() -> None:
    """By hand: 64 channels of 2 bytes and 8 for m and l make 136 bytes; 4 * 64 FLOPs a key; 206.25 FLOPs a byte."""
    peak = 990e12 / 4.8e12
    assert package.break_even_block(64, 2, peak) == pytest.approx(136 * 206.25 / 256)
    assert package.break_even_keys(2, peak) == pytest.approx(412.5)
    # 300 keys, half kept: 3 blocks of 136 bytes and 6 vectors of 128 bytes are moved; attention is compute-bound
    compute = 4 * 64 * 300 / peak
    assert package.speedup(300, 100, 64, 2, peak, 0.5) == pytest.approx(compute / (3 * 136 + 6 * 128))
    assert package.speedup(300, 100, 64, 2, peak, 0.5, 1.0) == pytest.approx(compute / (4 * 128))
    assert package.speedup(1 << 20, 1 << 15, 64, 2, peak, 0.75) == pytest.approx(4)  # compute-bound
    for keys, block, *table in (
        (120, 120, 0.28, 0.36, 0.5),
        (1024, 256, 0.97, 1.39, 2.48),
        (4096, 512, 2.74, 4.29, 9.93),
    ):
        rows = [package.speedup(keys, block, 64, 2, peak, *kept) for kept in ((0.9,), (0.9, 0.5), (0.9, 1.0))]
        assert rows == pytest.approx(table, abs=6e-3)


def test_flops() -> None:
    """The count equals PyTorch's for attention if nothing is kept, and shrinks with the kept fraction otherwise."""
    from torch.utils.flop_counter import sdpa_flop_count

    shape, other = (2, 3, 70, 24), (2, 3, 50, 24)
    assert package.flops(2, 3, 70, 50, 24) == sdpa_flop_count(shape, other, other)
    assert package.flops(2, 3, 70, 50, 24, 1.0) == 0
    assert package.flops(1, 1, 10, 10, 16, 0.37) == 4 * 16 * 63
    with pytest.raises(BadOpArgument, match="kept"):
        package.flops(1, 1, 1, 1, 16, 1.5)
