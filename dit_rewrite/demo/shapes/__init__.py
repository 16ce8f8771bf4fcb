"""A small trained DiT on a procedural data set, to measure fidelity without downloads."""

from dit_rewrite.demo.shapes.data import CLASSES, NULL_CLASS, NUM_CLASSES, SIZE, sample
from dit_rewrite.demo.shapes.model import accuracy, build_scheduler, load_classifier, load_denoiser

__all__ = [
    "CLASSES",
    "NULL_CLASS",
    "NUM_CLASSES",
    "SIZE",
    "accuracy",
    "build_scheduler",
    "load_classifier",
    "load_denoiser",
    "sample",
]
