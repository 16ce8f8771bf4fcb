"""The findings of the redundancy study and of the papers before it, judged on the trained toys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.record import Claim, Evidence
from dit_rewrite.analysis.compare import resampled, spearman

TOYS = ("class", "text", "flow")
STUDIED = ("keys", "values", "attention")
STABLE = 0.8  # the smallest rank correlation of distributions that are called the same
VARIATION = 0.15  # the largest of table 2's figures
LARGER = 1.2  # how much more counts as more
DEEPER = 0.5  # the smallest rank correlation of a trend

Sections = Mapping[str, Mapping[str, Any]]
Judge = Callable[[Mapping[str, Any]], list[tuple[str, float | None, bool]]]  # what, number, and whether it holds


def judge(sections: Sections) -> list[Claim]:
    """Return the claims with their evidence from the trained toys. Missing entries leave a claim open."""
    toys = {name: sections[name] for name in TOYS if "base" in sections.get(name, {})}
    claims = [Claim.of(text, bound, _evidence(toys, each)) for text, bound, each in _CLAIMS]
    claims.append(
        Claim.of(
            "The distribution over steps differs between models", f"rank correlation below {STABLE}", _between(toys)
        )
    )
    return claims


def _evidence(toys: Sections, each: Judge) -> list[Evidence]:
    return [
        {"toy": name, "what": what, "value": value, "held": held}
        for name, entries in toys.items()
        for what, value, held in each(entries)
    ]


def _between(toys: Sections) -> list[Evidence]:
    found = []
    for (a, first), (b, second) in itertools.combinations(toys.items(), 2):
        value = trend(first, second)
        found.append({"toy": f"{a}, {b}", "what": "attention", "value": value, "held": value < STABLE})
    return found


def trend(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return the rank correlation of two toys' attention profiles, averaged over their layers."""
    import torch

    a, b = (torch.tensor(toy["base"]["quantities"]["attention"]["profile"]).double() for toy in (first, second))
    return spearman(a, resampled(b, len(a)))


def _quantities(entries: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: entries["base"]["quantities"][name] for name in names if name in entries["base"]["quantities"]}


def _variation(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    return [(n, q["variation"][0], q["variation"][0] <= VARIATION) for n, q in _quantities(entries, *STUDIED).items()]


def _prompts(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    return [(n, q["prompts"][0], q["prompts"][0] >= STABLE) for n, q in _quantities(entries, *STUDIED).items()]


def _against(*names: str) -> Judge:
    def found(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
        chosen = [n for n in entries if (n in names if names else n not in ("base", "errors") and "steps" not in n)]
        return [
            (f"{name}: {quantity}", entries[name][quantity][0], (entries[name][quantity][0] or 0) >= STABLE)
            for name in chosen
            for quantity in STUDIED
        ]

    return found


def _trends(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    return [(f"keys and {n}", value, value >= STABLE) for n, value in entries["base"]["trends"].items()]


def _attention_most(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    found = _quantities(entries, *STUDIED)
    ratios = [(n, found["attention"]["relative_l1"] / found[n]["relative_l1"]) for n in ("keys", "values")]
    return [(f"attention over {n}", ratio, ratio >= LARGER) for n, ratio in ratios]


def _deeper(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    return [(n, q["with_depth"], (q["with_depth"] or 0) >= DEEPER) for n, q in _quantities(entries, *STUDIED).items()]


def _later(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    found = _quantities(entries, "branch", "mlp").items()
    return [(n, q["last_third"] / q["first_third"], q["last_third"] >= LARGER * q["first_third"]) for n, q in found]


def _more_than_mlps(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    found = _quantities(entries, "branch", "mlp")
    ratio = found["branch"]["relative_l1"] / found["mlp"]["relative_l1"]
    return [("attention branch over MLP", ratio, ratio > 1)]


def _u_shape(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    found = []
    for name, each in _quantities(entries, *STUDIED).items():
        ends = min(each["first_third"], each["last_third"])
        found.append((name, each["middle_third"] / ends, each["middle_third"] < ends))
    return found


def _residual(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    found = entries["base"]["windows"]
    return [
        (
            "MSE of the residual over that of the window",
            found["residual"] / found["mse"],
            found["residual"] < found["mse"],
        )
    ]


def _predicts(entries: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    known = [p for p in entries.get("errors", {}).get("predictions", ()) if p["quantity"] == "value"]
    own = [p for p in known if p["measure"] == "l1"]
    return [(f"{p['measure']} of the reused value", p["overall"], p["overall"] >= DEEPER) for p in own]


_CLAIMS: tuple[tuple[str, str, Judge], ...] = (
    ("Prompts change the L1 distances by 10 to 15 % (study, table 2)", f"variation of at most {VARIATION}", _variation),
    ("The distribution over steps is the same for all prompts", f"rank correlation of at least {STABLE}", _prompts),
    (
        "It is the same with 14 and with 56 steps",
        f"rank correlation of at least {STABLE}",
        _against("14 steps", "56 steps"),
    ),
    ("It is the same under another scheduler", f"rank correlation of at least {STABLE}", _against()),
    ("Keys, values and attention have one trend (FLUX.1-dev)", f"rank correlation of at least {STABLE}", _trends),
    ("Attention changes more than keys and values (PixArt, Open-Sora)", f"by a factor of {LARGER}", _attention_most),
    ("Deeper layers change more (FLUX.1-dev, SD3)", f"rank correlation of at least {DEEPER}", _deeper),
    ("Later steps change more than early ones (L2C)", f"by a factor of {LARGER}", _later),
    ("Attention changes more than MLPs (L2C)", "relative L1", _more_than_mlps),
    ("The middle steps change least (PAB's U shape)", "below both ends", _u_shape),
    ("The residual of window attention changes less than window attention (DiTFastAttn)", "smaller MSE", _residual),
    ("A small L1 distance means a small reuse error", f"rank correlation of at least {DEEPER}", _predicts),
)
