"""Policies from one number, judged on unseen seeds: python -m benchmarks.autopolicy"""
