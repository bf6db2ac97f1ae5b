"""The entry point: checks the inputs, picks the method, and ties scan and local operator into autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner import LinearAttentionShape
from planner.linear_attention_bytes import head_shares
from raysp.attention import SequenceLayout
from raysp.attention.differentiable import differentiable_once
from raysp.attention.merge import accumulation_dtype
from raysp.comm import Communicator, ProcessGroup
from raysp.errors import InputError
from raysp.linear_attention.chains import Links, LocalPieces, backward_links, forward_links, local_pieces
from raysp.linear_attention.checks import check_inputs
from raysp.linear_attention.chooser import LinearChoice, choose
from raysp.linear_attention.document_sums import DocumentSums
from raysp.linear_attention.final_states import GatherRows
from raysp.linear_attention.head_trade import ToHeads, ToTokens, own_heads
from raysp.linear_attention.kernels import resolve_kernel
from raysp.linear_attention.operator import LocalInputs, LocalOperator
from raysp.linear_attention.rates import MakeOperator
from raysp.linear_attention.scans import Given, StateScan


def parallel_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    rule: str = "additive",
    *,
    layout: SequenceLayout,
    group: ProcessGroup | Communicator | None,
    method: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Exact linear attention of packed documents whose tokens are spread over the ranks of a group.

    ``S_t = exp(g_t) S_{t-1} + k_t v_t^T`` (additive) or, with ``S' = exp(g_t) S_{t-1}``,
    ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` (delta); ``o_t = scale * S_t^T q_t``. All ranks of the group call this
    together, with the same arguments but for their own rows.

    Args:
        q: ``[local_tokens, H, K]``, this rank's rows in order; fp64, fp32, bf16 or fp16.
        k: Like ``q``.
        v: ``[local_tokens, H, V]``.
        log_decay: g, at most 0: ``None`` (no decay), ``[H]``, ``[local_tokens, H]`` or ``[local_tokens, H, K]``; better fp32
            than bf16.
        beta: ``[local_tokens, H]``, with the delta rule alone.
        rule: ``"additive"`` or ``"delta"``.
        layout: A contiguous layout. Reuse one object for all layers.
        group: Process group, or a ``Communicator`` that counts bytes; ``None`` at degree 1. A group made elsewhere must
            have run one collective on NCCL.
        method: One of ``raysp.linear_attention.METHODS``.
        causal: A token reads its document up to itself; otherwise all of it, for the additive rule without decay.
        scale: Factor of the output; ``K**-0.5`` by default.
        initial_state: ``[num_documents, H, K, V]``, whole on every rank; zero by default.
        output_final_state: Whether final states are gathered.
        kernel: One of ``raysp.linear_attention.KERNELS``.

    Returns:
        Output ``[local_tokens, H, V]`` in the dtype of ``v``, and ``[num_documents, H, K, V]`` in the accumulation dtype,
        complete on every rank, or ``None``. Both are differentiable once. Of inputs that every rank holds whole (``[H]``
        decay, initial state) each rank returns its part of the gradient; the objective is the sum over ranks, and every
        rank's part must use the same results, with weight zero if need be: their backward passes communicate. A value that
        is not finite spreads over its document, also to earlier rows.

    Raises:
        InputError: An argument cannot be used; the message says which and why.
        RankTimeoutError: A rank of the group did not take part in time.

    Source:
        LASP-2 (arXiv:2502.07563).
    """
    communicator = Communicator.of(group, layout.degree)
    check_inputs(
        q, k, v, log_decay, beta, rule, layout=layout, group_rank=communicator.group_rank, causal=causal,
        initial_state=initial_state,
    )  # fmt: skip
    scale = _number(scale, default=q.shape[2] ** -0.5)
    make = resolve_kernel(kernel, device=q.device, dtype=q.dtype, key_size=q.shape[2])
    # States stay in the accumulation dtype under autocast too.
    with torch.autocast(q.device.type, enabled=False):
        chosen = choose(
            method, layout=layout, group=communicator, shape=_shape(q, v, log_decay, beta, rule), causal=causal,
            make=make, dtype=q.dtype, device=q.device,
        )  # fmt: skip
        problem = _Problem(rule, scale, causal, layout, communicator, chosen, make)
        if chosen.method == "ulysses" and communicator.degree > 1:
            out, final = _by_heads(q, k, v, log_decay, beta, initial_state, problem, output_final_state)
        else:
            out, final = _by_tokens(q, k, v, log_decay, beta, initial_state, problem)
            if output_final_state and communicator.degree > 1:
                counts = [sum(local_pieces(layout, rank).ends) for rank in range(layout.degree)]
                final = GatherRows.apply(final, counts, communicator)
        return out, final if output_final_state else None


