"""All-gather: every rank gathers the keys it may need, then works alone; gradients are summed by a reduce-scatter.

Unlike in a ring the keys of all ranks are at hand at once, so all earlier keys of a chunk are picked in natural order
and met in one kernel call, whatever rank they came from.

Source: the context parallelism of Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raysp.attention.layout import Part, SequenceLayout
from raysp.attention.merge import PartialResult, accumulation_dtype
from raysp.attention.methods.call import (
    AttentionCall,
    GradientSums,
    KeyRows,
    OutputGradient,
    QueryRows,
    Saved,
    all_rows,
    attend_blocks,
    differentiate_blocks,
)
from raysp.attention.schedule import NO_ROWS, Block, Rows, Segments, needed_rows, pair_blocks
from raysp.comm import PendingExchange, reduce_scatter_rows, start_all_gather_rows


@dataclass(frozen=True)
class RemoteWork:
    """One kernel call on gathered keys: ``index [keys]`` picks them from the gathered rows for ``block``."""

    block: Block
    index: Tensor


class AllGather:
    """See ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Gather keys while the local blocks run, then attend to what the others hold."""
        gathered, pending = _start_gather(call, k, v)
        queries, result = QueryRows(all_rows(q), q), PartialResult(q.shape[0], q)
        attend_blocks(call, _own_blocks(call), queries, KeyRows(all_rows(k), k, v), result, queries.held)
        pending.wait()
        for work in _remote_work(call, q.device):
            attend_blocks(call, (work.block,), queries, _picked(gathered, work), result, queries.held)
        out = result.out.to(q.dtype)
        return out, (q, k, v, out, result.lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather keys again; sum what every rank found for everyone's keys in fp32 or fp64."""
        q, k, v, out, lse = saved
        gathered, pending = _start_gather(call, k, v)
        queries, gradient = QueryRows(all_rows(q), q), OutputGradient.of(dout, out, lse)
        dq, own = GradientSums(queries.held, q, 1), GradientSums(all_rows(k), k, 2)
        differentiate_blocks(call, _own_blocks(call), queries, gradient, KeyRows(all_rows(k), k, v), dq, own)
        pending.wait()
        remote = torch.zeros(gathered.shape, dtype=accumulation_dtype(k.dtype), device=k.device)
        for work in _remote_work(call, q.device):
            sums = GradientSums(work.block.keys, k, 2)
            differentiate_blocks(call, (work.block,), queries, gradient, _picked(gathered, work), dq, sums)
            # The keys of one call are distinct, so the addition has one order.
            remote.index_add_(0, work.index, torch.stack(sums.sums, dim=1))
        shared = _shared_rows(call.layout, call.causal)
        returned = reduce_scatter_rows(remote, [len(rows) for rows in shared], call.group)
        own.add(shared[call.group_rank], returned.unbind(dim=1))
        return dq.sums[0], own.sums[0], own.sums[1]


def _start_gather(call: AttentionCall, k: Tensor, v: Tensor) -> tuple[Tensor, PendingExchange]:
    """Keys and values ``[rows of all ranks, 2, Hk, D]``, valid once the exchange is over."""
    shared = _shared_rows(call.layout, call.causal)
    mine = shared[call.group_rank].index
    return start_all_gather_rows(torch.stack((k[mine], v[mine]), dim=1), [len(rows) for rows in shared], call.group)


def _picked(gathered: Tensor, work: RemoteWork) -> KeyRows:
    keys = gathered.index_select(0, work.index)
    return KeyRows(work.block.keys, keys[:, 0], keys[:, 1])


def _own_blocks(call: AttentionCall) -> tuple[Block, ...]:
    return pair_blocks(call.layout, call.group_rank, call.group_rank, causal=call.causal)


def _shared_rows(layout: SequenceLayout, causal: bool) -> tuple[Rows, ...]:
    """Rows of each rank that some other rank needs; documents that are not cut stay at home."""

    def build() -> tuple[Rows, ...]:
        shared = []
        for owner in range(layout.degree):
            rows = NO_ROWS
            for reader in range(layout.degree):
                if reader != owner:
                    rows = rows.hull(needed_rows(pair_blocks(layout, reader, owner, causal=causal), side="keys"))
            shared.append(rows)
        return tuple(shared)

    return layout.memo(("shared_rows", causal), build)


def _remote_work(call: AttentionCall, device: torch.device) -> tuple[RemoteWork, ...]:
    """One call for each part of the queries: all keys of other ranks that its documents' chunks may see."""
    layout, group_rank, causal = call.layout, call.group_rank, call.causal

    def build() -> tuple[RemoteWork, ...]:
        places = _gathered_places(layout, causal)
        works = [_part_work(layout, part, group_rank, causal, places) for part in layout.parts(group_rank)]
        return tuple(RemoteWork(work.block, work.index.to(device)) for work in works if work is not None)

    return layout.memo(("remote_work", group_rank, causal, device), build)


def _gathered_places(layout: SequenceLayout, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each global token its row among the gathered keys (-1: not gathered) and the rank that holds it."""
    place = np.full(layout.num_tokens, -1, dtype=np.int64)
    holder = np.empty(layout.num_tokens, dtype=np.int64)
    shared = _shared_rows(layout, causal)
    offsets = [0, *accumulate(len(rows) for rows in shared)]
    for rank, rows in enumerate(shared):
        tokens = layout.token_indices(rank).numpy()
        holder[tokens] = rank
        place[tokens[rows.index]] = np.arange(offsets[rank], offsets[rank + 1])
    return place, holder


def _part_work(
    layout: SequenceLayout, part: Part, group_rank: int, causal: bool, places: tuple[np.ndarray, np.ndarray]
) -> RemoteWork | None:
    place, holder = places
    starts = np.concatenate([[0], np.cumsum(layout.lengths)])
    picked: list[np.ndarray] = []
    for document, start in zip(part.documents, part.starts, strict=True):
        visible = np.arange(starts[document], starts[document] + start if causal else starts[document + 1])
        picked.append(place[visible[holder[visible] != group_rank]])
    counts = [len(rows) for rows in picked]
    if not sum(counts):
        return None
    segments = Segments(
        tuple(int(row) for row in part.rows - part.rows[0]), tuple(int(stop) for stop in accumulate(counts, initial=0))
    )
    block = Block(Rows(int(part.rows[0]), int(part.rows[-1])), Rows(0, sum(counts)), segments, False)
    return RemoteWork(block, torch.from_numpy(np.concatenate(picked)))
