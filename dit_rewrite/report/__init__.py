"""Reports: what `explain()` prints, what a dump folder holds, and why a policy reuses nothing.

It imports the compiler; the public face may import it.
"""
