"""What single ranks do in the attention tests: run a method on their rows, compare with full attention."""

from __future__ import annotations

import importlib
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from planner import AttentionWork, KernelRate, Link
from planner.attention_rates import HostRate
from raysp.attention import (
    SequenceLayout,
    explain_methods,
    parallel_attention,
    reference_attention,
    sparse_parallel_attention,
)
from raysp.attention.chooser import Tuning, make_method
from raysp.attention.host_times import host_factors
from raysp.attention.kernels import resolve_kernel
from raysp.comm import Communicator, Communicators, RankLostError, Workspace, all_reduce_sum
from raysp.errors import InputError


@dataclass(frozen=True)
class Case:
    """One problem, equal on all ranks."""

    lengths: tuple[int, ...]
    degree: int
    num_heads: int = 4
    num_key_heads: int = 2
    head_size: int = 8
    causal: bool = True
    order: str = "zigzag"
    dtype: torch.dtype = torch.float64
    kernel: str = "auto"
    scale: float | None = None
    window: int | None = None
    key_lengths: tuple[int, ...] | None = None
    deterministic: bool = False
    seed: int = 0


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output of all tokens, in the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    queries, keys = sum(case.lengths), sum(case.key_lengths or case.lengths)
    shapes = (
        (queries, case.num_heads), (keys, case.num_key_heads), (keys, case.num_key_heads), (queries, case.num_heads),
    )  # fmt: skip
    return tuple(
        torch.randn(*shape, case.head_size, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes
    )


def make_layouts(case: Case) -> tuple[SequenceLayout, SequenceLayout]:
    """Layouts of queries and keys."""
    layouts = [
        SequenceLayout(lengths, case.degree, order=case.order)
        for lengths in (case.lengths, case.key_lengths or case.lengths)
    ]
    return layouts[0], layouts[1]


def run_reference(case: Case) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of full attention in fp64."""
    q, k, v, dout = (tensor.double() for tensor in make_inputs(case))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = reference_attention(
        *leaves, case.lengths, case.causal, case.scale, window=case.window, key_lengths=case.key_lengths
    )
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def run_method(
    comms: Communicators, case: Case, method: str, group: Communicator | None = None, between: Callable[[], None] = int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """This rank's (out, dq, dk, dv) and the global tokens of each; ``None`` on ranks outside the group.

    Args:
        group: The case's own by default.
        between: Called after the forward and after the backward.
    """
    if comms.global_rank >= case.degree:
        return None
    layout, kv_layout = make_layouts(case)
    q_tokens, k_tokens = (each.token_indices(comms.global_rank) for each in (layout, kv_layout))
    q, k, v, dout = make_inputs(case)
    leaves = [tensor.requires_grad_() for tensor in (q[q_tokens], k[k_tokens], v[k_tokens])]
    out = parallel_attention(
        *leaves,
        layout=layout,
        group=group or comms.communicator(range(case.degree)),
        method=method,
        causal=case.causal,
        window=case.window,
        scale=case.scale,
        kernel=case.kernel,
        deterministic=case.deterministic,
        kv_layout=None if case.key_lengths is None else kv_layout,
    )
    between()
    gradients = torch.autograd.grad(out, leaves, dout[q_tokens])
    between()
    return (out.detach(), *gradients), (q_tokens, q_tokens, k_tokens, k_tokens)


def max_errors(comms: Communicators, case: Case, methods: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Largest difference to full attention of out, dq, dk, dv on this rank, by method."""
    truth = run_reference(case)
    errors: dict[str, tuple[float, ...]] = {}
    for method in methods:
        found = run_method(comms, case, method)
        if found is not None:
            results, tokens = found
            assert all(result.dtype == case.dtype for result in results)
            errors[method] = tuple(
                float((result.double() - expected[rows]).abs().max()) if len(rows) else 0.0
                for result, expected, rows in zip(results, truth, tokens, strict=True)
            )
    return errors


def outputs_with_and_without_future(
    comms: Communicators, case: Case, token: int, method: str
) -> tuple[Tensor, ...] | None:
    """This rank's output twice, before and after the key and value of ``token`` change, and its global tokens."""
    if comms.global_rank >= case.degree:
        return None
    layout = SequenceLayout(case.lengths, case.degree, order=case.order)
    tokens = layout.token_indices(comms.global_rank)
    q, k, v, _ = make_inputs(case)
    group = comms.group(range(case.degree))
    outputs = []
    for change in (0.0, 3.0):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[token] += change
        changed_v[token] -= change
        outputs.append(
            parallel_attention(
                q[tokens], changed_k[tokens], changed_v[tokens], layout=layout, group=group, method=method
            )
        )
    return (*outputs, tokens)


def plain_and_checkpointed_gradients(comms: Communicators, case: Case, method: str) -> float:
    """Largest difference of the gradients of two layers with and without recomputation."""
    layout = SequenceLayout(case.lengths, case.degree, order=case.order)
    tokens = layout.token_indices(comms.global_rank)
    q, k, v, _ = (tensor[tokens].requires_grad_() for tensor in make_inputs(case))
    group = comms.group(range(case.degree))

    def layer(hidden: Tensor) -> Tensor:
        return parallel_attention(hidden, k, v, layout=layout, group=group, method=method)

    plain = torch.autograd.grad(layer(layer(q)).square().sum(), (q, k, v))
    inner = checkpoint(layer, q, use_reentrant=False)
    again = torch.autograd.grad(checkpoint(layer, inner, use_reentrant=False).square().sum(), (q, k, v))
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(plain, again, strict=True))


