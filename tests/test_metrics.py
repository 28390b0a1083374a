from __future__ import annotations

import re
from pathlib import Path

import rexrag.metrics as keys

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"
# What scripts rely on in every line of metrics.jsonl.
PROMISED = {
    "step",
    "version",
    *("target/em", "probe/em", "target/dead_end_rate", "group/rescued", "mixture/alpha", "filter/rho"),
    *("weight/mean", "weight/max", "weight/ess_target", "weight/ess_probe", "staleness/mean", "staleness/max"),
    *("time/step_s", "time/learner_wait_s", "rollout/tokens_per_s"),
}


def test_promised_keys_exist() -> None:
    assert set(keys.DESCRIPTIONS) >= PROMISED


def test_keys_are_area_and_name_with_one_line() -> None:
    for key, line in keys.DESCRIPTIONS.items():
        assert key in ("step", "version") or re.fullmatch(r"[a-z_]+/[a-z0-9_]+", key), key
        assert line.endswith(".")
        assert "\n" not in line


def test_every_key_is_documented_as_the_code_says() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert rows == dict(keys.DESCRIPTIONS)
