"""Plans that tests share."""

from __future__ import annotations

from dataclasses import replace

from dit_rewrite.policy.plan import Choice, Plan

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice

PLAN = Plan(
    model="0123456789abcdef",
    steps=3,
    scheduler="DDIMScheduler:1234",
    sites=("blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"),
    table=((FULL, FULL, FULL, FULL), (FULL, AST, WA_RS, FULL), (AST, AST, WA_RS_ASC, ASC)),
    delta=0.05,
    window=0.125,
    conditional="second",
    evaluations=23,
    work=0.4,
    notes=("2 cross not searched (kinds: self)",),
)

TWO_STREAMS = replace(
    PLAN, table=tuple((*row, *(FULL, AST, FULL, FULL)) for row in PLAN.table), streams=("cond", "uncond")
)
