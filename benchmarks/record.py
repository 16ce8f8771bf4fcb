"""Helpers of benchmarks with many rows: claims, an incremental results file, and the setup of a run."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_rewrite.demo.report import console
from dit_rewrite.policy.files import write_whole

Evidence = dict[str, Any]
VERDICTS = {True: "held", False: "NOT held", None: "open"}


@dataclass(frozen=True)
class Claim:
    """A claim, its criterion, and its comparisons. ``held`` is None if there are no comparisons."""

    claim: str
    bound: str
    held: bool | None
    evidence: list[Evidence]

    @classmethod
    def of(cls, claim: str, bound: str, evidence: list[Evidence]) -> Claim:
        return cls(claim, bound, all(e["held"] for e in evidence) if evidence else None, evidence)


@dataclass
class Record:
    """A results file: a header, and sections of named entries. Each entry is written at once."""

    path: Path
    header: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any]) -> Record:
        """Load the file if its header is the same; otherwise start a new one."""
        record = cls(path, json.loads(json.dumps(header)))
        content = json.loads(path.read_text()) if path.exists() else {}
        if all(content.get(name) == value for name, value in record.header.items()):
            record.sections = content.get("sections", {})
        return record

    def get(self, section: str, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the entry; it is computed and written if it is missing."""
        entries = self.sections.setdefault(section, {})
        if name not in entries:
            entries[name] = json.loads(json.dumps(make()))
            self.write()
        found: dict[str, Any] = entries[name]
        return found

    def write(self, claims: Sequence[Claim] = ()) -> None:
        """Write the whole file, replacing it atomically."""
        content = {**self.header, "claims": [asdict(claim) for claim in claims], "sections": self.sections}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace, counted: str) -> None:
    """Exit with an error if batches would have several shapes, and configure PyTorch.

    counted: the name of the option with the number of samples.
    """
    count: int = getattr(arguments, counted)
    if arguments.batch < 1 or count < 1 or count % arguments.batch:
        parser.error(f"--batch must divide --{counted}, so that all batches have one shape")
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 1000  # torch < 2.13 counts all rows together


def print_claims(claims: Sequence[Claim]) -> None:
    """Print a line for each claim with the number of its comparisons."""
    for claim in claims:
        count = f"{sum(e['held'] for e in claim.evidence)} of {len(claim.evidence)} comparisons"
        console.print(f"{VERDICTS[claim.held]}: {claim.claim} ({claim.bound}; {count})", highlight=False)


def digest(path: Path) -> str:
    """Return a digest of the weights."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
