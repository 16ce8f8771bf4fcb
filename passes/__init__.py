"""Graph in, graph out: capture, find sites, guard, specialise. Knows torch.fx, sympy and networkx; no run-time state.

attention_core.py  the marker op that keeps attention whole through capture
capture.py         Dynamo's graph -> functional ATen graph
graph.py           questions to a graph: dependence, closures, parameters, what an op is
cost.py            FLOPs and bytes of nodes
branches.py        residual sums -> branches
sites.py           branches -> sites
naming.py          names and layers of sites, from module paths
guards.py          the language of guards
guard.py           sites -> `cache_or_compute` nodes
specialise.py      a guarded graph and a row of decisions -> a straight-line variant
printing.py        graphs that a person can read, and their differences
"""
