"""The collapse guard over runs that are done: where it would have tripped.

    python benchmarks/guard.py RUN... [--out FILE.json]

RUN is a run folder. Of one that went back, the steps that it cut are looked at in their place.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import commit

from rexrag.files import read_jsonl
from rexrag.run.guard import Guard


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run. `em`: on the test questions before and after, as far as it came; `trip`: step of the first alarm."""

    name: str
    steps: int
    em: tuple[float | None, float | None]
    trip: int | None
    reasons: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = [replay(run) for run in words.runs]
    for row in rows:
        print(f"| {row.name} | {row.steps} | {row.trip or '–'} | {'; '.join(row.reasons)} |")
    if words.out is not None:
        words.out.write_text(json.dumps({"commit": commit(), "runs": [asdict(row) for row in rows]}, indent=1) + "\n")


def replay(run: Path) -> Row:
    cut, kept = (list(read_jsonl(run / name)) for name in ("metrics.lost.jsonl", "metrics.jsonl"))
    went_back = int(cut[0]["step"]) if cut else len(kept) + 1
    before = [line for line in kept if int(line["step"]) < went_back]
    guard, first = Guard(), None
    for line in [*before, *cut]:
        trip = guard.look(int(line["step"]), line)
        first = first or trip
    guard = Guard(before)
    for line in kept[len(before) :]:
        trip = guard.look(int(line["step"]), line)
        first = first or trip
    em = [float(line["em"]) for line in read_jsonl(run / "eval.jsonl") if line["split"] == "test"]
    return Row(
        name=run.name,
        steps=len(kept),
        em=(em[0], em[-1]) if len(em) > 1 else (None, None),
        trip=None if first is None else first.step,
        reasons=() if first is None else first.reasons,
    )


if __name__ == "__main__":
    main()
