"""Proofs: reuse 0 against the untouched model, a replay of decisions by an independent interpreter, and distances.

It imports the public face and the compiler; search, cli and demo may import it.
"""
