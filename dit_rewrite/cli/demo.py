"""``python -m dit_rewrite demo``: the demo as a command."""

from __future__ import annotations

import argparse

from dit_rewrite.cli.outcome import Outcome


def run(arguments: argparse.Namespace) -> Outcome:
    """Run ``python -m dit_rewrite demo``, which prints its own table."""
    from dit_rewrite.demo import run as demo  # needs the extra

    return Outcome("", {"folder": arguments.out, **demo.run(arguments)})
