"""Custom operators, one folder each.

A folder holds the Triton kernel (`triton_kernel.py`), a reference in PyTorch (`naive.py`) that defines the result and
runs on a CPU, and the registration of both as one custom op (`op.py`). `common` holds the shared helpers. Apart from
`dit_rewrite.errors`, the kernels import nothing else from this package.
"""
