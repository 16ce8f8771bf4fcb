"""What benchmarks of many rows share: claims, a file of results that grows as they come, how a run begins and ends."""

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
from dit_rewrite.policy.plan import write_whole

Evidence = dict[str, Any]
VERDICTS = {True: "held", False: "NOT held", None: "open"}


@dataclass(frozen=True)
class Claim:
    """A claim, when it is said to hold, and the comparisons behind it; held is None where there are none."""

    claim: str
    bound: str
    held: bool | None
    evidence: list[Evidence]

    @classmethod
    def of(cls, claim: str, bound: str, evidence: list[Evidence]) -> Claim:
        return cls(claim, bound, all(e["held"] for e in evidence) if evidence else None, evidence)


@dataclass
class Record:
    """A file of results: a header, and sections of named entries that are written as they come."""

    path: Path
    header: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any]) -> Record:
        """Resume the file, where its header is the same."""
        record = cls(path, json.loads(json.dumps(header)))
        content = json.loads(path.read_text()) if path.exists() else {}
        if all(content.get(name) == value for name, value in record.header.items()):
            record.sections = content.get("sections", {})
        return record

    def get(self, section: str, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The entry, made and written if it is not there."""
        entries = self.sections.setdefault(section, {})
        if name not in entries:
            entries[name] = json.loads(json.dumps(make()))
            self.write()
        found: dict[str, Any] = entries[name]
        return found

    def write(self, claims: Sequence[Claim] = ()) -> None:
        """All of it; the file is replaced as a whole."""
        content = {**self.header, "claims": [asdict(claim) for claim in claims], "sections": self.sections}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace, counted: str) -> None:
    """Refuse batches of more than one shape, and set PyTorch up; `counted` is the option that says how many samples."""
    count: int = getattr(arguments, counted)
    if arguments.batch < 1 or count < 1 or count % arguments.batch:
        parser.error(f"--batch must divide --{counted}, so that all batches have one shape")
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 1000  # torch < 2.13 counts all rows together


def print_claims(claims: Sequence[Claim]) -> None:
    """A line for each claim, its comparisons counted."""
    for claim in claims:
        count = f"{sum(e['held'] for e in claim.evidence)} of {len(claim.evidence)} comparisons"
        console.print(f"{VERDICTS[claim.held]}: {claim.claim} ({claim.bound}; {count})", highlight=False)


def digest(path: Path) -> str:
    """Which weights these are."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
