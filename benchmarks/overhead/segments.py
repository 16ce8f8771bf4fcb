"""The rows of benchmarks/overhead/run.py about segments, measured decisions and packed caches."""

from __future__ import annotations

import itertools
from typing import Any

import sympy
import torch

import dit_rewrite
from benchmarks.timing import Row, Spread, alternate, ratio, seconds
from benchmarks.workload import ALWAYS, STEPS, Stepper, alternate_steps, build, calls, cold, instant, scheduler
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering, isolated
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, attach, twin
from dit_rewrite.policies import FORA, FirstBlockCache
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Reuse
from dit_rewrite.policy.where import Where

DEEP = 28
THRESHOLD = 0.15  # of the first block's change; about half of the steps reuse
BEHIND_THE_FIRST = Where(span="stack", layers=(1, None))


def measure_segment_steps(device: str, rounds: int) -> list[Row]:
    """Measure segments at reuse 0 against plain torch.compile, and at full reuse against variants."""
    model, inputs = build(device), calls(device)
    segments = Lowering(partition="segments")
    plain = isolated(model, "inductor")
    runs = {
        "plain": Stepper(plain, inputs),
        "segments": Stepper(attach(twin(model), Backend(model, ALWAYS, segments, force=True)), inputs),
        "reusing variant": Stepper(dit_rewrite.compile(twin(model), ALWAYS), inputs),
        "reusing segments": Stepper(dit_rewrite.compile(twin(model), ALWAYS, lowering="segments"), inputs),
    }
    samples = alternate_steps(runs, rounds)
    computing, reusing = ratio(samples, "segments", "plain"), ratio(samples, "reusing segments", "reusing variant")
    return [
        Row("segments at reuse 0 / plain", computing, "", "<= 1.03", computing.median <= 1.03),
        Row("reusing step, segments / variant", reusing, "", "", True),
    ]


def measure_segment_compile(device: str, rounds: int) -> list[Row]:
    """Measure the first call of a deep DiT by segments with empty caches, including FORA's reusing segments."""
    model, (first, *_) = build(device, DEEP), calls(device)

    runs = {
        "plain": cold(lambda: isolated(model, "inductor"), first),
        "segments": cold(lambda: dit_rewrite.compile(twin(model), FORA(3), lowering="segments"), first),
    }
    samples = alternate(runs, rounds)
    found = ratio(samples, "segments", "plain")
    return [
        Row(f"plain torch.compile, first call, {DEEP} blocks", Spread.of(samples["plain"]), "s", "", True),
        Row(f"FORA(3) by segments / plain, first call, {DEEP} blocks", found, "", "<= 0.5", found.median <= 0.5),
    ]


def measure_first_block(device: str, rounds: int) -> list[Row]:
    """Measure FirstBlockCache, which decides in the middle of each call, against a plan with the same decisions."""
    model, inputs = build(device), calls(device)
    measured = dit_rewrite.compile(twin(model), FirstBlockCache(THRESHOLD))
    trajectory(measured, inputs)
    reused = [d.step for d in measured.stats().decisions if "reuse" in d.strategies.values()]
    when = sympy.Or(*(sympy.Eq(step, s) for s in reused))
    plan = dit_rewrite.compile(twin(model), Policy((Rule(when, Reuse(), BEHIND_THE_FIRST),), "plan"))
    trajectory(plan, inputs)
    runs = {"measured": lambda: trajectory(measured, inputs), "plan": lambda: trajectory(plan, inputs)}
    found = ratio(alternate(runs, rounds), "measured", "plan")
    share = f"{len(reused)} of {STEPS} steps reused"
    return [Row(f"FirstBlockCache / the same decisions as a plan, {share}", found, "", "", True)]


def trajectory(model: RewrittenModule, inputs: list[dict[str, Any]]) -> None:
    """Run one explicit trajectory."""
    with model.trajectory(scheduler=scheduler()):
        for kwargs in inputs:
            model(**kwargs)


def measure_segment_host(device: str, rounds: int) -> list[Row]:
    """Measure the host time per segment: one graph in segments and whole, with precomputed results."""
    model, inputs = build(device), calls(device)
    policy = FORA(3)
    whole = dit_rewrite.compile(twin(model), policy, backend=instant)
    cut = dit_rewrite.compile(twin(model), policy, backend=instant, lowering="segments")
    runs = {"whole": Stepper(whole, inputs), "cut": Stepper(cut, inputs)}
    for run in runs.values():
        run()
    pieces = cut._backend.rewritten[0].partition.segments.count
    samples = alternate(runs, rounds * 25)
    for run in runs.values():
        run.close()
    pairs = zip(samples["cut"], samples["whole"], strict=True)
    added = Spread.of([(a - b) / (pieces - 1) * 1e6 for a, b in pairs])
    return [Row(f"host time of a further segment ({pieces} in all)", added, "µs", "", True)]


def measure_codecs(device: str) -> list[Row]:
    """Measure the bytes in the slots after a bfloat16 step, packed and unpacked."""
    inputs = [{k: _half(v) for k, v in kwargs.items()} for kwargs in itertools.islice(calls(device), 1)]
    model = build(device).bfloat16()
    held = {}
    for store in (None, "int8", "fp8"):
        policy = Policy((Rule(sympy.true, Reuse(store)),), f"store {store}")
        rewritten = dit_rewrite.compile(twin(model), policy, backend="aot_eager")
        with rewritten.trajectory(num_steps=2):
            rewritten(**inputs[0])
            held[store] = rewritten.stats().cache_bytes
    rows = []
    for store in ("int8", "fp8"):
        share = held[store] / held[None]
        rows.append(Row(f"cached bytes, {store} / bf16", Spread(share, share, share, 1), "", "<= 0.53", share <= 0.53))
    return rows


def _half(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def measure_all(device: str, rounds: int, compiles: int) -> list[Row]:
    """Measure all rows of this file."""
    with torch.no_grad():
        seconds(lambda: None)
        return [
            *measure_segment_steps(device, rounds),
            *measure_first_block(device, max(rounds // 8, 3)),
            *measure_segment_host(device, rounds),
            *measure_codecs(device),
            *measure_segment_compile(device, compiles),
        ]
