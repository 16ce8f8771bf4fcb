"""Plans: a table with the choice for each step and attention site (DiTFastAttn, Yuan et al. 2024, section 3.5).

A plan can be saved, drawn (`dit_rewrite.report.plan_picture`), compared and loaded. Its file is JSON with a version
number, and has a line of text for each step: the names of the choices, one for each site, stream after stream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn

from dit_rewrite.errors import BadParameter, BadPlan, PlanForOtherModel, PlanForOtherSteps
from dit_rewrite.policy.core_strategies import GRIDS
from dit_rewrite.policy.files import write_whole

VERSION = 4
SINCE = {"grid": 2, "notes": 2, "metric": 3, "attention": 3, "streams": 4}  # the first version that has the field

_LISTS = ("window", "grid", "notes", "attention", "streams")  # fields that may be tuples


class Choice(str, Enum):
    """The choices for an attention site at a step, with the paper's names (sections 3.2 to 3.4)."""

    FULL = "full"  # compute full attention
    AST = "AST"  # attention sharing across timesteps: reuse the last output
    ASC = "ASC"  # attention sharing across guidance: use the conditional half's output for both halves of the batch
    WA_RS = "WA-RS"  # window attention plus the residual to full attention from an earlier step
    WA_RS_ASC = "WA-RS+ASC"  # WA-RS on the conditional half, used for both halves

    def __str__(self) -> str:
        return self.value


PlanRow = tuple[Choice, ...]
Table = tuple[PlanRow, ...]
Window = float | tuple[float, ...]
Grid = tuple[int, ...] | Literal["latent"]

WINDOWED = frozenset({Choice.WA_RS, Choice.WA_RS_ASC})
SHARED = frozenset({Choice.ASC, Choice.WA_RS_ASC})


