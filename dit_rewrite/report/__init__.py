"""Reports: the table of `explain()`, the folder of `dump=`, and the reasons why a policy reuses nothing.

The package imports the compiler; the public API may import it.
"""
