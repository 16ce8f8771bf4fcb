"""Checks every entry in the catalogue of errors and reasons."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from dit_rewrite import errors
from dit_rewrite.errors import (
    BadTrajectory,
    CommandError,
    DitRewriteError,
    KernelError,
    MissingExtra,
    ModelError,
    NotCalibrated,
    NotCaptured,
    PlanMismatch,
    PolicyError,
    Reason,
)
from dit_rewrite.guards import step

ROOT = Path(__file__).parents[1]
PRODUCT = [p for folder in ("dit_rewrite", "passes", "kernels", "runtime") for p in (ROOT / folder).rglob("*.py")]
SOURCE = "\n".join(path.read_text() for path in PRODUCT if path.parent.name != "errors")
EXPORTED: list[type] = [getattr(errors, name) for name in errors.__all__]
FAMILIES = (PolicyError, KernelError, CommandError, ModelError, BadTrajectory)
GROUPS = {DitRewriteError, *FAMILIES, PlanMismatch, NotCalibrated}  # for `except` only
FAULTS = [kind for kind in EXPORTED if issubclass(kind, DitRewriteError) and kind not in GROUPS]
REASONS = [member for kind in EXPORTED if issubclass(kind, Reason) for member in kind]
VALUES: dict[str, Any] = {
    "names": ["a", "b"],
    "known": ["a", "b"],
    "symbols": ["a", "b"],
    "functions": ["a", "b"],
    "stores": [None, "int8"],
    "components": ["vae"],
    "refused": ["mlp: it is none"],
    "breaks": {"model.py:3": 2},
    "hooks": {"hook": 4},
    "a": (0, 2),
    "b": (1, 3),
    "guard": step > 2,
    "cause": OSError("no such file"),
    "scheduler": None,
    "r2": 0.5,
}
VERBS = "Call|Check|Compile|Find|Give|Install|Leave|Load|Offload|Remove|Restore|Sample|Search|Use|Write"
TODO = re.compile(rf"([.)] |\n)({VERBS}) ")


def example(kind: type[DitRewriteError]) -> DitRewriteError:
    """An instance of this error class; fields without a specific value are text."""
    takes = list(inspect.signature(kind).parameters) if "__init__" in vars(kind) else kind.fields()
    return kind(*(VALUES.get(name, f"Give {name}" if name == "remedy" else name) for name in takes))


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_faults(kind: type[DitRewriteError]) -> None:
    """Each error says what to do, belongs to one family, survives pickling, and is raised somewhere."""
    error = example(kind)
    assert TODO.search(str(error)), str(error)
    assert "{" not in str(error)
    assert sum(issubclass(kind, family) for family in FAMILIES) == 1
    error.seen_in = "a worker"  # type: ignore[attr-defined]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(again), str(again), again.args) == (kind, str(error), error.args)
        assert again.seen_in == "a worker"
    assert re.search(rf"\b(raise|return) {kind.__name__}\b|\belse {kind.__name__}\(", SOURCE), "it is never raised"


def test_groups_have_no_message_of_their_own() -> None:
    assert not any(kind.template for kind in GROUPS)
    assert all(kind.template for kind in FAULTS)


def test_values_that_do_not_fit_a_template() -> None:
    assert str(NotCaptured(what="explain()")) == str(NotCaptured("explain()"))
    for values, named in [((), {}), (("explain()", 3), {}), (("explain()",), {"what": 3}), ((), {"that": 3})]:
        with pytest.raises(TypeError, match="NotCaptured takes what"):
            NotCaptured(*values, **named)
    assert "{braces}" in str(NotCaptured("{braces}"))


def test_import_errors_have_their_message() -> None:
    again = pickle.loads(pickle.dumps(MissingExtra("rich", "the demo", "demo")))
    assert again.msg == "the demo needs rich. Install it: pip install 'dit_rewrite[demo]'."


def test_everything_is_exported() -> None:
    found = {DitRewriteError, Reason}
    todo = list(found)
    while todo:
        more = [kind for kind in todo.pop().__subclasses__() if kind.__module__.startswith("dit_rewrite.errors")]
        todo += more
        found.update(more)
    assert found == set(EXPORTED)


@pytest.mark.parametrize("member", REASONS, ids=repr)
def test_reasons(member: Reason) -> None:
    """Each reason is reported somewhere, and its phrase differs from every other one."""
    assert re.search(rf"\b{type(member).__name__}\.{member.name}\b", SOURCE), "it is never reported"
    assert str(member) == member.value
    assert len(str(member).split()) >= 3, "a phrase"
    assert [other for other in REASONS if other == member] == [member]
    assert pickle.loads(pickle.dumps(member)) is member