def sent_bytes(comms: Communicators, case: Case, method: str) -> tuple[int, int]:
    """Payload bytes this rank sends in the forward and in the backward."""
    layout = SequenceLayout(case.lengths, case.degree, order=case.order)
    tokens = layout.token_indices(comms.global_rank)
    q, k, v, dout = (tensor[tokens].requires_grad_() for tensor in make_inputs(case))
    communicator = comms.communicator(range(case.degree))
    communicator.counter.reset()
    out = parallel_attention(q, k, v, layout=layout, group=communicator, method=method, causal=case.causal)
    forward = communicator.counter.sent_bytes
    torch.autograd.grad(out, (q, k, v), dout)
    return forward, communicator.counter.sent_bytes - forward


def reuse_of_buffers(comms: Communicators, case: Case, method: str) -> tuple[bool, int, int]:
    """Two calls in which every buffer that a forward or backward leaves is filled with NaN.

    Returns:
        Whether both give the same bits, how many buffers the second allocated, and how many of its receives went into new
        memory.
    """
    workspace = Workspace()
    group = replace(comms.communicator(range(case.degree)), workspace=workspace)
    known: set[int] = set()
    num_strange = 0

    def spoil() -> None:
        for buffers in workspace._free.values():
            for buffer in buffers:
                buffer._bytes.fill_(255)
                known.add(buffer._bytes.data_ptr())

    module = importlib.import_module("raysp.comm.exchange")
    post = module.post_batch

    def post_and_look(
        sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]], process_group: dist.ProcessGroup
    ) -> list[dist.Work]:
        nonlocal num_strange
        num_strange += sum(tensor.untyped_storage().data_ptr() not in known for tensor, _ in recvs)
        return post(sends, recvs, process_group)

    first = run_method(comms, case, method, group, spoil)
    num_allocations = workspace.num_allocations
    module.post_batch = post_and_look
    try:
        second = run_method(comms, case, method, group, spoil)
    finally:
        module.post_batch = post
    assert first is not None
    assert second is not None
    same = all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    return same, workspace.num_allocations - num_allocations, num_strange


def held_bytes_after_many_calls(comms: Communicators, methods: tuple[str, ...], num_calls: int) -> tuple[int, int]:
    """What stays after calls of random lengths, and the largest buffer of each role together."""
    workspace = Workspace()
    degree = 2
    group = replace(comms.communicator(range(degree)), workspace=workspace)
    largest: dict[tuple[object, ...], int] = {}
    take = workspace._take

    def take_and_note(place: tuple[object, ...], num_bytes: int) -> object:
        largest[place] = max(largest.get(place, 0), num_bytes)
        return take(place, num_bytes)

    workspace._take = take_and_note
    generator = random.Random(0)
    for index in range(num_calls):
        lengths = tuple(generator.randrange(1, 80) for _ in range(generator.randrange(1, 4)))
        case = Case(lengths, degree, num_key_heads=4, dtype=torch.float32, causal=index % 3 > 0)
        run_method(comms, case, methods[index % len(methods)], group)
    return workspace.held_bytes, sum(largest.values())


