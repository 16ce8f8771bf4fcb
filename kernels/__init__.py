"""Operators of this package, one folder each: a Triton kernel, its plain PyTorch twin (what it must equal, and what
runs where Triton does not), and the registration of both as one custom op. Imports nothing else of the package."""
