"""Figures 3, 9 (left, middle) and 14 and appendix A.7 of DiTFastAttn, small: python -m benchmarks.ditfastattn.figures

On the bundled shapes DiT and, for negative prompts, on the bundled text-to-shapes model. Each plan is searched on a few
images, and judged on the images of that very search, which the policy would sample bit for bit; their errors are
therefore lower than on other images. Attention FLOPs are those that the plan's file has.

- maps: attention of each layer inside windows of one and two axes, mean over steps and heads (figure 3a, left).
- residual: the mean squared change between steps of window attention and of its residual (figure 3a, right).
- methods: one strategy alone against all of them, at each threshold (figure 9, left).
- steps: plans for other numbers of steps (figure 9, middle).
- metrics: plans by other metrics (appendix A.7).
- negative: plans calibrated with and without a negative caption, and what is left of its effect (appendix A.8).

Each result is written at once; a rerun with the same parameters measures what is missing. `--page` only renders.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import dit_rewrite
from benchmarks.ditfastattn.page import RESIDUAL, draw, render
from benchmarks.dqar_fidelity.run import evenly_spread
from benchmarks.record import Record, digest
from benchmarks.timing import RESULTS, machine
from dit_rewrite.demo.report import console, versions
from dit_rewrite.demo.shapes.captions import sample_captioned
from dit_rewrite.demo.shapes.model import WEIGHTS, load_denoiser
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.demo.shapes.text_model import load_text_model
from dit_rewrite.demo.shapes.text_sampling import sample_captions
from dit_rewrite.kernels.window_attention.geometry import make_window
from dit_rewrite.module import twin
from dit_rewrite.policies import DiTFastAttn
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.plan import Choice, Plan
from dit_rewrite.proof.image_metrics import relative_l2, ssim
from dit_rewrite.search.greedy import DELTAS
from dit_rewrite.search.segment_runner import ALL, greedy_plan

SEED, WINDOW = 1 << 20, 0.125  # the noise of the searches in benchmarks/ditfastattn/run.py
STEPS, OTHERS = 10, (5, 20)
THRESHOLDS = ("D2", "D6")
METHODS = {"all": ALL, "AST": {Choice.AST}, "ASC": {Choice.ASC}, "WA-RS": {Choice.WA_RS}}
METRICS = {"ssim": (0.005, 0.015), "relative_l2": (0.05, 0.15)}  # a tenth of D2 and D6, and D2 and D6
NEGATIVE, TEXT_GUIDANCE, TEXT_DELTA = "a large red circle", 4.0, "D4"
Sample = Callable[[Any], Tensor]


def in_eager(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that compiles nothing: plans and images are those of "aot_eager"."""
    return gm.forward


def search(denoiser: nn.Module, sample: Sample, uncached: Tensor, **settings: Any) -> tuple[Plan, dict[str, Any]]:
    """Search a plan, and return its figures and the distance of the search's own images from the uncached ones."""
    images: list[Tensor] = []
    torch.compiler.reset()
    given = {"conditional": "first", "window": WINDOW, "backend": in_eager, **settings}
    plan = greedy_plan(denoiser, [lambda model: images.append(sample(model))], **given)
    counts = {str(choice): count for choice, count in plan.counts.items()}
    facts = {"delta": plan.delta, "attention": plan.attention_share, "by_step": plan.attention, "choices": counts}
    return plan, facts | {
        "work": plan.work,
        "relative_l2": relative_l2(images[0], uncached),
        "ssim": ssim(images[0], uncached),
    }


def sampler(count: int, steps: int) -> Sample:
    labels = evenly_spread(count)
    return lambda model: sample_images(model, labels, steps=steps, guidance=GUIDANCE, seed=SEED)


