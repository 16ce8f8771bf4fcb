"""Passes over FX graphs. They use torch.fx, sympy and networkx, and hold no run-time state.

Each pass is one file. A pass may import `errors`, `torch_compat` and other passes. Every package except `runtime` and
`kernels` may import passes. The subpackages, lowest layer first: guards, capture, analysis, rewrite.
"""