@dataclass(frozen=True)
class Plan:
    """The choice of each site at each step of a trajectory, for one model. Raises BadParameter for invalid fields.

    ``model`` is the model's `fingerprint`, ``scheduler`` the result of `describe_scheduler`. ``table[step][i]`` is the
    choice for ``sites[i]``, in graph order. If guidance takes several calls a step, ``streams`` has their names (see
    `cache_context`), and a row has the choices of all sites for the first stream, then those for the next.
    ``window`` is the window of WA-RS: a fraction of the tokens, or a fraction or a distance in tokens along each axis
    of ``grid``, which is (H, W) for images, (T, H, W) for videos, "latent" for the grid that the graph shows
    (see `WindowResidual`), and None for a sequence.
    ``conditional`` is the half of a guided batch that ASC computes. ``window`` and ``conditional`` may be None if no
    choice needs them.

    The other fields describe the search: ``delta`` is its threshold (0 if there was no search) by ``metric`` (see
    `search.metrics`), ``evaluations`` the number of candidates tried, and ``work`` its cost in runs of the network, as
    a fraction of the steps x |S| x |M| full runs of an exhaustive search (appendix A.2). ``notes`` name the attentions
    that were left out, and why. ``attention`` are the FLOPs of attention at each step as a fraction of those without
    the plan, for the sizes that were searched; () if they were not counted.
    """

    model: str
    steps: int
    scheduler: str
    sites: tuple[str, ...]
    table: Table
    delta: float
    window: Window | None = None
    conditional: Literal["first", "second"] | None = None
    evaluations: int = 0
    work: float = 0.0
    grid: Grid | None = None
    notes: tuple[str, ...] = ()
    metric: str = "relative_error"
    attention: tuple[float, ...] = ()
    streams: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require("model", _is_name(self.model), "the text that fingerprint(model) gives")
        self._require("steps", is_whole(self.steps, 1), "a whole number >= 1")
        self._require("scheduler", _is_name(self.scheduler), "the text that describe_scheduler gives")
        self._require("sites", are_names(self.sites), "a tuple of names, each once")
        self._require("streams", self.streams == () or are_names(self.streams), "a tuple of names, each once, or ()")
        self._check_table()
        self._require("delta", is_real(self.delta), "a number >= 0")
        self._check_window()
        self._require("conditional", self.conditional in ("first", "second", None), '"first", "second" or None')
        self._require("conditional", self.conditional or not self._uses(SHARED), '"first" or "second" for ASC')
        self._require("evaluations", is_whole(self.evaluations, 0), "a whole number >= 0")
        self._require("work", is_real(self.work), "a number >= 0")
        texts = isinstance(self.notes, tuple) and all(isinstance(note, str) for note in self.notes)
        self._require("notes", texts, "a tuple of texts")
        self._require("metric", _is_name(self.metric), "the name of a metric")
        counted = isinstance(self.attention, tuple) and all(map(is_real, self.attention))
        fits = counted and len(self.attention) in (0, self.steps)
        self._require("attention", fits, f"a tuple of {self.steps} numbers >= 0, one for each step, or ()")

    def _require(self, name: str, fits: object, allowed: str) -> None:
        if not fits:
            raise BadParameter("Plan", name, getattr(self, name), allowed)

    def _check_table(self) -> None:
        """Check ``table``; the messages do not contain the whole table."""
        if not isinstance(self.table, tuple) or len(self.table) != self.steps:
            raise BadParameter("Plan", "table", "…", f"a tuple of {self.steps} rows, one for each step")
        for step, row in enumerate(self.table):
            if not (isinstance(row, tuple) and all(isinstance(choice, Choice) for choice in row)):
                raise BadParameter("Plan", f"table[{step}]", row, "a tuple of Choice")
            if len(row) != len(self.columns):
                each = "site and stream" if self.streams else "site"
                raise BadParameter("Plan", f"len(table[{step}])", len(row), f"{len(self.columns)}, one for each {each}")

    def _check_window(self) -> None:
        check_window("Plan", self.window, self.grid)
        allowed = f"{WINDOWS} for WA-RS"
        self._require("window", self.window is not None or not self._uses(WINDOWED), allowed)

    def _uses(self, choices: frozenset[Choice]) -> bool:
        return any(choice in choices for row in self.table for choice in row)

    @property
    def columns(self) -> tuple[tuple[str | None, str], ...]:
        """The stream and the site of each choice of a row. The stream is None if the choice holds for all streams."""
        return tuple((stream, site) for stream in self.streams or (None,) for site in self.sites)

    @property
    def counts(self) -> dict[Choice, int]:
        """The number of entries of the table with each choice. All choices are keys, in the order of `Choice`."""
        counted = Counter(choice for row in self.table for choice in row)
        return {choice: counted[choice] for choice in Choice}

    def fraction(self, choice: Choice) -> float:
        """Return the fraction of the table's entries with this choice."""
        return self.counts[choice] / (self.steps * len(self.columns))

    @property
    def attention_share(self) -> float | None:
        """The FLOPs of attention over all steps as a fraction of those without the plan, None if not counted."""
        return sum(self.attention) / self.steps if self.attention else None

    def check(self, model: nn.Module, num_steps: int) -> None:
        """Raise PlanMismatch if the plan was made for another model or another number of steps.

        A choice is valid for the noise level of its step, and noise levels change with the number of steps.
        """
        found = fingerprint(model)
        if found != self.model:
            raise PlanForOtherModel(self.model, type(_original(model)).__name__, found)
        if num_steps != self.steps:
            raise PlanForOtherSteps(self.steps, num_steps)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON atomically, and remove the file of an unfinished search beside it."""
        path = Path(path)
        content = {"version": VERSION} | asdict(self) | {"table": [row_text(row) for row in self.table]}
        write_whole(path, json.dumps(content, indent=2) + "\n")
        partial_path(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Load a plan from a file written by `save`. Raises BadPlan for other content, OSError if it cannot be read."""
        content = read_fields(Path(path), {field.name for field in fields(cls)}, VERSION, SINCE)
        try:
            rows = tuple(parse_row(row) for row in _items(content, "table"))
            lists = {n: tuple(v) for n in _LISTS if isinstance(v := content.get(n), list)}
            return cls(**content | lists | {"sites": tuple(_items(content, "sites")), "table": rows})
        except BadParameter as error:
            raise BadPlan(path, str(error)) from None


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the classes of the module tree, and the names, shapes and dtypes of the parameters and
    persistent buffers. A plan identifies its model by it.

    Values are left out: a plan depends on the structure, is worth trying with fine-tuned weights, and hashing gigabytes
    on a device takes longer than loading the model. Non-persistent buffers are left out because they are tables that
    the model computes, some of them for the size of the last input. A compiled model has its original's fingerprint.
    """
    model = _original(model)
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules(remove_duplicate=False)]
    stored = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = [(name, list(value.shape), str(value.dtype)) for name, value in sorted(stored.items())]
    return _digest([modules, tensors])


def describe_scheduler(scheduler: object | None) -> str:
    """Return a scheduler's class and a hash of its config, without private entries such as diffusers' version."""
    if scheduler is None:
        return "none"
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return f"{type(scheduler).__name__}:{_digest(settings)[:16]}"


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda v: v.tolist() if hasattr(v, "tolist") else repr(v))
    return hashlib.sha256(text.encode()).hexdigest()


def _original(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or `model` itself."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def row_text(row: PlanRow) -> str:
    """Return a step's choices as a line of text."""
    return " ".join(choice.value for choice in row)


