"""Log-probs of trained tokens, in chunks: the logits of a whole micro-batch are never alive at once.

Legend: P packed tokens, E trained tokens, C tokens of a chunk, V vocabulary, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from rexrag.model.packing import PackedBatch
from rexrag.model.sharding import body_of, release

CHUNK_TOKENS: Final = {"cpu": 256, "cuda": 2048}
"""Tokens whose logits exist at once: few fit a CPU's cache, more fill a GPU (a step a sixth faster than with 256)."""

ChunkLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(log-probs [C], entropies [C], which of the E tokens these are) → summed loss of the chunk."""


class _Context(FunctionCtx):
    probs: Tensor
    targets: Tensor


class _SelectedLogProb(torch.autograd.Function):
    """Log-softmax at the targets and the entropy, in the memory of the logits, which are overwritten."""

    @staticmethod
    def forward(ctx: _Context, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
        logprob = logits.gather(-1, targets[:, None]).squeeze(-1)
        probs = logits.exp()
        # A log-prob of −∞ has probability 0 and no part in the entropy.
        entropy = -(logits.clamp_(min=torch.finfo(logits.dtype).min).mul_(probs)).sum(dim=-1)
        ctx.probs = probs
        ctx.targets = targets
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_logprob: Tensor, _: Tensor) -> tuple[Tensor, None]:
        grad = ctx.probs
        del ctx.probs
        grad.mul_(-grad_logprob[:, None])
        grad.scatter_add_(1, ctx.targets[:, None], grad_logprob[:, None])
        return grad, None


def trained_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[E, W] last hidden states that predict the trained tokens; `model` uses packed attention."""
    out = body_of(model)(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        packed_layout=batch.layout,
        use_cache=False,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden[0].index_select(0, batch.logit_index)


def head_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 log-probs of the targets and entropies, both [C], from hidden states [C, W].

    The entropy carries no gradient.
    """
    logits: Tensor = head(hidden)
    logprob, entropy = _SelectedLogProb.apply(logits.float(), targets)  # type: ignore[no-untyped-call]
    return logprob, entropy


def backward_in_chunks(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    chunk_loss: ChunkLoss,
    total_of: Callable[[float], float] = lambda total: total,
) -> float:
    """Forward and backward pass of one micro-batch; gradients are added to the parameters'.

    Each chunk's loss goes back to the hidden states while its logits are alive, and the hidden states' gradient then
    goes through the body once: no logits are computed twice, and only one chunk's exist.

    Args:
        total_of: from this process's summed loss to that of all processes that hold the model.

    Returns:
        The summed loss of all. Where it is not finite the body's backward pass is left out, by all.
    """
    hidden = trained_hidden(model, batch)
    leaf = hidden.detach().requires_grad_()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    total = 0.0
    for chunk in chunks_of(batch.targets):
        logprob, entropy = head_logprobs(head, leaf[chunk], batch.targets[chunk])
        loss = chunk_loss(logprob, entropy, chunk)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    total = total_of(total)
    if not math.isfinite(total):
        release(model)
        return total
    assert leaf.grad is not None, "a packed batch has a trained token"
    hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[E] float32 log-probs of the trained tokens, without gradient."""
    hidden = trained_hidden(model, batch)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    parts = [head_logprobs(head, hidden[chunk], batch.targets[chunk])[0] for chunk in chunks_of(batch.targets)]
    release(model)
    return torch.cat(parts)


def chunks_of(tokens: Tensor) -> Iterator[slice]:
    """Slices of at most `CHUNK_TOKENS` that cover tokens [E]."""
    size = CHUNK_TOKENS[tokens.device.type]
    for start in range(0, len(tokens), size):
        yield slice(start, min(start + size, len(tokens)))
