from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rexrag.config import KEYS, Config
from rexrag.errors import ConfigError
from rexrag.methods import METHODS
from rexrag.recipe import (
    Recipe,
    check_runnable,
    flatten,
    load_recipe,
    make_config,
    nearest_key,
    prepared_values,
    quickstart_recipe,
    resolved_toml,
    with_prepared,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides=overrides)


def test_precedence_default_method_recipe_set(tmp_path: Path) -> None:
    recipe = load(tmp_path, 'method = "grpo"\n[train]\nsteps = 5\n[probe]\nrate = 0.25', "train.steps=7")
    values = flatten(recipe.config)
    assert values["train.steps"] == 7
    assert values["probe.rate"] == 0.25
    assert values["correction.mixture"] == "none"
    assert values["train.seed"] == 0
    assert recipe.sources["train.steps"] == "--set"
    assert recipe.sources["probe.rate"] == "mine.toml"
    assert recipe.sources["correction.mixture"] == "method grpo"
    assert recipe.sources["train.seed"] == "default"


def test_method_on_the_command_line_replaces_the_recipes_keys_of_its_set(tmp_path: Path) -> None:
    text = 'method = "paper"\n[probe]\nrate = 0.25\n[correction]\nmixture = "sequence"'
    grpo = load(tmp_path, text, "method=grpo").config
    assert (grpo.probe.rate, grpo.correction.mixture) == (0.0, "none")
    paper = load(tmp_path, text, "method=paper", "correction.mixture=none").config
    assert (paper.probe.rate, paper.correction.mixture) == (0.5, "none")


