from __future__ import annotations

import math
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rexrag.env.codec import Codec
from rexrag.errors import DataError
from rexrag.hints import DEFAULT_HINTS, HintPool, load_hints

pools = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def codec() -> Codec:
    """One token per byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]
    return Codec(fast)


def test_pmf_by_hand() -> None:
    pool = HintPool([[5, 7], [5, 7, 9], [5, 8], [5, 7]])
    expected = {
        0: [4 / 4, 3 / 4 * 2 / 3],  # two of three that go through "5 7" end there
        1: [4 / 4, 3 / 4, 1 / 3],
        2: [4 / 4, 1 / 4],
        3: [4 / 4, 3 / 4 * 2 / 3],
    }
    for hint, factors in expected.items():
        logpmf = pool.logpmf(hint)
        assert logpmf.dtype == np.float32
        np.testing.assert_allclose(logpmf, np.log(factors), rtol=1e-6, atol=1e-7)


@settings(deadline=None)
@given(hints=pools)
def test_pmf_sums_to_one_over_distinct_hints(hints: list[list[int]]) -> None:
    pool = HintPool(hints)
    count = Counter(map(tuple, hints))
    total = 0.0
    for index, hint in enumerate(hints):
        logpmf = pool.logpmf(index)
        assert logpmf.shape == (len(hint),)
        probability = math.exp(float(logpmf.sum(dtype=np.float64)))
        assert probability == pytest.approx(count[tuple(hint)] / len(hints), rel=1e-5)
        total += probability / count[tuple(hint)]
    assert total == pytest.approx(1.0, rel=1e-5)


@settings(deadline=None)
@given(hints=pools)
def test_at_each_node_continuations_and_end_sum_to_one(hints: list[list[int]]) -> None:
    """Only `logpmf` is read: the mass that it gives to each way out of a prefix."""
    pool = HintPool(hints)
    distinct = {tuple(hint): index for index, hint in enumerate(hints)}
    prefixes = {hint[:depth] for hint in distinct for depth in range(max(map(len, hints)) + 1) if depth <= len(hint)}

    def mass_below(prefix: tuple[int, ...]) -> float:
        """Probability that a draw begins with `prefix`."""
        return sum(
            math.exp(float(pool.logpmf(i).sum(dtype=np.float64)))
            for hint, i in distinct.items()
            if hint[: len(prefix)] == prefix
        )

    for prefix in prefixes:
        ways: dict[int | None, float] = {}
        for hint, index in distinct.items():
            if hint[: len(prefix)] != prefix:
                continue
            rest = pool.logpmf(index)[len(prefix) :].astype(np.float64)
            if len(rest) > 1:
                ways[hint[len(prefix)]] = math.exp(rest[0])
            elif len(rest) == 0:
                ways[None] = math.exp(float(pool.logpmf(index).sum(dtype=np.float64))) / mass_below(prefix)
            else:
                # The last factor is continuation times end: divide the end out where longer hints share the token.
                child = hint
                end = math.exp(float(pool.logpmf(index).sum(dtype=np.float64))) / mass_below(child)
                ways[hint[-1]] = math.exp(rest[0]) / end
        assert sum(ways.values()) == pytest.approx(1.0, rel=1e-5), prefix


def test_sample_is_uniform_and_seeded() -> None:
    pool = HintPool([[1], [1], [2, 3]])
    draws = [pool.sample(Random(seed)) for seed in range(3000)]
    assert draws == [pool.sample(Random(seed)) for seed in range(3000)]
    for count in Counter(draws).values():
        assert abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9)


def test_pool_facts() -> None:
    pool = HintPool([[1, 2], [3]])
    assert (len(pool), pool.longest, pool.ids(1)) == (2, 2, (3,))
    assert pool.hash == HintPool([(1, 2), range(3, 4)]).hash
    assert pool.hash != HintPool([[3], [1, 2]]).hash, "ids of hints are their order"
    assert pool.hash != HintPool([[1], [2, 3]]).hash
    with pytest.raises(ValueError, match="read-only"):
        pool.logpmf(0)[0] = 0.0


def test_unusable_pools_are_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        HintPool([])
    with pytest.raises(DataError, match="hint 0 has 1 token, it cannot keep 2"):
        HintPool([[1]], kept=[2])
    with pytest.raises(DataError, match="kept has 2 entries, the pool has 1"):
        HintPool([[1]], kept=[0, 0])


def test_a_fork_without_a_hint_is_a_hint_without_tokens(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "hints.txt"
    file.write_text("|\n<think> | Next I need\n")
    pool = load_hints(file, codec=codec, removable=True)
    assert pool.has_empty
    assert (pool.ids(0), pool.kept(0), pool.logpmf(0).tolist()) == ((), 0, [])
    assert pool.log_probability(0) == pytest.approx(math.log(0.5))
    assert [hint for _, hint in pool.find(pool.ids(1))] == [1]
    assert not HintPool([[1]]).has_empty


@settings(deadline=None)
@given(hints=pools, tokens=st.lists(st.integers(0, 3), max_size=20))
def test_find_agrees_with_a_plain_search(hints: list[list[int]], tokens: list[int]) -> None:
    expected = [
        (position, hints.index(hint))
        for position in range(len(tokens))
        for hint in sorted(map(list, set(map(tuple, hints))), key=len)
        if tokens[position : position + len(hint)] == hint
    ]
    assert HintPool(hints).find(np.array(tokens, dtype=np.int32)) == expected


def test_find_is_fast_enough_for_every_row() -> None:
    pool = HintPool([[7, i, *range(20)] for i in range(200)])
    tokens = np.random.default_rng(0).integers(0, 50_000, size=4096, dtype=np.int32)
    tokens[100:122] = pool.ids(5)
    took_s = []
    for _ in range(5):
        begin = time.thread_time()
        assert pool.find(tokens) == [(100, 5)]
        took_s.append(time.thread_time() - begin)
    assert min(took_s) < 0.05


def test_the_built_in_hints(codec: Codec) -> None:
    assert 8 <= len(DEFAULT_HINTS) == len(set(DEFAULT_HINTS)) <= 12
    for hint in DEFAULT_HINTS:
        assert hint.startswith("<think> | ")
        assert hint[-1].isalpha(), "half a sentence, without a trailing space"
        assert "</think>" not in hint
    pool = load_hints(None, codec=codec, removable=True)
    assert [codec.decode(pool.ids(i)) for i in range(len(pool))] == [h.replace("| ", "") for h in DEFAULT_HINTS]
    assert {codec.decode(pool.ids(i)[: pool.kept(i)]) for i in range(len(pool))} == {"<think>"}


def test_a_hint_says_what_of_it_stays(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "hints.txt"
    file.write_text("<think> I | still need\n<think> Wait,\n<think> so |\n| <think> no </think>\n")
    pool = load_hints(file, codec=codec)
    assert [codec.decode(pool.ids(i)) for i in range(4)] == [
        "<think> I still need", "<think> Wait,", "<think> so", "<think> no </think>",
    ]  # fmt: skip
    assert [codec.decode(pool.ids(i)[: pool.kept(i)]) for i in range(4)] == ["<think> I", "", "<think> so", ""]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("<think> Wait,", "'<think> Wait,' is taken out, and a <think>"),
        ("<think> | so </think>", "'so </think>' is taken out"),
        ("<think> | </think> <think> so", "is taken out"),
    ],
)
def test_hints_that_leave_half_a_thought_are_refused_where_they_are_taken_out(
    codec: Codec, tmp_path: Path, bad: str, match: str
) -> None:
    file = tmp_path / "hints.txt"
    file.write_text(f"<think> | Next I need\n{bad}\n")
    assert len(load_hints(file, codec=codec)) == 2
    with pytest.raises(DataError, match=rf"hints\.txt:2: .*{match}"):
        load_hints(file, codec=codec, removable=True)


@pytest.mark.parametrize(("bad", "match"), [("a | b | c", "more than one")])
def test_hints_with_misplaced_bars_are_refused(codec: Codec, tmp_path: Path, bad: str, match: str) -> None:
    file = tmp_path / "hints.txt"
    file.write_text(f"{bad}\n")
    with pytest.raises(DataError, match=rf"hints\.txt:1: .*{match}"):
        load_hints(file, codec=codec)


def test_load_hints_skips_comments_and_blank_lines(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "hints.txt"
    file.write_text("\ufeff# mine\n\n<think> Wait, \n  # more\n<think> Next I need\n<think> Wait,\n", encoding="utf-8")
    pool = load_hints(file, codec=codec)
    assert [codec.decode(pool.ids(i)) for i in range(len(pool))] == [
        "<think> Wait,", "<think> Next I need", "<think> Wait,",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "bad", ["so <search>", "x </answer> y", "<information>", "< Search >", "</ANSWER>", "<action/>", "well<|end|>"]
)
def test_hints_that_act_are_refused(codec: Codec, tmp_path: Path, bad: str) -> None:
    file = tmp_path / "hints.txt"
    file.write_text(f"<think> fine\n# comment\n{bad}\n")
    with pytest.raises(DataError, match=r"hints\.txt:3: hint .* contains"):
        load_hints(file, codec=codec)


def test_a_hint_is_a_line_of_the_file_whatever_stands_in_it(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "hints.txt"
    file.write_text("\ufeff<think> Wait,\u2028 # so\x85 I need\n", encoding="utf-8")
    assert len(load_hints(file, codec=codec)) == 1


def test_unusable_hint_files_are_refused(codec: Codec, tmp_path: Path) -> None:
    file = tmp_path / "hints.txt"
    with pytest.raises(DataError, match="cannot be read"):
        load_hints(file, codec=codec)
    file.write_text("# nothing\n\n")
    with pytest.raises(DataError, match="at least one"):
        load_hints(file, codec=codec)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_hints(file, codec=codec)


def test_imports_stay_light() -> None:
    heavy = "{'pydantic', 'torch', 'ray', 'transformers', 'tantivy'}"
    code = f"import rexrag.hints, rexrag.reward, rexrag.env.branch, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("prepends", ["always", "first"])
@pytest.mark.parametrize("removable", [False, True])
def test_a_tokenizer_that_begins_each_text_with_a_space_gives_a_hint_single_spaces(
    tmp_path: Path, prepends: Literal["always", "first"], removable: bool
) -> None:
    codec = sentencepiece_codec(prepends)
    (tmp_path / "hints.txt").write_text("<think> | That is only one step.\n<think> I must look up\n| Next\n")
    if removable:
        (tmp_path / "hints.txt").write_text("<think> | That is only one step.\n| Next\n")
    pool = load_hints(tmp_path / "hints.txt", codec=codec, removable=removable)
    found = [codec.decode(pool.ids(index)) for index in range(len(pool))]
    assert found[0] == "<think> That is only one step."
    assert all("  " not in hint for hint in found)


def sentencepiece_codec(prepends: Literal["always", "first"]) -> Codec:
    """Characters, and spaces as "▁", one of which stands before each text, as SentencePiece has it."""
    alphabet = "▁<>/.,'" + string.ascii_letters
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepends)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepends)
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"))  # type: ignore[no-untyped-call]


def test_pieces_of_a_text_join_with_the_spaces_that_they_have() -> None:
    """Segments of a demonstration are pieces like a hint's."""
    codec = sentencepiece_codec("always")
    pieces = ["<think>", " More", " of this."]
    assert codec.decode([i for piece in pieces for i in codec.encode(piece)]) == "<think> More of this."
