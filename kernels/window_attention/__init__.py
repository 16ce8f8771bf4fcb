"""Window attention with residual sharing (WA-RS of DiTFastAttn)."""

from dit_rewrite.kernels.window_attention.geometry import paper_window, window_flops
from dit_rewrite.kernels.window_attention.libraries import window_residual
from dit_rewrite.kernels.window_attention.op import window_refresh, window_reuse

__all__ = ["paper_window", "window_flops", "window_refresh", "window_residual", "window_reuse"]
