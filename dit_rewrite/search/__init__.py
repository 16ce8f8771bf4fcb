"""Searches: plans by DiTFastAttn's greedy method over compiled segments, and calibrated policies.

It imports the public face and the compiler; cli and demo may import it.
"""
