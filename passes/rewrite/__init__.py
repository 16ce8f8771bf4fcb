"""Rewrites: guarded graphs, half batches, slots, codecs, cuts into segments, and specialisation to straight-line code.

They import every other room of the passes; the compiler, proofs and reports may import them.
"""
