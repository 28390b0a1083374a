"""The commands and files of README and docs/how-to.md, run as they stand there on a small world."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from free_ports import free_ports
from system_runs import read_lines

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
TIMEOUT_S = 400.0

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def blocks(page: str, *, under: str) -> list[tuple[str, str, str]]:
    """Language, title and text of the fenced blocks of a section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(under)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"{page} has no section {under}"
    found = BLOCK.findall(section[1])
    assert found, f"{page}, {under}: no block"
    return found


@pytest.fixture
def folder(recipe: Path, tmp_path: Path) -> Path:
    """What a reader has in front of them: questions, corpus, demonstrations, model, a recipe that names them."""
    world = recipe.parent / "world"
    for name in ("train", "dev", "test", "corpus"):
        shutil.copy(world / f"{name}.jsonl", tmp_path)
    demonstrations = (world / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(demonstrations), encoding="utf-8")
    shutil.copytree(recipe.parent / "model", tmp_path / "model")
    text = recipe.read_text(encoding="utf-8").replace(f"{recipe.parent}/world/", "").replace(f"{recipe.parent}/", "")
    assert str(recipe.parent) not in text
    small = {"steps = 4": "steps = 1", "\nevery = 2": "\nevery = 0", "max_questions = 8": "max_questions = 2"}
    for old, new in small.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "my-recipe.toml").write_text(text, encoding="utf-8")
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "rexrag").write_text(f'#!/bin/sh\nexec {sys.executable} -m rexrag "$@"\n')
    (commands / "rexrag").chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}, "PATH": path}


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def bash(folder: Path, text: str) -> str:
    return run(folder, "bash", "-euc", text)


def test_your_own_data_as_the_readme_says(folder: Path) -> None:
    (block,) = blocks("README.md", under="Your own questions, corpus and model")
    assert block[2].count("rexrag ") == 6
    out = bash(folder, block[2])
    assert '"em"' in out
    assert (folder / "runs" / "first" / "run.json").exists()
    for _, _, text in blocks("docs/how-to.md", under="Resume, and go on longer")[:2]:
        bash(folder, text.replace("train.steps=300", "train.steps=2"))
    assert [line["step"] for line in read_lines(folder / "runs" / "first" / "metrics.jsonl")] == [1, 2]
    commands, export = blocks("docs/how-to.md", under="Evaluate, ask, export")
    bash(folder, "\n".join(line for line in lines(commands[2]) if line not in lines(block[2])))
    run(folder, sys.executable, "-c", export[2])
    assert (folder / "test.json").exists()
    assert (folder / "exported" / "model.safetensors").exists()


def lines(text: str) -> list[str]:
    """Commands, without what is said about them."""
    return [line.partition("  #")[0].strip() for line in text.splitlines()]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The search server of the page, on a free port."""
    (page_server,) = [text for _, title, text in blocks("docs/how-to.md", under="Your own search server") if title]
    (port,) = free_ports(1)
    (folder / "my_server.py").write_text(page_server.replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, "my_server.py"], cwd=folder)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_own_reward_server_hints_and_prompt_in_one_run(folder: Path, server: str) -> None:
    """The files and the lines of a recipe that the page gives, all of them at once."""
    settings = []
    for section in ("Your own reward", "Your own search server", "Your own hints", "Your own prompt"):
        for language, title, text in blocks("docs/how-to.md", under=section):
            if language == "toml":
                settings += assignments(text.replace("http://127.0.0.1:8000", server))
            elif title != "my_server.py":
                (folder / title).write_text(text)
    assert len(settings) == 6
    words = [word for setting in settings for word in ("--set", setting)]
    recipe = folder / "my-recipe.toml"
    rest = re.sub(r"^\[(retriever|reward)\]\n(?:[^\[]+\n)*", "", recipe.read_text(), flags=re.MULTILINE)
    assert "[retriever]" not in rest
    assert "[rollout]" in rest
    recipe.write_text(rest)
    run(folder, "rexrag", "train", "my-recipe.toml", *words, "--run-dir", "own")
    (line,) = read_lines(folder / "own" / "metrics.jsonl")
    assert line["target/searches"] is not None


def assignments(table: str) -> list[str]:
    """`[a]`, `b = c` as `a.b=c`."""
    name, *lines = table.strip().splitlines()
    return [f"{name.strip('[]')}.{line.partition(' = ')[0]}={line.partition(' = ')[2]}" for line in lines]


@pytest.mark.slow
def test_a_warm_start_and_a_sweep_over_methods_and_seeds(folder: Path) -> None:
    """Without training, which the other tests do; the first commands of the page are those of the README."""
    begin = [line for _, _, text in blocks("docs/how-to.md", under="Begin") for line in lines(text)]
    assert begin == lines(blocks("README.md", under="Your own questions, corpus and model")[0][2])[:4]
    (warm,) = blocks("docs/how-to.md", under="Your own model")
    (folder / "index").mkdir()  # a dry run only looks whether it is there
    bash(folder, warm[2].replace("--run-dir", "--dry-run --run-dir"))
    sweep, table = blocks("docs/how-to.md", under="Another method, several seeds")
    bash(folder, sweep[2].replace("--run-dir", "--dry-run --run-dir"))
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "eval.jsonl").write_text('{"split": "test", "step": 1, "em": 0.5}\n')
    assert run(folder, sys.executable, "-c", table[2]) == "a test 1 0.5\n"
