"""The costs and savings of rewriting, by time: python -m benchmarks.overhead"""
