"""Mean entropy of the attention rows (DQAR, equation 5)."""

from dit_rewrite.kernels.attention_entropy.op import attention_entropy

__all__ = ["attention_entropy"]
