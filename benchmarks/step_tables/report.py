"""The page of benchmarks/step_tables/run.py: figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STEPS = 50  # rows of a table

INTRODUCTION = """# Step tables

A step table holds what depends on the timestep, the conditioning and weights alone, and took a matrix product to
compute: timestep embedders, AdaLN modulation, the final modulation. A step that reuses something reads these values
from the table. A step that computes every site computes them as ever, so reuse 0 stays bit-equal; with
`compile(…, tables="all")` it reads them too, within rounding.

- **Rows.** If a scheduler tells the timesteps of the trajectory, as in a pipeline, the rows of all steps are computed
  by one call, batched over the steps, when a step first reads the table: weights are read once instead of once a step.
  Without one, a row is computed when it is read.
- **Keys.** A row is found by the value of the timestep, with its dtype and shape. It belongs to the schedule, because a
  batch of another size may be rounded differently and no image depends on those before it, and to the weights and the
  conditioning that it was computed from, compared by identity and version in each call, and weights by a checksum of
  their content in each trajectory. Rows that depend on no conditioning outlive the trajectory, and others last as long
  as the conditioning is in use.
- **Memory.** Only values that some compiled variant reads are stored, such as the gates of a modulation. The rows of a
  graph take at most an eighth of `memory_budget`, and those of each conditioning (streams of guidance, prompts; 8 at
  most) an eighth of that; the oldest ones are dropped first. As many rows are computed at once as take no more than an
  eighth of the budget while they are computed, 64 at most.
- **No table.** Values that depend on the conditioning have no table without a scheduler, because each row would be read
  once, nor if the timestep is a Python int, of which there is no batch. Nor is there one if reading the timestep would
  wait for a GPU: it is read on the host, or found as an entry of the scheduler's timesteps. If a policy decides in the
  middle of a call (`FirstBlockCache` with `lag=0`), the table is not read either: what a reusing step computes of it
  runs before the decision, or in the same way in all steps. `explain()` names the reason, and `stats().tables` counts
  dropped rows by reason.
- `disable_passes=("step_tables",)` turns tables off.

## Released weights

With `tables="all"` no step reads the weights that only tables are computed from. `compile(…, tables="all",
release=True)` releases their memory once the rows of a schedule were computed by one call; `restore` brings it back.

- **How.** The contents are written to a temporary file without a name, and the storage of each weight is replaced by a
  private mapping of it. The parameter stays the same object, with its metadata and version counter, so Dynamo does not
  recompile. Reading it works everywhere: in `state_dict`, `save_pretrained`, copies, and for rows that are computed
  later. The operating system reads pages from the file, and drops them when it needs the memory.
- **Changed weights.** What is written to a released weight stays in memory. The next trajectory computes rows from the
  new values, as ever, and releases the weight again.
- **Which.** Weights that no compiled variant, no value that is computed once per trajectory and no other graph of the
  model reads. A graph that is compiled later brings all of them back first, as it may read them. None is released if a
  graph is not the whole model, because the readers of its weights are then unknown, nor if rows are computed one by
  one. A weight that shares its storage stays, and so does everything if the folder of temporary files (`TMPDIR`) is in
  memory, full or cannot be written. `stats().tables` counts the reasons.
- **How much.** `stats().released_bytes` and `explain()` say how many bytes are released now.
- **GPUs.** Weights on a GPU are not released. An emptied storage there would make whatever reads it fail or crash.
- **Threads.** Tables lock the weights while they compute rows. Other code must not read a weight in one thread at the
  moment when another thread releases it or brings it back.

## On paper

Written by `python -m benchmarks.step_tables` from `step_tables.json` (torch {torch}, diffusers {diffusers}).

Nothing ran: the models have their published configurations on torch's meta device, weights in bfloat16 (in float32 what
the class keeps so), and are called with one sample; with classifier-free guidance rows are twice as large. FLOPs are
unknown where sizes depend on data, as the numbers of text tokens of HunyuanVideo-1.5 do.

