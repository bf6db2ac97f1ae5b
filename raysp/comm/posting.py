"""Posting the operations of one exchange with little time on the host.

``torch.distributed.batch_isend_irecv`` does the same; its checks and wrappers take several times as long as what they
lead to, which short exchanges cannot hide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def post_batch(
    sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]], process_group: dist.ProcessGroup
) -> list[dist.Work]:
    """Start sends and receives as one batch.

    Args:
        sends: Contiguous tensors, none empty, and the global ranks they go to.
        recvs: Contiguous buffers and the global ranks that fill them.
        process_group: The group; all tensors are on one device that it has a backend for.

    Returns:
        One work for each operation, sends first; on NCCL one for all.
    """
    device = (sends or recvs)[0][0].device
    together = process_group._get_backend(device).supports_coalescing
    if together:
        process_group._start_coalescing(device)
    works: list[dist.Work] = []
    for operations, post in ((sends, process_group.send), (recvs, process_group.recv)):
        for tensor, peer in operations:
            works.append(post([tensor], dist.get_group_rank(process_group, peer), 0))
    return [process_group._end_coalescing(device)] if together else works
