"""Relative L1 change of a tensor."""

from dit_rewrite.kernels.relative_l1.op import relative_l1

__all__ = ["relative_l1"]
