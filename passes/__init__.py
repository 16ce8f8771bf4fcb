"""Graph in, graph out: capture, guards, analysis, rewrite. Knows torch.fx, sympy and networkx; holds no run-time state.

Each pass is one file. A pass imports `errors`, `torch_compat` and other passes; anything but `runtime` and `kernels`
may import it. The rooms, lowest first: guards, capture, analysis, rewrite.
"""
