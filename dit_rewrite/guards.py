"""The symbols of guards: write ``when=Ne(Mod(step, 3), 0) & (age < 5)`` with them and sympy's functions.

step, num_steps: of the trajectory, from 0; num_steps is known only where it was told.
progress: step / (num_steps - 1), 0 to 1.
sigma, snr: noise and signal-to-noise ratio at the step (runtime/noise.py), known only in a trajectory that was told
its scheduler.
layer, num_layers: the block that the site lies in, from 0, in the order of the graph.
age: steps since the site was last computed. streak: consecutive reuses.
similarity(probe), drift(probe): how much a probe has changed since the site was last computed, as one relative L1
difference or as the sum of those from call to call. Probes: "first_block" (or "first_8_blocks" and so on),
"behind_first_block" (likewise), "modulated_input", "self", "latent", "output" (of the last two computed steps; it has
no drift). By rescale=(…) each change is first put through the polynomial of these coefficients, highest power first; by
rescale="rate" it is made the output's change, at the rate at which that followed the probe between the last two
computed steps. By filter="sea" the probe is put through SeaCache's spectral filter before, which needs the noise level.
advance(probe): how far a probe has gone along the way of the last two computed steps, the last of which is at 1.
forecast_error(of): how far the forecast of a value was from what was computed last, relative: "verified", of the sites
that do `Verify`, or "self". With elementwise=True, the mean of the ratios of all elements.
table(values, step): a number by its place; table(rows, step, age - 1): in rows. Outside of them nothing is proven.
accumulated_error(ratios, reach): MagCache's error estimate, of calibrated ratios; known `reach` steps after computing.
entropy: mean row entropy (nats) of the site's attention when it was last computed.
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
