"""The command line: ``python -m dit_rewrite COMMAND``; ``--help`` lists the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from dit_rewrite.cli import analyze, autopolicy, paths, search, tune
from dit_rewrite.cli.outcome import Outcome
from dit_rewrite.cli.pipeline_call import add_call, add_component
from dit_rewrite.cli.texts import DESCRIPTIONS, EXAMPLES
from dit_rewrite.errors import DitRewriteError

BUNDLED = "dit_rewrite.demo.shapes.calls:build"  # the factory of the bundled denoiser
MODEL = "a pipeline's folder or hub id, or module:factory, where factory(steps) returns (model, calls)"
FAILED = 2  # the exit code for errors, which argparse also uses for an invalid command line
INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C
EXIT_CODES = f"exit codes: 0 success, 1 a check failed, {FAILED} an error, {INTERRUPTED} interrupted"


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def seed(text: str) -> int:
    """An argparse type: an integer that torch accepts as a seed."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} does not fit into 64 bits")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """An argparse type: distinct integers of at least 1, separated by commas."""
    try:
        found = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 16,64,256") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1 or a duplicate")
    return found


def _add_demo(parser: argparse.ArgumentParser) -> None:
    paths.add_output(
        parser, "--out", folder=True, default=Path("demo"), help="output folder for images, graphs and results"
    )
    parser.add_argument("--images", type=positive, default=16, help="number of images that each method samples")
    parser.add_argument(
        "--steps", type=positive, default=50, help="DDIM steps of the uncached reference and of the policies"
    )
    parser.add_argument("--intervals", type=positive, nargs="+", default=[2, 3, 4, 6], help="intervals of the policies")
    parser.add_argument("--rounds", type=positive, default=3, help="timed runs of each method; the median is reported")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the initial noise of all methods")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; other load disturbs one thread least")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, or a folder written by save_pretrained")
    parser.add_argument(
        "--policy", default="fora:interval=3", help="name:parameter=value,…, the file of a policy, or never"
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompt", nargs="+", help="prompts, for text-conditional pipelines; one image for each")
    wanted.add_argument("--label", type=int, nargs="+", help="class numbers, for class-conditional pipelines")
    parser.add_argument("--steps", type=positive, default=50, help="number of steps of the scheduler")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--negative-prompt", help="what the images should not show")
    parser.add_argument("--height", type=positive, help="height in pixels (default: the pipeline's)")
    parser.add_argument("--width", type=positive, help="width in pixels (default: the pipeline's)")
    parser.add_argument("--frames", type=positive, help="frames of a video (default: the pipeline's)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise; further prompts take the next seeds")
    parser.add_argument("--backend", default="inductor", help="backend that compiles the graphs: inductor or aot_eager")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    paths.add_output(parser, "--out", default=Path("image.png"), help="the image; further images get a number")


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--conditions", type=lengths, default="16,64,256,1024", help="numbers of text tokens, separated by commas"
    )
    parser.add_argument("--width", type=positive, default=288, help="width of the model, 72 per head; PixArt has 1152")
    parser.add_argument("--tokens", type=positive, default=256, help="number of image tokens, a square number")
    parser.add_argument("--layers", type=positive, default=2, help="number of blocks; the times are averaged over them")
    parser.add_argument("--rounds", type=positive, default=10, help="timed calls per length; the median is reported")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; other load disturbs one thread least")
    paths.add_output(
        parser, "--out", folder=True, default=Path("latency"), help="output folder for the plot and the times"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=BUNDLED, help=MODEL)
    parser.add_argument("--policy", default="fora:interval=3", help="name:parameter=value,…, or the file of a policy")
    parser.add_argument(
        "--backend", default="aot_eager", help="backend that compiles the graphs: aot_eager or inductor"
    )
    parser.add_argument(
        "--lowering", default="auto", help="how the graphs are compiled: variants, segments, or auto to choose"
    )
    parser.add_argument("--steps", type=positive, default=12, help="number of steps of the replayed trajectory")
    paths.add_output(parser, "--dump", folder=True, help="output folder for the graphs after each pass and their diffs")
    add_component(parser)
    add_call(parser)


