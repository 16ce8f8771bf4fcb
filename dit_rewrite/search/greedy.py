"""The greedy search of a plan (DiTFastAttn, Yuan et al. 2024, section 3.5, algorithm 1 and appendix A.2).

The search goes through the steps, and through the sites of each step in order. At each site it takes the cheapest
candidate that keeps the model's output close to that of the uncompressed model. Where the paper is ambiguous:

- In the threshold (i / |M|) delta, layers count from 1. Counted from 0, the first layer could never be compressed.
- O is the uncompressed model's output for the input that the compressed sampling has produced, and not the output of a
  separate uncompressed sampling. So errors of earlier steps do not count for the current one.
- While candidates of site i are tried, earlier sites use the choices made so far, and later sites full attention.
- Step 0 is not compressed, because there is no earlier output or residual.
- If guidance takes several calls a step, each is searched as a step of its own: it has its own choices and thresholds.
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
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.plan import (
    Choice,
    PlanRow,
    Table,
    are_names,
    is_real,
    is_whole,
    parse_row,
    read_fields,
    row_text,
)
from dit_rewrite.proof.callers import calling
from dit_rewrite.search.metrics import Metric, metric_of, relative_error

VERSION = 2  # version of the file of an unfinished search
DELTAS = {"D1": 0.025, "D2": 0.05, "D3": 0.075, "D4": 0.1, "D5": 0.125, "D6": 0.15}  # section 4.1
STRATEGIES = (
    Choice.AST,
    Choice.WA_RS_ASC,
    Choice.WA_RS,
    Choice.ASC,
)  # S of section 3.5, in ascending cost for long sequences


class Runner(Protocol):
    """Interface of the model and its sampler, which run all trajectories step by step, side by side.

    Each call of the model is one of `replay`; or `begin`, `reference`, then for each site in order any number of
    `attempt` and one `fix`, and `finish`. The outputs are those of the model, one tensor of any shape for each
    trajectory. They are valid until the next call.
    """

    @property
    def work(self) -> float:
        """Runs of the network so far. A run for all trajectories counts 1, a partial run counts its fraction."""

    def replay(self, row: PlanRow) -> None:
        """Run the next call of the model (from 0) with these choices, one for each site."""

    def begin(self, number: int) -> None:
        """Begin a call. Its input is the result of the compressed sampling so far."""

    def reference(self) -> Sequence[Tensor]:
        """Return the outputs with full attention at every site."""

    def attempt(self, index: int, choice: Choice) -> Sequence[Tensor]:
        """Return the outputs with `choice` at site `index`, fixed choices before it, and full attention after it."""

    def fix(self, index: int, choice: Choice) -> None:
        """Fix the choice of site `index` in this call."""

    def finish(self) -> None:
        """End the call with the fixed choices, and continue the sampler with its outputs."""


@dataclass(frozen=True)
class Search:
    """The settings of a search. Raises BadParameter for values out of range.

    ``calls`` is how many calls of the model a step has. ``choices`` are the candidates in ascending cost; ``orders``,
    if given, has the candidates of each site. ``key`` identifies everything else that the result depends on, such as
    the model's fingerprint and the trajectories.
    ``metric`` is the name of the loss.
    """

    sites: tuple[str, ...]
    steps: int
    delta: float
    choices: tuple[Choice, ...] = STRATEGIES
    key: str | Mapping[str, str] = ""
    orders: tuple[tuple[Choice, ...], ...] = ()
    metric: str = "relative_error"
    calls: int = 1

    def __post_init__(self) -> None:
        self._require("sites", are_names(self.sites), "names, each once")
        self._require("steps", is_whole(self.steps, 1), "a whole number >= 1")
        self._require("delta", is_real(self.delta), "a number >= 0, such as one of DELTAS")
        self._require("calls", is_whole(self.calls, 1), "a whole number >= 1")
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
        """Return the candidates of site `index`, in the order in which they are tried."""
        return self.orders[index] if self.orders else self.choices

    def threshold(self, index: int) -> float:
        """Return the upper limit of the loss of a candidate at site `index` (from 0). It is delta for the last site."""
        return (index + 1) / len(self.sites) * self.delta


@dataclass(frozen=True)
class Found:
    """The choices of the calls so far, the number of candidates that were tried, and the runs of the network.

    ``work`` includes references, candidates, the steps themselves and their replays, also those of earlier, interrupted
    searches.
    """

    table: Table
    evaluations: int = 0
    work: float = 0.0

    def share(self, candidates: int) -> float:
        """Return the work as a fraction of a full run for each candidate, call and site (appendix A.2)."""
        return self.work / (candidates * sum(len(row) for row in self.table))


def greedy(
    runner: Runner,
    sites: Sequence[str],
    steps: int,
    delta: float,
    choices: Sequence[Choice] = STRATEGIES,
    *,
    orders: Sequence[Sequence[Choice]] = (),
    metric: str | Metric = "relative_error",
    calls: int = 1,
    partial: Path | None = None,
    key: str | Mapping[str, str] = "",
    progress: bool = False,
) -> Found:
    """Find the table of a plan by algorithm 1, for `sites` in graph order and `choices` in ascending cost.

    `orders` gives the candidates of each site, if their costs or the possible choices differ between sites. A candidate
    passes if its `loss` by `metric`, a name of `metrics.METRICS` or a function of two tensors, is below its threshold;
    NaN does not pass. The table has a row for each of the `calls` of a step, those of the first step without
    compression. With a file `partial`, the search saves its progress after each row, and continues from an existing
    file after replaying its rows; `key` is a further text in which two searches must agree. `progress` shows a progress
    bar.

    Raises BadParameter for invalid arguments or if the outputs' shapes differ from the reference's, BadPlan for a
    damaged partial file, PlanMismatch for that of another search, and MissingExtra for a progress bar without rich.
    """
    name, function = metric_of(metric)
    search = Search(tuple(sites), steps, delta, tuple(choices), key, tuple(map(tuple, orders)), name, calls)
    found = Found(((Choice.FULL,) * len(search.sites),) * calls)
    if partial is not None and partial.exists():
        found = _read(partial, search)
    missing = range(len(found.table), steps * calls)
    with _bar((steps - 1) * calls, len(missing), len(search.sites), progress and len(missing) > 0) as tick:
        before = runner.work - found.work
        for row in found.table if missing else ():
            runner.replay(row)
        for number in missing:
            row, tried = _choose(runner, number, search, function, tick)
            found = Found((*found.table, row), found.evaluations + tried, runner.work - before)
            if partial is not None:
                _write(partial, search, found)
    return found


def _choose(
    runner: Runner, number: int, search: Search, metric: Metric, tick: Callable[[], None]
) -> tuple[PlanRow, int]:
    """Search one call. Returns its choices, and the number of candidates that were tried."""
    runner.begin(number)
    reference = [output.clone() for output in runner.reference()]
    row: PlanRow = ()
    evaluations = 0
    for index in range(len(search.sites)):
        choice, tried = _first_passing(runner, number // search.calls, index, reference, search, metric)
        runner.fix(index, choice)
        row, evaluations = (*row, choice), evaluations + tried
        tick()
    runner.finish()
    return row, evaluations


def _first_passing(
    runner: Runner, step: int, index: int, reference: Sequence[Tensor], search: Search, metric: Metric
) -> tuple[Choice, int]:
    """Return the first candidate that passes at a site, or FULL, and the number of candidates that were tried."""
    candidates = search.candidates(index)
    for tried, choice in enumerate(candidates, start=1):
        output = runner.attempt(index, choice)
        with calling(metric, f"at step {step}, {search.sites[index]}, {choice}"):
            if loss(reference, output, metric) < search.threshold(index):
                return choice, tried
    return Choice.FULL, len(candidates)


def loss(reference: Sequence[Tensor], output: Sequence[Tensor], metric: Metric = relative_error) -> float:
    """Return the metric over the elements of all trajectories."""
    if [tensor.shape for tensor in reference] != [tensor.shape for tensor in output]:
        shapes = [tuple(tensor.shape) for tensor in output]
        raise BadParameter("loss", "shapes", shapes, f"those of the reference, {[tuple(r.shape) for r in reference]}")
    return float(metric(_joined(reference), _joined(output)))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, or, if other dimensions differ, all elements."""
    alike = len({tensor.shape[1:] for tensor in tensors}) == 1 and tensors[0].ndim > 0
    return torch.cat([tensor if alike else tensor.flatten() for tensor in tensors])


