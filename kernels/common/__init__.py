"""Helpers that several operators share: argument checks, masked scores, tile loads, reductions."""
