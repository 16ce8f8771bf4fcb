"""Errors of functions of the caller: the function, the run and the original exception."""

from __future__ import annotations

import pickle
from functools import partial, wraps

import pytest

from dit_rewrite.errors import FunctionFailed, NoSteps
from dit_rewrite.proof.callers import calling, name_of


def fail(kind: type[BaseException]) -> None:
    raise kind("it\nbroke")


class Metric:
    def __call__(self) -> None:
        fail(KeyError)

    def method(self) -> None:
        fail(KeyError)


def test_names() -> None:
    here = __name__
    assert name_of(fail) == f"{here}.fail"
    assert name_of(partial(partial(fail, KeyError))) == f"{here}.fail"
    assert name_of(Metric()) == name_of(Metric) == f"{here}.Metric"
    assert name_of(Metric().method) == f"{here}.Metric.method"
    assert name_of(wraps(partial(fail, KeyError))(lambda: None)) == f"{here}.fail"


def test_an_exception_is_told_with_its_function_and_run() -> None:
    says = r"test_callers\.fail failed with seed 3 \(KeyError: "
    with pytest.raises(FunctionFailed, match=says) as caught, calling(fail, "with seed 3"):
        fail(KeyError)
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, IndexError])
def test_others_are_passed_on(kind: type[BaseException]) -> None:
    """Interrupts, the exceptions that are named, and those of the catalogue: the innermost function is named."""
    with pytest.raises(kind), calling(fail, "with seed 3", IndexError):
        fail(kind)
    with pytest.raises(NoSteps), calling(fail, "with seed 3"):
        raise NoSteps(0)
    with pytest.raises(FunctionFailed, match="the inner failed inside"), calling(fail, "outside"):
        raise FunctionFailed("the inner", "inside", ValueError())
