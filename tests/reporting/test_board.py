from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rexrag.files import read_jsonl
from rexrag.reporting.board import Board
from rexrag.reporting.log_file import log_to
from rexrag.run_folder import RunFolder
from rexrag.types import Sample


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", recipe="mine", seed=0, config="")


def events(run: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.tensorboard), purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


def evaluation(split: str, step: int, em: float) -> dict[str, object]:
    hops = {"1": {"em": em, "n": 3}}
    sources = {"nq": {"em": em, "n": 2}, "own/x y": {"em": 0.5, "n": 1}}
    figures = {"em": em, "em_low": 0.0, "em_high": 1.0, "f1": em, "macro_em": 0.25}
    return {"split": split, "step": step, **figures, "by_hops": hops, "by_source": sources}


def test_sources_have_curves_of_their_own(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        board.evaluation(evaluation("dev", 1, 0.75))
    written = events(run)
    values = {tag: written.Scalars(f"eval/dev/{tag}")[0].value for tag in ("source/nq", "source/own_x_y", "macro_em")}
    assert values == {"source/nq": 0.75, "source/own_x_y": 0.5, "macro_em": 0.25}


def test_a_step_is_a_line_and_its_tags(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        board.step(1, metrics={"step": 1, "target/em": 0.25, "probe/em": None}, histograms={"histogram/age": [0, 1, 2]})
        board.step(2, metrics={"step": 2, "target/em": 0.5, "probe/em": 0.75}, histograms={"histogram/age": []})
    assert run.metrics.read_text().splitlines()[0] == '{"step": 1, "target/em": 0.25, "probe/em": null}'
    found = events(run)
    assert [(e.step, e.value) for e in found.Scalars("target/em")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in found.Scalars("probe/em")] == [(2, 0.75)]
    assert "step" not in found.Tags()["scalars"]
    assert [e.step for e in found.Histograms("histogram/age")] == [1]


def test_what_is_written_can_be_read_at_once(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        board.step(1, metrics={"target/em": 0.25}, histograms={})
        assert events(run).Scalars("target/em")[0].value == 0.25
        assert len(read_jsonl(run.metrics)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_refused_before_anything_is_written(run: RunFolder, value: float) -> None:
    with Board(run, purge_step=None) as board, pytest.raises(AssertionError, match="loss/total"):
        board.step(1, metrics={"loss/total": value}, histograms={})
    assert not run.metrics.exists()


def test_the_layout_puts_targets_beside_probes(run: RunFolder) -> None:
    with Board(run, purge_step=None):
        pass
    [event] = events(run).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert list(layout.category[0].chart[0].multiline.tag) == ["^compare/rollouts_em$"]


def test_what_is_compared_has_one_tag_in_runs_of_its_own(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        board.step(1, metrics={"target/em": 0.25, "probe/em": 0.5}, histograms={})
        board.evaluation(evaluation("dev", 1, 0.75))
    curves = {name: EventAccumulator(str(run.tensorboard / name)).Reload() for name in ("target", "probe", "dev")}
    assert [(e.step, e.value) for e in curves["target"].Scalars("compare/rollouts_em")] == [(1, 0.25)]
    assert [(e.step, e.value) for e in curves["probe"].Scalars("compare/rollouts_em")] == [(1, 0.5)]
    assert [(e.step, e.value) for e in curves["dev"].Scalars("compare/evaluation_em")] == [(1, 0.75)]


def test_a_resume_forgets_later_points(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        for step in (1, 2, 3):
            board.step(step, metrics={"target/em": 0.1 * step}, histograms={})
    with Board(run, purge_step=2) as board:
        board.step(2, metrics={"target/em": 0.9}, histograms={})
    assert [(e.step, round(e.value, 3)) for e in events(run).Scalars("target/em")] == [(1, 0.1), (2, 0.9)]


def test_an_evaluation_is_a_line_and_its_tags(run: RunFolder) -> None:
    with Board(run, purge_step=None) as board:
        board.evaluation(evaluation("test", 0, 0.2))
        board.evaluation(evaluation("dev", 4, 0.5))
    assert [line["split"] for line in read_jsonl(run.eval)] == ["test", "dev"]
    assert events(run).Scalars("eval/dev/em")[0].step == 4
    assert events(run).Scalars("eval/test/em_1_hops")[0].value == pytest.approx(0.2)


def test_a_sample_is_shown_as_it_is(run: RunFolder) -> None:
    text = "<think>a</think>\n```\n<answer>b</answer>"
    with Board(run, purge_step=None) as board:
        board.sample(3, Sample(tag="probe", text=text, rescued=True, fields={"em": 1.0}))
    assert read_jsonl(run.samples) == [{"step": 3, "tag": "probe", "em": 1.0, "text": text}]
    [event] = events(run).Tensors("samples/probe/text_summary")
    assert b"    <answer>b</answer>" in event.tensor_proto.string_val[0]


def test_a_line_after_a_torn_one_is_whole(run: RunFolder) -> None:
    run.metrics.write_text('{"step": 1, "to')
    with Board(run, purge_step=2) as board:
        board.step(2, metrics={}, histograms={})
    assert read_jsonl(run.metrics) == [{"step": 2}]


def test_log_records_become_lines_while_the_block_runs(run: RunFolder) -> None:
    log = logging.getLogger("rexrag.somewhere")
    with log_to(run.log):
        log.info("three of %d", 5)
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("a part died")
    log.warning("later")
    first, second = (json.loads(line) for line in run.log.read_text().splitlines())
    assert (first["level"], first["source"], first["message"]) == ("INFO", "rexrag.somewhere", "three of 5")
    assert "ValueError: broken" in second["traceback"]


def test_the_settings_of_a_run_stand_in_the_table_of_runs(run: RunFolder) -> None:
    settings: dict[str, object] = {
        "method": "rex",
        "train.steps": 3,
        "probe.rate": 0.5,
        "data.dev": [],
        "model.path": None,
    }
    with Board(run, purge_step=None, settings=settings):
        pass
    found = events(run).PluginTagToContent("hparams")
    started = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info
    assert dict(started.hparams.items()).keys() == {"method", "train.steps", "probe.rate"}
    assert started.hparams["method"].string_value == "rex"
    experiment = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment
    assert "eval/test/em" in [info.name.tag for info in experiment.metric_infos]
