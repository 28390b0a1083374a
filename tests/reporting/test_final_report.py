"""The report of a finished run, from its files."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from rexrag.reporting.final_report import bars, print_report
from rexrag.run_folder import RunFolder


def evaluation(step: int, em: float, *, sources: tuple[str, ...] = ("geo",)) -> dict[str, object]:
    by_hops = {"1": {"em": 1.0, "n": 4}, "2": {"em": em, "n": 6}}
    return {
        "split": "test",
        "step": step,
        "n": 10,
        "em": em,
        "em_low": em - 0.1,
        "em_high": em + 0.1,
        "macro_em": em / 2,
        "by_source": {name: {"em": em / 4, "n": 5} for name in sources},
        "by_hops": by_hops,
    }


def sample(kind: str, *, rescued: bool, text: str, group: str = "1-0") -> dict[str, object]:
    return {"kind": kind, "rescued": rescued, "group_id": group, "text": text}


def report(folder: Path, **files: list[dict[str, object]]) -> str:
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = io.StringIO()
    print_report(RunFolder(folder), console=Console(file=out, width=100))
    return out.getvalue()


def test_report_shows_em_dead_ends_and_a_rescue(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        eval=[evaluation(0, 0.2), evaluation(12, 0.8)],
        metrics=[{"target/dead_end_rate": rate} for rate in (0.9, None, 0.3)],
        samples=[
            sample("target", rescued=False, text="<answer>wrong</answer>"),
            sample("probe", rescued=True, text="<answer>right</answer>"),
            sample("target", rescued=False, text="<answer>later</answer>", group="1-9"),
        ],
    )
    assert "0.20 [0.10, 0.30]" in text
    assert "0.80 [0.70, 0.90]" in text
    assert "1 hop (n = 4)" in text
    assert "2 hops (n = 6)" in text
    assert "source" not in text
    assert "90% to 30%" in text
    assert text.index("wrong") < text.index("right")
    assert "later" not in text


def test_report_shows_each_source_where_there_are_several(tmp_path: Path) -> None:
    lines = [evaluation(step, em, sources=("nq", "[bold]\x1b[2J")) for step, em in ((0, 0.2), (12, 0.8))]
    text = report(tmp_path, eval=lines, metrics=[], samples=[])
    rows = [" ".join(row.replace("│", " ").split()) for row in text.splitlines()]
    assert "mean over sources 0.10 0.40" in rows
    assert "nq (n = 5) 0.05 0.20" in rows
    assert "[bold]\N{REPLACEMENT CHARACTER}[2J (n = 5) 0.05 0.20" in rows


def test_report_shows_the_weights_at_work(tmp_path: Path) -> None:
    steps: list[dict[str, object]] = [
        {"gradient/probe_share": 0.6, "gradient/hint_3": 0.4, "gradient/hint_0": 0.2, "weight/ess_probe": 0.2},
        {"gradient/probe_share": 0.2, "gradient/hint_3": 0.2, "weight/ess_probe": 0.4, "weight/ess_target": 0.9},
        {"gradient/probe_share": 0.0, "weight/ess_target": 0.8},
        {"gradient/probe_share": None, "weight/ess_probe": None, "weight/ess_target": 0.7},
    ]
    text = report(tmp_path, eval=[], metrics=[{"target/dead_end_rate": None, **step} for step in steps], samples=[])
    assert "gradient from probes, step by step:" in text
    assert "60% to 0%" in text
    assert "hint 3 75%, hint 0 25%" in text
    assert "targets 0.80, probes 0.30" in text


def test_report_of_a_run_without_figures_names_its_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in report(tmp_path, eval=[], metrics=[], samples=[]).replace("\n", "")


def test_bars_cover_the_whole_range() -> None:
    assert bars([0.0, 0.124, 0.5, 1.0]) == "▁▁▅█"
