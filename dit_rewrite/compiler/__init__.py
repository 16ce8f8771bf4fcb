"""The compiler: the torch.compile backend, its pipeline of passes, and the passes that need policy or runtime.

It imports passes, kernels, runtime and policy. The packages report, proof and search may import it.
"""
