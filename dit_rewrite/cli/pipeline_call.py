"""Options of commands that run a pipeline: its denoiser, and further arguments of its call."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Sequence
from typing import Any

from dit_rewrite.errors import BadOption, UnknownInput


def add_call(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--call``."""
    parser.add_argument(
        "--call",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="further arguments of a pipeline's call, such as height=256 num_frames=9 guidance_scale=3",
    )


def add_component(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--component``."""
    parser.add_argument(
        "--component", default="transformer", help="denoiser of a pipeline with several, such as transformer_2"
    )


def refuse_for_factory(factory: str, **given: Any) -> None:
    """Raise UnknownInput if an option of pipelines is given beside a factory, which makes its own calls."""
    for name, value in given.items():
        if value:
            raise UnknownInput(factory, f"--{name.replace('_', '-')}")


def parsed_call(pipeline: Any, items: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that ``--call`` has: Python literals, or else texts.

    Raises BadOption for other items than name=value, and UnknownInput for arguments that the pipeline does not take.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise BadOption("--call", "item", item, "name=value")
        if name not in inspect.signature(pipeline.__call__).parameters:
            raise UnknownInput(type(pipeline).__name__, name)
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
