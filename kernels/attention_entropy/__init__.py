"""The mean entropy of attention's rows."""

from dit_rewrite.kernels.attention_entropy.op import attention_entropy

__all__ = ["attention_entropy"]
