"""The sound estimate and the certified error are never exceeded, equation 14 is; and how loose the bounds are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_rewrite.kernels.blockwise_attention import State, blockwise_attention, bounds, kept_fraction, new_state
from dit_rewrite.kernels.blockwise_attention.certificate import certified_error
from dit_rewrite.kernels.blockwise_attention.naive import estimate

INF = math.inf


def wrong(out: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: int, mask: Tensor | None = None) -> Tensor:
    """Return the greatest error of each tile, in float64."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    error = (out.double() - exact).abs().amax(-1)
    return F.pad(error, (0, -q.shape[2] % tile)).unflatten(2, (-1, tile)).amax(-1)


def report(name: str, error: Tensor, certificate: Tensor) -> Tensor:
    """Assert that the certificate holds; print and return its ratio to the actual error."""
    assert certificate.isfinite().all()
    assert (error <= certificate).all(), (error / certificate).max()
    loose = (certificate / error.clamp(min=1e-12)).flatten()
    low, middle, high = loose.quantile(torch.tensor([0.0, 0.5, 0.9], dtype=loose.dtype)).tolist()
    print(f"\n{name}: certified / actual error: least {low:.3g}, median {middle:.3g}, 90 % below {high:.3g}")
    return loose


def test_equation_14_is_no_bound() -> None:
    """One query channel grows by 1 where the key is -1: the score changes by 1, but the equation gives 0."""
    q = torch.zeros(1, 1, 2, 16)
    k, v = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 1, 16)
    k[..., 0] = -1.0
    state = new_state(q, k, v, 1, 16)
    blockwise_attention(q, k, v, state, threshold=INF, block=1, bound="paper")
    now = q.clone()
    now[0, 0, 0, 0] = 1.0  # the other query does not change: max dQ = 1, min dQ = 0
    change = bounds.summary(now - q, 16).unsqueeze(3)
    true = ((now - q) @ k.transpose(-1, -2)).abs().max()
    assert true == 1
    assert bounds.paper(change, state.k_stats).item() == 0
    assert bounds.sound(change, state.k_stats, 1.0, None, None).item() == pytest.approx(1, rel=1e-4)
    for bound, count in (("paper", 0), ("sound", 1)):
        before = state.counters[0].item()
        blockwise_attention(now, k, v, state, threshold=0.01, block=1, bound=bound)
        assert state.counters[0].item() - before == count
    now[0, 0, 1, 0] = 1.0  # both grow: the estimate is negative although both scores change
    change = bounds.summary(now - q, 16).unsqueeze(3)
    assert bounds.paper(change, state.k_stats).item() == pytest.approx(-1, rel=1e-4)


def test_equation_14_as_printed() -> None:
    """`bounds.paper` equals explicit loops over the queries' change since the pair's recompute, without the scale."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 11, 16), torch.randn(1, 1, 11, 16)
    state = new_state(q, k, v, 4, 16)
    blockwise_attention(q, k, v, state, threshold=INF, block=4, bound="paper")
    now = q + torch.randn_like(q)
    change = bounds.summary(now - q, 16).unsqueeze(3)
    given = bounds.paper(change, state.k_stats)
    for t in range(2):
        for j in range(3):
            d, keys = (now - q)[0, 0, 16 * t : 16 * t + 16], k[0, 0, 4 * j : 4 * j + 4]
            terms = [max(d[:, c].max() * keys[:, c].max(), d[:, c].min() * keys[:, c].min()) for c in range(16)]
            assert given[0, 0, t, j].item() == pytest.approx(sum(terms).item(), rel=1e-4)


def test_where_equation_14_bounds_the_increase() -> None:
    """If in every channel the changes or the keys have both signs, no score grows by more than the equation says.

    Otherwise, or for a score that falls, it says nothing; the certificate holds all the same.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(200, 1, rows, 16) for rows in (16, 12, 12))
    k[50:150] += 2  # keys of one sign in most channels
    k[150:] -= 4  # of the other sign than the changes
    moves = 0.2 * torch.randn(200, 1, 16, 16)
    moves[150:] += 1
    state = new_state(q, k, v, 4, 16)
    options = {"threshold": INF, "block": 4, "bound": "paper", "certify": True}
    blockwise_attention(q, k, v, state, **options)
    change = bounds.summary(moves, 16).unsqueeze(3)
    low, high = change[..., :16], change[..., 16:32]
    k_low, k_high = state.k_stats.unsqueeze(2)[..., :16], state.k_stats.unsqueeze(2)[..., 16:32]
    both = (((low <= 0) & (high >= 0)) | ((k_low <= 0) & (k_high >= 0))).all(-1)
    grows = (moves.double() @ k.double().transpose(-1, -2)).amax(2).unflatten(-1, (3, 4)).amax(-1).unsqueeze(2)
    given = bounds.paper(change, state.k_stats)
    assert 100 < both.sum() < both.numel() and (grows <= given * (1 + 1e-6))[both].all()
    assert (grows > given)[~both].any()
    out, certificate = blockwise_attention(q + moves, k, v, state, **options)
    assert report("paper", wrong(out, q + moves, k, v, 16), certificate).median() < 100
    assert state.error.item() == certificate.max()


