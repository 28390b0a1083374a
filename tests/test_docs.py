"""The pages against the code: settings, links, sections, files, examples of data, and that they can be read."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic.fields import FieldInfo

from rexrag.config import KEYS, Config
from rexrag.data.check import check_file
from rexrag.data.foreign_keys import FOREIGN_KEYS
from rexrag.data.questions import load_questions
from rexrag.env.prompt import read_template
from rexrag.methods import METHOD_ADVICE, METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
IN_ROOT = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md")
PAGES = (*IN_ROOT, *sorted(DOCS.rglob("*.md")))
MAX_LINE = 120
MAX_PARAGRAPH = 5 * 100
"""Characters: five lines in a browser at 1,200 pixels."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:rexrag|recipes|benchmarks|tests|tools|cluster)/[\w./-]+)`")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def config_rows() -> list[str]:
    """The rows of docs/configuration.md, one for each key in the order of a recipe."""
    return [f"| `{key}` | {default(key)} | {bounds(field(key))} | {field(key).description} |" for key in KEYS]


def field(key: str) -> FieldInfo:
    table, _, name = key.rpartition(".")
    fields = type(getattr(Config(), table)).model_fields if table else Config.model_fields
    return fields[name]


def default(key: str) -> str:
    value = field(key).default
    return "" if value is None else f"`{json.dumps(value)}`"


def bounds(info: FieldInfo) -> str:
    """What a key allows: a choice, an interval, or a type."""
    kind = next((part for part in get_args(info.annotation) if part is not type(None)), info.annotation)
    choice = info.annotation if get_origin(info.annotation) is Literal else kind
    if get_origin(choice) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(choice))
    limits = [
        f"{sign} {getattr(rule, name):g}"
        for rule in info.metadata
        for name, sign in SIGNS.items()
        if hasattr(rule, name)
    ]
    if limits:
        return ", ".join(limits)
    names: dict[object, str] = {bool: "`true`, `false`", str: "text", list: "paths", dict: "table"}
    return names.get(get_origin(info.annotation)) or names.get(kind, "path")