def parse_row(text: object) -> PlanRow:
    """Parse the text of `row_text`. Raises BadParameter for unknown choices."""
    names = text.split(" ") if isinstance(text, str) else [text]
    known = [choice.value for choice in Choice]
    foreign = [name for name in names if name not in known]
    if foreign:
        raise BadParameter("Plan", "choice", foreign[0], f"one of {', '.join(known)}")
    return tuple(Choice(name) for name in names)


def partial_path(path: Path) -> Path:
    """Return the file in which a search for the plan at `path` saves its progress."""
    return path.with_name(f"{path.name}.partial")


def read_fields(
    path: Path, names: set[str], version: int, since: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """Read a JSON object that has exactly the fields `names`, and the given `version`.

    `since` maps fields to the version that introduced them; with it, older versions without these fields are accepted.
    Raises BadPlan for any other content.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadPlan(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadPlan(path, f"it is a {type(content).__name__}, not a JSON object")
    found = content.pop("version", None)
    oldest = 1 if since else version
    if type(found) is not int or not oldest <= found <= version:
        raise BadPlan(path, f"its version is {found!r:.50}, and this dit_rewrite reads version {version}")
    names = {name for name in names if since.get(name, oldest) <= found}
    for problem, wrong in (("lacks the fields", names - set(content)), ("has unknown fields", set(content) - names)):
        if wrong:
            raise BadPlan(path, f"it {problem} {', '.join(sorted(wrong))}")
    return content


def _items(content: dict[str, Any], name: str) -> list[Any]:
    items = content[name]
    if not isinstance(items, list):
        raise BadParameter("Plan", name, items, "a list")
    return items


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Return whether `value` is an int (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_real(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number >= 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


WINDOWS = "a fraction in (0, 1], or a tuple of whole numbers >= 0 or such fractions, one for each axis"


def check_window(where: str, window: object, grid: object) -> None:
    """Raise BadParameter unless `window` is None or fits the axes of `grid`; grid=None means a sequence."""
    axes = (len(grid),) if isinstance(grid, tuple) else (1, 2, 3) if grid == "latent" else (1,)
    good = isinstance(grid, tuple) and 1 <= len(grid) <= 3 and all(is_whole(n, 1) for n in grid)
    if grid not in (None, "latent") and not good:
        raise BadParameter(where, "grid", grid, GRIDS)
    tokens = isinstance(window, tuple) and len(window) in (1, *axes) and all(map(_is_reach, window))
    if not (_is_fraction(window) or tokens or window is None):
        raise BadParameter(where, "window", window, f"{WINDOWS} of grid={grid}, or None")


def _is_fraction(value: object) -> bool:
    return is_real(value) and 0 < value <= 1


def _is_reach(value: object) -> bool:
    """Return whether `value` is a distance in tokens, or a fraction below 1 of an axis."""
    return is_whole(value, 0) or (isinstance(value, float) and 0 < value < 1)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def are_names(value: object) -> bool:
    """Return whether `value` is a tuple of at least one non-empty string, without duplicates."""
    return isinstance(value, tuple) and len(value) > 0 and all(map(_is_name, value)) and len(set(value)) == len(value)
