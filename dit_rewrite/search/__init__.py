"""Searches: DiTFastAttn's greedy search of plans over compiled segments, and calibration of policies.

The package imports the public API and the compiler; cli and demo may import it.
"""
