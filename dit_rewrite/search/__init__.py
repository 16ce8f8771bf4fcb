"""Searches: policies from one number (autopolicy), tuning by Optuna (tune), DiTFastAttn's greedy search of plans over
compiled segments, and calibration of policies.

The package imports the public API, the compiler and the metrics of proof; cli and demo may import it.
"""
