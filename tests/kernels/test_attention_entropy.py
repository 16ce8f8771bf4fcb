"""Attention entropy of the naive reference and of the Triton kernel, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.attention_entropy import attention_entropy, naive
from tests.kernels.largest_tensor import LargestTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEAST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's 0/0 and log 0
Op = Callable[..., Tensor]


def triton(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Run the kernel with small tiles, so that there are several per axis."""
    from dit_rewrite.kernels.attention_entropy.triton_kernel import launch

    return launch(query, key, attn_mask, scale, is_causal, enable_gqa, block=(16, 16))


def triton_default(query: Tensor, key: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    from dit_rewrite.kernels.attention_entropy.triton_kernel import launch

    return launch(query, key, attn_mask, None, False, False)


@pytest.fixture(params=[attention_entropy, triton])
def op(request: pytest.FixtureRequest) -> Op:
    """The registered op (the naive reference on a CPU), and its Triton kernel."""
    return request.param


def expected(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False,
    enable_gqa: bool = False,
) -> float:  # fmt: skip
    """Compute equation 5 of DQAR over the number of rows that are not fully masked, in float64."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.where(attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    attention = scores[(scores > -math.inf).any(-1)].softmax(-1)
    return -(attention * attention.clamp_min(1e-300).log()).sum(-1).mean().item()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def test_by_hand(device: str, op: Op) -> None:
    """Equal scores give log M, weights 3/4 and 1/4 give log 4 - 3/4 log 3, and a single key gives 0."""
    key = torch.zeros(1, 2, 16, device=device)
    query = torch.zeros(1, 3, 16, device=device)
    assert op(query, key).item() == pytest.approx(math.log(2), rel=1e-6)
    query[..., 0], key[:, 0, 0] = 2 * math.log(3), 2  # times 1/sqrt(16)
    result = op(query, key)
    assert result.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-5)
    assert result.shape == () and result.dtype == torch.float32 and result.device.type == device
    assert op(query, key[:, :1]).item() == 0


@pytest.mark.parametrize("op", [attention_entropy, triton])
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40), m=st.integers(1, 40), d=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["none", "boolean", "additive", "padding", "causal"]), spread=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_definition(
    device: str, op: Op, n: int, m: int, d: int, dtype: torch.dtype, mask: str, spread: float, seed: int
) -> None:
    query = random(2, 2, n, d, seed=seed, dtype=dtype, device=device)
    key = random(2, 2, m, d, seed=seed + 1, dtype=dtype, device=device)
    added = random(2, 1, n, m, seed=seed + 2, device=device)
    seen = torch.arange(m, device=device) < 1 + m // 2
    masks = {"boolean": added > 0.3, "additive": added.to(dtype), "padding": torch.zeros(m, device=device)}
    masks["boolean"][..., 0] = True
    masks["padding"][~seen] = LEAST
    given = {"is_causal": True} if mask == "causal" else {"attn_mask": masks.get(mask), "scale": spread}
    assert op(query, key, **given).item() == pytest.approx(expected(query, key, **given), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("head_size", [16, 72, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles(device: str, head_size: int, dtype: torch.dtype) -> None:
    """The default tiles, which depend on the head size."""
    query = random(1, 2, 150, head_size, dtype=dtype, device=device)
    key = random(1, 2, 70, head_size, seed=1, dtype=dtype, device=device)
    assert triton_default(query, key).item() == pytest.approx(expected(query, key), rel=2e-5)


def test_large_scores(device: str, op: Op) -> None:
    """Scores near 40,000, exact in float32, keep their entropy of 0.58 despite the difference of large sums.

    The kernel scales and subtracts in one multiply-add, which a GPU rounds once and the interpreter twice.
    """
    query = torch.full((1, 4, 16), 100.0, device=device)
    key = torch.full((1, 33, 16), 25.0, device=device)
    key[0, ::3, 0] -= 0.01171875  # -1.171875 for each third score
    rounding = 1e-4 if op is triton and device == "cpu" else 1e-5
    assert op(query, key, scale=1.0).item() == pytest.approx(expected(query, key, scale=1.0), rel=rounding)


@pytest.mark.parametrize("boolean", [True, False])
def test_rows_without_keys(device: str, op: Op, boolean: bool) -> None:
    """Fully masked rows are left out of the mean; if all rows are, the result is NaN."""
    query, key = random(1, 20, 16, device=device), random(1, 24, 16, seed=1, device=device)
    seen = torch.ones(20, 24, dtype=torch.bool, device=device)
    seen[3:18] = False
    mask = seen if boolean else torch.zeros(20, 24, device=device).masked_fill(~seen, -math.inf)
    left = torch.cat([query[:, :3], query[:, 18:]], 1)
    assert op(query, key, mask).item() == pytest.approx(expected(left, key), rel=1e-5)
    assert math.isnan(op(query, key, mask[3:4]).item())


def test_lowest_float_is_a_score(device: str, op: Op) -> None:
    """A row padded entirely with the lowest float32 has equal scores and entropy log M, as in attention."""
    query, key = random(1, 5, 16, device=device), random(1, 8, 16, seed=1, device=device)
    assert op(query, key, torch.full((5, 8), LEAST, device=device)).item() == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.parametrize("place", ["query", "key", "mask"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate(device: str, op: Op, place: str, value: float) -> None:
    """One NaN or inf in any input makes the mean NaN."""
    given = {"query": random(2, 20, 16, device=device), "key": random(2, 20, 16, seed=1, device=device)}
    given["mask"] = torch.zeros(20, 20, device=device)
    given[place][..., 19, 7] = value
    assert math.isnan(op(*given.values()).item())


@pytest.mark.parametrize(
    ("query", "key", "given"),
    [
        ((20, 16), (7, 16), {}),
        ((3, 20, 16), (1, 7, 16), {}),
        ((2, 1, 3, 20, 16), (4, 3, 7, 16), {}),
        ((2, 6, 20, 16), (2, 2, 7, 16), {"enable_gqa": True}),
        ((2, 6, 20, 16), (2, 2, 20, 16), {"enable_gqa": True, "is_causal": True}),
    ],
)
def test_batch_dimensions(device: str, op: Op, query: tuple[int, ...], key: tuple[int, ...], given: dict) -> None:
    """No, several, and broadcast batch dimensions, and grouped-query heads, with transposed memory layouts."""
    q, k = random(*query, device=device), random(*key, seed=1, device=device)
    q, k = (x.mT.contiguous().mT for x in (q, k))
    assert op(q, k, **given).item() == pytest.approx(expected(q, k, **given), rel=1e-5)


@pytest.mark.parametrize("shape", [(1,), (20, 1), (2, 1, 1, 9), (3, 20, 9)])
def test_masks_expand(device: str, op: Op, shape: tuple[int, ...]) -> None:
    query, key = random(2, 3, 20, 16, device=device), random(2, 3, 9, 16, seed=1, device=device)
    mask = random(*shape, seed=2, device=device)
    assert op(query, key, mask).item() == pytest.approx(expected(query, key, mask), rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
def test_empty(device: str, op: Op, n: int, m: int) -> None:
    assert math.isnan(op(torch.ones(2, n, 16, device=device), torch.ones(2, m, 16, device=device)).item())


def test_float64_and_large_heads(device: str) -> None:
    """Dtypes and head sizes that the kernel does not support run the naive reference on any device."""
    for size, dtype in ((16, torch.float64), (300, torch.float32)):
        query, key = (random(2, 20, size, seed=i, dtype=dtype, device=device) for i in range(2))
        assert attention_entropy(query, key).item() == pytest.approx(expected(query, key), rel=1e-6)


def test_no_matrix_of_all_scores() -> None:
    """The naive reference allocates the scores of one block of rows at a time."""
    query = random(1, 1000, 16)
    with LargestTensor() as largest:
        naive.attention_entropy(query, query, torch.ones(1, 1000), None, False, False)
    assert largest.numel == naive.ROWS * 1000


QUERY = torch.ones(2, 6, 4, 8)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("key.shape", {"key": torch.ones(3, 6, 4, 8)}),
        ("key.shape", {"key": torch.ones(2, 4, 4, 8), "enable_gqa": True}),
        (r"key.shape\[-1\]", {"key": torch.ones(2, 6, 4, 9)}),
        ("key.dtype", {"key": QUERY.half()}),
        ("key.device", {"key": QUERY.to("meta")}),
        ("key.ndim", {"key": torch.ones(8)}),
        ("query.dtype", {"query": QUERY.long(), "key": QUERY.long()}),
        ("attn_mask.shape", {"attn_mask": torch.ones(3, 4)}),
        ("attn_mask.dtype", {"attn_mask": torch.ones(4, 4, dtype=torch.int32)}),
        ("is_causal", {"attn_mask": torch.ones(4, 4), "is_causal": True}),
    ],
)
def test_mismatch(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(BadOpArgument, match=f"attention_entropy: {name}="):
        attention_entropy(**{"query": QUERY, "key": QUERY, **given})


def test_registration() -> None:
    """`opcheck` accepts the schema, the fake implementation and the dispatch."""
    op = torch.ops.dit_rewrite.attention_entropy.default
    query, key = random(2, 3, 5, 8), random(2, 3, 6, 8, seed=1)
    for options in ({}, {"attn_mask": torch.zeros(6), "scale": 0.5}, {"is_causal": True}):
        assert set(torch.library.opcheck(op, (query, key), options).values()) == {"SUCCESS"}


def test_compiled() -> None:
    """The op compiles without a graph break and equals eager mode."""
    query, key = random(2, 3, 5, 8), random(2, 3, 6, 8, seed=1)
    compiled = torch.compile(lambda q, k: attention_entropy(q * 2, k) + 1, backend="aot_eager", fullgraph=True)
    assert compiled(query, key).item() == (attention_entropy(query * 2, key) + 1).item()


def test_flops() -> None:
    """Scores of 2 x 3 heads, 5 x 6 with head size 8; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        attention_entropy(random(2, 3, 5, 8), random(2, 1, 6, 8), enable_gqa=True)
        attention_entropy(random(2, 3, 5, 8), random(3, 6, 8))
    assert counter.get_total_flops() == 2 * (2 * (2 * 3) * (5 * 6) * 8)
