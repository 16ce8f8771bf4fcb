"""Tune the parameters of a policy with Optuna: a grid, TPE or NSGA-II, over one or more objectives."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dit_rewrite.errors import AllRefused, BadParameter, BadStorage, MissingExtra, OtherStudy, PolicyError
from dit_rewrite.policy.rules import Policy
from dit_rewrite.proof.callers import calling
from dit_rewrite.search.front import Front, Point

if TYPE_CHECKING:
    import optuna

Values = Mapping[str, float]  # objectives by name; all are minimised
Evaluate = Callable[[Policy], Iterable[Values]]  # yields the values so far, the last time all
PARTIAL = "values so far"  # the attribute of a trial with the values that `Evaluate` yielded
REFUSED = "refused"  # the attribute of a trial with the reason why the policy refused its parameters
KEY = "arguments"  # the attribute of a study with the arguments that its trials share
HOPELESS = 2.0


class Range(NamedTuple):
    """The values of a parameter from `low` to `high`, both included; whole numbers if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


Space = Mapping[str, Sequence[Any] | Range]


def tune(
    make_policy: Callable[..., Policy],
    space: Space,
    evaluate: Evaluate,
    *,
    objectives: Sequence[str] = ("error", "flops"),
    sampler: Literal["grid", "tpe", "nsga2"] = "tpe",
    trials: int | None = None,
    storage: str | Path | None = None,
    study: str = "dit_rewrite",
    seed: int = 0,
    prune: bool = True,
    timeout: float | None = None,
    report: Callable[[str], object] = lambda _: None,
) -> Front:
    """Search the parameters of a policy. Returns all trials, and the front of those that no other dominates.

    `make_policy` is a policy of `dit_rewrite.policies` or another function of the parameters in `space`, which maps
    each name to its values, or to a `Range`. `evaluate` yields the values of the `objectives`, which are minimised:
    `Evaluation(model, sample, seeds)` runs the model, and yields after each seed. "grid" tries every combination and
    takes no Range; "tpe" and "nsga2" try `trials` combinations. Parameters that the policy refuses are pruned trials.
    With `prune`, a trial is abandoned after a seed if a finished one is no worse in any objective and half as bad in
    one.

    `storage` is a journal file, or the URL of a database. Several processes or machines that are given the same one
    share the study, and an interrupted study is continued: `trials` counts those that are already in it. No trial
    begins after `timeout` seconds. Raises BadParameter, BadStorage, OtherStudy for a study with other arguments,
    AllRefused if the policy refused the parameters of all trials, FunctionFailed for an exception of `make_policy` or
    `evaluate`, and MissingExtra without Optuna.
    """
    optuna = _optuna()
    _check(make_policy, space, objectives, sampler, trials)
    count = trials or len(list(itertools.product(*space.values())))
    chooser, directions = _sampler(optuna, sampler, space, seed), ["minimize"] * len(objectives)
    with _opening(storage):
        found = optuna.create_study(
            storage=_storage(optuna, storage),
            sampler=chooser,
            study_name=study,
            directions=directions,
            load_if_exists=True,
        )
    _claim(found, _key(make_policy, space, evaluate, objectives))

    def objective(trial: Any) -> tuple[float, ...]:
        parameters = {name: _suggest(trial, name, values) for name, values in space.items()}
        try:
            with calling(make_policy, f"with {parameters}"):
                policy = make_policy(**parameters)
        except PolicyError as error:
            trial.set_user_attr(REFUSED, str(error))
            raise optuna.TrialPruned(str(error)) from error
        with calling(evaluate, f"with {policy}", optuna.TrialPruned):
            return _evaluated(trial, evaluate(policy), objectives, prune)

    def told(_: Any, trial: Any) -> None:
        values = ", ".join(f"{v:.4g}" for v in trial.values or ())
        report(f"trial {trial.number} of {count}: {trial.params}: {values or trial.user_attrs.get(REFUSED, 'pruned')}")

    left = count - len(_ended(found))
    if left > 0:
        found.optimize(objective, n_trials=left, timeout=timeout, callbacks=[told])
    return _front(found, make_policy, tuple(objectives))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optuna", "tune", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial raises its error
    return optuna


def _key(
    make_policy: Callable[..., Policy], space: Space, evaluate: Evaluate, objectives: Sequence[str]
) -> dict[str, str]:
    """Return what all trials of a study share, as text. `evaluate` may add a ``key``, as `Evaluation` does."""
    policy = getattr(make_policy, "__qualname__", type(make_policy).__name__)
    key = {"policy": policy, "objectives": ", ".join(objectives), **getattr(evaluate, "key", {})}
    return key | {f"space of {name}": repr(values) for name, values in space.items()}


def _claim(study: Any, key: dict[str, str]) -> None:
    """Write the key into a new study. Raises OtherStudy for a study with another one."""
    known = study.user_attrs.get(KEY, {})
    if not known and not study.get_trials(deepcopy=False):
        study.set_user_attr(KEY, key)
    elif known != key:
        differing = sorted(name for name in {*known, *key} if known.get(name) != key.get(name))
        differences = (f"{name}: {known.get(name)!s:.40}, not {key.get(name)!s:.40}" for name in differing)
        raise OtherStudy(study.study_name, "; ".join(differences))


