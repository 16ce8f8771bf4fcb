"""The language of guards: symbols, measurements, tables, their notation, and whether a guard can hold.

It knows sympy and no graph. Everything above, policies included, may import it.
"""
