"""The tables and figures of the DiT redundancy study: python -m benchmarks.redundancy"""
