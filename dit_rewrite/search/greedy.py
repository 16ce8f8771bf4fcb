"""The search of a plan (DiTFastAttn, Yuan et al. 2024, section 3.5, algorithm 1 and appendix A.2).

Greedy: step by step, and in each from the first site to the last, the cheapest candidate is taken with which the
model's output stays close to that of the uncompressed model. Where the paper leaves a choice:

- Layers count from 1 in the threshold (i / |M|) delta: counted from 0, the first could never be compressed.
- O is the uncompressed model's output at the input that the compressed sampling has led to, not at that of a separate
  sampling in full: an error of earlier steps is not charged to this one.
- While candidates of site i are tried, those before i are as already chosen, those behind it in full.
- Step 0 is not compressed: there is no earlier output or residual to take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_rewrite.errors import BadParameter, BadPlan, MissingExtra, OtherSearch
from dit_rewrite.policy.plan import (
    Choice,
    Row,
    Table,
    are_names,
    is_real,
    is_whole,
    parse_row,
    read_fields,
    row_text,
    write_whole,
)

VERSION = 2  # of the file of an unfinished search
EPSILON = 1e-6  # appendix A.2
CLIP = 10.0  # appendix A.2
DELTAS = {"D1": 0.025, "D2": 0.05, "D3": 0.075, "D4": 0.1, "D5": 0.125, "D6": 0.15}  # section 4.1
STRATEGIES = (Choice.AST, Choice.WA_RS_ASC, Choice.WA_RS, Choice.ASC)  # S of section 3.5, by cost at long sequences


class Runner(Protocol):
    """What the search asks of the model and its sampler, which go through the trajectories side by side.

    Each step is one call of `replay`; or `begin`, `reference`, then for each site in order some of `attempt` and one
    `fix`, and `finish`. Outputs are the model's, one tensor of any shape for each trajectory, and are read before
    the next call.
    """

    @property
    def work(self) -> float:
        """Runs of the network so far: a run for all trajectories is 1, a run of a part of it its share."""

    def replay(self, row: Row) -> None:
        """Go through the next step (from 0) with these choices, one for each site."""

    def begin(self, step: int) -> None:
        """A step begins; its input is what the compressed sampling has led to."""

    def reference(self) -> Sequence[Tensor]:
        """The outputs with every site in full."""

    def attempt(self, index: int, choice: Choice) -> Sequence[Tensor]:
        """The outputs with `choice` at site `index`, those before it as fixed and those behind it in full."""

    def fix(self, index: int, choice: Choice) -> None:
        """The choice of site `index` in this step."""

    def finish(self) -> None:
        """The step is done as it is fixed, and the sampler goes on with its outputs."""


@dataclass(frozen=True)
class Search:
    """What is searched. ``choices`` are the candidates in ascending cost, and ``orders``, if any, those of each site in
    its own; ``key`` tells apart what the rest does not, such as the model's fingerprint and the trajectories. Raises
    BadParameter for values out of range.
    """

    sites: tuple[str, ...]
    steps: int
    delta: float
    choices: tuple[Choice, ...] = STRATEGIES
    key: str | Mapping[str, str] = ""
    orders: tuple[tuple[Choice, ...], ...] = ()

    def __post_init__(self) -> None:
        self._require("sites", are_names(self.sites), "names, each once")
        self._require("steps", is_whole(self.steps, 1), "a whole number >= 1")
        self._require("delta", is_real(self.delta), "a number >= 0, such as one of DELTAS")
        known = [choice for choice in self.choices if isinstance(choice, Choice) and choice is not Choice.FULL]
        once = len(set(known)) == len(self.choices) > 0
        self._require("choices", once, "some Choice in ascending cost, each once and without Choice.FULL")
        own = all(len(set(order)) == len(order) and set(order) <= set(self.choices) for order in self.orders)
        fits = own and len(self.orders) in (0, len(self.sites))
        self._require("orders", fits, f"{len(self.sites)} tuples of choices, one for each site, or none")

    def _require(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise BadParameter("search", name, getattr(self, name), allowed)

    def candidates(self, index: int) -> tuple[Choice, ...]:
        """What is tried at site `index`, one after the other."""
        return self.orders[index] if self.orders else self.choices

    def threshold(self, index: int) -> float:
        """What the loss of a candidate at site `index` (from 0) must be below: delta for the last site."""
        return (index + 1) / len(self.sites) * self.delta


@dataclass(frozen=True)
class Found:
    """The choices of the steps so far, the candidates that were tried for them, and the runs of the network.

    ``work`` counts, over all sittings, the references, the candidates, the steps themselves and their replays.
    """

    table: Table
    evaluations: int = 0
    work: float = 0.0

    def share(self, candidates: int) -> float:
        """The work against a full run for each of so many candidates at every step and site (appendix A.2)."""
        return self.work / (candidates * sum(len(row) for row in self.table))


def greedy(
    runner: Runner,
    sites: Sequence[str],
    steps: int,
    delta: float,
    choices: Sequence[Choice] = STRATEGIES,
    *,
    orders: Sequence[Sequence[Choice]] = (),
    partial: Path | None = None,
    key: str | Mapping[str, str] = "",
    progress: bool = False,
) -> Found:
    """Algorithm 1: the table of a plan, for `sites` in graph order and `choices` in ascending cost. Where sites differ
    in what their choices cost, or in what they can do, `orders` has those of each.

    A candidate passes if its `loss` is below its threshold; one whose loss is NaN does not. With a file `partial`,
    what was found is written there after each step, and a search that finds it goes on behind those steps, which the
    runner replays; `key` tells what the other arguments do not. `progress` draws a bar.

    Raises BadParameter for arguments out of range or outputs of another shape than the reference's, BadPlan and
    PlanMismatch for a partial file that is damaged or of another search, and MissingExtra for a bar without rich.
    """
    search = Search(tuple(sites), steps, delta, tuple(choices), key, tuple(map(tuple, orders)))
    found = Found(((Choice.FULL,) * len(search.sites),))
    if partial is not None and partial.exists():
        found = _read(partial, search)
    missing = range(len(found.table), steps)
    with _bar(steps, len(missing), len(search.sites), progress and len(missing) > 0) as tick:
        before = runner.work - found.work
        for row in found.table if missing else ():
            runner.replay(row)
        for step in missing:
            row, tried = _choose(runner, step, search, tick)
            found = Found((*found.table, row), found.evaluations + tried, runner.work - before)
            if partial is not None:
                _write(partial, search, found)
    return found


def _choose(runner: Runner, step: int, search: Search, tick: Callable[[], None]) -> tuple[Row, int]:
    """Go through a step; its choices, and how many candidates were tried."""
    runner.begin(step)
    reference = [output.clone() for output in runner.reference()]
    row: Row = ()
    evaluations = 0
    for index in range(len(search.sites)):
        choice, tried = _first_passing(runner, index, reference, search)
        runner.fix(index, choice)
        row, evaluations = (*row, choice), evaluations + tried
        tick()
    runner.finish()
    return row, evaluations


def _first_passing(runner: Runner, index: int, reference: Sequence[Tensor], search: Search) -> tuple[Choice, int]:
    """The cheapest candidate that passes at a site, or FULL; and how many were tried."""
    candidates = search.candidates(index)
    for tried, choice in enumerate(candidates, start=1):
        if loss(reference, runner.attempt(index, choice)) < search.threshold(index):
            return choice, tried
    return Choice.FULL, len(candidates)


def loss(reference: Sequence[Tensor], output: Sequence[Tensor]) -> float:
    """The `relative_error` over the elements of all trajectories."""
    if [tensor.shape for tensor in reference] != [tensor.shape for tensor in output]:
        shapes = [tuple(tensor.shape) for tensor in output]
        raise BadParameter("loss", "shapes", shapes, f"those of the reference, {[tuple(r.shape) for r in reference]}")
    return relative_error(_joined(reference), _joined(output))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def relative_error(reference: Tensor, output: Tensor) -> float:
    """The mean relative absolute error L(O, O') of appendix A.2, in float64:

        mean(clip(|O - O'| / (max(|O|, |O'|) + eps), 0, 10))

    Both are real, of one shape and on one device. ``eps = 1e-6`` makes two zeros equal; half precision would round it
    away, hence float64. NaN where an element is NaN or both are infinite: nothing is proven then. (A ratio is at most
    2, so that the clip never acts.) Reads the device once. Raises BadParameter for other shapes.
    """
    if reference.shape != output.shape:
        raise BadParameter("relative_error", "output.shape", tuple(output.shape), f"{tuple(reference.shape)}")
    a, b = reference.double(), output.double()
    ratio = (a - b).abs() / (torch.maximum(a.abs(), b.abs()) + EPSILON)
    return float(ratio.clamp(0, CLIP).mean())


def _write(path: Path, search: Search, found: Found) -> None:
    rows = [row_text(row) for row in found.table]
    content = {"version": VERSION, "search": asdict(search)} | asdict(replace(found, table=())) | {"table": rows}
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _read(path: Path, search: Search) -> Found:
    """What an unfinished search has found. Raises BadPlan where it is damaged, PlanMismatch where it is another's."""
    content = read_fields(path, {"search", *(field.name for field in fields(Found))}, VERSION)
    wanted = json.loads(json.dumps(asdict(search)))
    if content["search"] != wanted:
        raise OtherSearch(path, _differences(content["search"], wanted))
    rows, tried, work = content["table"], content["evaluations"], content["work"]
    if not (isinstance(rows, list) and 1 <= len(rows) <= search.steps and is_whole(tried, 0) and is_real(work)):
        raise BadPlan(path, f"a table of 1 to {search.steps} rows, or a count, is missing")
    try:
        table = tuple(parse_row(row) for row in rows)
    except BadParameter as error:
        raise BadPlan(path, str(error)) from None
    if any(len(row) != len(search.sites) for row in table):
        raise BadPlan(path, f"a row has not {len(search.sites)} choices, one for each site")
    return Found(table, tried, work)


def _differences(there: object, here: dict[str, Any]) -> str:
    """The settings that differ, such as ``delta: 0.1 there, 0.05 here``."""
    if not isinstance(there, dict):
        return "it has no settings"
    lines = []
    for name, value in here.items():
        found = there.get(name)
        if isinstance(found, dict) and isinstance(value, dict):
            lines += [_differences(found, value)]
        elif found != value:
            lines += [f"{name}: {found!r:.60} there, {value!r:.60} here"]
    return "; ".join(filter(None, lines))


@contextmanager
def _bar(steps: int, missing: int, sites: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Gives ``tick()``, to be called for each site of the missing steps."""
    if not shown:
        yield lambda: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise MissingExtra("rich", "the progress bar", "demo") from error
    with Progress(TextColumn("plan search"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=(steps - 1) * sites, completed=(steps - 1 - missing) * sites)
        yield lambda: bar.advance(task)
