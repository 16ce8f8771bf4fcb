"""Window attention as ops: arguments, registration, FLOPs, tuning, and the work of the naive reference."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_rewrite.errors import BadOpArgument
from dit_rewrite.kernels.window_attention import naive, paper_window, window_flops, window_refresh, window_reuse
from dit_rewrite.kernels.window_attention.geometry import make_window
from tests.kernels.largest_tensor import LargestTensor
from tests.kernels.windows import WINDOWS, qkv, visible

KERNELS = Path(__file__).parents[2] / "kernels"


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
