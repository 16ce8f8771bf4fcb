"""Relative L1 change of the naive reference and of the Triton kernel, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.relative_l1 import naive, relative_l1

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's 0/0 and log 0
Op = Callable[[Tensor, Tensor], Tensor]


def triton_small(current: Tensor, reference: Tensor) -> Tensor:
    """Run the kernel with few programs and small blocks, so that each program handles several blocks."""
    from dit_rewrite.kernels.relative_l1.triton_kernel import launch

    return launch(current, reference, block=32, max_programs=3)


def triton_default(current: Tensor, reference: Tensor) -> Tensor:
    from dit_rewrite.kernels.relative_l1.triton_kernel import launch

    return launch(current, reference)


@pytest.fixture(params=[relative_l1, triton_small, triton_default])
def op(request: pytest.FixtureRequest) -> Op:
    """The registered op (the naive reference on a CPU), and its Triton kernel."""
    return request.param


def expected(current: Tensor, reference: Tensor) -> float:
    """Compute sum |current - reference| / sum |reference| in float64."""
    current, reference = current.double(), reference.double()
    return ((current - reference).abs().sum() / reference.abs().sum()).item()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def test_by_hand(device: str, op: Op) -> None:
    """(|2 - 1| + |-4 + 5| + 0) / (1 + 5 + 2)."""
    result = op(torch.tensor([2.0, -4.0, 2.0], device=device), torch.tensor([1.0, -5.0, 2.0], device=device))
    assert result.item() == 0.25
    assert result.shape == () and result.dtype == torch.float32 and result.device.type == device


@pytest.mark.parametrize("op", [relative_l1, triton_small])
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=5), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_definition(device: str, op: Op, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    current = random(*shape, seed=seed, dtype=dtype, device=device)
    reference = random(*shape, seed=seed + 1, dtype=dtype, device=device)
    assert op(current, reference).item() == pytest.approx(expected(current, reference), rel=2e-6)


def views(tensor: Tensor) -> dict[str, Tensor]:
    """Return 6 x 10 tensors with various memory layouts."""
    return {
        "contiguous": tensor[:6, :10].clone(),
        "transposed": tensor[:10, :6].clone().T,
        "slice": tensor[1:7, 2:12],
        "every third": tensor[:6, ::3][:, :10],
        "broadcast": tensor[:6, :1].expand(6, 10),
    }


@pytest.mark.parametrize("a", views(torch.empty(12, 30)))
@pytest.mark.parametrize("b", views(torch.empty(12, 30)))
def test_strides(device: str, op: Op, a: str, b: str) -> None:
    """Elements are paired by index whatever the strides."""
    current, reference = views(random(12, 30, device=device))[a], views(random(12, 30, seed=1, device=device))[b]
    assert op(current, reference).item() == pytest.approx(expected(current, reference), rel=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_keep_their_precision(device: str, dtype: torch.dtype) -> None:
    """With a million equal terms a running float32 sum is off by 1e-3, and a bfloat16 sum stops growing at 256."""
    reference = torch.full((1 << 20,), 0.1, dtype=dtype, device=device)
    current = reference * 2
    for op in (relative_l1, triton_default):
        assert op(current, reference).item() == pytest.approx(expected(current, reference), rel=1e-6)


@pytest.mark.parametrize(
    ("current", "reference", "result"),
    [
        ([0.0, 0.0], [0.0, 0.0], math.nan),
        ([0.0, 1.0], [0.0, 0.0], math.inf),
        ([1.0, 1.0], [1.0, 1.0], 0.0),
        ([1.0, math.nan], [1.0, 1.0], math.nan),
        ([1.0, 1.0], [1.0, math.nan], math.nan),
        ([1.0, math.inf], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [1.0, -math.inf], math.nan),
        ([], [], math.nan),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_false_similarity(
    device: str, op: Op, dtype: torch.dtype, current: list[float], reference: list[float], result: float
) -> None:
    """NaN and inf propagate, 0/0 is NaN, and a change relative to zero is infinite."""
    tensors = (torch.tensor(values, dtype=dtype, device=device) for values in (current, reference))
    assert op(*tensors).item() == pytest.approx(result, nan_ok=True)


def test_scalars_and_empty_axes(device: str, op: Op) -> None:
    """0-d tensors, and tensors with a dimension of size 0."""
    assert op(torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)).item() == 0.5
    assert math.isnan(op(torch.ones(3, 0, 2, device=device), torch.ones(3, 0, 2, device=device)).item())


def test_deterministic(device: str, op: Op) -> None:
    """Two runs agree bit for bit."""
    current, reference = random(37, 129, device=device), random(37, 129, seed=1, device=device)
    assert op(current, reference).item() == op(current, reference).item()


def test_naive_sums_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the block size."""
    monkeypatch.setattr(naive, "BLOCK", 7)
    current, reference = random(5, 11), random(5, 11, seed=1)
    assert relative_l1(current, reference).item() == pytest.approx(expected(current, reference), rel=2e-6)


@pytest.mark.parametrize(
    ("current", "reference", "name"),
    [
        (torch.ones(3), torch.ones(1), "reference.shape"),
        (torch.ones(3), torch.ones(3, 1), "reference.shape"),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), "reference.dtype"),
        (torch.ones(3), torch.ones(3, device="meta"), "reference.device"),
        (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), "current.dtype"),
    ],
)
def test_mismatch(current: Tensor, reference: Tensor, name: str) -> None:
    with pytest.raises(BadOpArgument, match=f"relative_l1: {name}="):
        relative_l1(current, reference)


def test_registration() -> None:
    """`opcheck` accepts the schema, the fake implementation and the dispatch."""
    arguments = (random(3, 4), random(4, 3, seed=1).T)
    assert set(torch.library.opcheck(torch.ops.dit_rewrite.relative_l1.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """The op compiles without a graph break and equals eager mode."""

    def change(current: Tensor, reference: Tensor) -> Tensor:
        return relative_l1(current * 2, reference) + 1

    current, reference = random(8, 9), random(8, 9, seed=1)
    compiled = torch.compile(change, backend=backend, fullgraph=True)
    assert compiled(current, reference).item() == change(current, reference).item()


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_beyond_two_to_the_31() -> None:
    """The last of 2^31 + 5 elements is read."""
    reference = torch.ones((1 << 31) + 5, dtype=torch.bfloat16, device="cuda")
    current = reference.clone()
    current[-1] = 1025
    assert relative_l1(current, reference).item() == pytest.approx(1024 / ((1 << 31) + 5), rel=1e-5)
