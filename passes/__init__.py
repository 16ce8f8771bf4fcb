"""Graph in, graph out: capture, find sites, guard, specialise. Knows torch.fx, sympy and networkx; no run-time state.

attention_core.py  the marker op that keeps attention whole through capture
capture.py         Dynamo's graph -> functional ATen graph
graph.py           questions to a graph: dependence, closures, what an op is
cost.py            FLOPs and bytes of nodes
structure.py       when two graphs are the same code
hoist.py           what is computed once per trajectory
branches.py        residual sums -> branches
sites.py           branches -> sites; site.py says what a site is
spans.py           runs of blocks as sites; crops.py says which part of a cat a selection is
stacks.py          chains of blocks over one stream, and which of them is the main one
parts.py, cores.py keys and values, attention cores, probes and entropy: what policies ask for beyond branches
batch.py           which values belong to which sample, by the rules of batch_rules.py
grid.py            where on the latent's grid the tokens of a signal are
halve.py           a graph for half of the batch
naming.py          names and layers of sites, from module paths
guards.py          the language of guards; notation.py and verdict.py show it, and say what decides nothing
measurements.py    what guards may measure, and the names of its symbols; tables.py: tables of numbers in guards
store.py, slot.py  what is held in the place of a value
guard.py           sites -> `cache_or_compute` nodes; guarded.py says what these are
segments.py        where a graph is cut
specialise.py      a guarded graph and a row of decisions -> a straight-line variant
printing.py        graphs that a person can read, and their differences
"""
