"""DQAR's reuse ratios beside ours: python -m benchmarks.dqar_tables

The reuse ratio is the share of (step, layer) pairs at which an attention is reused, here of 28 layers and 50 steps
(tables 3, 4, 10 and 11 of the paper). It follows from the schedule alone, so no model runs. Columns:

- paper: as printed.
- equation 2: the decisions of the policy `DQAR`, by the same code that makes them when a model runs.
- cap first: the interpretation that reproduces the paper's figures, in floating point. It rounds the number of layers
  that may reuse down before multiplying: floor((p - w) / (1 - w) * floor(l L)), where equation 2 rounds once.
- cap first, exact: the same with fractions. Where it is larger, floating point rounded an integer product down.

Signal-to-noise ratios are those of DDIM with the linear betas of DiT's training, at diffusers' "leading" timesteps.
Table 11 also has entropy thresholds, which have no effect according to the paper; they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

from benchmarks.timing import RESULTS
from dit_rewrite.compiler.foresee import simulate
from dit_rewrite.passes.analysis.site import Kind, Site
from dit_rewrite.policies import DQAR
from dit_rewrite.policy.rules import Policy
from dit_rewrite.runtime.decide import SiteSpec
from dit_rewrite.runtime.noise import NoiseLevels, noise_levels

LAYERS, STEPS = 28, 50


@dataclass(frozen=True)
class Setting:
    """A row of one of the paper's tables. Numbers are strings, so that they are exact. ``ratio`` is in percent."""

    table: int
    warmup: str
    fraction: str
    snr: str | None
    ratio: str


SETTINGS = (
    Setting(3, "0.1", "0.33", None, "12.9"),
    Setting(3, "0.2", "0.33", None, "11.6"),
    Setting(3, "0.3", "0.33", None, "10.1"),
    Setting(3, "0.4", "0.33", None, "8.8"),
    Setting(3, "0.5", "0.33", None, "7.4"),
    Setting(3, "0.6", "0.33", None, "6.0"),
    Setting(4, "0.2", "0.33", None, "11.6"),
    Setting(4, "0.2", "0.5", None, "18.7"),
    Setting(4, "0.2", "0.66", None, "24.5"),
    Setting(4, "0.2", "0.75", None, "28.7"),
    Setting(4, "0.2", "1.0", None, "38.7"),
    Setting(10, "0.4", "0.33", None, "8.79"),
    Setting(10, "0.4", "0.33", "0.1", "8.64"),
    Setting(10, "0.4", "0.33", "0.5", "7.43"),
    Setting(11, "0.4", "0.33", "0.04", "8.79"),
    Setting(11, "0.4", "0.33", "0.36", "7.64"),
    Setting(11, "0.4", "0.33", "0.75", "6.86"),
    Setting(11, "0.4", "0.33", "1.20", "6.21"),
    Setting(11, "0.4", "0.33", "1.66", "5.50"),
    Setting(11, "0.4", "0.33", "1.93", "5.14"),
)


def ddim(spacing: str = "leading", offset: int = 0) -> DDIMScheduler:
    """Return the scheduler of DiT-XL/2: betas from 1e-4 to 0.02 over 1000 training steps, with 50 sampling steps."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        timestep_spacing=spacing, steps_offset=offset,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    return scheduler


def levels_of(scheduler: Any) -> NoiseLevels:
    """Return the noise levels as the runtime reads them. Raises ValueError if they are unknown."""
    levels = noise_levels(scheduler)
    if levels is None:
        raise ValueError("the scheduler's noise levels are unknown")
    return levels


def decided(setting: Setting, levels: NoiseLevels) -> int:
    """Return how many (step, layer) pairs the policy reuses, for 28 attentions decided step by step."""
    threshold = None if setting.snr is None else float(setting.snr)
    policy = DQAR(float(setting.warmup), float(setting.fraction), threshold)
    specs = [_spec(policy, layer) for layer in range(LAYERS)]
    return sum(map(sum, simulate(specs, len(levels), levels.at)))


def _spec(policy: Policy, layer: int) -> SiteSpec:
    """Return the SiteSpec of a layer's self-attention, without fields that the policy does not read."""
    name = f"blocks.{layer}"
    site = Site(f"{name}.attn", Kind.SELF, ("attn",), (), name, layer)
    rules = policy.for_site(site, {"layer": layer, "num_layers": LAYERS})
    return SiteSpec(site.name, site.kind, layer, None, rules.chooser())


def cap_first(setting: Setting, snrs: Sequence[float], number: Callable[[str], Any] = float) -> int:
    """Return the same count by the "cap first" interpretation, in the arithmetic of the type `number`."""
    warmup = number(setting.warmup)
    cap = int(number(setting.fraction) * LAYERS)
    reused = 0
    for step, snr in enumerate(snrs):
        progress = number(str(step)) / (STEPS - 1)
        if progress >= warmup and (setting.snr is None or snr > float(setting.snr)):
            reused += int((progress - warmup) / (1 - warmup) * cap)
    return reused


@dataclass(frozen=True)
class Result:
    """Reused pairs of the 1400, by each method of counting."""

    setting: Setting
    ours: int
    cap_first: int
    cap_first_exact: int

    @property
    def as_printed(self) -> bool:
        """Whether the paper's figure equals that of `cap_first` to the printed digit."""
        return printed(self.cap_first, self.setting) == self.setting.ratio


def percent(reused: int) -> float:
    """Return the reuse ratio in percent."""
    return 100 * reused / (LAYERS * STEPS)


def printed(reused: int, setting: Setting) -> str:
    """Format the ratio with as many digits as the paper."""
    digits = len(setting.ratio.partition(".")[2])
    return f"{percent(reused):.{digits}f}"


def results() -> list[Result]:
    """Return all rows."""
    levels = levels_of(ddim())
    snrs = levels.snrs
    return [Result(s, decided(s, levels), cap_first(s, snrs), cap_first(s, snrs, Fraction)) for s in SETTINGS]


def report(rows: Sequence[Result]) -> None:
    """Print the table and write ``results/dqar_tables.json``."""
    table = Table(title=f"DQAR: reuse ratio in percent, {LAYERS} layers, {STEPS} steps")
    for column in ("table", "warmup", "layers", "SNR >", "paper", "equation 2", "cap first", "= paper", "… exact"):
        table.add_column(column)
    for row in rows:
        s = row.setting
        ours, cap, exact = (f"{percent(count):.2f}" for count in (row.ours, row.cap_first, row.cap_first_exact))
        same = "yes" if row.as_printed else "NO"
        table.add_row(str(s.table), s.warmup, s.fraction, s.snr or "-", s.ratio, ours, cap, same, exact)
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dqar_tables.json").write_text(json.dumps(as_json(rows), indent=2) + "\n")


def as_json(rows: Sequence[Result]) -> dict[str, Any]:
    """Convert to JSON; counts are of reused (step, layer) pairs."""
    return {
        "layers": LAYERS,
        "steps": STEPS,
        "rows": [{**asdict(row), "as_printed": row.as_printed} for row in rows],
    }


def main() -> None:
    report(results())


if __name__ == "__main__":
    main()