- *depends on*: the conditioning that the values depend on besides the timestep: then they hold for one trajectory.
- *row*: bytes of all values at one step, and of {steps} steps.
- *FLOPs*: what a step spends on the values, and its share of the whole step.
- *weights*: the bytes that nothing but the values reads, and their share of all weights of the graph.
- *for good*: those of them that only values of the timestep alone read. Such values outlive the trajectory.
- *read in reuse*: what a step reads of a row if it reuses every site. Where many blocks add weights of their own to one
  value (PixArt, Wan), each step reads all of it.
"""

SAMPLES = """### Values with one vector for each sample

Modulation and embeddings. Where each block has a modulation of its own, as in DiT, SD3.5, FLUX.1, Qwen-Image and
HunyuanVideo-1.5, it has about a third of the weights, and next to no FLOPs; where blocks share one, or make it from a
narrow embedding (PixArt, Wan, FLUX.2, Z-Image), a table frees little.
"""

TOKENS = """### All values

Where the first block projects its text before it meets the image, these projections depend on the text and the
timestep alone, and so do text refiners that take the timestep. They have one vector for each token. Where the pipeline
gives each token a timestep of its own (Wan 2.2 5B), modulation too has one vector for each token.
"""

CONFIGURATIONS = "### Configurations\n"

FOR_GOOD = "for good"
_COLUMNS = ("model", "depends on", "values", "row", f"{STEPS} rows", "FLOPs", "weights", FOR_GOOD, "read in reuse")


def render(content: Mapping[str, Any]) -> str:
    """Return the whole page."""
    rows = content["rows"]
    parts = [
        INTRODUCTION.format(torch=content["torch"], diffusers=content["diffusers"], steps=STEPS),
        SAMPLES,
        _table(_COLUMNS, (_cells(row, "samples") for row in rows)),
        TOKENS,
        _table(
            [column for column in _COLUMNS if column != FOR_GOOD],
            (_cells(row, "tokens") for row in rows if row["tokens"] != row["samples"]),
        ),
        CONFIGURATIONS,
        _table(("model", "class", "configuration", "blocks", "weights"), map(_configuration, rows)),
    ]
    return "\n".join(parts)


def _cells(row: Mapping[str, Any], section: str) -> tuple[str, ...]:
    figures, step = row[section], row["step"]
    depends = ", ".join(f"`{name}`" for name in row["conditioning"][section]) or "timestep alone"
    if not figures["values"]:
        return (row["name"], "", "none", *[""] * (len(_COLUMNS) - 3))
    return (
        row["name"],
        depends,
        f"{figures['values']:,}",
        size(figures["row_bytes"]),
        size(STEPS * figures["row_bytes"]),
        f"{count(figures['flops'])} ({percent(figures['flops'], step['flops'])})",
        _released(figures, step),
        *([_released(row["timestep"], step)] if section == "samples" else ()),
        f"{figures['reuse_values']:,} values, {size(figures['reuse_bytes'])}",
    )


def _released(figures: Mapping[str, int], step: Mapping[str, int]) -> str:
    released = figures["released_bytes"]
    return f"{size(released)} ({percent(released, step['weight_bytes'])})"


def _configuration(row: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = ", ".join(f"{name} {number}" for name, number in row["depths"].items())
    return row["name"], f"`{row['class']}`", row["source"], blocks, size(row["step"]["weight_bytes"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def size(count: float) -> str:
    """Return bytes with three digits and a binary unit."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(number: float) -> str:
    """Return a number with three digits and a decimal prefix."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T")).strip()


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < base:
            return f"{number:.3g} {unit}"
        number /= base
    return f"{number:.3g} {units[-1]}"


def percent(part: float, whole: float) -> str:
    """Return a share with two digits; unknown if there is no whole."""
    if not whole:
        return "unknown"
    share = 100 * part / whole
    return "< 0.01 %" if 0 < share < 0.01 else f"{share:.2g} %"
