"""The command line: one file for each subcommand of ``dit-rewrite``.

It imports every room; nothing but ``__main__`` imports it.
"""