def test_method_sets_hold_known_keys_and_defaults_are_those_of_the_default_method() -> None:
    for values in METHODS.values():
        assert set(values) <= set(KEYS)
        make_config(values, sources={})
    assert {key: flatten(Config())[key] for key in METHODS[Config().method]} == METHODS[Config().method]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.stps=3", "train.steps"),
        ("stps=3", "train.steps"),
        ("group_size=3", "rollout.group_size"),
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("learnig_rate=1", "optimizer.learning_rate"),
        ("correction.cpa=1", "correction.cap"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(tmp_path: Path, word: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest known one is `{expected}`"):
        load(tmp_path, "", word)


def test_unknown_key_in_a_recipe_and_in_an_unknown_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `train\.learning_rate`.*`optimizer\.learning_rate`"):
        load(tmp_path, "[train]\nlearning_rate = 1e-5")
    with pytest.raises(ConfigError, match=r"unknown key `trian\.steps`.*`train\.steps`"):
        load(tmp_path, "[trian]\nsteps = 3")
    with pytest.raises(ConfigError, match="`train` is a table"):
        load(tmp_path, "train = 3")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.train_files=['q.parquet']", "`data.train`"),
        ("data.train_file=q.parquet", r"`data\.train_files` is probably meant: it is `data\.train`"),
        ("+retriever.topk=3", "`env.top_k`"),
        ("actor_rollout_ref.rollout.n=5", "`rollout.group_size`"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "`optimizer.learning_rate`"),
        ("trainer.save_freqs=5", r"`trainer\.save_freq` is probably meant: it is `train\.checkpoint_every`"),
        ("max_turns=5", "`env.max_turns`"),
    ],
)
def test_keys_of_other_trainers_are_answered_with_ours(tmp_path: Path, word: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .* of Search-R1 or verl: .*{expected}"):
        load(tmp_path, "", word)


def test_what_ours_is_misspelt_for_is_never_taken_for_theirs(tmp_path: Path) -> None:
    for key in KEYS:
        with pytest.raises(ConfigError, match="nearest known one is"):
            load(tmp_path, "", f"{key}x=1")


def test_set_words_that_are_no_utf_8(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set 'model\.path=\\udcff': is not UTF-8"):
        load(tmp_path, "", "model.path=\udcff")


@pytest.mark.parametrize("word", ["data.train=", "model.path=  ", "data.dev=['']"])
def test_an_empty_path_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="names no path"):
        load(tmp_path, "", word)


def test_patterns_become_the_files_they_match(tmp_path: Path) -> None:
    base = tmp_path / "odd[1]"
    (base / "shards").mkdir(parents=True)
    files = [base / "shards" / f"{name}.jsonl" for name in ("a", "b", "c[1]")]
    for file in files:
        file.touch()
    text = '[data]\ntrain = ["shards/[ba].jsonl", "shards/c[1].jsonl"]\ndev = "none*"'
    config = load(base, text).config
    assert config.data.train == files
    assert config.data.dev == [base / "none*"]


def test_a_folder_of_data_is_found_out_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.jsonl").touch()
    text = '[model]\npath = "owner/name"\n[data]\ntrain = "shards"\n[retriever]\nkind = "http"\nurl = "http://x"'
    with pytest.raises(ConfigError, match=r"data\.train = .* is a folder; name the files .*a\.jsonl"):
        check_runnable(load(tmp_path, text))


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.steps=-1", ["train.steps = -1", "--set", "greater than or equal to 0", "Learner steps"]),
        ("train.steps=abc", ['train.steps = "abc"', "integer"]),
        ("probe.rate=1.5", ["probe.rate = 1.5", "less than or equal to 1"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate = nan", "finite"]),
        ("probe.transfer=free", ["probe.transfer", "'hinted' or 'hint_free'"]),
        ("probe.dead_end=question", ["probe.dead_end", "'rollout' or 'group'"]),
        ("correction.mixture=trajectory", ["correction.mixture", "'token', 'sequence', 'normalized' or 'none'"]),
        ("loss.preserve=-1", ["loss.preserve = -1", "greater than or equal to 0"]),
        ("weights.inflight=drop", ["weights.inflight", "'keep' or 'recompute'"]),
        ("method=dapo", ["method", "'grpo', 'maxrl', 'paper', 'exact' or 'rex'"]),
    ],
)
def test_values_out_of_bounds_are_explained(tmp_path: Path, word: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "", word)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["env.max_turn_tokens=4096"], "env.max_turn_tokens = 4096"),
        (["env.max_observation_tokens=5000"], "env.max_observation_tokens = 5000"),
        (["rollout.group_size=1", "probe.rate=0"], "rollout.group_size = 1"),
        (["rollout.group_size=1", "method=grpo"], "rollout.group_size = 1"),
        (["rollout.group_size=1", "loss.baseline=loo"], "rollout.group_size = 1"),
        (["reward.format_weight=0.1"], "reward.format_weight = 0.1"),
        (["replay.lease_timeout_s=9000"], "replay.lease_timeout_s = 9000"),
        (
            ["retriever.kind=http", "retriever.timeout_s=60"],
            "replay.lease_timeout_s = 300: must be above 367.75, the seconds that one search may take with "
            "retriever.timeout_s = 60 and retriever.max_retries = 5",
        ),
        (["prepare.index=bm25"], "prepare.index"),
        (["replay.refill=true", "loss.preserve=1"], "loss.preserve = 1.0"),
        (["rollout.engine=torch", "rollout.tensor_parallel=2"], "rollout.tensor_parallel = 2: must be 1 with"),
        (["rollout.num_gpus=1", "rollout.tensor_parallel=2"], "must be the number of GPUs of each actor"),
        (["rollout.num_gpus=2"], "rollout.num_gpus = 2: must be at most 1 with rollout.tensor_parallel = 1"),
        (["probe.transfer=hint_free", "method=paper"], 'probe.filter = "hint_logprob"'),
        (["method=paper", "correction.mixture=sequence", "loss.train_prefix=true"], "probe.filter = 'hint_logprob'"),
        (["method=paper", "correction.mixture=sequence", "probe.filter=none"], "loss.train_prefix = False"),
        (["correction.mixture=sequence", "probe.dead_end=group"], "probe.dead_end = 'group'"),
        (["correction.mixture=sequence", "loss.train_hints=false"], "loss.train_hints = False"),
        (["prepare.warmstart=true", "prepare.world=geo"], "prepare.warmstart: needs prepare.model"),
    ],
)
def test_settings_at_odds_are_refused(tmp_path: Path, words: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "", *words)
    assert named in str(caught.value)
    assert not str(caught.value).startswith("Value error")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "", "train.steps=-1", "probe.rate=2")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("reward.kind=em + format", "reward.kind", "em + format"),
        ('reward.kind="f1"', "reward.kind", "f1"),
        ("data.skip_bad_rows=true", "data.skip_bad_rows", True),
        ("prepare.world_size={train = 9}", "prepare.world_size", {"train": 9}),
        ("env.system_prompt=a = b\nc = 1", "env.system_prompt", "a = b\nc = 1"),
        ("eval={every = 3}", "eval.every", 3),
    ],
)
def test_words_of_set_are_toml_values_or_bare_strings(tmp_path: Path, word: str, key: str, value: object) -> None:
    assert flatten(load(tmp_path, "", word).config)[key] == value


