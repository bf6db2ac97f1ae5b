"""Every method over gloo ranks equals the recurrence on one rank: outputs, states and gradients."""

from __future__ import annotations

import functools

import linear_ranks as ranks
import pytest
import torch
from gloo_pool import GlooPool
from linear_families import FAMILIES, KEY_SIZE, NUM_HEADS, VALUE_SIZE
from linear_ranks import LinearCase
from torch import Tensor
from torch.nn.functional import conv1d, pad

from planner import LinearAttentionShape, LinearAttentionWork, linear_method_bytes
from raysp.attention import SequenceLayout

SCANS = ("lasp2", "lasp1", "zeco")
PACKED = (1, 63, 127, 300)
LONG = (1000,)
# Every kind of transition and gate: none, diagonal, matrix.
KINDS = ("basic", "gla", "deltanet", "kda")


@functools.lru_cache(maxsize=32)
def truth(case: LinearCase) -> dict[str, Tensor]:
    return ranks.reference(case)


def check(
    pool: GlooPool, case: LinearCase, degree: int, methods: tuple[str, ...], *, limit: float = 1e-10, wrap: str = ""
) -> None:
    layout = SequenceLayout(case.lengths, degree, "contiguous")
    expected = truth(case)
    for method in methods:
        results = [result for result in pool.run(ranks.run_method, case, degree, method, wrap, world=degree) if result]
        assert len(results) == degree
        for name, whole in expected.items():
            found = torch.empty_like(whole)
            parts = [result[name] for result in results]
            if name == "final_state":
                assert all(torch.equal(part, parts[0]) for part in parts), method
                found = parts[0]
            elif whole.shape[0] != layout.num_tokens or name == "dinitial_state":
                found = torch.stack(parts).sum(dim=0)
            else:
                for rank, part in enumerate(parts):
                    found[layout.token_indices(rank)] = part.double()
            error = float((found - whole).detach().abs().max())
            assert error < limit, (method, name, error)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_the_recurrence(gloo_pool: GlooPool, family: str, degree: int) -> None:
    check(gloo_pool, LinearCase(family, PACKED), degree, ("lasp2",))


@pytest.mark.parametrize("family", KINDS)
def test_methods_equal_the_recurrence_on_one_long_document(gloo_pool: GlooPool, family: str) -> None:
    case = LinearCase(family, LONG)
    check(gloo_pool, case, 4, SCANS)
    # Two heads over three or four ranks: ulysses leaves some without.
    check(gloo_pool, case, 3, (*SCANS, "ulysses"))
    check(gloo_pool, case, 2, (*SCANS, "ulysses"))
    check(gloo_pool, case, 1, ("auto",))


@pytest.mark.parametrize("family", KINDS)
def test_methods_equal_the_recurrence_on_packed_documents(gloo_pool: GlooPool, family: str) -> None:
    check(gloo_pool, LinearCase(family, PACKED), 3, ("lasp1", "zeco"))
    for degree in (2, 4):
        check(gloo_pool, LinearCase(family, PACKED), degree, ("ulysses",))
    # Borders before, on and after those of the ranks; documents over several ranks beside whole ones.
    for lengths in ((40, 40, 40, 40), (39, 41, 1, 79), (100, 2, 3, 150, 1)):
        check(gloo_pool, LinearCase(family, lengths), 4, SCANS)


@pytest.mark.parametrize("degree", [5, 6, 7, 8])
def test_wide_groups_equal_the_recurrence(wide_pool: GlooPool, degree: int) -> None:
    for family in FAMILIES:
        check(wide_pool, LinearCase(family, PACKED), degree, ("lasp2",))
    for family in ("mamba2", "gated_deltanet"):
        check(wide_pool, LinearCase(family, LONG), degree, (*SCANS, "ulysses"))


@pytest.mark.parametrize("family", ["retention", "mamba2", "gated_deltanet"])
def test_other_methods_equal_the_recurrence_with_decays_of_heads(gloo_pool: GlooPool, family: str) -> None:
    for degree in (2, 3):
        check(gloo_pool, LinearCase(family, PACKED), degree, ("lasp1", "zeco", "ulysses"))


@pytest.mark.parametrize("method", [*SCANS, "ulysses"])
def test_calls_in_a_checkpoint_equal_the_recurrence(gloo_pool: GlooPool, method: str) -> None:
    for family in ("retention", "kda"):
        # Two heads: at degree 3 ulysses leaves a rank without.
        check(gloo_pool, LinearCase(family, (40, 70, 3)), 3, (method,), wrap="checkpoint")
    check(gloo_pool, LinearCase("basic", (40, 70, 3), causal=False), 3, (method,), wrap="checkpoint")


def test_autocast_changes_nothing(gloo_pool: GlooPool) -> None:
    for family in ("basic", "kda"):
        case = LinearCase(family, (40, 70, 3), dtype=torch.float32)
        check(gloo_pool, case, 2, ("auto", "lasp2", "ulysses"), limit=1e-4, wrap="autocast")
    case = LinearCase("basic", (40, 70, 3), causal=False, dtype=torch.float32)
    check(gloo_pool, case, 2, ("lasp2",), limit=1e-4, wrap="autocast")