def measure_maps(record: Record, count: int) -> None:
    """Figure 3a, left: the attention map of the most local layer, and how much of each layer's a window sees."""
    denoiser = load_denoiser()
    tokens, layers = (denoiser.config.sample_size // denoiser.config.patch_size) ** 2, denoiser.config.num_layers
    side, places = math.isqrt(tokens), torch.arange(tokens)

    def rows() -> dict[str, Any]:
        maps = attention_maps(denoiser, sampler(count, STEPS)).unflatten(0, (STEPS, layers)).mean(0)
        windows: dict[str, Any] = {}
        for name, reach, grid in (("sequence", (tokens // 8,), None), ("rows and columns", (2, 2), (side, side))):
            seen = make_window("maps", tokens, reach, grid, 0).sees(places[:, None], places)
            inside = [round(float(each[seen].sum() / each.sum()), 6) for each in maps]
            windows[name] = {"reach": reach, "pairs": float(seen.double().mean()), "inside": inside}
        local = max(range(layers), key=windows["rows and columns"]["inside"].__getitem__)
        return {"layer": local, "map": [[round(value, 5) for value in row] for row in maps[local].tolist()], **windows}

    timed(record, "maps", "class", rows)


def attention_maps(denoiser: nn.Module, sample: Sample) -> Tensor:
    """Return the attention probabilities of every call, (calls, tokens, tokens): means over the batch and the heads."""
    maps: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        maps.append(scores.double().mean((0, 1)))
        return scores @ value

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        sample(denoiser)
    return torch.stack(maps)


def measure_residual(record: Record, count: int) -> None:
    """Figure 3a: the change of window attention and of its residual, as means over layers, by half and step."""
    steps, denoiser = 20, load_denoiser()

    def rows() -> dict[str, Any]:
        torch.compiler.reset()
        found = dit_rewrite.analyze(
            denoiser, lambda model, seed: sampler(count, steps)(model), [0], window=WINDOW, conditional="first",
            backend=in_eager,
        )  # fmt: skip
        means = {}
        for quantity in RESIDUAL:
            layers = [found.mean(row, "mse") for row in found.rows(quantity=quantity)]
            means[quantity] = torch.stack(layers).nanmean(0).tolist()[1:]
        return {"steps": steps, "rows": len(layers), **means}

    timed(record, "residual", "class", rows)


def measure_plans(record: Record, count: int) -> None:
    """Figure 9 (left, middle) and appendix A.7."""
    denoiser = load_denoiser()
    uncached = cache(lambda steps: sampler(count, steps)(denoiser))

    def plan(steps: int, **settings: Any) -> dict[str, Any]:
        return search(denoiser, sampler(count, steps), uncached(steps), steps=steps, **settings)[1]

    for name in THRESHOLDS:
        for method, strategies in METHODS.items():
            make = partial(plan, STEPS, delta=DELTAS[name], strategies=strategies)
            timed(record, "methods", f"{method} {name}", make)
    for steps in OTHERS:
        for name in THRESHOLDS:
            timed(record, "steps", f"{steps} {name}", partial(plan, steps, delta=DELTAS[name]))
    for metric, deltas in METRICS.items():
        for delta in deltas:
            timed(record, "metrics", f"{metric} {delta:g}", partial(plan, STEPS, delta=delta, metric=metric))


def measure_negative(record: Record, count: int) -> None:
    """Appendix A.8: the images with a negative caption, under plans calibrated without it, with it, and with both."""
    model = load_text_model()
    captions = sample_captioned(count, torch.Generator().manual_seed(SEED))[1]

    def sample(negative: str | None, denoiser: Any) -> Tensor:
        other = None if negative is None else [negative] * count
        return sample_captions(
            denoiser, model.encoder, captions, steps=STEPS, guidance=TEXT_GUIDANCE, seed=SEED, negative=other
        )

    plain = cache(lambda negative: sample(negative, model.denoiser))

    def calibrated(*negatives: str | None) -> dict[str, Any]:
        torch.compiler.reset()
        plan = greedy_plan(
            model.denoiser, [partial(sample, negative) for negative in negatives], DELTAS[TEXT_DELTA], steps=STEPS,
            window=WINDOW, conditional="first", backend=in_eager,
        )  # fmt: skip
        torch.compiler.reset()
        compiled = dit_rewrite.compile(twin(model.denoiser), DiTFastAttn(plan), backend=in_eager, lowering="segments")
        found = {negative: sample(negative, compiled) for negative in (None, NEGATIVE)}
        return {
            "attention": plan.attention_share,
            "choices": {str(choice): number for choice, number in plan.counts.items()},
            "error": {str(n): relative_l2(found[n], plain(n)) for n in found},
            "effect": effect(found[NEGATIVE] - found[None], plain(NEGATIVE) - plain(None)),
            "size": relative_l2(plain(NEGATIVE), plain(None)),
        }

    for name, negatives in (("without", [None]), ("with", [NEGATIVE]), ("both", [None, NEGATIVE])):
        timed(record, "negative", name, partial(calibrated, *negatives))


def effect(found: Tensor, exact: Tensor) -> float:
    """Return the cosine between two effects of a negative caption on the images: 1 if it is kept."""
    return float(functional.cosine_similarity(found.double().flatten(), exact.double().flatten(), dim=0))


def timed(record: Record, section: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Measure an entry of the file if it is missing, and say how long it took."""
    began = time.perf_counter()
    record.get(section, name, make)
    console.print(f"{section}: {name}, {time.perf_counter() - began:.0f} s", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="that each search looks at")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "ditfastattn_figures.json")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and its pictures")
    parser.add_argument("--page", action="store_true", help="only render the page from --out")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if not arguments.page:
        torch.set_num_threads(arguments.threads)
        settings = {"images": arguments.images, "window": WINDOW, "weights": digest(WEIGHTS / "denoiser.safetensors")}
        settings |= {"text_weights": digest(WEIGHTS / "text_denoiser.safetensors"), "negative": NEGATIVE}
        settings |= {"guidance": GUIDANCE, "text_guidance": TEXT_GUIDANCE, "steps": STEPS, "text_delta": TEXT_DELTA}
        header = {"settings": settings, "machine": machine(), "versions": versions()}
        record = Record.open(arguments.out, header)
        for measure in (measure_maps, measure_residual, measure_plans, measure_negative):
            measure(record, arguments.images)
        record.write()
    content = json.loads(arguments.out.read_text(encoding="utf-8"))
    draw(content, arguments.docs)
    write_whole(arguments.docs / "ditfastattn.md", render(content))
    console.print(f"wrote {arguments.docs / 'ditfastattn.md'} and its pictures", highlight=False)


if __name__ == "__main__":
    main()
