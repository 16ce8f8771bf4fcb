"""The language of policies: rules, where they apply, strategies, forecast bases, plans, and all of them as text.

It imports the language of guards and what the run time reads of a rule (`runtime.decide`); it knows no compiler.
Policies, the compiler and every room above may import it.
"""
