"""Training of the bundled networks: learning rates, an optimiser, a moving average, checkpoints and the loops."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dit_rewrite.demo.shapes.model import save

EMA_DECAY = 0.999
WARM_UP = 200  # steps in which the learning rate rises


def build_parser(
    description: str | None, *, steps: int, batch: int, threads: int, save_every: int
) -> argparse.ArgumentParser:
    """Return a parser with the options of all training scripts, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--stop", type=int, help="stop after this step; run again to continue")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--save-every", type=int, default=save_every)
    return parser


class Trainer:
    """A model, its moving average, its optimisers, and the next step.

    `loss_of` returns the loss of a batch, given a generator that is seeded with `seed` and the step. `rate_at` returns
    the learning rate of a step. The averaged weights are saved to ``<weights>.safetensors`` in the folder `out` in
    fp16, and the state for continuing to the file `checkpoint` there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
        loss_of: Callable[[Generator], Tensor],
        rate_at: Callable[[int], float],
        out: Path,
        checkpoint: str,
        weights: str,
        seed: int = 0,
    ) -> None:
        self.model, self.optimisers, self.loss_of, self.rate_at, self.seed = model, optimisers, loss_of, rate_at, seed
        self.checkpoint, self.weights = out / checkpoint, out / f"{weights}.safetensors"
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        self.step = 0

    def train(self, until: int, save_every: int) -> None:
        """Continue from the checkpoint, if there is one, up to step `until`, and save."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self._resume()
        losses: list[float] = []
        began = time.perf_counter()
        while self.step < until:
            losses.append(self._train_step())
            if self.step % save_every == 0:
                pace, recent = (time.perf_counter() - began) / len(losses), losses[-save_every:]
                print(f"step {self.step}  loss {sum(recent) / len(recent):.5f}  {pace * 1e3:.0f} ms/step", flush=True)
                self._save()
        self._save()

    def _train_step(self) -> float:
        """Run one step of the optimisers and return the loss."""
        loss = self.loss_of(Generator().manual_seed(self.seed + self.step))
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = self.rate_at(self.step)
            optimiser.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.item()

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """Yield all objects whose state is saved, by name."""
        yield from (("model", self.model), ("ema", self.ema))
        yield from ((f"optimiser {i}", optimiser) for i, optimiser in enumerate(self.optimisers))

    def _save(self) -> None:
        """Write a checkpoint atomically, and the averaged weights."""
        new = self.checkpoint.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in self._parts()} | {"step": self.step}, new)
        new.replace(self.checkpoint)
        save(self.ema.module, self.weights)

    def _resume(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            for name, part in self._parts():
                part.load_state_dict(state[name])
            self.step = state["step"]


def fit(network: nn.Module, loss_of: Callable[[Generator], Tensor], steps: int, rate: float) -> None:
    """Train a small network without checkpoints, by Adam with a cosine learning rate that falls to zero.

    `loss_of` returns the loss of a batch, given a generator that is seeded with the step.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    began = time.perf_counter()
    for step in range(steps):
        loss = loss_of(Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}  loss {loss.item():.5f}  {time.perf_counter() - began:.0f} s", flush=True)


def add_noise(images: Tensor, generator: Generator) -> Tensor:
    """Add noise of up to 0.15, as sampled images may have, to the first half of images (n, 3, SIZE, SIZE)."""
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
    strength[len(images) // 2 :] = 0
    return images + strength * torch.randn(images.shape, generator=generator)


def rate_at(step: int, steps: int, peak: float, hold: int = 0) -> float:
    """Return the learning rate: it rises linearly for WARM_UP steps, and falls as a cosine to zero from step `hold`."""
    fallen = max(0, step - hold) / (steps - hold)
    return peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * fallen))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return nearly orthogonal matrices with the singular vectors of `matrices` (n, rows, columns), by Newton-Schulz
    iterations (Jordan 2024).

    The computation has the dtype of the argument. `torch.optim.Muon` uses bfloat16, which most CPUs emulate.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices (Jordan 2024), for learning rates of AdamW.

    The update is scaled as in Liu et al. 2025 ("Muon is scalable for LLM training"), section 2.2.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix. Matrices of equal shape are orthogonalised together."""
        for group in self.param_groups:
            for shape in {matrix.shape for matrix in group["params"]}:
                matrices = [matrix for matrix in group["params"] if matrix.shape == shape]
                updates = orthogonalise(torch.stack([self.nesterov(x, group["momentum"]) for x in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        """Update the running average of the gradient, and return the gradient interpolated towards it."""
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        gradient = matrix.grad
        assert gradient is not None
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)
