"""Samplers for the segment search, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.policy.plan import SHARED, Plan
from dit_rewrite.search.segment_runner import ALL, greedy_plan
from tests.helpers import tiny
from tests.helpers.models import MODELS, output

STEPS = 5
CASE = MODELS["dit"]
SETTINGS: dict[str, Any] = {"steps": STEPS, "conditional": "first", "window": 0.25, "backend": "aot_eager"}
WITHOUT_ASC: dict[str, Any] = {"conditional": None, "strategies": ALL - SHARED}


class Sampler:
    """Calls the model once a step and keeps its outputs. Each call's latent depends on the output before."""

    build: Callable[[], Any] = staticmethod(CASE.build)
    calls: Callable[..., list[dict[str, Any]]] = staticmethod(CASE.inputs)

    def __init__(self, seed: int, steps: int = STEPS, told: int | None = STEPS) -> None:
        self.inputs, self.told, self.outputs = self.calls(steps, seed=seed), told, list[Tensor]()

    def __call__(self, model: Any) -> None:
        self.outputs = []
        if self.told is None:
            self._loop(model)
            return
        with model.trajectory(num_steps=self.told):
            self._loop(model)

    def _loop(self, model: Any) -> None:
        for arguments in self.inputs:
            latent = arguments["hidden_states"]
            moved = latent if not self.outputs else latent + 0.05 * self.outputs[-1][:, : latent.shape[1]]
            self.outputs.append(output(model(**{**arguments, "hidden_states": moved})).clone())


class Tiny(Sampler):
    """Calls a smaller model: it compiles sooner."""

    build, calls = staticmethod(tiny.build), staticmethod(tiny.calls)


class Conditioned(Tiny):
    """The same latents, with another condition."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inputs = [{**given, "condition": given["condition"] + 1} for given in self.inputs]


class Guided(Sampler):
    """Guidance in two named calls a step: the other class belongs to the unconditional one."""

    def _loop(self, model: Any) -> None:
        change: Tensor | float = 0.0
        for given in self.inputs:
            latent = given["hidden_states"] + change
            for name, labels in (("cond", given["class_labels"]), ("uncond", given["class_labels"] + 1)):
                with model.cache_context(name):
                    found = output(model(**{**given, "hidden_states": latent, "class_labels": labels}))
                self.outputs.append(found.clone())
            change = 0.05 * (3 * self.outputs[-2] - 2 * self.outputs[-1])[:, : latent.shape[1]]


def sampling(calls: list[dict[str, Any]], steps: int = 3) -> Callable[[Any], None]:
    """A sampler that makes these calls within an explicit trajectory."""

    def sample(model: Any) -> None:
        with model.trajectory(num_steps=steps):
            for arguments in calls:
                model(**arguments)

    return sample


def search(samplers: list[Sampler], delta: float, **more: Any) -> Plan:
    torch.compiler.reset()
    return greedy_plan(samplers[0].build(), samplers, delta, **{**SETTINGS, **more})
