"""Backward functions that autograd may not differentiate again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from raysp.errors import InputError


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an autograd function whose gradients have no gradient.

    torch's own ``once_differentiable`` says nothing where the incoming gradient needs none, and gives a wrong second
    derivative.

    Raises:
        InputError: From the decorated function, where a graph of the backward pass is asked for.
    """
    inner = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise InputError(
                "a gradient of a gradient was asked for (create_graph = True); expected first derivatives alone. Parallel "
                "attention, softmax or linear, is differentiable once."
            )
        return inner(ctx, *gradients)

    return checked