def slug(heading: str) -> str:
    """The anchor that renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def test_every_setting_is_documented_as_the_code_says() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert rows == config_rows()


def test_keys_of_other_trainers_are_answered_as_the_table_says() -> None:
    text = (DOCS / "from-search-r1.md").read_text(encoding="utf-8").replace("\\_", "_")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "." in line]
    told = {key: answer for key, answer in FOREIGN_KEYS.items() if "`" in answer}
    for theirs, ours in rows:
        names = [name for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", ours) if name != "metrics.jsonl"]
        assert set(names) <= set(KEYS), names
        for key in re.findall(r"(?:data|actor_rollout_ref|algorithm|trainer|retriever)\.[\w.]+\w", theirs):
            assert key in FOREIGN_KEYS or key in KEYS, key
            if key in told and names:
                assert any(f"`{name}`" in told[key] for name in names), key
    for answer in told.values():
        assert set(re.findall(r"`([a-z_]+\.[a-z_]+)`", answer)) <= set(KEYS), answer


def test_method_sets_are_documented_as_the_code_says() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    section = text.partition("`method` stands for:")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    keys = METHODS["paper"].keys()
    assert rows == [f"| `{key}` | {' | '.join(set_value(method, key) for method in METHODS)} |" for key in keys]
    assert all(values.keys() == keys for values in METHODS.values())
    advice = [f"- `{method}`: {text}" for method, text in METHOD_ADVICE.items()]
    assert [line for line in section.splitlines() if line.startswith("- ")] == advice
    assert METHOD_ADVICE.keys() == METHODS.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert all(f"| `{method}` | {text} |" in readme for method, text in METHOD_ADVICE.items())


def set_value(method: str, key: str) -> str:
    return f"`{json.dumps(METHODS[method][key])}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        outside = page.is_relative_to(DOCS) and not found.is_relative_to(DOCS)  # not a part of the site
        if outside or not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_site() -> None:
    def paths(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
        return [path for value in values for path in paths(value)]

    listed = paths(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_room_has_its_docstrings_in_the_site() -> None:
    shown = {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    }
    rooms = {f"rexrag.{path.parent.name}" for path in (ROOT / "rexrag").glob("*/__init__.py")}
    modules = {f"rexrag.{path.stem}" for path in (ROOT / "rexrag").glob("[!_]*.py")}
    assert shown == (rooms | modules) - {"rexrag.cli"}


def test_files_named_in_the_pages_exist() -> None:
    missing = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in FILE.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paragraphs_are_short(page: Path) -> None:
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"\]\([^)\s]+\)", "", text)
    parts = [item for part in re.split(r"\n\s*\n", text) for item in re.split(r"\n\s*(?=- |\d+\. )", part)]
    long = [part[:60] for part in parts if not part.startswith(("|", "    ")) and len(part) > MAX_PARAGRAPH]
    assert not long


@pytest.mark.parametrize("page", IN_ROOT, ids=lambda page: page.name)
def test_lines_outside_tables_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > MAX_LINE and not line.startswith("|")]


def test_the_picture_of_the_system_is_that_of_its_source() -> None:
    drawing = runpy.run_path(str(ROOT / "tools" / "draw_system.py"))["drawing"]
    assert (DOCS / "images" / "system.svg").read_text(encoding="utf-8") == drawing()


def test_settings_named_in_the_pages_exist() -> None:
    tables = "|".join({key.partition(".")[0] for key in KEYS if "." in key})
    named = re.compile(rf"`({tables})\.(\w+)")
    for page in PAGES:
        names = {".".join(match) for match in named.findall(page.read_text(encoding="utf-8"))}
        unknown = {name for name in names if name not in KEYS and not (ROOT / name).exists() and not is_file_name(name)}
        assert not unknown, page.name


def is_file_name(name: str) -> bool:
    return name.rpartition(".")[2] in ("toml", "json", "jsonl", "parquet", "md", "py")


def test_cited_sections_exist() -> None:
    numbers = set(re.findall(r"^## (\d+b?)\. ", (DOCS / "algorithm.md").read_text(encoding="utf-8"), re.MULTILINE))
    cited = {
        number
        for path in [*(ROOT / "rexrag").rglob("*.py"), *PAGES]
        for number in re.findall(r"§(\d+b?)", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert cited <= numbers


def test_tables_of_the_study_are_those_of_its_figures() -> None:
    path = ROOT / "benchmarks" / "estimators_tables.py"
    made = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60).stdout
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    *tables, quick_start = made.strip().split("\n\n")
    assert len(tables) >= 4
    assert all(table in page for table in tables)
    assert quick_start in (DOCS / "results.md").read_text(encoding="utf-8")


def test_the_tables_of_the_corrected_method_are_those_of_its_figures() -> None:
    script = ROOT / "benchmarks" / "estimators_tables.py"
    figures = ROOT / "benchmarks" / "results" / "likelihood.json"
    made = subprocess.run(
        [sys.executable, script, "--figures", figures], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    tables = [part for part in made.split("\n\n") if part.startswith("| P(going on) | method")]
    assert len(tables) == 2, "of the invented world and the real model"
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables)


def test_the_tables_on_asynchrony_are_those_of_their_figures() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "load_tables.py"))["tables"]()
    page = (DOCS / "asynchrony.md").read_text(encoding="utf-8")
    assert len(tables) == 3
    assert all(table in page for table in tables)


def test_the_tables_on_retrieval_are_those_of_their_figures() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "load_tables.py"))["retrieval_tables"]()
    page = (DOCS / "retrieval.md").read_text(encoding="utf-8")
    assert len(tables) == 3
    assert all(table in page for table in tables)


@pytest.mark.parametrize(
    ("section", "name", "heading", "least_steps"),
    [
        ("section", "chaos", "## Under faults", 100),
        ("nodes_section", "node_chaos", "## Under faults, over several nodes", 50),
    ],
)
def test_the_sections_on_faults_are_those_of_their_figures(
    section: str, name: str, heading: str, least_steps: int
) -> None:
    make = runpy.run_path(str(ROOT / "benchmarks" / "chaos_table.py"))[section]
    figures = ROOT / "benchmarks" / "results" / f"{name}.json"
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    if not figures.exists():
        assert heading not in page, "figures without a file that they are from"
        return
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert make(report) in page
    assert (report["lost"], report["trained_twice"], report["unplayed"]) == (0, 0, {})
    assert report["steps"] >= least_steps
    assert report["machine"]["cpu"]
    assert report["commit"]


def test_examples_of_data_files_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"^```jsonl\n(.*?)^```", (DOCS / "data.md").read_text(encoding="utf-8"), re.M | re.DOTALL)
    kinds = []
    for block in blocks:
        file = tmp_path / "example.jsonl"
        file.write_text(block, encoding="utf-8")
        report = check_file(file)
        assert not report.problems
        kinds.append(report.kind)
    assert kinds == ["questions", "corpus", "demonstrations"]


def test_questions_are_held_out_of_search_r1s_file_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "from-search-r1.md").read_text(encoding="utf-8")
    (block,) = re.findall(r'^ *```python title="hold_out.py"\n(.*?)^ *```', page, re.M | re.DOTALL)
    rows = [
        {
            "id": f"train_{i}",
            "data_source": "nq",
            "question": f"{i}?",
            "prompt": [{"role": "user", "content": f"Answer after a search. Question: {i}?\n"}],
            "golden_answers": ["a"],
        }
        for i in range(401)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "train.parquet")
    Path("hold_out.py").write_text(textwrap.dedent(block), encoding="utf-8")
    runpy.run_path("hold_out.py")
    learn, dev = (load_questions(Path(f"{name}.parquet")).questions for name in ("learn", "dev"))
    assert [question.question for question in dev] == ["0?", "200?", "400?"]
    assert len({question.key for question in (*learn, *dev)}) == len(learn) + len(dev) == 401
    assert read_template(Path("prompt.txt")) == "Answer after a search. Question: {question}\n"
