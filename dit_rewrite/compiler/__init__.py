"""The compiler: the pipeline of passes, the torch.compile backend that runs it, bind, partition and lowering.

It imports passes, kernels, runtime and the language of policies. Reports, proofs and searches may import it.
"""
