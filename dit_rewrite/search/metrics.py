"""Metrics of a plan search: the loss of an output against that of the uncompressed model (DiTFastAttn, A.2 and A.7).

A metric is a function of two tensors, the outputs of the uncompressed and of the compressed model, in which the outputs
of all trajectories are concatenated along the batch. It is 0 for equal ones, and the search compares it with delta. A
function that decodes latents or computes LPIPS may be given in place of a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

from dit_rewrite.errors import BadParameter
from dit_rewrite.proof import image_metrics

Metric = Callable[[Tensor, Tensor], float]
EPSILON = 1e-6  # appendix A.2
CLIP = 10.0  # appendix A.2
SSIM_WINDOW = 11  # pixels of the Gaussian window on each axis


def relative_error(reference: Tensor, output: Tensor) -> float:
    """Return the mean relative absolute error L(O, O') of appendix A.2, computed in float64:

        mean(clip(|O - O'| / (max(|O|, |O'|) + eps), 0, 10))

    Both tensors are real, of one shape and on one device. ``eps = 1e-6`` avoids 0/0; half precision would round it to
    0, hence float64. The result is NaN if an element is NaN or infinite in both. The ratio is at most 2, so the clip
    has no effect. Synchronises with the device once. Raises BadParameter for different shapes.
    """
    if reference.shape != output.shape:
        raise BadParameter("relative_error", "output.shape", tuple(output.shape), f"{tuple(reference.shape)}")
    a, b = reference.double(), output.double()
    ratio = (a - b).abs() / (a.abs().maximum(b.abs()) + EPSILON)
    return float(ratio.clamp(0, CLIP).mean())


def mse(reference: Tensor, output: Tensor) -> float:
    """Return the mean squared error."""
    return image_metrics.mean_squared_error(output, reference)


def noise_to_peak(reference: Tensor, output: Tensor) -> float:
    """Return the mean squared error over the squared range of the reference, 10^(-PSNR / 10): 0.001 is 30 dB.

    NaN for a constant reference, such as that of a model whose last layer is zero.
    """
    peak = _range(reference)
    return mse(reference, output) / peak**2 if peak else math.nan


def relative_l2(reference: Tensor, output: Tensor) -> float:
    """Return ``|O' - O| / |O|`` in the Euclidean norm."""
    return image_metrics.relative_l2(output, reference)


def cosine_distance(reference: Tensor, output: Tensor) -> float:
    """Return 1 minus the cosine of the angle between the outputs."""
    return 1 - float(cosine_similarity(reference.double().flatten(), output.double().flatten(), dim=0))


def ssim_distance(reference: Tensor, output: Tensor) -> float:
    """Return 1 minus the mean structural similarity of the planes of outputs whose last axes are height and width.

    The range of the data is that of the reference. Raises BadParameter for outputs that are not (…, height, width) of
    at least 11 pixels, such as tokens, and MissingExtra without torchmetrics.
    """
    if reference.ndim < 4 or min(reference.shape[-2:]) < SSIM_WINDOW:
        allowed = (
            f"a metric without planes: the output has the shape {tuple(reference.shape)}, and SSIM needs (…, height, "
        )
        allowed += f"width) of at least {SSIM_WINDOW}. Give a function that decodes it"
        raise BadParameter("search", "metric", "ssim", allowed)
    planes, others = (tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (reference, output))
    return 1 - image_metrics.ssim(others, planes, _range(reference))


def _range(reference: Tensor) -> float:
    return float(reference.max() - reference.min())


METRICS: dict[str, Metric] = {
    "relative_error": relative_error,
    "relative_l2": relative_l2,
    "mse": mse,
    "psnr": noise_to_peak,
    "ssim": ssim_distance,
    "cosine": cosine_distance,
}


def metric_of(given: str | Metric) -> tuple[str, Metric]:
    """Return the name and the function of a metric. Raises BadParameter for another name or type."""
    if isinstance(given, str) and given in METRICS:
        return given, METRICS[given]
    if isinstance(given, str) or not callable(given):
        raise BadParameter("search", "metric", given, f"one of {', '.join(METRICS)}, or a function of two tensors")
    name = getattr(given, "__qualname__", type(given).__qualname__)
    return f"{getattr(given, '__module__', '')}.{name}", given
