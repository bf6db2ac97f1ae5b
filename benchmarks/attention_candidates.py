"""What the attention benchmark measures: raysp's methods, and one GPU alone. Peers are in `benchmarks.attention_peers`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_adapter import FlashAttnAdapter
from benchmarks.attention_cases import ONE_GPU, RAYSP, Case, Settings
from benchmarks.attention_kernels import FlashBackend, Packing, attend, make_backend
from raysp.attention import METHODS, SequenceLayout, parallel_attention
from raysp.comm import Communicator

if TYPE_CHECKING:
    from benchmarks.attention_peers import Peers

# The one-GPU row of a kernel that only sdpa offers.
CUDNN = "cudnn"
# RSA keeps the scores of a rank's rows against all keys, in fp32 or wider, several times.
MAX_RSA_SCORE_BYTES = 2 << 30


class NotRunError(Exception):
    """A candidate that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One implementation on one kernel.

    Attributes:
        name: As in the tables.
        kernel: Kernel that does the block work.
        run: ``q [T, Hq, D]``, ``k``, ``v [T, Hk, D]`` of this rank to ``out`` like ``q``; differentiable.
        tokens: Global token of each local row, int64.
        is_peer: Not raysp.
        region: Entered around each measurement, outside the clock.
        sent_bytes: What this rank has sent since the last call; None where nobody counts.
    """

    name: str
    kernel: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    tokens: Tensor
    is_peer: bool = False
    region: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    sent_bytes: Callable[[], int] | None = None


@dataclass(frozen=True)
class Site:
    """Where a candidate is built: the case, this rank, and what all candidates share."""

    case: Case
    settings: Settings
    rank: int
    device: torch.device
    group: Communicator
    peers: Peers

    @property
    def is_dense(self) -> bool:
        """Whether there is one document."""
        return len(self.case.lengths) == 1

    @cached_property
    def layout(self) -> SequenceLayout:
        """raysp's, shared by all its methods, so that index maps are built once."""
        return SequenceLayout(self.case.lengths, self.settings.degree, order="zigzag")

    def zigzag_tokens(self, traders: int = 1) -> Tensor:
        """Chunks r and 2N-1-r of every document, document by document.

        With ``traders``, r and N count groups of so many neighbouring ranks, which hold a run each of their group's rows.
        """
        degree, (rank, place), start, pieces = self.settings.degree // traders, divmod(self.rank, traders), 0, []
        for length in self.case.lengths:
            chunk = length // (2 * degree)
            for index in (rank, 2 * degree - 1 - rank):
                pieces.append(torch.arange(chunk) + start + index * chunk)
            start += length
        return torch.cat(pieces).chunk(traders)[place]

    def contiguous_tokens(self) -> Tensor:
        """The r-th run of the joined documents."""
        return torch.arange(self.case.tokens_per_rank) + self.rank * self.case.tokens_per_rank

    def borders(self, divisor: int = 1) -> Tensor:
        """Borders of the documents, int32 on the device; of a rank's share of each with ``divisor`` N."""
        lengths = torch.tensor([0, *self.case.lengths], dtype=torch.int64) // divisor
        return lengths.cumsum(0).to(torch.int32).to(self.device)

    def packing(self) -> Packing:
        """All documents on one rank."""
        borders = self.borders()
        return Packing(borders, borders, max(self.case.lengths), max(self.case.lengths))

    def using(self, kernel: str) -> Callable[[], AbstractContextManager[Any]]:
        """A region in which the adapter runs on a kernel."""
        try:
            backend = make_backend(kernel, self.device)
        except ValueError as error:
            raise NotRunError(str(error)) from error
        return lambda: _backend_of(self.peers.adapter, backend)


def raysp_builders(kernels: Sequence[str]) -> list[tuple[str, str, Callable[[Site, str], Candidate]]]:
    """Name, kernel and maker of every raysp method; ``rsa`` has a kernel of its own."""
    rows = [(method, kernel) for kernel in kernels for method in METHODS if method not in ("local", "rsa")]
    rows += [("rsa", "eager")] if "rsa" in METHODS else []
    return [(f"{RAYSP} {method}", kernel, partial(_raysp, method)) for method, kernel in rows]


def _raysp(method: str, site: Site, kernel: str) -> Candidate:
    case, layout, group = site.case, site.layout, site.group
    # fp32 scores of this rank's rows against their documents' keys.
    scores_bytes = 4 * case.num_heads * sum(length**2 for length in case.lengths) // site.settings.degree
    if method == "rsa" and scores_bytes > MAX_RSA_SCORE_BYTES:
        raise NotRunError(f"would keep more than {MAX_RSA_SCORE_BYTES >> 30} GiB of scores")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_attention(q, k, v, layout=layout, group=group, method=method, kernel=kernel)

    def sent_bytes() -> int:
        sent = group.counter.sent_bytes
        group.counter.reset()
        return sent

    return Candidate(f"{RAYSP} {method}", kernel, run, layout.token_indices(site.rank), sent_bytes=sent_bytes)


def one_gpu(site: Site, kernel: str) -> Candidate:
    """The whole problem on one GPU by the best call of the kernel: dense for one document, packed otherwise.

    Raises:
        NotRunError: The kernel cannot run it.
    """
    if kernel == CUDNN:
        return _one_gpu_cudnn(site)
    try:
        backend = make_backend(kernel, site.device)
    except ValueError as error:
        raise NotRunError(str(error)) from error
    packing = None if site.is_dense else site.packing()
    return Candidate(
        ONE_GPU, kernel, lambda q, k, v: attend_rows(backend, q, k, v, packing), torch.arange(site.case.num_tokens)
    )


def attend_rows(backend: FlashBackend, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """Differentiable attention on one rank, dense where there is no packing: ``q [T, Hq, D]``."""
    if packing is None:
        return attend(backend, q[None], k[None], v[None], None)[0]
    return attend(backend, q, k, v, packing)


def _one_gpu_cudnn(site: Site) -> Candidate:
    need_dense(site)
    need_cuda(site)
    return Candidate(
        ONE_GPU, CUDNN, sdpa, torch.arange(site.case.num_tokens),
        region=lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    )  # fmt: skip


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of one document: ``q [T, Hq, D]``, ``k``, ``v [T, Hk, D]``."""
    # Looked up at each call: context_parallel replaces the function.
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped).transpose(1, 2)[0]


def need_dense(site: Site) -> None:
    """Refuse packed documents.

    Raises:
        NotRunError: There are several documents.
    """
    if not site.is_dense:
        raise NotRunError("runs no packed documents")


def need_cuda(site: Site) -> None:
    """Refuse the CPU.

    Raises:
        NotRunError: The device is not a GPU.
    """
    if site.device.type != "cuda":
        raise NotRunError("runs on CUDA only")


@contextmanager
def _backend_of(adapter: FlashAttnAdapter, backend: FlashBackend) -> Iterator[None]:
    before, adapter.backend = adapter.backend, backend
    try:
        yield
    finally:
        adapter.backend = before
