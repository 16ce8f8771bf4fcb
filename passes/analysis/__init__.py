"""Analyses: questions to a captured graph that change nothing, from dependence and cost to sites, spans and probes.

They import capture and guards; rewrite and the compiler may import them.
"""
