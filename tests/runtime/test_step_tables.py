"""The rows of step tables: when they are computed, ahead or one by one, and when they are not used."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import TableReason
from dit_rewrite.runtime.clock import Clock, Named
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.step_tables import BATCH, MOST, SHARE, STEADY, Bookmark, Tables
from dit_rewrite.runtime.tensors import checksum

TIMESTEPS = torch.tensor([900, 600, 300, 0])
ROW_BYTES = 2 * 3 * 4


class Product:
    """Computes two columns of 2 x 3 numbers: the timestep times a weight, plus a condition."""

    step, weights, conditioning, sizes = (0,), (1,), (2,), (3,)

    def __init__(self, batched: bool = True) -> None:
        self.batched, self.single, self.batches = batched, 0, list[int]()
        self.columns: tuple[str, ...] = ()
        self.released, self.peak, self.checksums = 0, 0, 0

    def add(self, columns: tuple[str, ...]) -> None:
        self.columns = tuple(dict.fromkeys((*self.columns, *columns)))

    def bytes_of(self, columns: tuple[str, ...]) -> int:
        return ROW_BYTES * len(columns)

    def peak_of(self, columns: tuple[str, ...]) -> int:
        return self.peak

    def row(self, columns: tuple[str, ...], args: Sequence[Any]) -> list[Tensor]:
        self.single += 1
        return [self.column(name, args[0], args) for name in columns]

    def rows(self, columns: tuple[str, ...], args: Sequence[Any], timesteps: Tensor) -> list[Tensor] | None:
        self.batches += [len(timesteps)]
        one = [[self.column(name, t, args) for t in timesteps] for name in columns]
        return [torch.stack(column) for column in one] if self.batched else None

    def checksum(self, args: Sequence[Any]) -> Tensor:
        self.checksums += 1
        return checksum([args[1]])

    def release(self, args: Sequence[Any]) -> None:
        self.released += 1

    @staticmethod
    def column(name: str, timestep: Tensor, args: Sequence[Any]) -> Tensor:
        return timestep[:, None] * args[1] * (2.0 if name == "b" else 1.0) + args[2]


class Steps:
    """Calls of a graph with a table. The inputs are those of `Product`: timestep, weight, condition, a size."""

    def __init__(self, batched: bool = True, limit: int = 1 << 20, scheduled: bool = True) -> None:
        self.program, self.stats = Product(batched), Stats()
        self.tables = Tables(self.program, self.stats, lambda: limit * SHARE * MOST)
        self.weight, self.condition = torch.arange(3.0), torch.ones(1)
        self.scheduler = SimpleNamespace(timesteps=TIMESTEPS) if scheduled else None
        self.explicit = True
        self.begin()

    def begin(self) -> None:
        """Begin another trajectory."""
        self.clock, self.bookmark = Clock(scheduler=self.scheduler), Bookmark()

    def __call__(self, value: int, *columns: str, dtype: torch.dtype = torch.int64, size: Any = 2) -> list[Tensor]:
        """Read the table at a timestep, check it, and return the values."""
        timestep = torch.full((2,), value, dtype=dtype)
        self.clock.enter(self.clock.read(timestep, Named()), timestep, Named(), "stream")
        args, columns = [timestep, self.weight, self.condition, size], columns or ("a",)
        self.program.add(columns)
        self.bookmark.begin(self.explicit)
        found = self.tables.read(columns, args, self.bookmark, self.explicit, self.clock)
        expected = [Product.column(name, timestep, args) for name in columns]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        return list(found)


def test_the_rows_of_a_schedule_are_computed_at_once() -> None:
    """The first read computes the rows of all steps in one batch, and later ones compute nothing."""
    run = Steps()
    for value in (600, 300, 0):
        run(value)
    assert (run.program.single, run.program.batches) == (0, [4])
    assert run.stats.table_rows == 4
    assert run.stats.table_bytes == 4 * ROW_BYTES
    assert not run.stats.tables


def test_weights_are_released_after_a_batch_alone() -> None:
    """Rows that are computed one at a time would read released weights again and again."""
    counts = []
    for run in (Steps(), Steps(scheduled=False), Steps(batched=False)):
        run(600)
        run(300)
        counts.append(run.program.released)
    assert counts == [1, 0, 0]


def test_the_next_trajectory_reads_the_same_rows() -> None:
    run = Steps()
    run(600)
    run.begin()
    run(600)
    run(300)
    assert run.program.batches == [4]


def test_a_timestep_that_is_not_scheduled_gets_its_own_row() -> None:
    run = Steps()
    run(600)
    run(599)
    run(599)
    assert (run.program.single, run.program.batches) == (1, [4])


@pytest.mark.parametrize("inference", [False, True])
def test_a_timestep_that_the_model_changes_is_read_again(inference: bool) -> None:
    """The clock has read it before; eager code between two graphs may change it in place."""
    run = Steps()
    with torch.inference_mode(inference):
        timestep = torch.full((2,), 600)
        run.clock.enter(run.clock.read(timestep, Named()), timestep, Named(), "stream")
        timestep -= 300
        run.program.add(("a",))
        args = [timestep, run.weight, run.condition, 2]
        (found,) = run.tables.read(("a",), args, run.bookmark, True, run.clock)
    assert torch.equal(found, Product.column("a", timestep, args))


def test_without_a_schedule_rows_are_computed_when_they_are_read() -> None:
    run = Steps(scheduled=False)
    for value in (600, 300, 600):
        run(value)
    assert (run.program.single, run.program.batches) == (2, [])


@pytest.mark.parametrize("change", ["dtype", "size"])
def test_rows_belong_to_a_dtype_and_to_sizes(change: str) -> None:
    run = Steps(scheduled=False)
    run(600)
    run(600, **{"dtype": {"dtype": torch.float32}, "size": {"size": 3}}[change])
    assert run.program.single == 2


def test_of_a_tensor_that_is_read_for_its_shape_only_the_shape_counts() -> None:
    """`full_like` and similar ops take the shape of the latent, which is another tensor in each step."""
    run = Steps()
    for value in (600, 300, 0):
        run(value, size=torch.zeros(2, value + 1)[:, :1])
    run(600, size=torch.zeros(2, 2))
    assert (run.program.single, run.program.batches) == (0, [4, 4])


def test_a_row_is_completed_when_a_variant_reads_more_columns() -> None:
    """A variant that is compiled later reads another column: the rows get both, and each is computed once more."""
    run = Steps()
    run(600, "a")
    run(600, "a", "b")
    run(300, "b")
    assert run.program.batches == [4, 4]
    assert run.stats.table_bytes == 4 * 2 * ROW_BYTES


def test_a_weight_that_was_changed_in_place_drops_the_rows() -> None:
    """Weights are compared at the first read of a trajectory."""
    run = Steps()
    run(600)
    run.weight.mul_(2)
    run.begin()
    run(600)
    assert run.program.batches == [4, 4]
    assert run.stats.tables == {TableReason.NEW_WEIGHTS: 1}


def test_a_weight_that_was_changed_behind_its_version_drops_the_rows() -> None:
    """Adapters are merged into `weight.data`, which counts no version."""
    run = Steps()
    run(600)
    before = run.weight._version
    run.weight.data.neg_()
    assert run.weight._version == before
    run.begin()
    run(600)
    assert run.program.batches == [4, 4]
    assert run.stats.tables == {TableReason.NEW_WEIGHTS: 1}


def test_a_weight_that_was_replaced_drops_the_rows() -> None:
    run = Steps()
    run(600)
    run.weight = run.weight * 2
    run.begin()
    run(600)
    assert run.stats.tables == {TableReason.NEW_WEIGHTS: 1}


@pytest.mark.parametrize("in_place", [True, False])
def test_other_conditioning_in_a_trajectory_gets_other_rows(in_place: bool) -> None:
    """Conditioning is compared at every read."""
    run = Steps()
    run(600)
    run.condition = run.condition.add_(1) if in_place else run.condition + 1
    run(300)
    assert run.stats.tables == {TableReason.NEW_CONDITIONING: 1}


def test_two_conditions_keep_their_rows() -> None:
    """As the two streams of guidance do: each has its own bookmark, and neither drops the other's rows."""
    run = Steps()
    other, bookmark = torch.zeros(1), Bookmark()
    for value in (600, 300, 0):
        for _ in range(2):
            run(value)
            run.condition, other = other, run.condition
            run.bookmark, bookmark = bookmark, run.bookmark
    assert run.program.batches == [4, 4]
    assert not run.stats.tables


