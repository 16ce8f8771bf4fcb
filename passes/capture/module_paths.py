"""Names of sites, from module paths. They are labels for people and for `layer`; the match never reads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx

_MODULES = re.compile(r"\.?__dict__\['_modules'\]|\._modules")
_KEY = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_DYNAMO = re.compile(r"_(?:(?:dict_)?modules_|parameters_|buffers_)+")
_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced in: ``transformer_blocks.0.attn1.to_q``, or ``""``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("",))[0]
    path = _MODULES.sub("", path.removeprefix("L['self']"))
    return _KEY.sub(r".\1", path).strip(".")


def input_name(dynamo_name: str) -> str:
    """What Dynamo calls an input, without its own words: ``blocks_0_norm_weight`` for
    ``L_self_modules_blocks_modules_0_modules_norm_parameters_weight_``."""
    bare = _DYNAMO.sub("_", f"_{dynamo_name.removeprefix('L_')}").strip("_")
    return bare.removeprefix("self_") or dynamo_name


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all `nodes` were traced in; that of a single node without its last part."""
    paths = sorted({module_path(node) for node in nodes})
    if not paths:
        return ""
    first, last = paths[0].split("."), paths[-1].split(".")
    common = [a for a, b in zip(first, last, strict=False) if a == b]
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(common))
    return ".".join(first[:depth])


def block_of(path: str) -> str:
    """The block that a path lies in, up to its outermost number: ``transformer_blocks.0``; ``""`` outside of any."""
    match = _BLOCK.match(path)
    return match.group() if match else ""


def container_of(block: str) -> str:
    """The path of the list of modules that holds a block: ``transformer_blocks``; ``""`` outside of any."""
    return block.rpartition(".")[0]


def unique(names: Sequence[str]) -> list[str]:
    """`names`, those that stand more than once numbered: ``mlp, mlp`` -> ``mlp, mlp#1``."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        result.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return result
