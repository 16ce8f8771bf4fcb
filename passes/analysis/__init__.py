"""Analyses of a captured graph, from dependence and cost to sites, spans and probes. They do not change the graph.

They import capture and guards; rewrite and the compiler may import them.
"""
