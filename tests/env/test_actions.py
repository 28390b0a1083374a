from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.env import Answer, Malformed, Search, parse_action
from rexrag.env.actions import STOP_STRINGS, locate_action
from rexrag.env.codec import Codec

PIECES = [
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "?</",
    "><",
    "<",
    ">",
    "é",
    "日",
    "😀",
]
turn_texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think> hm </think>\n<search> who is\nit </search>", Search("who is\nit")),
        ("<answer>Paris</answer>", Answer("Paris")),
        ("<search>a</search><answer>b</answer>", Search("a")),
        ("<answer>b</answer><search>a</search>", Answer("b")),
        ("<search>a<search>b</search>", Search("b")),
        ("<search>a <answer>b</answer> c</search>", Answer("b")),
        ("<search>a<answer>b</search>", Search("a<answer>b")),
        ("</search> <answer>x</answer>", Answer("x")),
        ("<search>\n </search><answer>x</answer>", Malformed("the query is empty")),
        ("<answer></answer>", Malformed("the answer is empty")),
        ("<search>a", Malformed("<search> was not closed")),
        ("a</answer>", Malformed("</answer> came without <answer>")),
        ("<search>a</answer>", Malformed("</answer> came without <answer>")),
        ("<SEARCH>a</SEARCH>", Malformed("no action was written")),
        ("", Malformed("no action was written")),
    ],
)
def test_parse_action(text: str, action: Search | Answer | Malformed) -> None:
    assert parse_action(text) == action


@settings(deadline=None, max_examples=400)
@given(text=turn_texts)
def test_parse_action_agrees_with_a_scan_of_prefixes(text: str) -> None:
    """Reference: the shortest prefix that ends in a closing tag whose opening tag came before it."""
    for end in range(1, len(text) + 1):
        for close in STOP_STRINGS:
            opening = close.replace("/", "")
            if not text[:end].endswith(close) or opening not in text[: end - len(close)]:
                continue
            content = text[: end - len(close)].rpartition(opening)[2].strip()
            kind = Search if close == "</search>" else Answer
            action = parse_action(text)
            assert action == kind(content) if content else isinstance(action, Malformed)
            return
    assert isinstance(parse_action(text), Malformed)


@settings(deadline=None, max_examples=200)
@given(text=turn_texts, rest=turn_texts)
def test_what_follows_an_action_does_not_exist(text: str, rest: str) -> None:
    action = parse_action(text)
    if not isinstance(action, Malformed):
        assert parse_action(text + rest) == action


def test_tags_are_several_tokens_and_merge_with_their_surroundings(codec: Codec) -> None:
    assert len(codec.encode("</search>")) > 1
    assert "><" in {codec.decode([token]) for token in codec.encode("</search><answer>")}


def test_locate_keeps_a_token_that_spans_the_end(codec: Codec) -> None:
    head, action = codec.encode("the next step\n"), codec.encode("<search>it</search><answer>")
    located = locate_action([*head, *action], codec=codec)
    assert located.action == Search("it")
    assert located.start == len(head)
    kept = codec.decode([*head, *action][: located.end])
    assert kept == "the next step\n<search>it</search><"


def test_locate_without_an_action_keeps_everything(codec: Codec) -> None:
    ids = [*codec.encode("the capital <search>of"), *codec.encode_markup("<|im_end|>")]
    located = locate_action(ids, codec=codec)
    assert (located.action, located.start, located.end) == (Malformed("<search> was not closed"), None, len(ids))


def test_an_empty_action_cuts_what_follows_and_has_no_start(codec: Codec) -> None:
    ids = codec.encode("<search> </search> more")
    located = locate_action(ids, codec=codec)
    assert isinstance(located.action, Malformed)
    assert located.start is None
    assert codec.decode(ids[: located.end]) == "<search> </search>"


def _check_location(ids: list[int], codec: Codec) -> None:
    text = codec.decode(ids)
    located = locate_action(ids, codec=codec)
    assert located.action == parse_action(text)
    assert parse_action(codec.decode(ids[: located.end])) == located.action
    if isinstance(located.action, Malformed):
        assert located.start is None
        return
    assert located.start is not None
    assert 0 <= located.start < located.end <= len(ids)
    assert isinstance(parse_action(codec.decode(ids[: located.end - 1])), Malformed), (
        "one token fewer completes nothing"
    )
    opening = "<search>" if isinstance(located.action, Search) else "<answer>"
    assert parse_action(codec.decode(ids[located.start : located.end])) == located.action, "the whole tag is in"
    assert opening not in codec.decode(ids[located.start + 1 : located.end]), "the tag begins in the first token"


@settings(deadline=None, max_examples=400)
@given(text=turn_texts)
def test_locate_on_the_tokenizers_own_merges(codec: Codec, text: str) -> None:
    _check_location(codec.encode(text), codec)


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=12))
def test_locate_on_any_bytes(codec: Codec, pieces: list[str | bytes]) -> None:
    """A policy samples any token: bytes that are no UTF-8, and merges that no encoder would give."""
    ids: list[int] = []
    for piece in pieces:
        # ids 3 to 258 are the single bytes, in an order of their own
        ids += codec.encode(piece) if isinstance(piece, str) else [byte + 3 for byte in piece]
    _check_location(ids, codec)
