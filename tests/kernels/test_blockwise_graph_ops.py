"""The entry points for compiled graphs: filling a state and then taking steps equals the op itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._subclasses import FakeTensorMode

from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.blockwise_attention import blockwise_attention, new_state
from dit_rewrite.kernels.blockwise_attention.graph_ops import blockwise_fill, blockwise_step
from dit_rewrite.kernels.blockwise_attention.state import State

INF = math.inf
COUNTERS = State._fields.index("counters")
BLOCK = 8


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed)).to(dtype)


def qkv(queries: int, keys: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(2, 2, rows, size, seed=i, dtype=dtype) for i, rows in enumerate((queries, keys, keys))]


def perturbed(tensor: Tensor, size: float, seed: int) -> Tensor:
    """Add noise of the given size."""
    return tensor + size * random(*tensor.shape, seed=seed, dtype=tensor.dtype)


MASKS = {
    "none": None,
    "padding": torch.arange(20)[None, None, None] < torch.tensor([20, 13])[:, None, None, None],
    "additive": random(20, 20, seed=8),
}


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, None), (torch.bfloat16, 0.3)], ids=["fp32", "bf16"])
def test_fill_and_step_equal_the_op(mask: str, static: bool, dtype: torch.dtype, scale: float | None) -> None:
    """A filled state equals a new state after its first call, and each step gives the output and state of the op."""
    q, k, v = qkv(20, 20, 16, dtype)
    k[:, :, :BLOCK] *= 0.02  # the scores of the first block hardly change
    seen = MASKS[mask]
    state = new_state(q, k, v, BLOCK, kv_static=static)
    options = {"threshold": 0.6, "block": BLOCK, "bound": "sound", "attn_mask": seen, "scale": scale}
    blockwise_attention(q, k, v, state, kv_static=static, **options)
    assert state.counters.tolist() == [12, 12, 1600, 1600]  # 2 x 2 heads of 1 tile and 3 blocks, 20 x 20 scores each
    state.counters.zero_()

    tensors = blockwise_fill(q, k, v, seen, BLOCK, scale, static)
    assert same(tensors, state.tensors)
    for step in range(3):
        q = perturbed(q, 0.2, 10 + step)
        k, v = (k, v) if static else (perturbed(k, 0.005, 20 + step), perturbed(v, 0.005, 30 + step))
        expected, _ = blockwise_attention(q, k, v, state, kv_static=static, **options)
        found = blockwise_step(q, k, v, tensors, seen, 0.6, BLOCK, "sound", scale, static)
        assert torch.equal(found, expected)
        assert same(tensors, state.tensors)
    recomputed, pairs = tensors[COUNTERS].tolist()[:2]
    assert pairs == 3 * 12 and 0 < recomputed < pairs


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether two states are bitwise equal, except for the rows beyond the last query, which are undefined."""
    a, b = (State._make((*tensors, BLOCK, 20, 20)) for tensors in (found, expected))
    rows = {"row_max": -1, "row_sum": -1, "partial": -2, "merged": -2, "q_ref": -2}
    for name, x, y in zip(State._fields, a.tensors, b.tensors, strict=False):
        if name in rows:
            x, y = (t.narrow(rows[name], 0, 20) for t in (x, y))
        if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x, y):
            return False
    return True


def test_thresholds() -> None:
    """With inf, a step gives the output of the fill whatever its queries are; with -inf, it equals attention."""
    q, k, v = qkv(20, 24, 16)
    for threshold, asked in ((INF, q), (-INF, -q)):
        tensors = blockwise_fill(q, k, v, None, BLOCK, None, True)
        found = blockwise_step(-q, k, v, tensors, None, threshold, BLOCK, "sound", None, True)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(asked, k, v), atol=4e-6, rtol=0)
        assert tensors[COUNTERS].tolist() == [0 if threshold == INF else 12, 12, 0 if threshold == INF else 1920, 1920]


def test_state_owns_its_memory() -> None:
    """The state shares no memory with q, k and v, whose buffers the next step overwrites."""
    for static in (True, False):
        q, k, v = qkv(20, 20, 16)
        tensors = blockwise_fill(q, k, v, None, BLOCK, None, static)
        before = [tensor.clone() for tensor in tensors]
        for tensor in (q, k, v):
            tensor.fill_(math.nan)
        assert same(tensors, before)
        storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        assert len(storages) == sum(t.numel() > 0 for t in tensors)


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_registration(static: bool) -> None:
    """The op is functional, and its fake implementation gives the right shapes, dtypes and strides."""
    for mask in (None, MASKS["padding"]):
        q, k, v = qkv(20, 20, 16)
        arguments = (q, k, v, mask, BLOCK, 0.25, static)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")  # without gradients
        found = torch.library.opcheck(torch.ops.dit_rewrite.blockwise_fill, arguments, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake(dtype: torch.dtype, static: bool) -> None:
    """Fake tensors have the metadata of the real ones for queries of any strides; 150 queries make two tiles."""
    shapes = [(2, rows, 3, 24) for rows in (150, 20, 20)]
    real = [torch.zeros(shape, dtype=dtype).transpose(1, 2) for shape in shapes]
    expected = blockwise_fill(*real, None, BLOCK, None, static)
    with FakeTensorMode():
        fake = [torch.zeros(shape, dtype=dtype).transpose(1, 2) for shape in shapes]
        found = blockwise_fill(*fake, None, BLOCK, None, static)
        out = blockwise_step(*fake, found, None, 0.1, BLOCK, "sound", None, static)
    assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in expected]
    assert tuple(found[0].shape) == (2, 3, 2, 3, 128)
    assert (out.shape, out.dtype) == (real[0].shape, dtype)
    assert out.stride() == blockwise_step(*real, expected, None, 0.1, BLOCK, "sound", None, static).stride()


def test_errors() -> None:
    """Invalid arguments raise the errors of the op, already when the state is filled."""
    q, k, v = qkv(20, 20, 16)
    with pytest.raises(BadOpArgument, match="block=21"):
        blockwise_fill(q, k, v, None, 21, None, True)
    with pytest.raises(BadOpArgument, match=r"q\.shape\[-1\]=8"):
        blockwise_fill(q[..., :8], k[..., :8], v[..., :8], None, BLOCK, None, True)
    tensors = blockwise_fill(q, k, v, None, BLOCK, None, False)
    with pytest.raises(BadOpArgument, match="bound='paper'"):
        blockwise_step(q, k, v, tensors, None, 0.1, BLOCK, "paper", None, False)
    with pytest.raises(BadOpArgument, match=r"state\.row_max\.shape=\(2, 2, 1, 3, 128\)"):
        blockwise_step(q, k, v, tensors, None, 0.1, 4, "sound", None, False)
