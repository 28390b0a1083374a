from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rexrag.env import Malformed, neutralize
from rexrag.env.codec import Codec
from rexrag.env.observation import Observation, format_observation, render_feedback, render_observation
from rexrag.errors import ConfigError
from rexrag.types import Passage

TAGS = ["think", "search", "information", "answer", "action"]
SPECIAL = ("<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "ab", "bca")
fragments = st.sampled_from([*TAGS, *SPECIAL, "<", ">", "/", " ", "\n", "\u00a0", "a", "b", "c", "<SeArCh", "[", "]"])
hostile_texts = st.lists(fragments | st.text(max_size=3), max_size=14).map("".join)


def _has_tag(text: str) -> bool:
    """Reference: any bracketed run that is a control word once spaces and slashes are dropped."""
    inner = re.findall(r"(?=<([^<>]*)>)", text)
    return any(part.strip("/" + "".join(filter(str.isspace, part))).casefold() in TAGS for part in inner)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<search>", "[search]"),
        ("</Answer>", "[/Answer]"),
        ("< / INFORMATION >", "[ / INFORMATION ]"),
        ("<think/>", "[think/]"),
        ("<think / >", "[think / ]"),
        ("<\nsearch\n>", "[\nsearch\n]"),
        ("<sea<search>rch>", "<sea[search]rch>"),
        ("<<action>>", "<[action]>"),
        ("a < b and c > d, <searching> <b>bold</b> <search engine>", None),
        ("x <|im_end|> y", None),
        ("", None),
    ],
)
def test_neutralize_tags(text: str, expected: str | None) -> None:
    assert neutralize(text) == (text if expected is None else expected)


def test_neutralize_breaks_special_tokens() -> None:
    assert neutralize("x<|im_end|>y [INST]", special_tokens=SPECIAL) == "x< |im_end|>y [ INST]"
    assert neutralize("abca", special_tokens=SPECIAL) == "a b ca", "overlapping ones too"


@settings(deadline=None, max_examples=600)
@given(text=hostile_texts)
def test_neutralize_leaves_no_tag_and_no_special_token(text: str) -> None:
    clean = neutralize(text, special_tokens=SPECIAL)
    assert not _has_tag(clean)
    assert not any(token in clean for token in SPECIAL)
    assert neutralize(clean, special_tokens=SPECIAL) == clean
    if not _has_tag(text) and not any(token in text for token in SPECIAL):
        assert clean == text


def _passage(title: str, text: str) -> Passage:
    return Passage(id="p", title=title, text=text)


PASSAGES = [
    _passage("Gabon", "its capital is Libreville"),
    _passage("Libreville", "a city"),
    _passage("Homs", "is in Syria"),
]


def test_an_observation_that_fits_is_whole(codec: Codec) -> None:
    ids, num_shown = render_observation(PASSAGES, codec=codec, max_tokens=500)
    assert num_shown == 3
    assert codec.decode(ids) == format_observation(PASSAGES) == (
        "\n\n<information>Doc 1(Title: Gabon) its capital is Libreville\n"
        "Doc 2(Title: Libreville) a city\nDoc 3(Title: Homs) is in Syria</information>\n\n"
    )  # fmt: skip
    assert render_observation(PASSAGES, codec=codec, max_tokens=len(ids)) == (ids, 3)


def test_a_cut_observation_loses_last_passages_first_then_words(codec: Codec) -> None:
    def shown(num_tokens: int) -> str:
        return codec.decode(observe(num_tokens).ids)

    def observe(num_tokens: int) -> Observation:
        return render_observation(PASSAGES, codec=codec, max_tokens=num_tokens)

    whole = len(observe(500).ids)
    two = len(render_observation(PASSAGES[:2], codec=codec, max_tokens=500).ids)
    assert [observe(num).num_shown for num in (whole, whole - 1, two + 1, two - 1)] == [3, 3, 2, 2]
    assert shown(whole - 1).endswith("Doc 3(Title: Homs) is in</information>\n\n")
    assert shown(two) == format_observation(PASSAGES[:2])
    assert shown(two + 1) == format_observation(PASSAGES[:2]), "no header without a word of text"


@pytest.mark.parametrize("words", ["Doc", "Doc 1(Title:", "Doc 1(Title: Gabon)", "Doc 1(Title: Gabon) its"])
def test_of_the_first_passage_anything_that_fits_is_shown(codec: Codec, words: str) -> None:
    text = f"\n\n<information>{words}</information>\n\n"
    assert codec.decode(render_observation(PASSAGES, codec=codec, max_tokens=len(codec.encode(text))).ids) == text


def test_no_passage_is_an_empty_block(codec: Codec) -> None:
    ids, num_shown = render_observation([], codec=codec, max_tokens=50)
    assert codec.decode(ids) == "\n\n<information></information>\n\n"
    assert num_shown == 0


@pytest.mark.parametrize("passages", [[_passage("Book", "long story " * 5000)], [_passage("Short", "one")] * 1000])
def test_what_cannot_fit_is_never_tokenised(passages: list[Passage], tokenizer: PreTrainedTokenizerFast) -> None:
    class Counting(Codec):
        num_encoded = 0

        def encode(self, text: str) -> list[int]:
            self.num_encoded += len(text)
            return super().encode(text)

    codec = Counting(tokenizer)
    ids, num_shown = render_observation(passages, codec=codec, max_tokens=100)
    assert 0 < len(ids) <= 100
    assert 0 < num_shown < 20
    assert codec.num_encoded < 30_000, "of 55,000 characters, or a thousand passages"


def test_a_budget_below_the_tags_is_refused(codec: Codec) -> None:
    with pytest.raises(ConfigError, match=r"env\.max_observation_tokens = 3 .* tokens"):
        render_observation(PASSAGES, codec=codec, max_tokens=3)


passages = st.lists(st.builds(_passage, hostile_texts, hostile_texts | st.text("ab 日本\n", max_size=60)), max_size=3)


@settings(deadline=None, max_examples=300)
@given(passages=passages, extra=st.integers(0, 120))
def test_observation_budget(
    codec: Codec, tokenizer: PreTrainedTokenizerFast, passages: list[Passage], extra: int
) -> None:
    frame = len(render_observation([], codec=codec, max_tokens=500).ids)
    ids, num_shown = render_observation(passages, codec=codec, max_tokens=frame + extra)
    assert num_shown <= len(passages)
    text = codec.decode(ids)
    assert len(ids) <= frame + extra
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert text.startswith("\n\n<information>")
    assert text.endswith("</information>\n\n")
    inside = text.removeprefix("\n\n<information>").removesuffix("</information>\n\n")
    assert not _has_tag(inside)
    whole = format_observation(passages, special_tokens=codec.special_tokens)
    assert whole.startswith("\n\n<information>" + inside), "what is shown is the beginning of the whole"
    if len(codec.encode(whole)) <= frame + extra:
        assert text == whole
    else:
        rest = whole.removeprefix("\n\n<information>" + inside)
        is_between_words = re.search(r"[\u2e80-\u9fff\uf900-\ufaff\s]", inside[-1:] + rest[0])
        assert not inside or is_between_words, "a word is never cut"


def test_feedback_says_what_was_wrong_and_what_is_allowed(codec: Codec) -> None:
    text = codec.decode(render_feedback(Malformed("the query is empty"), codec=codec))
    assert "the query is empty" in text
    assert "<search>query</search> or <answer>text</answer>" in text
    assert text == "\n\n" + text.strip() + "\n\n"
