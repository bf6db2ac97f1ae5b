"""Every method over gloo ranks equals full attention on one rank, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import attention_ranks as ranks
import pytest
import torch
from attention_ranks import Case
from gloo_pool import GlooPool

METHODS = ("ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses")
ACROSS_BORDERS = (1, 63, 127, 1000)
HEADS = [(4, 2), (4, 4), (4, 1)]


def runnable(degree: int, num_heads: int, methods: tuple[str, ...] = METHODS) -> tuple[str, ...]:
    return tuple(method for method in methods if method != "ulysses" or num_heads % degree == 0)


def check_errors(pool: GlooPool, case: Case, limit: float, methods: tuple[str, ...] = METHODS) -> None:
    chosen = runnable(case.degree, case.num_heads, methods)
    for rank, errors in enumerate(pool.run(ranks.max_errors, case, chosen, world=case.degree)):
        assert set(errors) == set(chosen)
        for method, found in errors.items():
            assert max(found) < limit, (rank, method, found)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_methods_equal_full_attention(gloo_pool: GlooPool, degree: int, causal: bool, heads: tuple[int, int]) -> None:
    case = Case(ACROSS_BORDERS, degree, num_heads=heads[0], num_key_heads=heads[1], causal=causal)
    check_errors(gloo_pool, case, 1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(257, 5, 100, 3, 1, 61), (1000,)])
def test_methods_equal_full_attention_on_contiguous_shards(
    gloo_pool: GlooPool, degree: int, causal: bool, lengths: tuple[int, ...]
) -> None:
    check_errors(gloo_pool, Case(lengths, degree, causal=causal, order="contiguous"), 1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(257, 5, 100, 3, 1, 61), (331,), (3, 2, 7, 5)])
def test_methods_equal_full_attention_on_other_packings(
    gloo_pool: GlooPool, causal: bool, lengths: tuple[int, ...]
) -> None:
    check_errors(gloo_pool, Case(lengths, 4, causal=causal, scale=0.7), 1e-10)


def test_odd_key_heads_and_the_eager_kernel(gloo_pool: GlooPool) -> None:
    check_errors(gloo_pool, Case((40, 90, 1), 3, num_heads=6, num_key_heads=3, kernel="eager"), 1e-10)
    check_errors(gloo_pool, Case((40, 90, 1), 4, num_heads=10, num_key_heads=5, kernel="eager"), 1e-10)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("causal", [True, False])
def test_ranks_without_tokens_take_part(gloo_pool: GlooPool, order: str, causal: bool) -> None:
    for lengths in ((1,), (2, 1)):
        check_errors(gloo_pool, Case(lengths, 4, num_key_heads=4, causal=causal, order=order), 1e-10)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kernel", ["aten", "eager"])
def test_lower_precision(gloo_pool: GlooPool, dtype: torch.dtype, limit: float, kernel: str) -> None:
    check_errors(gloo_pool, Case((1, 63, 300), 4, head_size=16, dtype=dtype, kernel=kernel), limit)


@pytest.mark.parametrize("method", METHODS)
def test_a_future_token_changes_nothing_before_it(gloo_pool: GlooPool, method: str) -> None:
    case = Case(ACROSS_BORDERS, 4)
    token = 1 + 63 + 127 + 600
    for before, after, tokens in gloo_pool.run(ranks.outputs_with_and_without_future, case, token, method):
        assert torch.equal(before[tokens < token], after[tokens < token])
        assert (before[tokens >= token] != after[tokens >= token]).any(dim=-1).all()


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_gives_the_same_gradients(gloo_pool: GlooPool, method: str) -> None:
    assert gloo_pool.run(ranks.plain_and_checkpointed_gradients, Case((37, 90), 4), method) == [0.0] * 4


def test_ulysses_refuses_heads_that_do_not_divide_on_every_rank(gloo_pool: GlooPool) -> None:
    for message in gloo_pool.run(ranks.refusal, Case((30,), 3), "ulysses", world=3):
        assert "4 query heads over a group of degree 3" in message


def test_a_group_of_another_size_than_the_layout_is_refused(gloo_pool: GlooPool) -> None:
    for message in gloo_pool.run(ranks.refusal_of_degree, Case((30,), 3)):
        assert "the group has 4 ranks and the layout degree 3" in message


@pytest.mark.parametrize("causal", [True, False])
def test_bytes_follow_the_formulas(gloo_pool: GlooPool, causal: bool) -> None:
    """ALGORITHMS.md section 2, summed over ranks; fp64, so sums and statistics are as wide as the inputs."""
    degree, group, head_size = 4, 2, 8
    case = Case((degree * 64,), degree, head_size=head_size, causal=causal)
    queries = 64 * case.num_heads * head_size * 8
    full = (degree - 1) * degree * queries
    trim = 0.75 if causal else 1.0
    # Causal: nobody else needs the last chunk of the document, rank 0's second. The ring's backward goes forwards, which
    # trims its sums, and of the keys only that chunk. The sums take one hop less than in the table: a rank's own part
    # never leaves it.
    shared = 1 - 1 / (2 * degree) if causal else 1.0
    expected = {
        "ring": (2 * trim * full / group, 2 * (shared + trim) * full / group),
        "token_ring": (trim * full * (2 + 1 / head_size), trim * full * (3 + 2 / head_size)),
        "all_gather": (2 * shared * full / group, 4 * shared * full / group),
        "ulysses": (full * (2 + 2 * degree / 4) / degree, full * (2 + 2 * degree / 4) / degree),
    }
    for method, (forward, backward) in expected.items():
        sent = gloo_pool.run(ranks.sent_bytes, case, method)
        assert sum(rank[0] for rank in sent) == forward, method
        assert sum(rank[1] for rank in sent) == backward, method


def test_documents_of_one_rank_send_nothing(gloo_pool: GlooPool) -> None:
    case = Case((5, 3, 7, 6), 4)
    for method in ("ring", "bidirectional_ring", "token_ring", "all_gather"):
        assert gloo_pool.run(ranks.sent_bytes, replace(case, causal=False), method) == [(0, 0)] * 4
