"""Print the tables of docs/retrieval.md, from the figures of `indexes.py` and `retrieval.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).resolve().parent / "results"


def tables() -> list[str]:
    """Of the kinds of index, of the servers, in the order of the page."""
    indexes, servers = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("indexes", "retrieval"))
    return [of_indexes(indexes["rows"]), of_servers(servers["corpora"])]


def of_indexes(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["index", "bytes a passage", "lists looked through", "queries a second: alone", "64 at once"]
    heads += ["of the exact best 3", "of the best 10"]
    return _table(
        heads,
        [
            [
                f"`{row['index']}`",
                f"{row['bytes_a_passage']:.0f}",
                f"{row['probes']} of {row['lists']}" if row.get("lists") else "–",
                f"{row['qps_1']:,.0f}",
                f"{row['qps_64']:,.0f}",
                f"{row['recall_3']:.3f}",
                f"{row['recall_10']:.3f}",
            ]
            for row in rows
        ],
    )


def of_servers(corpora: Sequence[dict[str, Any]]) -> str:
    heads = ["passages", "clients", "queries a second", "one per call", "p99, ms", "one per call"]
    heads += ["CPU of a query, ms", "one per call", "of encoding and searching alone"]
    rows = []
    for corpus in corpora:
        loads = {(load["server"], load["clients"]): load for load in corpus["loads"]}
        for clients in sorted({clients for _, clients in loads}):
            ours, peers = loads["rexrag", clients], loads["one per call", clients]
            rows.append(
                [
                    f"{corpus['passages']:,}",
                    str(clients),
                    f"{ours['qps']:.1f}",
                    f"{peers['qps']:.1f}",
                    f"{ours['p99_ms']:,.0f}",
                    f"{peers['p99_ms']:,.0f}",
                    f"{1000 * ours['cpu_s']:.1f}",
                    f"{1000 * peers['cpu_s']:.1f}",
                    f"{corpus['ratios'][f'share_of_encode_and_search_{clients}']:.2f}",
                ]
            )
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("\n\n".join(tables()))
