"""Draw which room imports which, from the source: python -m docs.figures.imports writes docs/architecture.svg.

A room stands above all rooms that it imports. An arrow that follows from others is left out: of a -> b -> c and a -> c
only the first two are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import networkx as nx

from docs.figures.rooms import MAY_IMPORT, ROOT, edges, room_of

OUT = ROOT / "docs" / "architecture.svg"
WIDTH, BOX, HEIGHT, GAP, STAGGER = 760, 132, 30, 34, 90
COLOURS = {"passes": "#e3f2fd", "runtime": "#fff3e0", "kernels": "#fce4ec"}  # other rooms belong to dit_rewrite/
STYLE = "text{font:13px sans-serif;text-anchor:middle;fill:#222}path{fill:none;stroke:#888}"


class Place(NamedTuple):
    """The top left corner of a box."""

    x: float
    y: float


def room_graph() -> nx.DiGraph:
    """The imports between rooms without those that follow from others."""
    pairs = {(room_of(a), room_of(b)) for a, b in edges()}
    graph = nx.DiGraph((a, b) for a, b in sorted(pairs, key=str) if a is not None and b is not None and a != b)
    graph.add_nodes_from(MAY_IMPORT)
    return nx.transitive_reduction(graph)


def places(graph: nx.DiGraph) -> dict[str, Place]:
    """Each room one row above the highest room that it imports; within a row in the order of the table.

    Rooms that have a row to themselves are staggered, so that an arrow past one of them can be seen.
    """
    rows: dict[str, int] = {}
    for room in reversed(list(nx.topological_sort(graph))):
        rows[room] = 1 + max((rows[other] for other in graph[room]), default=-1)
    found = {}
    for row in range(max(rows.values()) + 1):
        members = [room for room in MAY_IMPORT if rows[room] == row]
        y = 16 + (max(rows.values()) - row) * (HEIGHT + GAP)
        step, aside = WIDTH / len(members), STAGGER * (-1) ** (row + 1) if row and len(members) == 1 else 0
        found.update({room: Place(step * (i + 0.5) - BOX / 2 + aside, y) for i, room in enumerate(members)})
    return found


def svg() -> str:
    """The figure as text, the same for the same source."""
    graph = room_graph()
    where = places(graph)
    height = max(place.y for place in where.values()) + HEIGHT + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8" style="stroke:#888"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
        *_arrows(graph, where),
        *_boxes(where),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _arrows(graph: nx.DiGraph, where: dict[str, Place]) -> Iterator[str]:
    for a, b in sorted(graph.edges):
        start, end = where[a], where[b]
        x0, y0, x1, y1 = start.x + BOX / 2, start.y + HEIGHT, end.x + BOX / 2, end.y
        bend = (y1 - y0) / 2
        path = f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
        yield f'<path d="{path}" marker-end="url(#a)"><title>{a} imports {b}</title></path>'


def _boxes(where: dict[str, Place]) -> Iterator[str]:
    for room, (x, y) in where.items():
        colour = COLOURS.get(room.partition(".")[0], "#f1f8e9")
        yield (
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="5" fill="{colour}" stroke="#888"/>'
            f'<text x="{x + BOX / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}">{room}</text>'
        )


if __name__ == "__main__":
    OUT.write_text(svg(), encoding="utf-8")
