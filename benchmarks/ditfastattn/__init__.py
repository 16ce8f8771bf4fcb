"""DiTFastAttn's tables and figures on a bundled toy: python -m benchmarks.ditfastattn"""