def error_of_a_death(
    comms: Communicators, case: Case, method: str, dying_rank: int, *, exchange: int, in_backward: bool
) -> tuple[tuple[int, ...], str]:
    """The ranks that this rank's error names, and its text, where one is killed in a forward or backward.

    Args:
        exchange: Of how many of this pass it has posted the sends, but not the receives, when it dies.
    """
    run_method(comms, case, method)
    layout = make_layouts(case)[0]
    tokens = layout.token_indices(comms.global_rank)
    q, k, v, dout = make_inputs(case)
    leaves = [tensor[tokens].requires_grad_() for tensor in (q, k, v)]
    group = comms.communicator(range(case.degree))
    try:
        if comms.global_rank == dying_rank and not in_backward:
            _die_at(exchange)
        out = parallel_attention(*leaves, layout=layout, group=group, method=method)
        if comms.global_rank == dying_rank:
            _die_at(exchange)
        torch.autograd.grad(out, leaves, dout[tokens])
    except RankLostError as error:
        return error.lost_ranks, str(error)
    raise AssertionError(f"{method}: nothing failed")


def _die_at(exchange: int) -> None:
    module = importlib.import_module("raysp.comm.exchange")
    post, left = module.post_batch, exchange

    def post_or_die(
        sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]], process_group: dist.ProcessGroup
    ) -> list[dist.Work]:
        nonlocal left
        left -= 1
        if left:
            return post(sends, recvs, process_group)
        post(sends, (), process_group)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    module.post_batch = post_or_die


def refusal(comms: Communicators, case: Case, method: str) -> str:
    """The message of the InputError that this rank gets."""
    try:
        run_method(comms, case, method)
    except InputError as error:
        return str(error)
    return ""


def refusal_of_degree(comms: Communicators, case: Case) -> str:
    """The message where the whole world runs a layout of fewer ranks."""
    rows = torch.zeros(1, 2, 4)
    try:
        parallel_attention(rows, rows, rows, layout=SequenceLayout(case.lengths, case.degree), group=comms.world)
    except InputError as error:
        return str(error)
    return ""


def same_bits_when_late(comms: Communicators, case: Case, method: str) -> bool:
    """Whether output and gradients are the same bits when each rank in turn comes late."""
    results = []
    for late in range(3):
        if comms.global_rank == late:
            threading.Event().wait(0.05)
        found = run_method(comms, case, method)
        assert found is not None
        results.append(found[0])
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def rms_error_ratios(comms: Communicators, case: Case, method: str) -> tuple[float, ...]:
    """RMS error of (out, dq, dk, dv) over all ranks, as a multiple of one rank's flash attention in the case's dtype."""
    truth = run_reference(case)
    found = run_method(comms, case, method)
    assert found is not None
    squares = torch.tensor(
        [
            float((result.double() - expected[rows]).square().sum())
            for result, expected, rows in zip(found[0], truth, found[1], strict=True)
        ]
    )
    all_reduce_sum(squares, comms.group(range(case.degree)))
    one = flash_gradients(case)
    alone = torch.tensor([float((a.double() - b).square().sum()) for a, b in zip(one, truth, strict=True)])
    return tuple((squares / alone).sqrt().tolist())


