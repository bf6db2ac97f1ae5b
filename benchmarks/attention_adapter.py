"""The functions of flash-attn 2 on other kernels, so that packages written for it run on the kernel that raysp runs on.

For benchmarks only. `FlashAttnAdapter` offers the interface of the package ``flash_attn`` 2.7 on a backend of
`benchmarks.attention_kernels`.

Real flash-attn writes gradients where it is told to. So does ``fa4``; ``aten`` returns new tensors, which are copied: below
1 % of a backward from 8K tokens on.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from benchmarks.attention_kernels import FlashBackend, Packing, attend

VERSION = "2.7.4"
_PACKAGE = "flash_attn"
_INTERFACE = "flash_attn.flash_attn_interface"


class FlashAttnAdapter:
    """The package ``flash_attn`` as far as the peers use it; ``backend`` may be changed between calls."""

    def __init__(self, backend: FlashBackend) -> None:
        self.backend = backend

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let imports inside the block find the adapter under the name ``flash_attn``, and nothing after it.

        The package may be there already, as the home of ``flash_attn.cute``; it is put back as it was.
        """
        found = sys.modules.get(_PACKAGE)
        spec = None if found is not None else importlib.util.find_spec(_PACKAGE)
        places = list(getattr(found, "__path__", None) or (spec.submodule_search_locations if spec else None) or [])
        before = {name: sys.modules[name] for name in (_PACKAGE, _INTERFACE) if name in sys.modules}
        package, interface = ModuleType(_PACKAGE), ModuleType(_INTERFACE)
        package.__path__ = places
        package.__version__ = VERSION  # type: ignore[attr-defined]
        for module in (package, interface):
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=module is package)
            for function in self.functions():
                setattr(module, function.__name__, function)
        package.flash_attn_interface = interface  # type: ignore[attr-defined]
        sys.modules.update({_PACKAGE: package, _INTERFACE: interface})
        try:
            yield
        finally:
            for name in (_PACKAGE, _INTERFACE):
                sys.modules.pop(name, None)
            sys.modules.update(before)

    def functions(self) -> list[Callable[..., Any]]:
        """Plain functions with the names and arguments of flash-attn 2.7; peers read their signatures."""

        def _flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, return_softmax=False,
        ):  # fmt: skip
            _check_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
            out, lse = self.backend.forward(q, k, v, None, scale=softmax_scale, causal=causal)
            return out, lse, None, None

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
        ):  # fmt: skip
            _check_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
            self.backend.backward(
                dout, q, k, v, out, softmax_lse, None, scale=softmax_scale, causal=causal, into=(dq, dk, dv)
            )
            return None

        def _flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
            block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
        ):  # fmt: skip
            _check_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
            packing = Packing(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
            out, lse = self.backend.forward(q, k, v, packing, scale=softmax_scale, causal=causal)
            return out, lse, None, None

        def _flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=False, rng_state=None, zero_tensors=False,
        ):  # fmt: skip
            _check_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
            packing = Packing(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
            self.backend.backward(
                dout, q, k, v, out, softmax_lse, packing, scale=softmax_scale, causal=causal, into=(dq, dk, dv)
            )
            return None

        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
        ):  # fmt: skip
            _check_plain(dropout_p, window_size, softcap, alibi_slopes)
            return attend(self.backend, q, k, v, None, causal=causal, scale=softmax_scale)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            _check_plain(dropout_p, window_size, softcap, alibi_slopes)
            packing = Packing(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
            return attend(self.backend, q, k, v, packing, causal=causal, scale=softmax_scale)

        return [
            _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward,
            flash_attn_func, flash_attn_varlen_func,
        ]  # fmt: skip


def _check_plain(dropout_p: float, window: tuple[int, int], softcap: float | None, alibi_slopes: Any) -> None:
    if dropout_p or tuple(window) != (-1, -1) or softcap or alibi_slopes is not None:
        raise ValueError("the adapter offers attention without dropout, window, softcap and alibi slopes.")
