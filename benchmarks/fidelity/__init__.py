"""The errors of policies on the bundled toys, beside fewer steps of the best solver: python -m benchmarks.fidelity"""