def test_corners_by_brute_force() -> None:
    """The interval bound equals the extremes of the sum over 3 channels for all 64 choices of interval ends."""
    torch.manual_seed(0)
    changes, keys = (torch.randn(200, 2, 3).sort(1).values for _ in range(2))
    ends = torch.cartesian_prod(*[torch.arange(2)] * 3)
    channel = torch.arange(3)
    for change, key in zip(changes, keys, strict=True):
        a, b = (torch.stack([box[end, channel] for end in ends]) for box in (change, key))
        expected = (a @ b.T).abs().max()
        long = torch.tensor([1e9])  # so that the Cauchy-Schwarz bound is never the smaller one
        summaries = [torch.cat((box.flatten(), long))[None, None, None] for box in (change, key)]
        given = bounds.sound(summaries[0].unsqueeze(3), summaries[1], -2.0, None, None)
        assert 0 <= given.item() - 2 * expected <= 1e-3
        short = [torch.cat((box.flatten(), torch.tensor([0.1])))[None, None, None] for box in (change, key)]
        given = bounds.sound(short[0].unsqueeze(3), short[1], -2.0, None, None)
        assert given.item() == pytest.approx(min(0.02, 2 * expected.item()), rel=1e-4)


@pytest.mark.parametrize("what", ["keys", "values", "both"])
def test_drift_of_keys_and_values(what: str) -> None:
    """One tile recomputes all blocks at each step, which moves the references; the other must add up the moves."""
    torch.manual_seed(0)
    q, k, v = torch.ones(50, 1, 32, 16), torch.randn(50, 1, 8, 16), torch.randn(50, 1, 8, 16)
    sign = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    state = new_state(q, k, v, 4, 16, kv_static=False)
    options = {"threshold": 0.9, "block": 4, "bound": "sound", "kv_static": False, "certify": True}
    for step in range(8):
        out, certificate = blockwise_attention(q, k, v, state, **options)
        error = wrong(out, q, k, v, 16)
        assert (error <= certificate).all()
        assert state.counters[0] == 50 * (4 + 2 * step)
        q = torch.cat((q[:, :, :16], torch.randn(50, 1, 16, 16) * 9), 2)
        k = k + (0.01 * sign if what != "values" else 0.0)
        v = v + (0.02 if what != "keys" else 0.0)
    assert (error[..., 0] > 0.02 * 5).all() or what == "keys"
    loose = report(f"drift of {what}", error[..., 0], certificate[..., 0])
    assert loose.median() < (1.1 if what == "values" else 12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sound_estimates(dynamic: bool) -> None:
    """For 2,000 tiles over 20 steps, no score of a kept pair is off by more than its estimate or the threshold."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(500, 4, rows, 16) for rows in (16, 9, 9))
    k = k * torch.tensor([0.1, 1, 1]).repeat_interleave(3)[:, None]
    state = new_state(q, k, v, 3, 16, kv_static=not dynamic)
    then, threshold, ratios = torch.zeros(500, 4, 16, 9), 0.3, []
    naive = 0.0
    for _ in range(20):
        scores = (q @ k.transpose(-1, -2)).double() * 0.25
        kv_change = None
        if dynamic:
            from dit_rewrite.kernels.blockwise_attention.dynamic_kv import measure_kv_change

            kv_change = measure_kv_change(state, k, v)
        decision = estimate(q, k, state, kv_change, threshold, 0.25, False)
        blockwise_attention(q, k, v, state, threshold=threshold, block=3, bound="sound", kv_static=not dynamic)
        again = decision.recompute.repeat_interleave(3, -1)
        off = torch.where(again, 0.0, (scores - then).abs()).unflatten(-1, (3, 3)).amax((2, 4))
        bound = torch.where(decision.recompute, 0.0, decision.score_change).squeeze(2)
        assert (off <= bound * (1 + 1e-9) + 1e-6).all() and (bound <= threshold).all()
        ratios.append((bound / off)[off > 0])
        then = torch.where(again, scores, then)
        step = 0.02 * torch.randn_like(q)
        naive = max(naive, 0.25 * (step @ k.transpose(-1, -2)).abs().max().item())
        q = q + step
        if dynamic:
            k, v = k + 0.005 * torch.randn_like(k), v + 0.005 * torch.randn_like(v)
    assert naive < threshold < 1  # a single step never reaches the threshold, only the accumulated change does
    assert 0.1 < kept_fraction(state) < 0.95
    ratio = torch.cat(ratios)
    print(f"\nestimate / greatest change of a score: median {ratio.median():.3g}")
    assert (ratio >= 1 - 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_thousand_cases(dtype: torch.dtype) -> None:
    """Changes from 0 to more than the size of the queries, peaked and flat scores, with and without a mask."""
    torch.manual_seed(0)
    cases = 10_000 if dtype == torch.float32 else 2_000
    q, k, v = (torch.randn(cases, 1, rows, 16) for rows in (16, 10, 10))
    q, v = q * torch.logspace(-1, 1, cases)[:, None, None, None], v + torch.randn(cases, 1, 1, 1)
    q, k, v = (x[torch.randperm(cases)].to(dtype) for x in (q, k, v))
    mask = torch.rand(cases, 1, 1, 10) > 0.2
    mask[..., 0] = True
    size = torch.logspace(-4, 1, cases)[torch.randperm(cases)][:, None, None, None]
    for given in (None, mask, torch.randn(cases, 1, 1, 10) * 5):
        for threshold in (INF, 0.5):
            state = new_state(q, k, v, 4, 16)
            options = {"block": 4, "bound": "sound", "attn_mask": given, "certify": True}
            out, certificate = blockwise_attention(q, k, v, state, threshold=INF, **options)
            report(f"{dtype} all recomputed", wrong(out, q, k, v, 16, given), certificate)
            now = q + (size * torch.randn_like(q)).to(dtype)
            out, certificate = blockwise_attention(now, k, v, state, threshold=threshold, **options)
            loose = report(f"{dtype} threshold {threshold}", wrong(out, now, k, v, 16, given), certificate)
            assert (loose >= 1).all()


@pytest.mark.parametrize("bound", ["sound", "paper"])
def test_planted_sign(bound: str) -> None:
    """All changes and all keys of a block have one sign, where an estimate without all four products fails.

    For small changes the bound is nearly attained here.
    """
    torch.manual_seed(0)
    q = torch.randn(1000, 1, 16, 16).mean((2, 3), keepdim=True).expand(-1, -1, 16, 16).contiguous()
    k = torch.cat((torch.ones(1000, 1, 4, 16), -torch.ones(1000, 1, 4, 16)), 2) * (
        1 + 0.01 * torch.rand(1000, 1, 8, 16)
    )
    v = torch.cat((torch.ones(1000, 1, 4, 16), -torch.ones(1000, 1, 4, 16)), 2)
    for sign in (1, -1):
        state = new_state(q * 0, k, v, 4, 16)
        options = {"threshold": INF, "block": 4, "bound": bound, "certify": True}
        blockwise_attention(q * 0, k, v, state, **options)
        now = sign * torch.logspace(-2, 0, 1000)[:, None, None, None].expand_as(q) * (1 + 0.01 * torch.rand_like(q))
        out, certificate = blockwise_attention(now, k, v, state, **options)
        loose = report(f"planted, {sign:+}", wrong(out, now, k, v, 16), certificate)
        assert loose.min() >= 1 and loose.median() < 1.5


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("threshold", [INF, 0.4])
def test_walks(threshold: float, dynamic: bool) -> None:
    """20 steps in one direction plus noise, certified at each; a bound from the last step alone is exceeded."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(100, 2, rows, 16) for rows in (40, 21, 21))
    direction = torch.randn(100, 2, 1, 16)
    state, naive = (new_state(q, k, v, 8, 16, kv_static=not dynamic) for _ in range(2))
    exceeded = 0
    for _ in range(20):
        options = {"block": 8, "bound": "sound", "kv_static": not dynamic, "certify": True}
        out, certificate = blockwise_attention(q, k, v, state, threshold=threshold, **options)
        error = wrong(out, q, k, v, 16)
        assert (error <= certificate).all() and certificate.isfinite().all()
        out, short = blockwise_attention(q, k, v, naive, threshold=INF, **options)
        exceeded += int((wrong(out, q, k, v, 16) > short).sum())
        _forget(naive, q, k, v)
        q = q + 0.03 * direction + 0.01 * torch.randn_like(q)
        if dynamic:
            k, v = k + 0.003 * torch.randn_like(k), v + 0.003 * torch.randn_like(v)
    loose = report(f"walk of 20 steps, threshold {threshold}, dynamic {dynamic}", error, certificate)
    assert (loose >= 1).all()
    assert exceeded > 300 and certificate.median() < v.abs().max()


def _forget(state: State, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Reset the accumulated moves, so that the next call compares with the last step only."""
    tiles = F.pad(q, (0, 0, 0, -q.shape[2] % 16)).unflatten(2, (-1, 16))
    state.q_ref.copy_(tiles)
    state.q_moved.zero_()
    if state.k_ref.numel():
        state.k_ref.copy_(k)
        state.v_ref.copy_(v)
        state.k_moved.zero_()
        state.v_moved.zero_()


def test_certificate_by_hand() -> None:
    """Two keys of weight 1/2 in separate blocks, with values -1 and 1, and both scores off by at most e.

    The odds change by exp(2 e), so the weight of a key becomes at most exp(2 e) / (1 + exp(2 e)). The output, 0, is
    then off by at most tanh(e), and the certified bound is 2 tanh(e / 2).
    """
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 2, 16)
    k[0, 0, :, 0] = torch.tensor([1.0, -1.0])
    v = k.sign() + 0.0
    state = new_state(q, k, v, 1, 16)
    options = {"block": 1, "bound": "sound", "scale": 1.0, "certify": True, "threshold": INF}
    blockwise_attention(q, k, v, state, **options)
    for e in (0.01, 0.1, 1.0):
        now = q.clone()
        now[..., 0] = e
        out, certificate = blockwise_attention(now, k, v, state, **options)
        assert out.abs().max() == 0
        assert math.tanh(e) <= certificate.item()
        assert certificate.item() == pytest.approx(min(2 * math.tanh(e / 2), 1.0), rel=2e-3, abs=2e-4)


def test_certificate_of_nan() -> None:
    """A NaN in the queries makes the certificate NaN, so that no comparison accepts it as small."""
    q, k, v = (torch.randn(1, 1, 16, 16) for _ in range(3))
    state = new_state(q, k, v, 16, 16)
    q[0, 0, 3, 3] = math.nan
    decision = estimate(q, k, state, None, INF, 0.25, False)
    blockwise_attention(q, k, v, state, threshold=INF, block=16, bound="sound")
    assert certified_error(state, decision, None, q, 0.25).isnan().all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e18, 1e25])
def test_row_norms_of_any_size(size: float) -> None:
    """The summary's norm is a tight bound even if the squares overflow or underflow float32 (all sizes but 1)."""
    x = torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(0)) * size
    found = bounds.summary(x, 6)[0, 0, 0, -1].double()
    exact = torch.linalg.vector_norm(x.double(), dim=-1).amax()
    assert exact <= found <= exact * (1 + 1e-4)
