"""Redundancy analysis: how much the tensors of a model change between steps, and which of them may be reused.

places.py finds the tensors, probing.py measures them while the model runs, statistics.py sums up over prompts, store.py
has the file, compare.py compares profiles, errors.py measures reuse errors, plots.py draws, and analyze.py is
`dit_rewrite.analyze`.
"""
