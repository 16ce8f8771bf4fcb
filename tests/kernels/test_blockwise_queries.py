"""Equation 14 of CachedAttention, against the queries from which each block was computed, in a float64 reading of the
paper that loops over tiles, blocks and channels."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

import dit_rewrite.kernels.blockwise_attention as package
from dit_rewrite.kernels.blockwise_attention import new_state, state_bytes
from dit_rewrite.kernels.blockwise_attention.op import run

TILE, BLOCK, SIZE, SCALE, THRESHOLD = 16, 4, 16, 0.25, 1.0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN in memory that is read but not used


@pytest.fixture(scope="module", params=["naive", "triton_kernel"])
def ops(request: pytest.FixtureRequest, device: str) -> ModuleType:
    """The module with `estimate` and `attend`: the naive reference or the Triton kernels."""
    return __import__(f"{package.__name__}.{request.param}", fromlist=["attend"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


class Paper:
    """Algorithms 1 and 2 for one head: caches the queries, the scores and the outputs of each tile and block."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k.double().split(BLOCK), v.double().split(BLOCK)
        self.cached: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def difference(self, q: Tensor, tile: int, block: int) -> float:
        """Equation 14, summed over the channels as in algorithm 1."""
        change, keys = q - self.cached[tile, block][0], self.keys[block]
        terms = (max(change[:, c].max() * keys[:, c].max(), change[:, c].min() * keys[:, c].min()) for c in range(SIZE))
        return float(sum(terms))

    def __call__(self, q: Tensor) -> tuple[Tensor, list[list[bool]]]:
        """Return the output, and for each tile and block whether it was recomputed."""
        rows, recomputed = [], []
        for t, queries in enumerate(q.double().split(TILE)):
            again = []
            m, total = torch.full((len(queries), 1), -torch.inf), torch.zeros(len(queries), 1)
            out = torch.zeros(len(queries), SIZE).double()
            for j, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
                again.append((t, j) not in self.cached or self.difference(queries, t, j) > THRESHOLD)
                if again[-1]:
                    scores = queries @ keys.T * SCALE
                    weights = (scores - scores.amax(1, keepdim=True)).exp()
                    self.cached[t, j] = queries, scores, weights @ values
                _, scores, summed = self.cached[t, j]
                m_j = scores.amax(1, keepdim=True)
                l_j = (scores - m_j).exp().sum(1, keepdim=True)
                higher = torch.maximum(m, m_j)
                new = (m - higher).exp() * total + (m_j - higher).exp() * l_j
                out = (total * (m - higher).exp() * out + (m_j - higher).exp() * summed) / new
                m, total = higher, new
            rows.append(out)
            recomputed.append(again)
        return torch.cat(rows), recomputed


def walk(device: str, ops: ModuleType, own: bool) -> tuple[list[list[list[bool]]], list[list[list[bool]]], float]:
    """Take 8 steps with a state and with the paper's algorithm: what each recomputed, and the largest difference of the
    outputs while they agree. Some blocks have small keys, so that most steps recompute only a part of them."""
    q, k, v = drawn(0, 40, SIZE), drawn(1, 14, SIZE), drawn(2, 14, SIZE)
    k = k * torch.tensor([0.1, 0.5, 1.0, 0.3]).repeat_interleave(BLOCK)[:14, None]
    paper, state = Paper(k, v), None
    k, v = (x[None, None].to(device) for x in (k, v))
    ours, theirs, error = [], [], 0.0
    for step in range(8):
        given = q[None, None].to(device)
        if state is None:
            state = new_state(given, k, v, BLOCK, TILE, own_queries=own)
        decision = ops.estimate(given, k, state, None, THRESHOLD, SCALE, True)
        out, bound = run(ops, given, k, v, state.tensors, None, THRESHOLD, BLOCK, "paper", SCALE, True, True)
        expected, recomputed = paper(q)
        ours.append((decision.recompute != 0)[0, 0].tolist())
        theirs.append(recomputed)
        if ours == theirs:
            error = max(error, float((out[0, 0].cpu() - expected).abs().max()))
        assert bound.isfinite().all()
        q = q + 0.08 * drawn(10 + step, 40, SIZE) * torch.tensor([1.0, 0.5, 2.0]).repeat_interleave(TILE)[:40, None]
    return ours, theirs, error


def test_each_block_has_its_own_queries(device: str, ops: ModuleType) -> None:
    ours, theirs, error = walk(device, ops, own=True)
    assert ours == theirs and error < 2e-6
    partly = [any(tile) and not all(tile) for step in theirs[1:] for tile in step]
    assert sum(partly) > 8  # of 21 tiles, those of which some blocks were kept


def test_a_sum_of_moves_is_more(device: str, ops: ModuleType) -> None:
    """Without them the change is bounded by a sum, so that blocks are recomputed that the equation keeps."""
    ours, theirs, error = walk(device, ops, own=False)
    assert ours != theirs and error < 2e-6


def test_bytes() -> None:
    """A state with the queries of each block holds what `state_bytes` says, and no summaries of their moves."""
    q, k = drawn(0, 1, 2, 40, SIZE), drawn(1, 1, 2, 14, SIZE)
    state = new_state(q, k, k, BLOCK, TILE, own_queries=True)
    assert state.own_queries and state.q_ref.shape == (1, 2, 3, 4, TILE, SIZE) and state.q_moved.numel() == 0
    found = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors)
    assert found == state_bytes(q.shape, k.shape, q.dtype, BLOCK, TILE, own_queries=True)