def flash_gradients(case: Case) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of torch's own CPU flash attention in the case's dtype, documents one by one."""
    q, k, v, dout = make_inputs(case)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    (length,) = case.lengths
    batched = [tensor.transpose(0, 1).unsqueeze(0) for tensor in leaves]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(*batched, is_causal=case.causal, scale=case.scale, enable_gqa=True)
    out = out[0].transpose(0, 1)
    assert out.shape[0] == length
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def _projections(case: Case, num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.num_key_heads, num_rows, max(case.lengths) + 3)
    first, second = (torch.randn(shape, generator=generator, dtype=case.dtype).requires_grad_() for _ in range(2))
    return first, second


def sparse_errors(comms: Communicators, case: Case, num_rows: int) -> tuple[float, ...]:
    """Largest difference to Linformer of out, dq, dk, dv and the summed gradients of both projections."""
    inputs = make_inputs(case)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    projections = _projections(case, num_rows)
    outs = []
    for q, k, v in zip(*(leaf.split(case.lengths) for leaf in leaves), strict=True):
        keys, values = (
            torch.einsum("hkt,thd->khd", projection[:, :, : len(x)], x).repeat_interleave(q.shape[1] // k.shape[1], 1)
            for projection, x in zip(projections, (k, v), strict=True)
        )
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, keys) * case.head_size**-0.5, dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    truth = (torch.cat(outs), *torch.autograd.grad(torch.cat(outs), (*leaves, *projections), inputs[3]))

    tokens = make_layouts(case)[0].token_indices(comms.global_rank)
    out, mine, parts = _run_sparse(comms, case, _projections(case, num_rows))
    found = [out, *torch.autograd.grad(out, (*mine, *parts), inputs[3][tokens])]
    for gradient in found[4:]:
        all_reduce_sum(gradient, comms.group(range(case.degree)))
    expected = [value[tokens] for value in truth[:4]] + list(truth[4:])
    return tuple(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(found, expected, strict=True))


def sparse_sent_bytes(comms: Communicators, case: Case, num_rows: int) -> tuple[int, int]:
    """Payload bytes this rank sends in the forward and in the backward."""
    communicator = comms.communicator(range(case.degree))
    communicator.counter.reset()
    out, mine, parts = _run_sparse(comms, case, _projections(case, num_rows))
    forward = communicator.counter.sent_bytes
    torch.autograd.grad(out.sum(), (*mine, *parts))
    return forward, communicator.counter.sent_bytes - forward


def _run_sparse(
    comms: Communicators, case: Case, projections: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    layout = make_layouts(case)[0]
    tokens = layout.token_indices(comms.global_rank)
    leaves = [tensor[tokens].requires_grad_() for tensor in make_inputs(case)[:3]]
    out = sparse_parallel_attention(*leaves, *projections, layout=layout, group=comms.communicator(range(case.degree)))
    return out, leaves, projections


def explained_choice(comms: Communicators, case: Case) -> tuple[str, str, str]:
    """The methods that auto takes, and its explanation."""
    decision = explain_methods(
        make_layouts(case)[0],
        group=comms.communicator(range(case.degree)),
        num_heads=case.num_heads,
        num_key_heads=case.num_key_heads,
        head_size=case.head_size,
        dtype=case.dtype,
        device="cpu",
        causal=case.causal,
        window=case.window,
    )
    return decision.forward, decision.backward, decision.explain()


def measured_host_factors(comms: Communicators, case: Case) -> tuple[dict[str, tuple[float, float]], int]:
    """By method, against a host that is said to need a microsecond for each operation; and what was counted as sent."""
    group = comms.communicator(range(case.degree))
    assert group is not None
    work = AttentionWork(
        degree=case.degree, num_heads=case.num_heads, num_key_heads=case.num_key_heads, head_size=case.head_size,
        lengths=case.lengths,
    )  # fmt: skip
    host = HostRate(forward_call_s=1e-6, backward_call_s=1e-6, exchange_s=1e-6, row_operation_s=1e-6)
    rate = KernelRate(
        forward_flops_per_s=1e12, backward_flops_per_s=1e12, launch_s=0.0, copy_bytes_per_s=1e12, efficient_rows=0.0,
        host=host,
    )  # fmt: skip
    methods = {name: make_method(name, Tuning()) for name in ("ring", "all_gather", "ulysses", "ulysses_ring")}
    sent_before = group.counter.sent_bytes
    factors = host_factors(
        methods, work, Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5), rate,
        kernel=resolve_kernel("aten", device=comms.device, dtype=torch.float32, head_size=case.head_size),
        group=group, dtype=torch.float32, device=comms.device,
    )  # fmt: skip
    return factors, group.counter.sent_bytes - sent_before


def measurements_after_two_auto_calls(comms: Communicators, case: Case) -> tuple[int, int]:
    """What auto measured on a bare process group, as numbers of entries, after one call and after two."""
    group = comms.group(range(case.degree))
    layout = make_layouts(case)[0]
    rows = layout.token_indices(comms.global_rank)
    q, k, v, _ = (tensor[rows] for tensor in make_inputs(case))
    entries = []
    for _ in range(2):
        parallel_attention(q, k, v, layout=layout, group=group)
        entries.append(len(Communicator.wrap(group).measurements))
    assert entries[0] > 0
    return entries[0], entries[1]
