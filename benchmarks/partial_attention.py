"""Attention that is reused in part, against whole static reuse: python -m benchmarks.partial_attention [--captions 16]

Joint attention (the bundled flow-matching model, a small SD3): CachedAttention over the condition's keys, with the
sound bound, keeps blocks of the text's keys. It is compared at an equal share of kept scores, of all scores between all
tokens, with two static rules: the same blocks kept in all but every n-th step, and the whole attention reused in as
many steps as have at most that share.

Cross-attention (the bundled text-to-shapes model, a small PixArt): tiles of tokens (`TileReuse`) against FORA, which
reuses the whole branch in all but every n-th step, at no more FLOPs; with each token as old on average, at more FLOPs,
since the first step computes all tokens; and with a share of tiles for each branch (`calibrate_tiles`). The FLOPs of a
policy are those of its branches over the trajectory, as shares of those without reuse.

Errors are relative L2 distances from the uncached images. Thresholds are found by bisection on other captions and
noise. Nothing is timed. Each result is written at once; a rerun measures what is missing. `--page` writes the tables
into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import sympy
import torch
from sympy import Eq, Ne
from torch import Generator, Tensor, nn

import dit_rewrite
from benchmarks.cached_attention import CALIBRATION_NOISE, CALIBRATION_SEED, SEED, Kept, bisect, reused_by_step
from benchmarks.record import Claim, Record, digest, prepare, print_claims
from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, open_progress, versions
from dit_rewrite.demo.shapes.captions import sample_captioned
from dit_rewrite.demo.shapes.flow_model import load_flow_model
from dit_rewrite.demo.shapes.flow_sampling import sample_relations
from dit_rewrite.demo.shapes.model import WEIGHTS
from dit_rewrite.demo.shapes.relations import MAX_TOKENS, sample_related
from dit_rewrite.demo.shapes.text_model import load_text_model
from dit_rewrite.demo.shapes.text_sampling import sample_captions
from dit_rewrite.guards import step
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.policies import FORA, CachedAttention, TileReuse
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import BlockwiseReuse, Reuse
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.tile_shares import calibrate_tiles

INTERVALS = (4, 2)
TILE, TILES = 2, 32  # of the 64 tokens: as many tiles as 4,096 tokens have tiles of 128
BLOCK, EVALUATIONS, TOLERANCE = 3, 5, 0.005  # keys of a block; of the bisection
IMAGE_TOKENS = 64  # of the flow-matching model
JOINT = Where(("joint",))
PAGE = Path("docs") / "benchmarks.md"
MARKS = ("<!-- partial attention: begin -->", "<!-- partial attention: end -->")


@dataclass(frozen=True)
class Row:
    """A policy's share (kept scores, or FLOPs of the branches), and its errors, in all and by batch."""

    name: str
    interval: int
    threshold: float | None
    share: float
    error: float
    by_batch: list[float]


class Toy:
    """A bundled model with its captions: the measured ones, and others to find thresholds with."""

    def __init__(self, model: Any, sample: Callable[..., Tensor], draw: Callable[..., Any], given: Any) -> None:
        self.model, self._sample, self.steps, self.batch = model, sample, given.steps, given.batch
        captions = draw(given.captions, Generator().manual_seed(SEED))[1]
        self.batches = [captions[i : i + self.batch] for i in range(0, len(captions), self.batch)]
        self.others = draw(self.batch, Generator().manual_seed(CALIBRATION_SEED))[1]

    def sample(self, denoiser: nn.Module, captions: Sequence[str], seed: int) -> Tensor:
        return self._sample(denoiser, self.model.encoder, captions, steps=self.steps, seed=seed)

    def sample_all(self, denoiser: nn.Module) -> Tensor:
        return torch.cat([self.sample(denoiser, captions, seed) for seed, captions in enumerate(self.batches)])

    @cached_property
    def uncached(self) -> Tensor:
        return self.sample_all(self.model.denoiser)

    def run(self, policy: Policy, sample: Callable[[nn.Module], Tensor]) -> tuple[Tensor, RewrittenModule, Kept]:
        """Return the images, the model after the run, and the counters of blocks."""
        model = dit_rewrite.compile(twin(self.model.denoiser), policy, backend="aot_eager")
        model._backend.session.observer = kept = Kept(model._backend, self.steps)
        return sample(model), model, kept

    def row(
        self, name: str, interval: int, policy: Policy, share: Callable[..., float], at: float | None = None
    ) -> Row:
        images, model, kept = self.run(policy, self.sample_all)
        pairs = zip(images.split(self.batch), self.uncached.split(self.batch), strict=True)
        errors = [relative_l2(*pair) for pair in pairs]
        return Row(name, interval, at, share(model, kept, self.steps), relative_l2(images, self.uncached), errors)