def test_set_of_one_entry_of_a_table_leaves_the_others(tmp_path: Path) -> None:
    recipe = '[prepare]\nworld = "geo"\nworld_size = { demonstrations = 480, dev = 40 }\n'
    both = load(tmp_path, recipe, "prepare.world_size.test=100", "prepare.world_size.dev=16").config.prepare
    assert both.world_size == {"demonstrations": 480, "dev": 16, "test": 100}
    whole = load(tmp_path, recipe, "prepare.world_size={train = 9}", "prepare.world_size.dev=16").config.prepare
    assert whole.world_size == {"train": 9, "dev": 16}
    bounds = load(tmp_path, "", "rollout.autoscale.min=1", "rollout.autoscale.max=8").config.rollout
    assert bounds.autoscale == {"min": 1, "max": 8}


@pytest.mark.parametrize("word", ["train.steps", "=3", ""])
def test_set_without_key_or_value(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load(tmp_path, "", word)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "nope.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path, "train = ")


def test_a_byte_order_mark_before_a_recipe_is_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff[train]\nsteps = 5\n").config.train.steps == 5


def test_paths_are_relative_to_the_recipe_and_a_list_or_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "local").mkdir()
    text = '[data]\ntrain = "a.jsonl"\ndev = ["b.jsonl", "/abs/c.jsonl"]\n[model]\npath = "local"'
    config = load(tmp_path, text, "retriever.path=index").config
    assert config.data.train == [tmp_path / "a.jsonl"]
    assert config.data.dev == [tmp_path / "b.jsonl", Path("/abs/c.jsonl")]
    assert config.model.path == str(tmp_path / "local")
    assert config.retriever.path == tmp_path / "elsewhere" / "index"


def test_a_hub_id_is_no_path_but_a_dotted_one_is(tmp_path: Path) -> None:
    assert load(tmp_path, '[model]\npath = "owner/name"').config.model.path == "owner/name"
    assert load(tmp_path, '[model]\npath = "./owner"').config.model.path == str(tmp_path / "owner")


