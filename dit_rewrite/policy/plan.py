"""Plans: for each step and site, what is done in place of full attention (DiTFastAttn, Yuan et al. 2024, section 3.5).

A plan is a table that can be saved, drawn (`dit_rewrite.report.plan_picture`), compared and loaded. Its file is JSON
with a version, and a line of text for each step: the names of the choices, site by site.
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

VERSION = 2
SINCE = {"grid": 2, "notes": 2}  # the first version that has a field


class Choice(str, Enum):
    """What is done with an attention at a step, by the paper's names (sections 3.2 to 3.4)."""

    FULL = "full"  # it is computed
    AST = "AST"  # attention sharing across timesteps: the last output again
    ASC = "ASC"  # attention sharing across guidance: the conditional half, for both halves of the batch
    WA_RS = "WA-RS"  # window attention, and the residual to full attention of an earlier step
    WA_RS_ASC = "WA-RS+ASC"  # the same of the conditional half, for both

    def __str__(self) -> str:
        return self.value


Row = tuple[Choice, ...]
Table = tuple[Row, ...]
Window = float | tuple[int, ...]
Grid = tuple[int, ...]

WINDOWED = frozenset({Choice.WA_RS, Choice.WA_RS_ASC})
SHARED = frozenset({Choice.ASC, Choice.WA_RS_ASC})


@dataclass(frozen=True)
class Plan:
    """What each site does at each step of one model's trajectory. Raises BadParameter for fields that do not fit.

    ``model`` is the model's `fingerprint`, ``scheduler`` the sampler by `describe_scheduler`. ``table[step][i]`` is the
    choice of ``sites[i]``, in graph order. ``window`` is the window of WA-RS, as a share of the tokens or as a distance
    in tokens on each axis of ``grid``, the (H, W) or (T, H, W) of an image's or a video's tokens (None: a sequence);
    ``conditional`` the half of a guided batch that ASC computes. Each may be None where no choice needs it.

    How it was found: ``delta`` is the threshold of the search (0 where nothing was searched), ``evaluations`` how many
    candidates it tried, and ``work`` its runs of the network, as a share of the steps x |S| x |M| that a full run for
    every candidate takes (appendix A.2). ``notes`` say which attentions it left out, and why.
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

    def __post_init__(self) -> None:
        self._require("model", _is_name(self.model), "the text that fingerprint(model) gives")
        self._require("steps", is_whole(self.steps, 1), "a whole number >= 1")
        self._require("scheduler", _is_name(self.scheduler), "the text that describe_scheduler gives")
        self._require("sites", are_names(self.sites), "a tuple of names, each once")
        self._check_table()
        self._require("delta", is_real(self.delta), "a number >= 0")
        self._check_window()
        self._require("conditional", self.conditional in ("first", "second", None), '"first", "second" or None')
        self._require("conditional", self.conditional or not self._uses(SHARED), '"first" or "second" for ASC')
        self._require("evaluations", is_whole(self.evaluations, 0), "a whole number >= 0")
        self._require("work", is_real(self.work), "a number >= 0")
        texts = isinstance(self.notes, tuple) and all(isinstance(note, str) for note in self.notes)
        self._require("notes", texts, "a tuple of texts")

    def _require(self, name: str, fits: object, allowed: str) -> None:
        if not fits:
            raise BadParameter("Plan", name, getattr(self, name), allowed)

    def _check_table(self) -> None:
        """Without the whole table in the message."""
        if not isinstance(self.table, tuple) or len(self.table) != self.steps:
            raise BadParameter("Plan", "table", "…", f"a tuple of {self.steps} rows, one for each step")
        for step, row in enumerate(self.table):
            if not (isinstance(row, tuple) and all(isinstance(choice, Choice) for choice in row)):
                raise BadParameter("Plan", f"table[{step}]", row, "a tuple of Choice")
            if len(row) != len(self.sites):
                raise BadParameter("Plan", f"len(table[{step}])", len(row), f"{len(self.sites)}, one for each site")

    def _check_window(self) -> None:
        check_window("Plan", self.window, self.grid)
        allowed = f"{WINDOWS} for WA-RS"
        self._require("window", self.window is not None or not self._uses(WINDOWED), allowed)

    def _uses(self, choices: frozenset[Choice]) -> bool:
        return any(choice in choices for row in self.table for choice in row)

    @property
    def counts(self) -> dict[Choice, int]:
        """How many (step, site) have each choice; all choices, in their order."""
        counted = Counter(choice for row in self.table for choice in row)
        return {choice: counted[choice] for choice in Choice}

    def fraction(self, choice: Choice) -> float:
        """The share of all (step, site) that have this choice."""
        return self.counts[choice] / (self.steps * len(self.sites))

    def check(self, model: nn.Module, num_steps: int) -> None:
        """Raise PlanMismatch for another model, or for a trajectory of more or fewer steps.

        A choice holds for its step's noise level, which is another one as soon as the number of steps is.
        """
        found = fingerprint(model)
        if found != self.model:
            raise PlanForOtherModel(self.model, type(_original(model)).__name__, found)
        if num_steps != self.steps:
            raise PlanForOtherSteps(self.steps, num_steps)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all, and remove what an unfinished search left beside it."""
        path = Path(path)
        content = {"version": VERSION} | asdict(self) | {"table": [row_text(row) for row in self.table]}
        write_whole(path, json.dumps(content, indent=2) + "\n")
        partial_path(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan of a file that `save` has written. Raises BadPlan for whatever else is in it, OSError without it."""
        content = read_fields(Path(path), {field.name for field in fields(cls)}, VERSION, SINCE)
        try:
            rows = tuple(parse_row(row) for row in _items(content, "table"))
            lists = {n: tuple(v) for n in ("window", "grid", "notes") if isinstance(v := content.get(n), list)}
            return cls(**content | lists | {"sites": tuple(_items(content, "sites")), "table": rows})
        except BadParameter as error:
            raise BadPlan(path, str(error)) from None


def fingerprint(model: nn.Module) -> str:
    """What a plan knows its model by: SHA-256 over the classes of the module tree, and the names, shapes and dtypes of
    its parameters and persistent buffers.

    Values are left out: a plan is a matter of structure, it stays worth trying for fine-tuned weights, and hashing
    gigabytes on a device would take longer than loading the model. So are buffers that a checkpoint does not hold:
    they are tables made anew, some of them for the size of the last input. A compiled model has its original's.
    """
    model = _original(model)
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules(remove_duplicate=False)]
    held = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = [(name, list(value.shape), str(value.dtype)) for name, value in sorted(held.items())]
    return _digest([modules, tensors])


def describe_scheduler(scheduler: object | None) -> str:
    """A scheduler's class, and the hash of its config without private entries (such as diffusers' version)."""
    if scheduler is None:
        return "none"
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return f"{type(scheduler).__name__}:{_digest(settings)[:16]}"


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda v: v.tolist() if hasattr(v, "tolist") else repr(v))
    return hashlib.sha256(text.encode()).hexdigest()


def _original(model: nn.Module) -> nn.Module:
    """The module that was compiled."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def row_text(row: Row) -> str:
    """A step's choices, as a line of text."""
    return " ".join(choice.value for choice in row)


