"""AdamW with a linear schedule and a clipped gradient norm; its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from rexrag.model.sharding import shared_like, whole

_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
_LAST_SHARE: Final = 0.1
"""Of the learning rate, where its decay ends."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of AdamW. Weight decay acts on matrices, not on norms and biases."""

    learning_rate: float
    warmup_steps: int
    decay_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float


class Optimizer:
    """One parameter update at a time.

    `num_updates` drives the schedule: a step without an update does not move it. Lifecycle: backward passes add
    gradients → `clip` → `update` or `discard`.
    """

    def __init__(self, model: nn.Module, *, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._params.values() if p.ndim >= 2]
        others = [p for p in self._params.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self._adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)
        self.num_updates = 0

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update: it rises over the warm-up, then falls to a tenth, where it has a decay."""
        peak, warmup, decay = self._settings.learning_rate, self._settings.warmup_steps, self._settings.decay_steps
        if self.num_updates < warmup:
            return peak * (self.num_updates + 1) / warmup
        gone = min(1.0, (self.num_updates + 1 - warmup) / decay) if decay else 0.0
        return peak * (1.0 - (1.0 - _LAST_SHARE) * gone)

    def clip(self) -> float:
        """Scale the gradients to at most `max_grad_norm`; the global norm before it, maybe not finite."""
        return float(whole(nn.utils.clip_grad_norm_(self._params.values(), self._settings.max_grad_norm)))

    def update(self) -> None:
        """One AdamW update with the gradients at hand, which are freed."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self.num_updates += 1
        self.discard()

    def discard(self) -> None:
        """Forget the gradients at hand."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments by `<moment>/<parameter>`, in shards as it is; parameters that were never updated have none."""
        return {
            f"{moment}/{name}": self._adamw.state[p][moment]
            for name, p in self._params.items()
            if p in self._adamw.state
            for moment in _MOMENTS
        }

    def load_state(self, tensors: Mapping[str, Tensor], *, num_updates: int) -> None:
        """The inverse of `state`, from whole tensors.

        Raises:
            ValueError: a moment of an unknown parameter or of another shape.
        """
        self._adamw.state.clear()
        for key, tensor in tensors.items():
            moment, _, name = key.partition("/")
            parameter = self._params.get(name)
            if moment not in _MOMENTS or parameter is None:
                raise ValueError(f"optimizer state has {key}, which is no moment of a parameter of this model")
            if moment != "step" and tensor.shape != parameter.shape:
                raise ValueError(f"optimizer state {key} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            own = tensor.to(parameter.device, copy=True) if moment == "step" else shared_like(tensor, parameter)
            self._adamw.state[parameter][moment] = own
        self.num_updates = num_updates
