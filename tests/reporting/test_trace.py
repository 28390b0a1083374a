from __future__ import annotations

from rexrag.reporting.trace import coloured_trace, printable


def test_nothing_reaches_the_terminal_that_it_would_act_on() -> None:
    hostile = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9be\tf\ng\u00a0h\u2028i 東京"
    kept = "a\ufffd[2Jb\ufffd]0;title\ufffdc\ufffdd\ufffde\tf\ng\u00a0h\u2028i 東京"
    assert printable(hostile) == kept == coloured_trace(hostile).plain


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