def kept_share(model: RewrittenModule, kept: Kept, steps: int) -> float:
    """Return the share of scores that were kept, or of sites that reused for a policy without blocks."""
    return fmean(kept.by_step() if kept.totals.any() else reused_by_step(model.stats(), steps))


def flops_share(model: RewrittenModule, kept: Kept, steps: int) -> float:
    """Return the FLOPs of the guarded branches over a trajectory, as a share of those without reuse."""
    (graph,) = model._backend.rewritten
    rows = [record.row for record in model.stats().records]
    flops = {
        row: cost.total_flops(graph.straight(row, with_table=False).gm.graph)
        for row in {*rows, (False,) * len(rows[0])}
    }
    full = flops[(False,) * len(rows[0])]
    branches = sum(graph.found.sites[i].flops for i in graph.reached)
    return 1 - fmean(full - flops[row] for row in rows) / branches


def whole(share: float, steps: int) -> Policy:
    """Reuse joint attention in as many steps, evenly spread, as have at most that share of all scores."""
    count = int(share * steps)
    chosen = [(2 * i + 1) * steps // (2 * count) for i in range(count)]
    return Policy((Rule(sympy.Or(*(Eq(step, s) for s in chosen)) & (step > 0), Reuse(), JOINT),))


def static_blocks(interval: int) -> Policy:
    """Keep the condition's blocks in all but every n-th step."""
    do = BlockwiseReuse(torch.inf, BLOCK, keys="condition")
    return Policy((Rule(Ne(step % interval, 0), do, JOINT),))


def static_share(interval: int, steps: int) -> float:
    """Return the share of scores that `static_blocks` keeps. A state's own counters begin anew at a computed step."""
    reusing = sum(s % interval != 0 for s in range(steps))
    return reusing / steps * MAX_TOKENS / (MAX_TOKENS + IMAGE_TOKENS)


def joint_rows(toy: Toy, record: Record, tick: Callable[[], object]) -> list[Row]:
    def row(
        name: str, interval: int, policy: Policy, at: float | None = None, share: Callable[..., float] = kept_share
    ) -> Row:
        found = record.get("joint", name, lambda: asdict(toy.row(name, interval, policy, share, at)))
        tick()
        return Row(**found)

    def measured(threshold: float) -> Policy:
        return CachedAttention(threshold, BLOCK, kinds=JOINT.kinds, keys="condition")

    def reuse(threshold: float) -> float:
        images, model, kept = toy.run(measured(threshold), lambda m: toy.sample(m, toy.others, CALIBRATION_NOISE))
        return kept_share(model, kept, toy.steps)

    rows = []
    for interval in INTERVALS:
        fixed = static_share(interval, toy.steps)
        static = row(f"static blocks {interval}", interval, static_blocks(interval), share=lambda *_: fixed)  # noqa: B023
        found = record.get(
            "thresholds",
            str(interval),
            lambda: {"threshold": bisect(reuse, static.share, TOLERANCE, EVALUATIONS)[0]},  # noqa: B023
        )
        ours = row(f"blocks {interval}", interval, measured(found["threshold"]), found["threshold"])
        rows += [static, ours, row(f"whole {interval}", interval, whole(ours.share, toy.steps))]
    return rows


def tile_rows(toy: Toy, record: Record, tick: Callable[[], object]) -> list[Row]:
    def row(name: str, interval: int, policy: Policy) -> Row:
        found = record.get("tiles", name, lambda: asdict(toy.row(name, interval, policy, flops_share)))
        tick()
        return Row(**found)

    rows = []
    for interval in INTERVALS:
        rows.append(row(f"whole {interval}", interval, FORA(interval, kinds=("cross",))))
        count = (toy.steps / interval - 1) * TILES // (toy.steps - 1)  # the first step computes all
        for name, share in (("turns", count / TILES), ("change", count / TILES), ("often", 1 / interval)):
            order: Any = "change" if name == "change" else "turns"
            rows.append(row(f"{name} {interval}", interval, TileReuse(share, TILE, order)))
        rows.append(row(f"shares {interval}", interval, shares_by_branch(toy, count / TILES)))
    return rows


def shares_by_branch(toy: Toy, share: float) -> Policy:
    """Return the calibrated shares of tiles, on other captions and noise."""

    def sample(model: nn.Module) -> Tensor:
        return toy.sample(model, toy.others, CALIBRATION_NOISE)

    return calibrate_tiles(twin(toy.model.denoiser), sample, share, TILE, backend="aot_eager").policy


def judge(joint: Sequence[Row], tiles: Sequence[Row]) -> list[Claim]:
    """Judge in each batch whether partial reuse is closer to the uncached images than whole or static reuse."""
    claims = []
    pairs = (
        ("Blocks chosen by their bound beat the same blocks in fixed steps", joint, "blocks", "static blocks"),
        ("Blocks chosen by their bound beat whole attention in fixed steps", joint, "blocks", "whole"),
        ("Tiles in turns beat the whole branch in fixed steps", tiles, "turns", "whole"),
        ("Tiles in turns, each as often, beat the whole branch in fixed steps", tiles, "often", "whole"),
        ("Tiles that changed most beat tiles in turns", tiles, "change", "turns"),
        ("Tiles with a share for each branch beat equal shares", tiles, "shares", "turns"),
    )
    for text, rows, ours, theirs in pairs:
        named = {row.name: row for row in rows}
        found = [(named[f"{ours} {n}"], named[f"{theirs} {n}"]) for n in INTERVALS]
        claims.append(Claim.of(text, "relative L2, in every batch", [_closer(a, b) for a, b in found]))
    return claims


def _closer(a: Row, b: Row) -> dict[str, Any]:
    held = all(x < y for x, y in zip(a.by_batch, b.by_batch, strict=True))
    return {"row": a.name, "error": a.error, "against": b.name, "other": b.error, "held": held}


TEXTS = {
    "static blocks": "the text's blocks in all but every n-th step", "blocks": "the text's blocks within their bound",
    "whole": "the whole branch in fixed steps", "turns": "tiles in turns", "change": "tiles that changed most",
    "often": "tiles in turns, each as often as the whole branch", "shares": "tiles in turns, a share for each branch",
}  # fmt: skip


def render(content: Mapping[str, Any]) -> str:
    """Render the tables and the claims from the content of ``partial_attention.json``."""
    settings, sections = content["settings"], content["sections"]
    lines = [
        f"`python -m benchmarks.partial_attention`: {settings['captions']} captions, {settings['steps']} steps"
        " (`partial_attention.json`; errors only, nothing is timed).",
    ]
    for section, heading in (("joint", "joint attention keeps"), ("tiles", "cross-attention computes")):
        share = "kept scores" if section == "joint" else "FLOPs"
        lines += ["", f"| {heading} | interval | {share} | relative L2 |", "|---|---:|---:|---:|"]
        for row in sections[section].values():
            text = TEXTS[row["name"].rpartition(" ")[0]]
            lines.append(f"| {text} | {row['interval']} | {row['share']:.1%} | {row['error']:.4f} |")
    lines.append("")
    for claim in content["claims"]:
        held = sum(each["held"] for each in claim["evidence"])
        lines.append(f"- {claim['claim']}: in {held} of {len(claim['evidence'])} comparisons ({claim['bound']}).")
    return "\n".join(lines) + "\n"


def write_page(content: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write the tables between their marks in the page."""
    text = page.read_text(encoding="utf-8")
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    write_whole(page, pattern.sub(lambda _: f"{begin}\n{render(content)}{end}", text))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("captions", 16), ("steps", 20), ("batch", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--out", type=Path, default=RESULTS / "partial_attention.json")
    parser.add_argument("--page", action="store_true", help="write the tables of the results into the documentation")
    arguments = parser.parse_args(argv)
    if arguments.page:
        write_page(json.loads(arguments.out.read_text(encoding="utf-8")))
        return
    prepare(parser, arguments, "captions")
    settings = {name: getattr(arguments, name) for name in ("captions", "steps", "batch", "threads")}
    settings["weights"] = [digest(WEIGHTS / f"{name}_denoiser.safetensors") for name in ("text", "flow")]
    record = Record.open(arguments.out, {"settings": settings, "machine": machine(), "versions": versions()})
    with open_progress() as bar, bar("rows", 8 * len(INTERVALS)) as tick:
        tiles = tile_rows(Toy(load_text_model(), sample_captions, sample_captioned, arguments), record, tick)
        joint = joint_rows(Toy(load_flow_model(), sample_relations, sample_related, arguments), record, tick)
    claims = judge(joint, tiles)
    record.write(claims)
    print_claims(claims)
    console.print(f"wrote {arguments.out}", highlight=False)


if __name__ == "__main__":
    main()
