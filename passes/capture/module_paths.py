"""Names of sites from module paths. They serve as labels and give `layer`; matching of sites never reads them."""

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
    """Return the path of the module that `node` was traced in, such as ``blocks.0.attn1.to_q``, or ``""``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("",))[0]
    path = _MODULES.sub("", path.removeprefix("L['self']"))
    return _KEY.sub(r".\1", path).strip(".")


def input_name(dynamo_name: str) -> str:
    """Return Dynamo's name of an input without Dynamo's own words.

    For example, ``L_self_modules_blocks_modules_0_modules_norm_parameters_weight_`` gives ``blocks_0_norm_weight``.
    """
    bare = _DYNAMO.sub("_", f"_{dynamo_name.removeprefix('L_')}").strip("_")
    return bare.removeprefix("self_") or dynamo_name


def common_path(nodes: Iterable[fx.Node]) -> str:
    """Return the longest common prefix of the module paths of `nodes`."""
    paths = sorted({module_path(node) for node in nodes})
    if not paths:
        return ""
    first, last = paths[0].split("."), paths[-1].split(".")
    common = [a for a, b in zip(first, last, strict=False) if a == b]
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(common))
    return ".".join(first[:depth])


def block_of(path: str) -> str:
    """Return `path` up to its first number, such as ``transformer_blocks.0``, or ``""`` if it has none."""
    match = _BLOCK.match(path)
    return match.group() if match else ""


def container_of(block: str) -> str:
    """Return the path of the module list that contains `block`, such as ``transformer_blocks``, or ``""``."""
    return block.rpartition(".")[0]


def unique(names: Sequence[str]) -> list[str]:
    """Return `names` with repeated names numbered: ``mlp, mlp`` gives ``mlp, mlp#1``."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        result.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return result