def parse_row(text: object) -> Row:
    """The choices of `row_text`. Raises BadParameter for foreign ones."""
    names = text.split(" ") if isinstance(text, str) else [text]
    known = [choice.value for choice in Choice]
    foreign = [name for name in names if name not in known]
    if foreign:
        raise BadParameter("Plan", "choice", foreign[0], f"one of {', '.join(known)}")
    return tuple(Choice(name) for name in names)


def partial_path(path: Path) -> Path:
    """Where a search of the plan in `path` keeps what it has found so far."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or finds it after a crash, has all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.writing")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_fields(
    path: Path, names: set[str], version: int, since: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """The object in a JSON file that has these fields and this version, or, where some fields are known to have come
    `since` a version, an older one without them. Raises BadPlan for another.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadPlan(path, f"it is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadPlan(path, f"it is a {type(content).__name__}, and no object with fields")
    found = content.pop("version", None)
    oldest = 1 if since else version
    if type(found) is not int or not oldest <= found <= version:
        raise BadPlan(path, f"its version is {found!r:.50}, and this dit_rewrite reads {version}")
    names = {name for name in names if since.get(name, oldest) <= found}
    for problem, wrong in (("lacks", names - set(content)), ("has the foreign", set(content) - names)):
        if wrong:
            raise BadPlan(path, f"it {problem} {', '.join(sorted(wrong))}")
    return content


def _items(content: dict[str, Any], name: str) -> list[Any]:
    items = content[name]
    if not isinstance(items, list):
        raise BadParameter("Plan", name, items, "a list")
    return items


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """A whole number (true is none) of at least that size."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_real(value: object) -> TypeGuard[float]:
    """A finite number >= 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


WINDOWS = "a share in (0, 1], or a tuple of whole numbers >= 0, one for each axis"


def check_window(where: str, window: object, grid: object) -> None:
    """Raise BadParameter unless `window` fits a sequence, or the axes of a `grid`."""
    axes = len(grid) if isinstance(grid, tuple) else 1
    good = isinstance(grid, tuple) and 1 <= axes <= 3 and all(is_whole(n, 1) for n in grid)
    if grid is not None and not good:
        raise BadParameter(where, "grid", grid, "(H, W) or (T, H, W) in tokens, or None for a sequence")
    tokens = isinstance(window, tuple) and len(window) in (1, axes) and all(is_whole(n, 0) for n in window)
    share = is_real(window) and 0 < window <= 1
    if not (share or tokens or window is None):
        raise BadParameter(where, "window", window, f"{WINDOWS} of grid={grid}, or None")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def are_names(value: object) -> bool:
    """A tuple of at least one name, none of them twice."""
    return isinstance(value, tuple) and len(value) > 0 and all(map(_is_name, value)) and len(set(value)) == len(value)
