"""The symbols of guards. Combine them with sympy's functions: ``when=Ne(Mod(step, 3), 0) & (age < 5)``.

step, num_steps: the step of the trajectory, from 0, and the number of steps, which is known only in an explicit
trajectory.
progress: step / (num_steps - 1), from 0 to 1.
sigma, snr: the noise level and the signal-to-noise ratio (power) of the step (runtime/noise.py), known only in an
explicit trajectory with a scheduler.
layer, num_layers: the block of the site, from 0 in graph order, and the number of blocks.
age: steps since the site was last computed. streak: consecutive reuses.
similarity(probe), drift(probe): the relative L1 change of a probe since the site was last computed; `drift` is the sum
of the changes between consecutive calls since then. Probes: "first_block" (or "first_8_blocks" etc.),
"behind_first_block" (likewise), "modulated_input", "self", "latent", and "output", which compares the last two computed
steps and has no drift. With rescale=(…) each change is mapped by the polynomial with these coefficients, highest power
first. With rescale="rate" it is multiplied by the rate at which the output followed the probe between the last two
computed steps. With filter="sea" the probe passes through SeaCache's spectral filter, which needs the noise level.
advance(probe): how far a probe has moved along the line through its values at the last two computed steps; the newer of
them is at 1.
forecast_error(of): the relative error of the last forecast that was compared with a computed value: "verified" for the
sites of `Verify`, or "self". With elementwise=True, the mean of the elementwise ratios.
table(values, step): the number at an index; table(rows, step, age - 1): the number at a row and a column. Outside of
the table nothing is proven.
accumulated_error(ratios, reach): MagCache's error estimate from magnitude ratios, known for `reach` steps after a
computed one.
entropy: the mean entropy in nats of the rows of the site's attention when it was last computed.
"""

from dit_rewrite.passes.guards.symbols import (
    accumulated_error,
    advance,
    age,
    drift,
    entropy,
    forecast_error,
    layer,
    num_layers,
    num_steps,
    progress,
    sigma,
    similarity,
    snr,
    step,
    streak,
)
from dit_rewrite.passes.guards.tables import table

__all__ = [
    "accumulated_error",
    "advance",
    "age",
    "drift",
    "entropy",
    "forecast_error",
    "layer",
    "num_layers",
    "num_steps",
    "progress",
    "sigma",
    "similarity",
    "snr",
    "step",
    "streak",
    "table",
]
