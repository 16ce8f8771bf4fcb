"""DQAR's claims on a bundled toy: python -m benchmarks.dqar_fidelity"""