def _write(path: Path, search: Search, found: Found) -> None:
    rows = [row_text(row) for row in found.table]
    content = {"version": VERSION, "search": asdict(search)} | asdict(replace(found, table=())) | {"table": rows}
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _read(path: Path, search: Search) -> Found:
    """Read the progress of an unfinished search. Raises BadPlan for a damaged file, PlanMismatch for another search."""
    content = read_fields(path, {"search", *(field.name for field in fields(Found))}, VERSION)
    wanted = json.loads(json.dumps(asdict(search)))
    if content["search"] != wanted:
        raise OtherSearch(path, _differences(content["search"], wanted))
    rows, tried, work = content["table"], content["evaluations"], content["work"]
    least, most = search.calls, search.steps * search.calls
    if not (isinstance(rows, list) and least <= len(rows) <= most and is_whole(tried, 0) and is_real(work)):
        raise BadPlan(path, f"it lacks a count, or a table of {least} to {most} rows")
    try:
        table = tuple(parse_row(row) for row in rows)
    except BadParameter as error:
        raise BadPlan(path, str(error)) from None
    if any(len(row) != len(search.sites) for row in table):
        raise BadPlan(path, f"a row does not have {len(search.sites)} choices, one for each site")
    return Found(table, tried, work)


def _differences(there: object, here: dict[str, Any]) -> str:
    """Describe the settings that differ, such as ``delta: 0.1 there, 0.05 here``."""
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
def _bar(rows: int, missing: int, sites: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar over `rows` if `shown`. Yields ``tick()``, to be called for each site of the missing ones."""
    if not shown:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise MissingExtra("rich", "the progress bar", "demo") from error
    columns = (TextColumn("plan search"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=rows * sites, completed=(rows - missing) * sites)
        yield lambda: bar.advance(task)