def _add_observed(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cli.observe`."""
    parser.add_argument("--model", default=BUNDLED, help=MODEL)
    parser.add_argument("--policy", default="fora:interval=3", help="name:parameter=value,…, or the file of a policy")
    parser.add_argument("--steps", type=positive, default=12, help="number of steps of the trajectory")
    parser.add_argument(
        "--backend", default="aot_eager", help="backend that compiles the graphs: aot_eager or inductor"
    )
    add_component(parser)
    add_call(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_observed(parser)
    parser.add_argument(
        "--analysis",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="files of `analyze`: the first is drawn, further ones with other schedulers or steps are compared with it",
    )
    parser.add_argument("--plan", type=Path, help="file of a searched plan, drawn as a heat map")
    parser.add_argument("--front", type=Path, help="front.json of `tune`, or another JSON list of points")
    parser.add_argument("--figures", type=Path, help="folder with further plots, as SVG or PNG")
    parser.add_argument("--images", type=Path, nargs="+", default=(), help="samples to show side by side, PNG or SVG")
    paths.add_output(parser, "--out", default=Path("report.html"), help="the page")


COMMANDS = {
    "analyze": (
        analyze.add_arguments,
        "dit_rewrite.cli.analyze",
        "measure how much a model's tensors change between steps",
    ),
    "autopolicy": (autopolicy.add_arguments, "dit_rewrite.cli.autopolicy", "find the best policy under one bound"),
    "demo": (_add_demo, "dit_rewrite.cli.demo", "sample images with and without caching, and compare"),
    "explain": (_add_observed, "dit_rewrite.cli.explain", "show a model's sites, and the predicted costs of a policy"),
    "generate": (_add_generate, "dit_rewrite.cli.generate", "run a diffusers pipeline with its denoiser rewritten"),
    "latency": (_add_latency, "dit_rewrite.cli.latency", "time the parts of a text-conditional block"),
    "report": (_add_report, "dit_rewrite.cli.report", "write one HTML page about a model under a policy"),
    "search": (search.add_arguments, "dit_rewrite.cli.search", "search a plan: a choice for each step and attention"),
    "tune": (tune.add_arguments, "dit_rewrite.cli.tune", "search the parameters of a policy"),
    "verify": (_add_verify, "dit_rewrite.cli.verify", "verify a rewrite against the unmodified model"),
}


PROGRAM = "python -m dit_rewrite"
DESCRIPTION = "Compile diffusion transformers so that they reuse values that change little between steps."


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"error: {message} ({self.prog} --help shows the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of options that have a value, and keeps the lines of descriptions and examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or isinstance(action.default, bool) or action.default == ()
        return action.help if plain else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, _, summary) in COMMANDS.items():
        lines = "\n".join(f"  {PROGRAM} {line}" for line in EXAMPLES[name])
        about = fill(" ".join(DESCRIPTIONS[name].split()), 100)
        examples = f"examples:\n{lines}\n\n{EXIT_CODES}"
        command = commands.add_parser(name, help=summary, description=about, epilog=examples, formatter_class=_Help)
        add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as one line of JSON on stdout")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 for success, 1 for a check that failed, 2 after an error, or 130 if interrupted.

    The result is printed on stdout, as text or with ``--json`` as one line of JSON; everything else that is printed
    then goes to stderr. The message of an error is one line on stderr; with ``--debug`` the error is raised instead.
    """
    arguments = build_parser().parse_args(argv)
    _, module, _ = COMMANDS[arguments.command]
    try:
        with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
            paths.check_outputs(arguments)
            outcome: Outcome = import_module(module).run(arguments)
        text = outcome.to_json() if arguments.json else outcome.text
        if text:
            print(text)
        return outcome.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        print(f"error: {_line(paths.explained(error, arguments))}", file=sys.stderr)
        return FAILED


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, DitRewriteError) else f"{type(error).__name__}: {text} (--debug shows where)"
