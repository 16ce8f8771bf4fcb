"""Proofs: reuse 0 against the unmodified model, a replay of decisions by an independent interpreter, and metrics.

The package imports the public API and the compiler; search, cli and demo may import it.
"""
