"""The policy language: rules, the sites that they select, strategies, forecast bases, plans, and their text formats.

The package imports the guard language and the interface of `runtime.decide`, but not the compiler. Policies, the
compiler and every package above it may import it.
"""