@dataclass(frozen=True)
class _Problem:
    """What all ranks agree on.

    Attributes:
        rule: Of the update.
        scale: Of the output.
        causal: Along the tokens, or over whole documents.
        layout: Contiguous.
        group: The ranks.
        choice: How states travel.
        make: The local operator.
    """

    rule: str
    scale: float
    causal: bool
    layout: SequenceLayout
    group: Communicator
    choice: LinearChoice
    make: MakeOperator

    @property
    def pieces(self) -> LocalPieces:
        """Of this rank."""
        return local_pieces(self.layout, self.group.group_rank)

    def operator(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> LocalOperator:
        """The work on this rank's rows."""
        return self.make(LocalInputs(q, k, v, log_decay, beta, self.rule, self.scale, self.pieces.lengths))


def _by_tokens(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    problem: _Problem,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and final states of the documents that end on this rank."""
    pieces, dtype = problem.pieces, accumulation_dtype(q.dtype)
    # States that local pieces start from, zero for one that another rank began.
    starts = torch.zeros(len(pieces.documents), q.shape[1], q.shape[2], v.shape[2], dtype=dtype, device=q.device)
    if initial_state is not None:
        begun = [document for document, begins in zip(pieces.documents, pieces.begins, strict=True) if begins]
        starts = torch.cat([starts[: len(pieces.documents) - len(begun)], initial_state[begun].to(dtype)])
    if not problem.causal:
        out, sums = DocumentSums.apply(q, k, v, starts, problem.scale, problem.layout, problem.group)
        return out, sums[: sum(pieces.ends)]
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(q.shape[0], -1)
    out, final = _LinearAttention.apply(q, k, v, log_decay, beta, starts, problem)
    return out, final[: sum(pieces.ends)]


def _by_heads(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    problem: _Problem, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and, if asked for, final states of all documents; each rank runs all tokens for its share of the heads."""
    layout, group = problem.layout, problem.group
    counts = [layout.local_tokens(rank) for rank in range(layout.degree)]
    travelling = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    whole_decay = log_decay is not None and log_decay.dim() == 1
    if whole_decay and log_decay is not None:
        travelling["log_decay"] = None
    names = [name for name, tensor in travelling.items() if tensor is not None]
    traded = ToHeads.apply(counts, group, *(travelling[name] for name in names))
    rows: dict[str, Tensor | None] = {**travelling, **dict(zip(names, traded, strict=True))}
    if whole_decay and log_decay is not None:
        rows["log_decay"] = own_heads(log_decay, group, dim=0)
    shares = head_shares(q.shape[1], group.degree)
    initial = None if initial_state is None else own_heads(initial_state, group, dim=1)
    if shares[group.group_rank]:
        joined = layout.memo("joined", lambda: SequenceLayout(layout.lengths, 1, "contiguous"))
        alone = replace(problem, layout=joined, group=Communicator.alone())
        out, final = _by_tokens(
            rows["q"], rows["k"], rows["v"], rows["log_decay"], rows["beta"], initial, alone,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        # More ranks than heads. The empty results hang on every input, for what follows communicates in its backward too.
        everything = [tensor.sum() for tensor in (*rows.values(), initial) if tensor is not None]
        out = traded[2] + torch.stack([each.to(traded[2].dtype) for each in everything]).sum()
        empty = (len(layout.lengths), 0, q.shape[2], v.shape[2])
        final = out.new_zeros(empty, dtype=accumulation_dtype(q.dtype)) + out.sum()
    if output_final_state:
        final = GatherRows.apply(final.transpose(0, 1), shares, group).transpose(0, 1)
    return ToTokens.apply(counts, q.shape[1], group, out), final


class _LinearAttention(torch.autograd.Function):
    """Scan and local operator, forward and backward: one exchange of states each way."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, starts: Tensor,
        problem: _Problem,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Output, and final states of the pieces."""
        links = forward_links(problem.layout, problem.group.group_rank)
        operator = problem.operator(q, k, v, log_decay, beta)
        given = Given(starts.new_empty(starts.shape[1:]), None)
        if links.targets:
            start = None if links.passes_through else starts[-1]
            given = Given(*operator.outgoing(start, with_transition=links.passes_through))
        reached = _scanned(problem.choice.forward, problem, given, links, operator.work_ahead, transposed=False)
        if reached is not None:
            starts = torch.cat([reached.unsqueeze(0), starts[1:]])
        out, final = operator.output(starts)
        ctx.save_for_backward(q, k, v, log_decay, beta, starts, given.transition)
        ctx.problem = problem
        return out, final

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients; of the starts those of pieces that begin their document here."""
        q, k, v, log_decay, beta, starts, transition = ctx.saved_tensors
        problem: _Problem = ctx.problem
        pieces = problem.pieces
        links = backward_links(problem.layout, problem.group.group_rank)
        operator = problem.operator(q, k, v, log_decay, beta)
        dout = dout.contiguous()
        given = Given(starts.new_empty(starts.shape[1:]), transition)
        with torch.autocast(q.device.type, enabled=False):
            if links.targets:
                given = Given(operator.incoming_gradient(dout, dfinal[0] if pieces.ends[0] else None), transition)
            meanwhile = partial(operator.gradient_work_ahead, starts, dout)
            reached = _scanned(problem.choice.backward, problem, given, links, meanwhile, transposed=True)
            if reached is not None:
                # The last piece's final state is no result of this rank.
                dfinal = torch.cat([dfinal[:-1], reached.unsqueeze(0)])
            gradients = operator.gradients(starts, dout, dfinal)
        dstarts = gradients.initial_states
        if pieces.takes:
            dstarts = torch.cat([torch.zeros_like(dstarts[:1]), dstarts[1:]])
        return gradients.q, gradients.k, gradients.v, gradients.log_decay, gradients.beta, dstarts, None


def _scanned(
    scan: StateScan | None, problem: _Problem, given: Given, links: Links, meanwhile: Callable[[], None], *,
    transposed: bool,
) -> Tensor | None:  # fmt: skip
    """What reaches this rank, ``None`` where nothing can; ``meanwhile`` runs while states travel."""
    if scan is None or not (links.sources or links.targets):
        return None
    heads, rows, _ = given.state.shape
    size = heads * rows * (rows if problem.rule == "delta" else 1)
    pending = scan.start(given, links, problem.group, transition_size=size, transposed=transposed)
    meanwhile()
    reached = pending.wait()
    pending.finish()
    return reached if links.sources else None


def _shape(q: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, rule: str) -> LinearAttentionShape:
    """The call's sizes as the planner's cost functions take them."""
    decay = "none" if log_decay is None else ("constant", "head", "channel")[log_decay.dim() - 1]
    return LinearAttentionShape(
        num_heads=q.shape[1],
        key_size=q.shape[2],
        value_size=v.shape[2],
        rule=rule,
        decay=decay,
        element_bytes=q.element_size(),
        decay_bytes=None if log_decay is None else log_decay.element_size(),
        state_bytes_per_number=accumulation_dtype(q.dtype).itemsize,
    )


def _number(scale: float | None, *, default: float) -> float:
    if isinstance(scale, Tensor):
        raise InputError(f"scale is a tensor {list(scale.shape)}; expected a number or None. Multiply q instead.")
    return default if scale is None else float(scale)