def _check(
    make_policy: Callable[..., Policy], space: Space, objectives: Sequence[str], sampler: str, trials: int | None
) -> None:
    if not callable(make_policy):
        raise BadParameter("tune", "make_policy", make_policy, "a function such as dit_rewrite.policies.FORA")
    if sampler not in ("grid", "tpe", "nsga2"):
        raise BadParameter("tune", "sampler", sampler, '"grid", "tpe" or "nsga2"')
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if not space or any(not values for values in space.values()) or (sampler == "grid" and ranges):
        allowed = "values for each parameter; a grid takes no Range"
        raise BadParameter("tune", "space", dict(space), allowed)
    for name, values in space.items():
        if isinstance(values, Range) and not (values.low <= values.high and (values.low > 0 or not values.log)):
            raise BadParameter("tune", f"space[{name!r}]", values, "low <= high, and low > 0 with log")
    _check_names(make_policy, space)
    if not objectives or len(set(objectives)) < len(objectives):
        raise BadParameter("tune", "objectives", objectives, "one or more names, each once")
    if sampler != "grid" and (not isinstance(trials, int) or trials < 1):
        raise BadParameter("tune", "trials", trials, "a whole number >= 1; only a grid needs none")


def _check_names(make_policy: Callable[..., Policy], space: Space) -> None:
    """Raise BadParameter for a parameter that the policy does not have."""
    known = inspect.signature(make_policy).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for name in space:
            if name not in known:
                raise BadParameter("tune", "space", name, f"parameters of the policy: {', '.join(known)}")


@contextmanager
def _opening(storage: object) -> Iterator[None]:
    """Raise BadStorage for a damaged journal, or a database that cannot be used, and OSError for a file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of Optuna, SQLAlchemy, the database's driver, or of what a damaged journal holds
        raise BadStorage(storage, f"{type(error).__name__}: {error}") from error


def _storage(optuna: Any, storage: str | Path | None) -> Any:
    """Return the storage of a study: none, a database by its URL, or a journal file."""
    if storage is None or "://" in str(storage):
        return storage
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))


def _sampler(optuna: Any, name: str, space: Space, seed: int) -> Any:
    if name == "grid":
        return optuna.samplers.GridSampler({key: list(values) for key, values in space.items()}, seed=seed)
    kinds = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
    return kinds[name](seed=seed)


def _suggest(trial: optuna.Trial, name: str, values: Sequence[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, list(values))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, step=int(values.step or 1), log=values.log)
    return trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)


def _evaluated(
    trial: optuna.Trial, yielded: Iterable[Values], objectives: Sequence[str], prune: bool
) -> tuple[float, ...]:
    """Follow an evaluation to its end. Raises TrialPruned if a finished trial makes it hopeless."""
    optuna, partial = _optuna(), []
    for values in yielded:
        if not isinstance(values, Mapping) or not set(objectives) <= values.keys():
            allowed = f"names that `evaluate` yields: {', '.join(values)}"
            raise BadParameter("tune", "objectives", objectives, allowed)
        partial.append([float(values[name]) for name in objectives])
        trial.set_user_attr(PARTIAL, partial)
        if prune and is_hopeless(partial, [t.user_attrs.get(PARTIAL, []) for t in _finished(trial.study)]):
            raise optuna.TrialPruned(f"a finished trial is better after {len(partial)} seeds")
    if not partial:
        raise BadParameter("tune", "evaluate", "nothing", "a function that yields the values of the objectives")
    return tuple(partial[-1])


def is_hopeless(partial: Sequence[Sequence[float]], finished: Iterable[Sequence[Sequence[float]]]) -> bool:
    """Return whether a finished trial was, after as many seeds, no worse anywhere and half as bad somewhere."""
    own, place = partial[-1], len(partial) - 1
    others = [values[place] for values in finished if place < len(values) - 1]  # at the end nothing is saved
    return any(
        all(a <= b for a, b in zip(other, own, strict=True))
        and any(HOPELESS * a < b for a, b in zip(other, own, strict=True))
        for other in others
    )


def _finished(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def _ended(study: Any) -> list[Any]:
    """Return the trials that count: finished and pruned ones, and not those whose process was killed."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def _front(study: Any, make_policy: Callable[..., Policy], objectives: tuple[str, ...]) -> Front:
    points, ended = [], _ended(study)
    refused = [trial.user_attrs[REFUSED] for trial in ended if REFUSED in trial.user_attrs]
    if refused and len(refused) == len(ended):
        raise AllRefused(len(refused), refused[-1])
    for trial in _finished(study):
        values = dict(zip(objectives, trial.values, strict=True))
        points.append(Point(trial.number, trial.params, values, make_policy(**trial.params)))
    return Front(objectives, tuple(points), len(ended) - len(points))
