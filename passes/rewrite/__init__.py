"""Rewrites: hoisting, guarded graphs, half batches, slots, codecs, segments, specialisation to straight-line graphs.

They import every other subpackage of passes; the compiler, proofs and reports may import them.
"""
