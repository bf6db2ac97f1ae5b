"""Everything by which rows of a model see each other: softmax attention, linear attention, short convolutions.

Layers do these through the context of the forward pass, which knows how the tokens lie on the ranks and notes who asked.
Whatever else of a model mixed rows would see the rows of its own rank alone.

Symbols: R rows that a layer runs, of which the first T are tokens: a rank without tokens runs one dummy row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raysp.attention import SequenceLayout, parallel_attention, relayout
from raysp.errors import InputError
from raysp.linear_attention import parallel_linear_attention, short_convolution

ATTENTION_NAME = "raysp"
# What transformers hands to every attention function without asking it for anything.
_PASSIVE = ("position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings", "is_causal")


@dataclass(frozen=True)
class MixingCall:
    """A layer's request to mix rows.

    Attributes:
        module: Who asked.
        kind: ``full_attention``, ``sliding_attention`` or ``linear_attention``, as transformers names layer types.
        num_heads: Query heads, or heads of the state.
        num_key_heads: Key heads; equal to ``num_heads`` for linear attention.
        key_size: Of a head.
        value_size: Of a head.
        window: Keys that a token sees, itself included; ``None`` for all.
    """

    module: nn.Module
    kind: str
    num_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    window: int | None = None


class SequenceMixing(Protocol):
    """What layers ask of the context of their forward pass."""

    calls: list[MixingCall]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None) -> Tensor:
        """Causal softmax attention; q ``[R, Hq, D]``, k, v ``[R, Hk, D]`` -> ``[R, Hq, D]``."""
        ...

    def attend_linearly(
        self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, beta: Tensor | None, rule: str, scale: float
    ) -> Tensor:
        """Causal linear attention; q, k ``[R, H, K]``, v ``[R, H, V]`` -> ``[R, H, V]``; gates ``[R, ...]`` or ``[H]``."""
        ...

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Causal depthwise convolution; x ``[R, C]``, weight ``[C, W]`` -> ``[R, C]``."""
        ...


class AttentionContext:
    """How the tokens of a forward pass lie on the ranks of a group; handed to every attention layer.

    Not a dataclass: FSDP walks through those among a module's arguments to look for tensors.

    Args:
        layout: The documents and who holds which of their tokens.
        group: Process group of the SP group; ``None`` for degree 1.
        group_rank: This process's place in the group.
        method: Parallel attention method.
        kernel: Block kernel.
        attention_layout: In which softmax attention runs, of the same documents; ``layout`` by default.
        linear_method: Method of linear attention.
    """

    def __init__(
        self,
        *,
        layout: SequenceLayout,
        group: Any,
        group_rank: int,
        method: str,
        kernel: str,
        attention_layout: SequenceLayout | None = None,
        linear_method: str = "auto",
    ) -> None:
        self.layout = layout
        self.attention_layout = attention_layout or layout
        self.group = group
        self.group_rank = group_rank
        self.method = method
        self.kernel = kernel
        self.linear_method = linear_method
        self.calls: list[MixingCall] = []

    @classmethod
    def of_whole_rows(cls, num_rows: int, length: int) -> AttentionContext:
        """The context of ``num_rows`` documents of ``length`` tokens on one rank, one after the other."""
        layout = SequenceLayout([length] * num_rows, 1, "contiguous")
        return cls(layout=layout, group=None, group_rank=0, method="auto", kernel="auto")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None) -> Tensor:
        """See :class:`SequenceMixing`."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            here, there = self.layout, self.attention_layout
            q, k, v = relayout(q, k, v, source=here, target=there, group=self.group)
            out = parallel_attention(
                q, k, v, layout=there, group=self.group, method=self.method, window=window, scale=scale,
                kernel=self.kernel,
            )  # fmt: skip
            return relayout(out, source=there, target=here, group=self.group)[0]

        return self._on_tokens(run, q, k, v)

    def attend_linearly(
        self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, beta: Tensor | None, rule: str, scale: float
    ) -> Tensor:
        """See :class:`SequenceMixing`."""
        per_row = log_decay is not None and log_decay.dim() > 1

        def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> Tensor:
            return parallel_linear_attention(
                q, k, v, decay if per_row else log_decay, beta, rule, layout=self.layout, group=self.group,
                method=self.linear_method, scale=scale,
            )[0]  # fmt: skip

        return self._on_tokens(run, q, k, v, log_decay if per_row else None, beta)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`SequenceMixing`."""
        return self._on_tokens(lambda x: short_convolution(x, weight, layout=self.layout, group=self.group), x)

    def _on_tokens(self, run: Callable[..., Tensor], *rows: Tensor | None) -> Tensor:
        """``run`` on the rows that are tokens; the output is zero for a dummy one, which transformers cannot do without."""
        num_tokens = self.layout.local_tokens(self.group_rank)
        out = run(*(None if each is None else each[:num_tokens] for each in rows))
        num_dummies = next(len(each) for each in rows if each is not None) - num_tokens
        return torch.cat([out, out.new_zeros(num_dummies, *out.shape[1:])]) if num_dummies else out


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_context: SequenceMixing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls; query ``[1, Hq, R, D]``, key and value ``[1, Hk, R, D]`` -> ``[1, R, Hq, D]``.

    ``sliding_window`` counts keys like ``window`` does, the token itself included.

    Raises:
        InputError: The layer asks for something that parallel attention does not do.
    """
    if attention_context is None or attention_mask is not None or dropout:
        raise InputError(
            "raysp's attention was called without its context, with a mask or with dropout; expected causal packed "
            "documents without dropout. Run the model through raysp.train and set attention_dropout = 0."
        )
    asked = {
        name for name, value in others.items() if value is not None and value is not False and name not in _PASSIVE
    }
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        asked.add("is_causal")
    if asked:
        raise InputError(
            f"{layer_name(module)} asks its attention for {', '.join(sorted(asked))}; expected plain causal softmax "
            "attention, with or without a sliding window. Such layers are not supported."
        )
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"{layer_name(module)} has queries, keys and values of {query.shape[-1]}, {key.shape[-1]} and "
            f"{value.shape[-1]} numbers per head; expected one size for all. Such layers are not supported."
        )
    note_call(
        attention_context, module, "full_attention" if sliding_window is None else "sliding_attention",
        num_heads=query.shape[1], num_key_heads=key.shape[1], key_size=query.shape[-1], value_size=value.shape[-1],
        window=sliding_window,
    )  # fmt: skip
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attention_context.attend(q, k, v, window=sliding_window, scale=scaling).unsqueeze(0), None


def note_call(context: SequenceMixing, module: nn.Module, kind: str, **sizes: Any) -> None:
    """Write down that ``module`` mixes rows through ``context``; see :class:`MixingCall`."""
    context.calls.append(MixingCall(module, kind, **sizes))


def layer_name(module: nn.Module) -> str:
    """``Qwen3Attention of layer 3``."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + (f" of layer {index}" if index is not None else "")