def test_second_derivatives_are_refused(gloo_pool: GlooPool) -> None:
    for causal in (True, False):
        for said in gloo_pool.run(ranks.error_of_second_derivative, LinearCase("basic", (30,)), causal):
            assert "expected first derivatives alone" in said


@pytest.mark.parametrize("family", ["gla", "kda"])
def test_ranks_without_tokens_take_part(gloo_pool: GlooPool, family: str) -> None:
    check(gloo_pool, LinearCase(family, (2,)), 4, SCANS)
    check(gloo_pool, LinearCase(family, (1, 2)), 4, SCANS)
    check(gloo_pool, LinearCase(family, (1,)), 2, ("ulysses",))


@pytest.mark.parametrize("lengths", [PACKED, LONG, (2,), (100, 2, 3, 150, 1)])
def test_bidirectional_equals_sums_over_documents(gloo_pool: GlooPool, lengths: tuple[int, ...]) -> None:
    for degree in (1, 2, 3, 4):
        check(gloo_pool, LinearCase("basic", lengths, causal=False), degree, ("lasp2", "ulysses"))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(1, 63, 127), (5, 2, 1, 1, 3), (3,)])
def test_short_convolution_equals_torchs_on_each_document(
    gloo_pool: GlooPool, lengths: tuple[int, ...], width: int
) -> None:
    x, weight, bias, dout = ranks.convolution_inputs(lengths, width)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    documents = [
        conv1d(pad(document.T, (width - 1, 0)), weight.unsqueeze(1), bias, groups=3).T for document in x.split(lengths)
    ]
    out = torch.cat(documents)
    dx, dweight, dbias = torch.autograd.grad(out, leaves, dout)
    for degree in (1, 2, 4):
        results = gloo_pool.run(ranks.run_convolution, lengths, width, degree, world=degree)
        torch.testing.assert_close(torch.cat([result["out"] for result in results]), out.detach())
        torch.testing.assert_close(torch.cat([result["dx"] for result in results]), dx)
        torch.testing.assert_close(sum(result["dweight"] for result in results), dweight)
        torch.testing.assert_close(sum(result["dbias"] for result in results), dbias)


def test_rows_move_between_orders_and_gradients_come_back(gloo_pool: GlooPool) -> None:
    for lengths in ((1, 63, 127, 300), (2,), (9, 9, 9)):
        assert all(gloo_pool.run(ranks.run_relayout, lengths))


def shape_of(family: str) -> LinearAttentionShape:
    kind = FAMILIES[family]
    decay = {"": "none", "H": "constant", "TH": "head", "THK": "channel"}[kind.decay]
    return LinearAttentionShape(
        num_heads=NUM_HEADS, key_size=KEY_SIZE, value_size=VALUE_SIZE, rule=kind.rule, decay=decay, element_bytes=8,
        state_bytes_per_number=8,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [(640,), (80,), PACKED, (100, 2, 3, 150, 1)])
def test_bytes_are_those_of_the_formula(gloo_pool: GlooPool, lengths: tuple[int, ...]) -> None:
    for family in KINDS:
        for method, degree in [*((method, 4) for method in SCANS), ("ulysses", 2), ("ulysses", 3)]:
            work = LinearAttentionWork(lengths=lengths, degree=degree, shape=shape_of(family))
            sent = gloo_pool.run(ranks.sent_bytes, LinearCase(family, lengths), degree, method, world=degree)
            expected = tuple(linear_method_bytes(work, method, backward=backward) for backward in (False, True))
            assert tuple(map(sum, zip(*sent, strict=True))) == expected, (family, method)


def test_bytes_do_not_depend_on_the_length(gloo_pool: GlooPool) -> None:
    for method, family in [*((method, "kda") for method in SCANS), ("lasp2", "gla"), ("lasp2", "basic")]:
        short, long = (gloo_pool.run(ranks.sent_bytes, LinearCase(family, (n,)), 4, method) for n in (80, 640))
        assert short == long
        assert all(forward + backward for forward, backward in long)


def test_auto_chooses_the_same_on_all_ranks_and_says_why(gloo_pool: GlooPool) -> None:
    case = LinearCase("gated_deltanet", LONG)
    check(gloo_pool, case, 4, ("auto",))
    choices = gloo_pool.run(ranks.automatic_choice, (3000,))
    assert len(set(choices)) == 1
    assert choices[0] is not None
    assert choices[0][1].startswith(choices[0][0])


def test_perturbed_future_token_changes_nothing_before_it(gloo_pool: GlooPool) -> None:
    layout = SequenceLayout((40, 200), 4, "contiguous")
    for family, method in [
        *((family, "lasp2") for family in KINDS),
        ("kda", "lasp1"),
        ("gla", "zeco"),
        ("gla", "ulysses"),
    ]:
        case = LinearCase(family, layout.lengths)
        # On a border of ranks, beside it, and inside a chunk.
        for token in (119, 120, 190):
            results = gloo_pool.run(ranks.outputs_with_and_without_future, case, token, 4, method)
            for rank, (before, after) in enumerate(results):
                earlier = layout.token_indices(rank) < token
                assert torch.equal(before[earlier], after[earlier])
                assert not torch.equal(before, after) or bool(earlier.all())