def test_conditioning_that_changes_in_every_call_stops_the_batches() -> None:
    """After the second change, rows are computed one by one: what is computed ahead would not be read."""
    run = Steps()
    for value in (900, 600, 300, 0):
        run.condition = run.condition + 1
        run(value)
    assert (run.program.batches, run.program.single) == ([4, 4], 2)
    assert run.program.checksums == STEADY  # each reads all weights
    rows = run.tables.bytes
    run.begin()
    run(0)  # the condition is that of the last call, and its row belongs to that trajectory alone
    assert (run.program.checksums, run.tables.bytes) == (STEADY + 1, rows + 4 * ROW_BYTES)


def test_an_op_that_cannot_be_batched() -> None:
    """Rows are computed one by one from then on, and the reason is counted once."""
    run = Steps(batched=False)
    for value in (900, 600, 300):
        run(value)
    assert (run.program.batches, run.program.single) == ([4], 3)
    assert run.stats.tables == {TableReason.NOT_BATCHED: 1}


def test_rows_beyond_the_limit_are_dropped() -> None:
    """A batch is as large as the limit allows, and the rows before it are dropped."""
    run = Steps(limit=2 * ROW_BYTES)
    for value in (900, 600, 300, 0):
        run(value)
        assert run.tables.bytes == 2 * ROW_BYTES
    assert run.program.batches == [2, 2]
    assert run.stats.tables == {TableReason.OVER_LIMIT: 1}


