"""The transitions of a slot: one table for calls that run and for steps that are foreseen."""

from __future__ import annotations

from enum import Enum

from dit_rewrite.errors import DecisionReason, Reason
from dit_rewrite.runtime.history import NEVER, Computed, Past, pushed


class Transition(Enum):
    """The effect of a step on the slot of a site."""

    FILL = "the slot gets the computed value"
    EMPTY = "the site was computed without its value being kept: older values are no longer of use"
    USE = "the slot was read, or its value was verified: it stays as it is"
    NONE = "an enclosing site was reused"


def transition(reused: bool, reason: Reason) -> Transition:
    """Return the effect of a decision on the slot of its site."""
    if reason is DecisionReason.COVERED:
        return Transition.NONE
    if reason is DecisionReason.UNREAD:
        return Transition.EMPTY
    return Transition.USE if reused or reason is DecisionReason.VERIFIED else Transition.FILL


def after(change: Transition, past: Past, streak: int, now: Computed, depth: int) -> tuple[Past, int]:
    """Return the steps of the values in a slot, and the number of uses since the last one, after a transition.

    `past` and `streak` are those before it, `now` is the step, and `depth` is how many values the slot keeps.
    """
    if change is Transition.FILL:
        return pushed(past, now, depth), 0
    if change is Transition.EMPTY:
        return pushed(NEVER, now, 1), 0
    return past, streak + (change is Transition.USE)
