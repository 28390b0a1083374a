"""Draws docs/images/quickstart-terminal.svg from what a run of the quick start really printed.

make quickstart 2>run.log; python tools/draw_terminal.py run.log runs/latest
Lines are left out, never changed: all but the first and the last ones, and those that name a path of this machine.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from rexrag.reporting.final_report import print_report
from rexrag.run_folder import RunFolder

OUT: Final = Path(__file__).resolve().parent.parent / "docs" / "images" / "quickstart-terminal.svg"
WIDTH: Final = 108
FIRST_STEPS: Final = 2
LAST_STEPS: Final = 3
FORMAT: Final = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Without the fonts that rich fetches from elsewhere: a picture in a page fetches nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what the run wrote on stderr")
    parser.add_argument("run", type=Path)
    words = parser.parse_args()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print("$ make quickstart", style="bold")
    for line in shortened(words.log.read_text(encoding="utf-8").splitlines()):
        console.print(line, markup=False, style="dim" if line == "…" else None, no_wrap=True)
    for text in report(RunFolder(words.run.resolve())):
        console.print(text)
    OUT.write_text(console.export_svg(title="make quickstart", code_format=FORMAT, unique_id="quickstart"))


def shortened(lines: list[str]) -> list[str]:
    """What was prepared, the evaluation before the first step, and the first and last steps."""
    done = [line for line in lines if re.match(r"(?!  )[^%]*: [\d.]+ (s|min \d+ s)$", line) and "/" not in line]
    before = [line for line in lines if re.match(r"EM on \w+ at step 0:", line)]
    steps = [line for line in lines if re.match(r"(step +\d+/|EM on dev at step [1-9])", line)]
    return [*done[:5], *before, *steps[:FIRST_STEPS], "…", *steps[-LAST_STEPS:], ""]


def report(run: RunFolder) -> list[Text]:
    """The lines of the final report, but for the paths."""
    console = Console(width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    assert isinstance(console.file, io.StringIO)
    print_report(run, console=console)
    lines = Text.from_ansi(console.file.getvalue()).split("\n")
    return [line for line in lines if not re.match(r"(best checkpoint|run folder|curves): ", line.plain)]


if __name__ == "__main__":
    main()