def test_runnable_names_all_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_runnable(load(tmp_path, "", "eval.every=2"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.path",
        "data.train",
        "retriever.path",
        "data.dev",
    ]
    text = '[model]\npath = "owner/name"\n[data]\ntrain = "t.jsonl"\n[retriever]\nkind = "http"\nurl = "http://x"'
    with pytest.raises(ConfigError, match=r"t\.jsonl.*does not exist"):
        check_runnable(load(tmp_path, text))
    (tmp_path / "t.jsonl").touch()
    check_runnable(load(tmp_path, text))
    with pytest.raises(ConfigError, match=r"model\.path.*does not exist"):
        check_runnable(load(tmp_path, text, "model.path=./nope"))


def test_prepared_places_are_filled_in_and_not_twice(tmp_path: Path) -> None:
    text = '[prepare]\nmodel = "tiny"\nworld = "synthetic"\nindex = "bm25"\nwarmstart = true'
    recipe = load(tmp_path, text)
    check_runnable(recipe)
    filled = with_prepared(recipe, prepared=tmp_path / "prepared")
    assert filled.config.model.path == str(tmp_path / "prepared" / "warmstart")
    assert filled.config.data.eval == [tmp_path / "prepared" / "world" / "test.jsonl"]
    assert filled.sources["retriever.path"] == "[prepare]"
    assert with_prepared(filled, prepared=tmp_path / "prepared").config == filled.config
    with pytest.raises(ConfigError, match=r"data\.train.*\[prepare\] fills this key"):
        with_prepared(load(tmp_path, text, "data.train=mine.jsonl"), prepared=tmp_path / "prepared")


def test_resolved_settings_are_written_movable_and_read_back(tmp_path: Path) -> None:
    for name in ("quickstart", "synthetic", "own-data"):
        filled = with_prepared(load_recipe(RECIPES / f"{name}.toml"), prepared=tmp_path / "prepared")
        path = tmp_path / "config.toml"
        path.write_text(resolved_toml(filled, base=tmp_path), encoding="utf-8")
        assert load_recipe(path).config == filled.config
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_every_value_has_its_source(tmp_path: Path) -> None:
    lines = resolved_toml(load(tmp_path, "", "train.steps=3")).splitlines()
    assert "steps = 3  # --set" in lines
    assert "# num_actors =  # default" in lines
    values = [line for line in lines[1:] if line and not line.startswith("[")]
    assert len(values) == len(KEYS)
    assert all(line.rpartition("  # ")[2] for line in values)


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    system_prompt=TEXT,
    train=st.lists(TEXT.filter(lambda text: text.strip(".") != "" and "\0" not in text), max_size=3),
    size=st.dictionaries(TEXT, st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    rate=st.floats(0, 1),
)
def test_any_settings_survive_the_way_through_toml(
    tmp_path: Path, system_prompt: str, train: list[str], size: dict[str, float], rate: float
) -> None:
    values: dict[str, object] = {
        "env.system_prompt": system_prompt,
        "data.train": [Path("/data") / text.lstrip("/") for text in train],
        "prepare.world_size": size,
        "probe.rate": rate,
    }
    config = make_config(values, sources={})
    recipe = Recipe(name="any", config=config, sources=dict.fromkeys(KEYS, "test"))
    text = resolved_toml(recipe)
    tomllib.loads(text)
    path = tmp_path / "any.toml"
    path.write_bytes(text.encode())
    reloaded = load_recipe(path).config
    assert reloaded.env == config.env
    assert reloaded.prepare == config.prepare
    assert reloaded.probe == config.probe
    assert reloaded.data.train == [path.resolve() for path in config.data.train]


def test_shipped_recipes_resolve_and_the_prepared_ones_run_as_they_are() -> None:
    assert quickstart_recipe() == RECIPES / "quickstart.toml"
    for path in RECIPES.glob("*.toml"):
        recipe = load_recipe(path)
        if recipe.config.prepare.world:
            check_runnable(recipe)
            assert prepared_values(recipe.config, prepared=Path("p"))["model.path"] == "p/warmstart"


def test_the_quick_start_with_vllm_differs_in_the_engine_alone() -> None:
    with_vllm = flatten(load_recipe(RECIPES / "quickstart-vllm.toml").config)
    assert with_vllm == {**flatten(load_recipe(quickstart_recipe()).config), "rollout.engine": "vllm"}


def test_nearest_key_is_always_a_known_one() -> None:
    assert nearest_key("zzz") in KEYS
