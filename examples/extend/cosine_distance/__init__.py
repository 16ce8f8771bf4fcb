"""Cosine distance of two tensors."""

from examples.extend.cosine_distance.op import cosine_distance

__all__ = ["cosine_distance"]