def test_a_row_larger_than_the_limit_is_the_only_one() -> None:
    run = Steps(limit=1)
    run(900)
    assert run.tables.bytes == ROW_BYTES


def test_rows_of_a_batch_own_their_memory() -> None:
    """A dropped row frees its memory: no row is a view of the batch."""
    (value,) = Steps()(900)
    assert value.untyped_storage().nbytes() == ROW_BYTES


def test_a_long_schedule_is_computed_in_several_batches() -> None:
    run = Steps()
    run.scheduler = SimpleNamespace(timesteps=torch.arange(2 * BATCH, 0, -1))
    run.begin()
    for value in range(2 * BATCH, 0, -1):
        run(value)
    assert run.program.batches == [BATCH, BATCH]


def test_what_is_computed_at_once_takes_no_more_than_the_limit() -> None:
    """If intermediate values of two rows fit, rows are computed in pairs, whichever of a pair is read first."""
    for first, second in ((900, 300), (600, 0)):
        run, counts = Steps(limit=9 * ROW_BYTES), []
        run.program.peak = 4 * MOST * ROW_BYTES
        for value in (first, 1500 - first, second, 300 - second):
            run(value)
            counts.append(len(run.program.batches))
        assert (run.program.batches, run.program.single, counts) == ([2, 2], 0, [1, 1, 2, 2])
        assert not run.stats.tables


def test_a_row_that_takes_more_than_the_limit_is_computed_alone() -> None:
    run = Steps(limit=9 * ROW_BYTES)
    run.program.peak = 10 * MOST * ROW_BYTES
    run(600)
    assert (run.program.batches, run.program.single) == ([], 1)


def test_nothing_is_read_for_a_timestep_that_is_not_a_number() -> None:
    """A NaN equals no key, so that its row is computed at each read."""
    run = Steps(scheduled=False)
    run.program.add(("a",))
    args = [torch.full((2,), float("nan")), run.weight, run.condition, 2]
    for _ in range(2):
        run.bookmark.begin(True)
        (value,) = run.tables.read(("a",), args, run.bookmark, True, run.clock)
        assert value.isnan().all()
    assert run.program.single == 2


def test_the_segments_of_a_call_look_the_row_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call looks it up again, although the bookmark remembers the row of the last one."""
    run, lookups = Steps(), []
    run(900, "a", "b")
    numbers = run.clock.numbers
    monkeypatch.setattr(run.clock, "numbers", lambda timestep: (lookups.append(int(timestep[0])), numbers(timestep))[1])
    for value in (600, 300):
        (a,) = run(value, "a")
        args = [torch.full((2,), value), run.weight, run.condition, 2]
        (b,) = run.tables.read(("b",), args, run.bookmark, True, run.clock)
        assert torch.equal(b, Product.column("b", args[0], args))
    assert lookups == [600, 300]


def test_rows_are_counted_since_an_earlier_time() -> None:
    run = Steps()
    run(600)
    before = run.stats.copy()
    run(599)
    assert run.stats.since(before).table_rows == 1


@pytest.mark.parametrize("rows", [4, 2])
def test_two_conditions_do_not_depend_on_one_another(rows: int) -> None:
    """Neither drops rows of the other, and both have the batches that each would have alone."""
    run = Steps(limit=rows * ROW_BYTES)
    other, bookmark = torch.zeros(1), Bookmark()
    for value in (900, 600, 300, 0):
        for _ in range(2):
            run(value)
            assert run.tables.bytes <= 2 * rows * ROW_BYTES
            run.condition, other = other, run.condition
            run.bookmark, bookmark = bookmark, run.bookmark
    assert (run.program.batches, run.program.single) == ([rows] * (8 // rows), 0)


def test_rows_of_freed_conditioning_are_dropped() -> None:
    run = Steps()
    run(600)
    run.tables.drop_dead()
    assert run.tables.bytes == 4 * ROW_BYTES
    run.condition = torch.ones(1)
    run.tables.drop_dead()
    assert run.tables.bytes == 0


@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_weights_without_a_version_are_compared_by_content(explicit: bool, changed: bool) -> None:
    """Inference tensors have none. In a trajectory that nobody marked they are compared at each read."""
    run = Steps()
    run.explicit = explicit
    with torch.inference_mode():
        run.weight = torch.arange(3.0)
    run(600)
    if explicit:
        run.begin()
    with torch.inference_mode():
        run.weight.mul_(2 if changed else 1)
    run(300)
    assert run.program.batches == ([4, 4] if changed else [4])
    assert run.stats.tables == ({TableReason.NEW_WEIGHTS: 1} if changed else {})


def test_a_row_does_not_depend_on_earlier_trajectories() -> None:
    """Another schedule with the same timestep has rows of its own, since rounding may depend on the batch."""
    run = Steps()
    run(600)
    run.scheduler = SimpleNamespace(timesteps=torch.tensor([900, 600]))
    run.begin()
    run(600)
    run.scheduler = SimpleNamespace(timesteps=TIMESTEPS)
    run.begin()
    run(300)
    assert run.program.batches == [4, 2]
    assert not run.stats.tables
