from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_builders import VOCABULARY, small_model, tiny_model
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rexrag.errors import ModelError
from rexrag.model.attention import use_packed_attention
from rexrag.model.comparison import prepare_model
from rexrag.model.logprobs import (
    CHUNK_TOKENS,
    ChunkLoss,
    backward_in_chunks,
    chunks_of,
    head_logprobs,
    token_logprobs,
)
from rexrag.model.packing import PackRow, pack


def rows_of(seed: int = 0, *, num_groups: int = 3) -> list[PackRow]:
    """Groups whose rows share a prompt; the last row of each also shares half of the first row's own tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for g in range(num_groups):
        prompt = rng.integers(0, VOCABULARY, 6)
        bodies = [rng.integers(0, VOCABULARY, n) for n in (8, 12, 5)]
        bodies.append(np.concatenate([bodies[0][:4], rng.integers(0, VOCABULARY, 7)]))
        for i, body in enumerate(bodies):
            ids = np.concatenate([prompt, body]).astype(np.int32)
            rows.append(PackRow(token_ids=ids, trained=np.arange(7 + i % 2, len(ids) - i % 2), group=g))
    return rows


def separate_logprobs(model: PreTrainedModel, row: PackRow) -> Tensor:
    """An ordinary forward pass of one row, by transformers' own attention."""
    logits = model(torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0]
    selected: Tensor = logits.log_softmax(-1)[row.trained - 1, row.token_ids[row.trained]]
    return selected


def padded_logprobs(model: LlamaForCausalLM, rows: list[PackRow]) -> Tensor:
    width = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.token_ids)] = torch.from_numpy(row.token_ids.astype(np.int64))
        mask[i, : len(row.token_ids)] = 1
    logits = model(ids, attention_mask=mask).logits.log_softmax(-1)
    return torch.cat([logits[i, row.trained - 1, row.token_ids[row.trained]] for i, row in enumerate(rows)])


def weighted(coefficients: Tensor) -> ChunkLoss:
    return lambda logprob, _, chunk: (logprob * coefficients[chunk]).sum()


def gradients(model: LlamaForCausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_packed_is_padded_is_separate_in_log_probs_and_gradients() -> None:
    rows = rows_of()
    model = tiny_model()
    coefficients = torch.randn(sum(len(row.trained) for row in rows), generator=torch.Generator().manual_seed(1))
    expected = torch.cat([separate_logprobs(model, row) for row in rows])
    (expected * coefficients).sum().backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    padded = padded_logprobs(model, rows)
    assert torch.allclose(padded, expected, atol=2e-6)
    (padded * coefficients).sum().backward()  # type: ignore[no-untyped-call]
    assert_close(gradients(model), wanted)

    use_packed_attention(model)
    for budget in (1, 30, 70, 10_000):
        done = 0
        for micro in pack(rows, budget=budget):
            part = coefficients[done : done + len(micro.targets)]
            assert torch.allclose(token_logprobs(model, micro), expected[done : done + len(part)], atol=2e-6)
            backward_in_chunks(model, micro, chunk_loss=weighted(part))
            done += len(part)
        assert done == len(coefficients)
        assert_close(gradients(model), wanted)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_budget_and_order() -> None:
    rows = rows_of()
    for budget in (20, 40, 100):
        batches = pack(rows, budget=budget)
        assert [i for batch in batches for i in batch.rows] == list(range(len(rows)))
        assert all(len(batch.token_ids) <= budget or len(batch.rows) == 1 for batch in batches)


def test_a_shared_prefix_is_packed_once() -> None:
    rows = rows_of(num_groups=1)
    (batch,) = pack(rows, budget=1000)
    # Inputs end before the last trained token. Prompt 6, then what rows 1 to 3 bring of their own.
    assert [len(row.inputs) for row in rows] == [13, 16, 10, 15]
    assert batch.layout.query_lengths == [13, 10, 4, 5]
    assert len(batch.token_ids) == 32
    assert batch.num_row_tokens == 54
    assert batch.position_ids.tolist()[13:23] == list(range(6, 16))


def test_rows_of_different_groups_do_not_share() -> None:
    ids = np.arange(10, dtype=np.int32)
    rows = [PackRow(token_ids=ids, trained=np.arange(5, 10), group=g) for g in range(2)]
    (batch,) = pack(rows, budget=100)
    assert len(batch.token_ids) == 18
    assert batch.layout.key_index is None


def test_equal_rows_share_everything() -> None:
    ids = np.arange(10, dtype=np.int32)
    rows = [PackRow(token_ids=ids, trained=np.arange(5, 10), group=0) for _ in range(2)]
    (batch,) = pack(rows, budget=100)
    assert len(batch.token_ids) == 9
    model = tiny_model()
    expected = separate_logprobs(model, rows[0]).detach()
    use_packed_attention(model)
    assert torch.allclose(token_logprobs(model, batch), torch.cat([expected, expected]), atol=2e-6)


@pytest.mark.parametrize("trained", [[], [0, 1], [9, 10]])
def test_trained_indices_are_checked(trained: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[1, 10\)"):
        PackRow(token_ids=np.arange(10, dtype=np.int32), trained=np.array(trained, np.int64), group=0)


def test_log_probs_and_entropy_are_those_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, dtype=torch.float32)
    head = torch.nn.Linear(8, 11, bias=False)
    targets = torch.tensor([0, 3, 3, 10, 7])
    coefficients = torch.randn(5, generator=generator)
    ours = hidden.clone().requires_grad_()
    logprob, entropy = head_logprobs(head, ours, targets)
    (logprob * coefficients).sum().backward()  # type: ignore[no-untyped-call]
    theirs = hidden.clone().requires_grad_()
    distribution = torch.distributions.Categorical(logits=head(theirs))
    (distribution.log_prob(targets) * coefficients).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(logprob, distribution.log_prob(targets), atol=1e-6)  # type: ignore[no-untyped-call]
    assert torch.allclose(entropy, distribution.entropy(), atol=1e-6)  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert not entropy.requires_grad


def test_chunks_cover_all_tokens_once() -> None:
    size = CHUNK_TOKENS["cpu"]
    for n in (1, size, size + 1, 3 * size - 1):
        chunks = list(chunks_of(torch.zeros(n)))
        assert [i for chunk in chunks for i in range(n)[chunk]] == list(range(n))
        assert all(chunk.stop - chunk.start <= size for chunk in chunks)


@pytest.mark.parametrize("architecture", [Qwen2Config, Qwen3Config])
def test_other_dense_architectures(architecture: type[Qwen2Config | Qwen3Config]) -> None:
    model = small_model(architecture)
    rows = rows_of()
    expected = torch.cat([separate_logprobs(model, row) for row in rows])
    prepare_model(model, length=32)
    (batch,) = pack(rows, budget=10_000)
    assert torch.allclose(token_logprobs(model, batch), expected, atol=2e-6)


def test_rows_beyond_a_sliding_window_are_refused() -> None:
    model = small_model(MistralConfig, sliding_window=10)
    prepare_model(model, length=8)
    (batch,) = pack(rows_of(num_groups=1), budget=10_000)
    with pytest.raises(ModelError, match=r"a row has 16 tokens, the model's sliding window is 10"):
        token_logprobs(model, batch)
