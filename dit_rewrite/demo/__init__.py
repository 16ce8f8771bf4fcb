"""The demo: toy denoisers with bundled weights, and a comparison of policies with fewer steps on them.

It imports the public face; cli, benchmarks and examples may import it.
"""
