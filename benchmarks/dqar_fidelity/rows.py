"""The rows of the DQAR fidelity benchmark: the policy of each row, and its measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.timing import Spread
from dit_rewrite.policies import DQAR, FORA, FirstBlockCache
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.serialise import to_json
from dit_rewrite.policy.strategies import Reuse, ReuseKV, Store

FAMILIES: dict[str, Callable[..., Policy]] = {"FORA": FORA, "DQAR": DQAR, "FirstBlockCache": FirstBlockCache}
STEPS = "steps"  # the family of the controls, which are uncached with fewer steps
SHARES = (0.95, 0.85, 0.7, 0.5, 0.35, 0.25)  # share of the steps of each control


@dataclass(frozen=True)
class Recipe:
    """One row: a policy of a family with its settings, optionally with a packed codec or cached keys and values."""

    name: str
    family: str
    settings: Mapping[str, Any]
    store: Store = None
    kv: bool = False

    def policy(self) -> Policy | None:
        """The policy to compile with, or None for a control."""
        if self.family == STEPS:
            return None
        policy = FAMILIES[self.family](**self.settings)
        if self.store is None and not self.kv:
            return policy
        do = ReuseKV(self.store) if self.kv else Reuse(self.store)
        return Policy(tuple(replace(rule, do=do) for rule in policy.rules), f"{policy.name} with {do}")

    def key(self) -> dict[str, Any]:
        """Everything that determines the row's figures, apart from the benchmark's settings."""
        policy = self.policy()
        more = {"name": self.name, "family": self.family, "settings": dict(self.settings)}
        return more | {"store": self.store, "kv": self.kv, "policy": None if policy is None else to_json(policy)}


@dataclass(frozen=True)
class Result:
    """The measurements of a row. Images are compared with the uncached ones of the same noise and labels.

    seconds_per_image: over all batches. ratio: time over that of the uncached model, on batches run in alternation.
    reuse: share of the site decisions that reused. relative_l2_by_batch: the error of each batch, for paired
    comparisons. frechet_data, frechet_uncached: Fréchet distances of the classifier's features to real images and to
    the uncached ones. late_variants: variants compiled during the measured batches.
    """

    key: dict[str, Any]
    steps: int
    seconds_per_image: Spread
    ratio: Spread
    reuse: float
    relative_l2: float
    relative_l2_by_batch: list[float]
    ssim: float
    accuracy: float
    frechet_data: float
    frechet_uncached: float
    compile_seconds: float = 0.0
    cache_bytes: int = 0
    late_variants: int = 0
    misses: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.key["name"]

    @property
    def family(self) -> str:
        return self.key["family"]

    def setting(self, name: str) -> Any:
        return self.key["settings"].get(name)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Result:
        spreads = {name: Spread(**row[name]) for name in ("seconds_per_image", "ratio")}
        return cls(**{**row, **spreads})


def fewer(steps: int) -> Recipe:
    """Return a control: uncached with fewer steps."""
    return Recipe(f"{steps} steps", STEPS, {"steps": steps})


def uncached(steps: int) -> Recipe:
    """Return the recipe of the uncached model, which all rows are compared with."""
    return Recipe("uncached", STEPS, {"steps": steps})


def _fora(interval: int, *, attention: bool = False, **more: Any) -> Recipe:
    settings: dict[str, Any] = {"interval": interval}
    if attention:
        settings["kinds"] = ("attention",)
    return Recipe(_named(f"FORA {interval}{' attention' if attention else ''}", **more), "FORA", settings, **more)


def _dqar(
    warmup: float,
    fraction: float,
    *,
    snr: float | None = None,
    entropy: float | None = None,
    reverse: bool = False,
    **more: Any,
) -> Recipe:
    settings = {
        "warmup": warmup,
        "layer_fraction": fraction,
        "snr_threshold": snr,
        "order": "linear_reverse" if reverse else "linear",
        "entropy_threshold": entropy,
    }
    name = f"DQAR {warmup}/{fraction}{' reverse' if reverse else ''}"
    name += "" if snr is None else f" snr>{snr}"
    name += "" if entropy is None else f" entropy<{entropy}"
    return Recipe(_named(name, **more), "DQAR", settings, **more)


def _named(name: str, store: str | None = None, kv: bool = False) -> str:
    return f"{name}{' K/V' if kv else ''}{'' if store is None else ' ' + store}"


def recipes(steps: int) -> list[Recipe]:
    """Return all rows of a benchmark with `steps` steps, the controls first.

    The schedules are chosen so that each gated one has a static or SNR-gated counterpart with nearly the same reuse
    ratio (equation 2 of DQAR on 8 layers). The entropies of the bundled model lie between 3.2 and 3.9 nats; the maximum
    is ln 64 = 4.16.
    """
    default, aggressive = (0.4, 0.33), (0.2, 1.0)
    return [
        *(fewer(n) for n in sorted({round(share * steps) for share in SHARES} - {0, steps}, reverse=True)),
        *(_fora(interval) for interval in (2, 3, 5)),
        *(_dqar(warmup, fraction) for warmup in (0.2, 0.4, 0.5, 0.6) for fraction in (0.33, 1.0)),
        _dqar(0.2, 0.66),
        *(_dqar(*default, snr=threshold) for threshold in (0.1, 0.5, 1.0)),
        *(_dqar(*aggressive, snr=threshold) for threshold in (0.1, 0.5, 1.0, 1.5)),
        *(_dqar(warmup, 1.0, reverse=True) for warmup in (0.2, 0.4)),
        _dqar(*default, reverse=True),
        *(_dqar(*aggressive, entropy=threshold) for threshold in (3.6, 3.7)),
        *(_dqar(*aggressive, snr=0.5, entropy=threshold) for threshold in (3.6, 3.7)),
        _fora(3, attention=True),
        _fora(3, attention=True, kv=True),
        _dqar(*aggressive, kv=True),
        *(_fora(3, store=store) for store in ("int8", "fp8")),
        *(_dqar(*default, snr=0.5, store=store) for store in ("int8", "fp8")),
        *(Recipe(f"FBC {threshold}", "FirstBlockCache", {"threshold": threshold}) for threshold in (0.05, 0.1, 0.2)),
    ]
