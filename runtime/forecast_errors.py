"""The errors of forecasts: the value that a site computed, against the forecast from its slot at that step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dit_rewrite.runtime.decide import SiteSpec, Weights
from dit_rewrite.runtime.measure import Distance, Number, Tracked

Fresh = list[tuple[tuple[int, int], Tensor]]  # the new tensors of slots, by site and index


class ForecastErrors:
    """Compares the forecasts of those among `sites` whose errors some guard asks for. They stay on the device."""

    def __init__(self, sites: Sequence[SiteSpec], distance: Distance) -> None:
        self._sites, self._distance = sites, distance
        asked = [error for site in sites for error in site.errors.values()]
        self._ratios = {i: {e.elementwise for e in asked if i in e.sites} for error in asked for i in error.sites}

    def __contains__(self, site: int) -> bool:
        return site in self._ratios

    def foretell(self, site: int, held: tuple[Tensor, ...] | None, weights: Weights | None) -> list[Tensor]:
        """Return the forecast of each tensor that a site is about to compute for its slot; [] if the slot is empty."""
        if held is None or weights is None:
            return []
        width = self._sites[site].width
        return [weighted_sum(held[k::width], weights) for k in range(width)]

    def note(self, foretold: Mapping[int, list[Tensor]], fresh: Fresh, tracked: Tracked) -> None:
        """Keep the distances between the forecasts and the computed values: for each site the largest."""
        for site, forecasts in foretold.items():
            made = {index: value for (i, index), value in fresh if i == site}
            values = [k for k in range(len(forecasts)) if k != self._sites[site].entropy]
            pairs = [(forecasts[k], made[k]) for k in values if made[k].is_floating_point()]
            for elementwise in self._ratios[site]:
                distance = elementwise_error if elementwise else self._distance
                errors = [distance(forecast, computed) for forecast, computed in pairs]
                tracked.errors.pop((site, elementwise), None)
                if errors:
                    tracked.errors[site, elementwise] = Number(torch.stack(errors).max(), ahead=True)


def weighted_sum(values: Sequence[Tensor], weights: Weights) -> Tensor:
    """Return the weighted sum of computed values, newest first; a value of weight 0 is not read."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    total = torch.zeros_like(values[0], dtype=dtype)
    for value, weight in zip(values, weights, strict=False):
        total = total + value.to(dtype) * weight if weight else total
    return total.to(values[0].dtype)


def elementwise_error(forecast: Tensor, computed: Tensor) -> Tensor:
    """The mean of |forecast - computed| / |computed|, in float32 (float64 for float64)."""
    dtype = torch.promote_types(computed.dtype, torch.float32)
    forecast, computed = forecast.to(dtype), computed.to(dtype)
    return ((forecast - computed).abs() / (computed.abs() + 1e-10)).mean()
