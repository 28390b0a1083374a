from __future__ import annotations

from rexrag.reporting.trace import coloured_trace


def test_each_part_has_its_colour_and_the_text_stays() -> None:
    text = "<think>a</think><search>b</search>\n<information>c\nd</information> e <answer>[f]"
    trace = coloured_trace(text)
    assert trace.plain == text
    assert [(text[s.start : s.end], str(s.style)) for s in trace.spans] == [
        ("<think>a</think>", "dim"),
        ("<search>b</search>", "cyan"),
        ("<information>c\nd</information>", "blue"),
        ("<answer>[f]", "bold green"),
    ]
