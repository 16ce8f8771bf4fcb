"""The two readings of DQAR's equation, the contents of its cache, and FORA's store."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from dit_rewrite.errors import BadParameter
from dit_rewrite.policies import DQAR, FORA, TileReuse, parse
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import Reuse, ReuseKV, ReuseTiles
from tests.helpers import tiny
from tests.helpers.runs import decided

STEPS = 11


def reusing(layers: int, warmup: Fraction, share: Fraction, cap_first: bool) -> list[int]:
    """How many layers reuse at each step: by equation 2, or with the product of share and layers rounded first."""
    found = []
    for step in range(STEPS):
        p = Fraction(step, STEPS - 1)
        most = Fraction(math.floor(share * layers)) if cap_first else share * layers
        found.append(0 if p < warmup else math.floor((p - warmup) / (1 - warmup) * most))
    return found


@pytest.mark.parametrize("rounding", ["equation", "paper"])
def test_how_many_layers_reuse(rounding: Any) -> None:
    """With 4 layers and a share of 0.7 the two readings differ: at most 2.8 layers, or 2."""
    policy = DQAR(0.2, 0.7, None, rounding=rounding)
    did = decided(policy, STEPS, tiny.build(4))
    counts = [sum(row[step] == "R" for row in did.values()) for step in range(STEPS)]
    assert counts == reusing(4, Fraction("0.2"), Fraction("0.7"), rounding == "paper")
    assert reusing(4, Fraction("0.2"), Fraction("0.7"), True) != reusing(4, Fraction("0.2"), Fraction("0.7"), False)


def test_keys_and_values_in_the_place_of_outputs() -> None:
    """The same decisions at sites of another part."""
    outputs, keys = (decided(DQAR(0.2, 1.0, None, cache=cache), STEPS) for cache in ("output", "kv"))
    assert set(keys) == {f"{name}.kv" for name in outputs}
    assert list(keys.values()) == list(outputs.values())


@pytest.mark.parametrize(
    ("policy", "do"),
    [
        (FORA(3, store="int8"), Reuse("int8")),
        (FORA(3), Reuse()),
        (DQAR(store="fp8"), Reuse("fp8")),
        (DQAR(cache="kv", store="bf16"), ReuseKV("bf16")),
        (TileReuse(0.5, 64, "change"), ReuseTiles(0.5, 64, "change")),
    ],
    ids=str,
)
def test_what_is_held(policy: Any, do: Any) -> None:
    assert [rule.do for rule in policy.rules] == [do]
    assert from_json(to_json(policy)) == policy


def test_text() -> None:
    assert parse("dqar:cache=kv,store=int8,rounding=paper") == DQAR(cache="kv", store="int8", rounding="paper")
    assert parse("fora:interval=2,store=bf16") == FORA(2, store="bf16")
    assert parse("tile_reuse:refresh=0.5,order=change,kinds=cross+mlp") == TileReuse(
        0.5, order="change", kinds=("cross", "mlp")
    )
    assert "store" not in str(FORA(2)) and "store='bf16'" in str(FORA(2, store="bf16"))


@pytest.mark.parametrize("given", [{"cache": "keys"}, {"store": "int4"}, {"rounding": "up"}])
def test_parameters_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter):
        DQAR(**given)
