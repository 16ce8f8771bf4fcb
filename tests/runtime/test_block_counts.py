"""Counters of kept blocks: what is counted, and that snapshots stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import DecisionReason
from dit_rewrite.runtime import block_counts
from dit_rewrite.runtime.block_counts import BlockCounts
from dit_rewrite.runtime.decide import Choice, Decisions, SiteSpec
from dit_rewrite.runtime.stats import Stats

RULE, COVERED = DecisionReason.RULE, DecisionReason.COVERED


def core(index: int, certificate: int | None = None) -> tuple[int, SiteSpec]:
    """The core at an even index, which reads the slot behind it."""
    choose = lambda *_: Choice(True, RULE)  # noqa: E731
    return index, SiteSpec(
        f"core{index}", "attention", 0, None, choose, reads=index + 1, counters=0, certificate=certificate
    )


def state(again: int, total: int, bound: float = 0.0) -> tuple[Tensor, ...]:
    return torch.tensor([again, total, 0, 0]), torch.tensor([bound])


def decided(*reasons: DecisionReason | None) -> Decisions:
    """A core for each reason, and its state; None is a core that computes."""
    row = tuple(value for reason in reasons for value in (reason is not None, True))
    return Decisions(row, tuple(r for reason in reasons for r in (reason or DecisionReason.NO_RULE, COVERED)), ())


def test_states_that_a_strategy_read_are_counted() -> None:
    """A core that computes, or that an enclosing site covers, counts nothing."""
    sites, values = [core(0), core(2), core(4)], [None, state(1, 4), None, state(2, 4), None, state(3, 4)]
    counts = BlockCounts()
    counts.note(sites, values, decided(RULE, COVERED, None), (0, 1, None))
    assert counts.snapshot().kept() == {"core0": (3, 4)} and counts.certificates() == []


def test_snapshots_and_differences() -> None:
    """A snapshot is unaffected by later steps, which change a state in place; a new state adds to the old one."""
    stats, sites, first = Stats(), [core(0, certificate=1)], state(1, 4, 0.5)
    assert "kept" not in str(stats.copy())
    stats.note_blocks(sites, [None, first], decided(RULE), (0, 1, "a"))
    before = stats.copy()
    first[0].add_(torch.tensor([0, 4, 0, 0]))
    first[1].fill_(0.25)
    stats.note_blocks(sites, [None, first], decided(RULE), (0, 2, "a"))
    stats.note_blocks(sites, [None, state(4, 4, 1.0)], decided(RULE), (1, 1, "a"))
    after = stats.copy()
    assert before.kept_blocks == {"core0": (3, 4)} and before.kept_blocks["core0"].fraction == 0.75
    assert after.kept_blocks == {"core0": (7, 12)} and "7 of 12 blocks of attention kept (58.3%)" in str(after)
    assert after.since(before).kept_blocks == {"core0": (4, 8)}
    assert [bound[1:] for bound in after.certificates] == [(0, 1, "a", 0.5), (0, 2, "a", 0.25), (1, 1, "a", 1.0)]
    assert [bound[1:] for bound in after.since(before).certificates] == [(0, 2, "a", 0.25), (1, 1, "a", 1.0)]


def test_old_states_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_counts, "MOST", 2)
    counts = BlockCounts()
    for _ in range(5):
        counts.note([core(0)], [None, state(1, 4)], decided(RULE), (0, 1, None))
        assert len(counts._states) <= 2
    assert counts.snapshot().kept() == {"core0": (15, 20)}


def test_only_reading_needs_the_numbers() -> None:
    """A step and `stats()` work with tensors that have no numbers, so that they cannot wait for a device."""
    stats, sites = Stats(), [core(0, certificate=1)]
    for turn in range(2):
        meta = tuple(tensor.to("meta") for tensor in state(1, 4))
        stats.note_blocks(sites, [None, meta], decided(RULE), (0, turn, None))
    earlier = stats.copy()
    stats.copy().since(earlier)
    for read in (lambda: earlier.kept_blocks, lambda: earlier.certificates):
        with pytest.raises(NotImplementedError):
            read()
