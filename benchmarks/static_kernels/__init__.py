"""The compiled code of every kernel, which needs no GPU: python -m benchmarks.static_kernels"""
