"""The command line: one file for each subcommand of ``dit-rewrite``.

The package may import all others; only ``__main__`` imports it.
"""
