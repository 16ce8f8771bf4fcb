"""Capture: from Dynamo's graph to the functional ATen graph that every other pass works on.

It imports no other subpackage of passes; analysis and rewrite may import it.
"""
