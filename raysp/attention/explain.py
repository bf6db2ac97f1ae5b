"""What ``method="auto"`` would take for a call, and why."""

from __future__ import annotations

import torch

from planner import MethodDecision
from raysp.attention.chooser import choose
from raysp.attention.kernels import resolve_kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.mask import DocumentMask
from raysp.attention.schedule import schedule_of
from raysp.comm import Communicator, ProcessGroup
from raysp.errors import InputError


def explain_methods(
    layout: SequenceLayout,
    *,
    group: ProcessGroup | Communicator,
    num_heads: int,
    num_key_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool = True,
    window: int | None = None,
    kernel: str = "auto",
    kv_layout: SequenceLayout | None = None,
) -> MethodDecision:
    """Predict the time of every method for a call, as ``parallel_attention`` does with ``method="auto"``.

    All ranks of the group call this together; the first call on a group measures its links and the kernel.

    Args:
        layout: Of the queries, degree at least 2.
        group: Process group or ``Communicator``.
        num_heads: Query heads.
        num_key_heads: Key heads.
        head_size: D.
        dtype: Of the inputs.
        device: Of this rank.
        causal: As in ``parallel_attention``.
        window: As in ``parallel_attention``.
        kernel: As in ``parallel_attention``.
        kv_layout: As in ``parallel_attention``.

    Returns:
        The methods of forward and backward, the predicted times of all, and the reason; ``explain()`` makes a table.

    Raises:
        InputError: The layout has degree 1, where there is nothing to choose.
    """
    if layout.degree == 1:
        raise InputError("the layout has degree 1; expected at least 2, because a group of one always runs 'local'.")
    choice = choose(
        "auto",
        schedule=schedule_of(layout, DocumentMask(causal, window), kv_layout),
        group=group if isinstance(group, Communicator) else Communicator.wrap(group),
        kernel=resolve_kernel(kernel, device=torch.device(device), dtype=dtype, head_size=head_size),
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        head_size=head_size,
        dtype=dtype,
        device=torch.device(device),
    )
    if choice.decision is None:
        raise InputError("nothing was chosen; expected method 'auto' on more than one rank.")
    return choice.decision
