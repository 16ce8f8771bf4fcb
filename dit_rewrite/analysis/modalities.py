"""The parts of a tapped tensor: image and text tokens, and the halves of a guided batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.attention_sites import text_tokens
from dit_rewrite.passes.analysis.graph import operands
from dit_rewrite.passes.rewrite.tap import Cut

ALL, IMAGE, TEXT = "all", "image", "text"
COND, UNCOND = "cond", "uncond"
Part = tuple[str, str | None]  # the modality of a cut, and the half of the batch, if it is one


class Modalities:
    """Tells image from text tokens by their numbers, where the structure of the graph does.

    `image` is the number of tokens of the stream that the output is computed from, or None if unknown. `cores` are the
    attention ops of the graph; a cat before them shows how many text tokens there are, and whether they come last.
    """

    def __init__(self, image: int | None, cores: Sequence[fx.Node]) -> None:
        self.image = image
        self._of_core = {core: text_tokens(core, image) if image is not None else (0, False) for core in cores}
        self._text, self._last = next(((n, last) for n, last in self._of_core.values() if n), (0, False))

    def cuts(
        self, node: fx.Node, cores: Sequence[fx.Node], heads: int | None
    ) -> tuple[tuple[str, ...], tuple[Cut, ...]]:
        """Return the labels and the cuts of a tensor of a site with these attention ops."""
        shape = cost.shape(node.meta["val"])
        if self.image is None or not self._text or len(shape) < 3:
            return (ALL,), (Cut(),)
        text, last = next((self._of_core[core] for core in cores if self._of_core[core][0]), (self._text, self._last))
        split = node in cores or any(node in operands(core) for core in cores)  # into heads, before the tokens
        dims = [dim for dim in ([2] if split else [1, 2] if len(shape) == 4 else [1]) if dim != heads]
        for dim in dims:
            if shape[dim] == self.image + text:
                first, second = (self.image, text) if last else (text, self.image)
                pair = ((dim, 0, first),), ((dim, first, second),)
                names = (IMAGE, TEXT) if last else (TEXT, IMAGE)
                return (ALL, *names), (Cut(), Cut(pair[0]), Cut(pair[1]))
        sizes = {shape[dim] for dim in dims}
        if self.image == text or not sizes & {self.image, text}:
            return (ALL,), (Cut(),)
        return ((IMAGE,) if self.image in sizes else (TEXT,)), (Cut(),)


def halves(labels: Sequence[str], rows: int, cuts: Sequence[Cut], first: int) -> tuple[list[Part], list[Cut]]:
    """Return the parts and cuts of a tensor with `rows` rows for each half of the batch, and the comparison of both.

    `first` is the number of the conditional half, against which the other one is compared.
    """
    half = rows // 2
    names: list[Part] = []
    found: list[Cut] = []
    conditional, unconditional = ((0, first * half, half),), ((0, (1 - first) * half, half),)
    for label, cut in zip(labels, cuts, strict=True):
        names += [(label, COND), (label, UNCOND), (label, UNCOND)]
        found += [Cut((*conditional, *cut.axes)), Cut((*unconditional, *cut.axes))]
        found.append(Cut((*unconditional, *cut.axes), against=(*conditional, *cut.axes)))
    return names, found
