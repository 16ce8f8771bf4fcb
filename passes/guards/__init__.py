"""Guards: symbols, measurements, tables, notation, and satisfiability.

This subpackage uses sympy and no graphs. Every higher layer, policies included, may import it.
"""
