"""Attention kernels and whole steps on a GPU: python -m benchmarks.attention"""
