from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rexrag.data.demonstrations import GOING_ON, Demonstration, Segment, write_demonstrations
from rexrag.env.codec import Codec
from rexrag.errors import DataError, ModelError, RunFailure
from rexrag.model import checks
from rexrag.model.checks import check_model
from rexrag.model.loading import load_model, load_tokenizer
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.preparation.warmstart import (
    PromptSettings,
    WarmstartProgress,
    WarmstartResult,
    tokenize_demonstration,
)
from rexrag.preparation.warmstart import warm_start as warm_start_with

NAMES = ("Ano", "Bel", "Cid", "Dor", "Eva", "Fox", "Gus", "Hal")
PROMPT = PromptSettings(template="{question}")


def warm_start(model: Path, **changes: Any) -> WarmstartResult:  # noqa: ANN401
    return warm_start_with(model, **{"learning_rate": 1e-4, "batch_size": 16, "epochs": 1, **changes})


def test_a_place_that_cannot_be_made_is_told_before_hours_of_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file/out cannot be made \(.*\); name another folder"):
        warm_start(tmp_path, demonstrations=tmp_path / "none.jsonl", out=tmp_path / "file" / "out", prompt=PROMPT)


def early(name: str) -> Demonstration:
    segments = (
        Segment(f"<think> I need {name}. </think>\n<search>{name}</search>", 1.0),
        Segment(f"\n\n<information>Doc 1(Title: {name}) the colour of {name}</information>\n\n", 0.0),
        Segment(f"<think> Good. </think>\n<answer>{name}</answer>", 1.0),
    )
    return Demonstration(f"What is {name}?", segments)


def going_on(name: str, *, weight: float) -> Demonstration:
    first, shown, _ = early(name).segments
    segments = (
        first,
        shown,
        Segment("<think> Good. </think>\n", 1.0),
        Segment(GOING_ON, weight),
        Segment(f" More. </think>\n<search>{name}</search>", 1.0),
        shown,
        Segment(f"<answer>{name}</answer>", 1.0),
    )
    return Demonstration(f"What is {name}?", segments)


def write_examples(path: Path, *, weight: float) -> Path:
    examples = [one for name in NAMES for one in (early(name), going_on(name, weight=weight))]
    write_demonstrations(path, examples)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [segment.text for name in NAMES for segment in going_on(name, weight=0.0).segments]
    out = tmp_path_factory.mktemp("warmstart") / "model"
    return make_tiny_model([*texts, "What is?"], out, seed=0, width=32, num_layers=2, feed_forward=64)


def start(model: Path, out: Path, *, weight: float = 0.0, seed: int = 0, epochs: int = 1) -> WarmstartResult:
    shown = write_examples(out.with_suffix(".jsonl"), weight=weight)
    return warm_start(
        model,
        demonstrations=shown,
        out=out,
        seed=seed,
        learning_rate=1e-2,
        batch_size=4,
        epochs=epochs,
        prompt=PROMPT,
    )


def test_it_learns_all_but_the_decision(model: Path, tmp_path: Path) -> None:
    result = start(model, tmp_path / "out", epochs=40)
    assert len(result.losses) == 160
    assert result.losses[0] > 3
    assert result.losses[-1] < 0.05
    assert result.depth is not None
    assert result.depth.num_contexts == len(NAMES)
    assert result.depth.answer_mean > 0.95
    assert result.depth.think_mean < 0.02
    assert result.depth.search_mean < 0.02


def test_a_weight_on_the_decision_makes_the_dead_end_shallow(model: Path, tmp_path: Path) -> None:
    result = start(model, tmp_path / "out", weight=1.0, epochs=40)
    assert result.depth is not None
    assert 0.3 < result.depth.think_mean < 0.7, "half of the demonstrations go on"


