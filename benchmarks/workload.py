"""The workload of the overhead benchmarks: a DiT, the calls of a trajectory, and a stepper through them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from diffusers import DiTTransformer2DModel
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_cache

from benchmarks.timing import alternate
from dit_rewrite.module import RewrittenModule
from dit_rewrite.policy.rules import Policy, Rule

STEPS = 50
ALWAYS = Policy((Rule(sympy.true),), "reuse always")


def build(device: str, layers: int = 6) -> DiTTransformer2DModel:
    """Build the benchmark's denoiser with random weights; the gates are random too, not zero-initialised."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers, sample_size=32
    )
    return model.to(device).eval().requires_grad_(False)


def scheduler() -> Any:
    """Return a scheduler with the timesteps of `calls`."""
    config = SimpleNamespace(num_train_timesteps=1000)
    return SimpleNamespace(timesteps=torch.tensor([999 - 20 * step for step in range(STEPS)]), config=config)


def calls(device: str) -> list[dict[str, Any]]:
    """Return the keyword arguments of each step, with one conditioning and continuing latents."""
    labels = torch.tensor([1, 2], device=device)
    latent = torch.randn(2, 4, 32, 32, device=device)
    drift = torch.randn(2, 4, 32, 32, device=device) / STEPS
    return [
        {
            "hidden_states": latent + step * drift,
            "timestep": torch.tensor([999 - 20 * step] * 2, device=device),
            "class_labels": labels,
            "return_dict": False,
        }
        for step in range(STEPS)
    ]


class Stepper:
    """Calls a model with the inputs of the next step, in endless explicit trajectories.

    Time goes back after the last step, which begins the next trajectory.
    """

    def __init__(self, model: Any, inputs: Sequence[dict[str, Any]]) -> None:
        self.model, self.inputs = model, itertools.cycle(inputs)
        self.context: Any = None

    def __call__(self) -> None:
        if isinstance(self.model, RewrittenModule) and self.context is None:
            self.context = self.model.trajectory(scheduler=scheduler())
            self.context.__enter__()
        self.model(**next(self.inputs))

    def close(self) -> None:
        """Leave the trajectory."""
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None


def alternate_steps(runs: Mapping[str, Stepper], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of single steps in alternation, after a few warm-up steps of each."""
    for run in runs.values():
        for _ in range(5):
            run()
    samples = alternate(runs, rounds)
    for run in runs.values():
        run.close()
    return samples


def cold(make: Callable[[], Any], kwargs: dict[str, Any]) -> Callable[[], None]:
    """Run the first call of the model that `make` compiles, with empty compiler caches."""

    def run() -> None:
        torch._dynamo.reset()
        with fresh_cache():
            make()(**kwargs)

    return run


def _ready(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., list[Any]]:
    """A lowering whose code returns precomputed results."""
    outputs = [node.meta["val"] for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    real: list[torch.Tensor] = []

    def run(_: list[Any]) -> list[Any]:
        if not real:  # created at the first call, since tensors are fake while Dynamo traces
            real.extend(torch.empty(out.shape, dtype=out.dtype, device=out.device) for out in outputs)
        return list(real)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


# wrapped in AOTAutograd like Inductor, so that all compared models have the same wrapper
instant = aot_autograd(fw_compiler=_ready, inference_compiler=_ready)
