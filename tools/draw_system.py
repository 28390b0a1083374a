"""Draws docs/images/system.svg, the picture of the system: this file is its source.

python tools/draw_system.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

OUT: Final = Path(__file__).resolve().parent.parent / "docs" / "images" / "system.svg"
WIDTH: Final = 1200
HEIGHT: Final = 530

INK, SOFT, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#ffffff"
POLICY, HINT, ENVIRONMENT = "#3b82c4", "#e07b1a", "#b3bcc6"
RIGHT, WRONG = "#2f855a", "#c53030"
ROOMS: Final = {"actors": "#eaf3fb", "buffer": "#fdf4e3", "learner": "#eaf6ee", "plain": "#f4f6f8"}
FONT: Final = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def main() -> None:
    OUT.write_text(drawing(), encoding="utf-8")


def drawing() -> str:
    """The whole picture as SVG. The paper is part of it, so that it reads on a dark page too."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}" role="img">',
        "<title>Rollout actors, replay buffer and learner, and what flows between them</title>",
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{SOFT}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}"/>',
        *_rooms(),
        *_episode(),
        *_flows(),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rooms() -> list[str]:
    return [
        _box(30, 40, 540, 330, "actors"),
        _text(50, 70, "Rollout actors × N", size=19, bold=True),
        _text(50, 93, "many episodes at once; a token keeps its log-prob and its version"),
        _box(700, 20, 200, 46, "plain"),
        _text(800, 48, "questions", size=16, bold=True, anchor="middle"),
        _box(700, 120, 200, 250, "buffer"),
        _text(800, 150, "Replay buffer", size=19, bold=True, anchor="middle"),
        *_lines(800, 178, "whole groups", "in order of admission", "age bounded, in steps", anchor="middle"),
        _cylinder(800, 300),
        _box(1000, 120, 170, 250, "learner"),
        _text(1085, 150, "Learner", size=19, bold=True, anchor="middle"),
        *_lines(1085, 182, "filter, advantages", "weights for probes", "and for staleness", anchor="middle"),
        *_lines(1085, 264, "clipped loss", "one AdamW update", "checkpoint, metrics", anchor="middle"),
        _box(180, 445, 250, 60, "plain"),
        _text(305, 471, "retriever", size=16, bold=True, anchor="middle"),
        _text(305, 492, "BM25 index, or a server", anchor="middle"),
        _box(940, 445, 230, 60, "plain"),
        _text(1055, 471, "checkpoints", size=16, bold=True, anchor="middle"),
        _text(1055, 492, "transformers folders", anchor="middle"),
    ]


def _episode() -> list[str]:
    """A group: two targets that fail alike, and the probe that forks from one of them."""
    wrong, dead = "✗ wrong", [(POLICY, 70), (POLICY, 60), (ENVIRONMENT, 80)]
    return [
        _text(50, 130, "target", anchor="start"),
        *_row(110, 126, [*dead, (POLICY, 90)], wrong, WRONG),
        _text(50, 166, "target"),
        *_row(110, 162, [*dead, (POLICY, 90)], wrong, WRONG),
        _text(110, 190, "thinks, searches", colour=SOFT),
        _text(242, 190, "reads", colour=SOFT),
        _text(340, 190, "answers too early: a dead end", colour=SOFT),
        f'<path d="M330 168V232q0 12 12 12H346" fill="none" stroke="{HINT}" stroke-width="3"/>',
        _text(50, 248, "probe"),
        _text(110, 248, "keeps the beginning", colour=SOFT),
        *_row(350, 244, [(HINT, 46), (POLICY, 40), (ENVIRONMENT, 40), (POLICY, 30)], "✓ right", RIGHT),
        _text(350, 274, "a hint, then the policy goes on", colour=SOFT),
        _box(50, 296, 500, 54, None),
        _text(300, 319, "engine: continuous batching, prefixes shared in a group", anchor="middle"),
        _text(300, 339, "takes new weights between two passes", anchor="middle"),
    ]


def _flows() -> list[str]:
    return [
        _arrow("M800 66V116"),
        _arrow("M700 165H574"),
        *_lines(636, 134, "lease:", "a question", anchor="middle"),
        _arrow("M570 290H696"),
        *_lines(635, 312, "finished group", "(Arrow)", anchor="middle"),
        _arrow("M900 230H996"),
        *_lines(948, 200, "a step's", "groups", anchor="middle"),
        _arrow("M1085 370V408H560V374"),
        _text(750, 402, "weights, version v + 1", anchor="middle"),
        _arrow("M1130 370V441"),
        _arrow("M270 370V441"),
        _text(260, 414, "query", anchor="end"),
        _arrow("M340 445V374"),
        _text(350, 414, "passages"),
    ]


def _legend() -> list[str]:
    parts = [_text(490, 452, "tokens", bold=True)]
    names = ((POLICY, "of the policy"), (HINT, "hint"), (ENVIRONMENT, "from the retriever"))
    for index, (colour, name) in enumerate(names):
        x, y = 560 + 130 * (index == 1), 452 + 24 * (index > 1)
        parts += [f'<rect x="{x}" y="{y - 9}" width="26" height="9" rx="4.5" fill="{colour}"/>', _text(x + 34, y, name)]
    return parts


def _box(x: int, y: int, width: int, height: int, room: str | None) -> str:
    fill = "none" if room is None else ROOMS[room]
    dash = ' stroke-dasharray="5 4"' if room is None else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="{LINE}" '
        f'stroke-width="1.3"{dash}/>'
    )


def _row(x: int, y: int, pieces: list[tuple[str, int]], end: str, colour: str) -> list[str]:
    """A trajectory: who wrote it, piece by piece, and how it ended."""
    made = []
    for fill, width in pieces:
        made.append(f'<rect x="{x}" y="{y - 7}" width="{width - 4}" height="13" rx="6.5" fill="{fill}"/>')
        x += width
    return [*made, _text(x + 4, y + 4, end, bold=True, colour=colour)]


def _cylinder(x: int, y: int) -> str:
    return (
        f'<path d="M{x - 62} {y - 22}v44a62 11 0 0 0 124 0v-44" fill="{PAPER}" stroke="{LINE}" stroke-width="1.3"/>'
        f'<ellipse cx="{x}" cy="{y - 22}" rx="62" ry="11" fill="{PAPER}" stroke="{LINE}" stroke-width="1.3"/>'
        + _text(x, y + 12, "log on disk", anchor="middle")
    )


def _arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{SOFT}" stroke-width="1.8" marker-end="url(#tip)"/>'


def _lines(x: int, y: int, *texts: str, anchor: str) -> list[str]:
    return [_text(x, y + 19 * index, text, anchor=anchor) for index, text in enumerate(texts)]


def _text(
    x: int, y: int, text: str, *, size: int = 13, bold: bool = False, anchor: str = "start", colour: str = INK
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
    )


if __name__ == "__main__":
    main()