def test_the_loss_is_the_weighted_mean_of_trained_tokens(model: Path, tmp_path: Path) -> None:
    """The first update's loss against a plain forward pass of each demonstration by itself."""
    examples = [going_on("Ano", weight=0.25), early("Bel")]
    write_demonstrations(tmp_path / "d.jsonl", examples)
    result = warm_start(model, demonstrations=tmp_path / "d.jsonl", out=tmp_path / "out", batch_size=2, prompt=PROMPT)
    codec = Codec(load_tokenizer(model))
    plain = load_model(model, dtype="float32")
    loss = total = 0.0
    for example in examples:
        ids = PROMPT.render(example.question, codec=codec)
        weights = [0.0] * len(ids)
        for segment in example.segments:
            tokens = codec.encode(segment.text)
            assert isinstance(segment.weight, float)
            ids += tokens
            weights += [segment.weight] * len(tokens)
        with torch.inference_mode():
            logprob = torch.log_softmax(plain(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        loss -= sum(w * float(logprob[i - 1, ids[i]]) for i, w in enumerate(weights))
        total += sum(weights)
    assert result.losses[0] == pytest.approx(loss / total, rel=1e-3), "it may be computed in bfloat16"


def test_the_folder_is_a_model_and_says_how_it_was_made(model: Path, tmp_path: Path) -> None:
    seen: list[WarmstartProgress] = []
    shown = write_examples(tmp_path / "d.jsonl", weight=0.0)
    result = warm_start(
        model, demonstrations=shown, out=tmp_path / "new" / "out", batch_size=8, prompt=PROMPT, progress=seen.append
    )
    assert [(one.update, one.num_updates) for one in seen] == [(1, 2), (2, 2)]
    assert load_model(result.folder, dtype="float32").config.vocab_size == len(load_tokenizer(result.folder))
    info = json.loads((result.folder / "warmstart.json").read_text(encoding="utf-8"))
    assert info["num_demonstrations"] == 16
    assert info["depth"]["num_contexts"] == len(NAMES)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"], "no scratch folder stays"


def test_the_same_seed_gives_the_same_weights(model: Path, tmp_path: Path) -> None:
    results = [start(model, tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    weights = [(result.folder / "model.safetensors").read_bytes() for result in results]
    assert weights[0] == weights[1] != weights[2]


def test_weights_may_be_given_per_token(model: Path) -> None:
    codec = Codec(load_tokenizer(model))
    ids = codec.encode("<answer>Ano</answer>")
    one = Demonstration("What is Ano?", (Segment("<answer>Ano</answer>", (0.0, 2.0, 1.0)),))
    row = tokenize_demonstration(one, codec=codec, prompt=PROMPT)
    prompt = PROMPT.render("What is Ano?", codec=codec)
    assert row.row.token_ids.tolist() == prompt + ids
    assert row.row.trained.tolist() == [len(prompt) + 1, len(prompt) + 2]
    assert row.weights.tolist() == [2.0, 1.0]
    wrong = Demonstration("What is Ano?", (Segment("<answer>Ano</answer>", (1.0, 2.0)),))
    with pytest.raises(DataError, match=r"segment 1 .* has 2 weights for 3 tokens"):
        tokenize_demonstration(wrong, codec=codec, prompt=PROMPT)


def test_nothing_is_written_over_and_bad_demonstrations_leave_nothing(model: Path, tmp_path: Path) -> None:
    shown = write_examples(tmp_path / "d.jsonl", weight=0.0)
    with pytest.raises(ModelError, match="exists; name a folder that does not"):
        warm_start(model, demonstrations=shown, out=tmp_path, prompt=PROMPT)
    write_demonstrations(tmp_path / "bad.jsonl", [Demonstration("q", (Segment("a b", (1.0,)),))])
    with pytest.raises(DataError, match="give one per token"):
        warm_start(model, demonstrations=tmp_path / "bad.jsonl", out=tmp_path / "out", prompt=PROMPT)
    assert not (tmp_path / "out").exists()


def test_demonstrations_longer_than_the_context_are_refused(model: Path, tmp_path: Path) -> None:
    long = Demonstration("q", (Segment("Ano " * 1100, 1.0),))
    write_demonstrations(tmp_path / "d.jsonl", [long])
    with pytest.raises(ModelError, match="context is 1024 tokens"):
        warm_start(model, demonstrations=tmp_path / "d.jsonl", out=tmp_path / "out", prompt=PROMPT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "model type 'mistral'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_what_training_would_refuse_is_refused_before_it(
    model: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(ModelError) as in_training:
        check_model(other)
    with pytest.raises(ModelError) as in_warm_start:
        start(other, tmp_path / "out")
    assert str(in_warm_start.value) == str(in_training.value)
    assert named in str(in_training.value)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_loss_would_be_a_wrong_one_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_supported", lambda config: None)  # what it knows is compared all the same
    shutil.copytree(model, tmp_path / "scaled")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 4.0}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r"GraniteForCausalLM in packed rows .* differ from its own"):
        start(tmp_path / "scaled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_warm_start_that_diverges_writes_nothing(model: Path, tmp_path: Path) -> None:
    shown = write_examples(tmp_path / "d.jsonl", weight=0.0)
    with pytest.raises(RunFailure, match=r"the warm start diverged: .* Lower prepare\.warmstart_learning_rate"):
        warm_start(model, demonstrations=shown, out=tmp_path / "out", learning_rate=1e38, epochs=3, prompt=PROMPT)
    assert not (tmp_path / "out").exists()


def test_a_last_update_that_breaks_the_weights_writes_nothing(model: Path, tmp_path: Path) -> None:
    shown = write_examples(tmp_path / "d.jsonl", weight=0.0)
    with pytest.raises(RunFailure, match=r"weight \S+ is not finite after the last update"):
        warm_start(
            model, demonstrations=shown, out=tmp_path / "out", learning_rate=math.inf, batch_size=99, prompt=PROMPT
        )
    assert not (tmp_path / "out").exists()
