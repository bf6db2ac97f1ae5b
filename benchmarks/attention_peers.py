"""Parallel attention of other projects as candidates of the attention benchmark, each on the same kernels as raysp.

ring-flash-attn, yunchang and DeepSpeed Ulysses are looked for in a folder of unpacked packages:

    pip download --no-deps -d /tmp/peers ring-flash-attn==0.1.8 yunchang==0.6.4     # unzip both into DIR
    # and deepspeed/sequence/layer.py of DeepSpeed's source distribution (0.19.8) to DIR/deepspeed/sequence/layer.py

torch's context parallel is part of torch. What cannot run a shape, or cannot be imported, is a row that says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_adapter import FlashAttnAdapter
from benchmarks.attention_candidates import (
    CUDNN,
    Candidate,
    NotRunError,
    Site,
    attend_rows,
    need_cuda,
    need_dense,
    sdpa,
)
from benchmarks.attention_kernels import make_backend

# ring-flash-attn's own benchmark of its llama3 variant gathers four key heads at a time.
LLAMA3_KEY_HEADS = 4


@dataclass
class Peers:
    """The peers' packages as far as they can be imported, and the process groups that they need. Made once a process.

    Attributes:
        packages: By name; an error's text where the import failed.
        yunchang_layers: By ``ulysses``, ``ring`` and, from degree 4 on, ``hybrid``: two ranks trade heads.
        adapter: What they take for flash-attn.
    """

    adapter: FlashAttnAdapter
    packages: dict[str, Any] = field(default_factory=dict)
    yunchang_layers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path | None, rank: int, degree: int, device: torch.device) -> Peers:
        """Import what is there; all ranks call this together."""
        peers = cls(FlashAttnAdapter(make_backend("aten", device)))
        if folder is not None and str(folder) not in sys.path:
            sys.path.append(str(folder))
        with peers.adapter.installed():
            for name, load in (
                ("ring-flash-attn", _ring_flash_attn), ("yunchang", _yunchang), ("DeepSpeed", _deepspeed)
            ):  # fmt: skip
                try:
                    peers.packages[name] = load(folder)
                # Foreign code: whatever goes wrong is the row's text.
                except Exception as error:
                    peers.packages[name] = f"cannot be imported: {type(error).__name__}: {error}"
        if not isinstance(peers.packages["yunchang"], str):
            yunchang = peers.packages["yunchang"]
            peers.yunchang_layers["ulysses"] = yunchang.UlyssesAttention(dist.group.WORLD)
            for kind, ulysses_degree in (("ring", 1), ("hybrid", 2)):
                if degree > ulysses_degree and degree % ulysses_degree == 0:
                    yunchang.set_seq_parallel_pg(ulysses_degree, degree // ulysses_degree, rank, degree)
                    peers.yunchang_layers[kind] = yunchang.LongContextAttention(ring_impl_type="zigzag")
        return peers

    def package(self, name: str) -> Any:
        """A package.

        Raises:
            NotRunError: It could not be imported.
        """
        found = self.packages[name]
        if isinstance(found, str):
            raise NotRunError(found)
        return found


def peer_builders(site: Site) -> list[tuple[str, str, Callable[[Site, str], Candidate]]]:
    """Name, kernel and maker of every peer; a maker raises `NotRunError`."""
    rows = [
        (name, kernel, build)
        for kernel in site.settings.kernels
        for name, build in _BUILDERS.items()
    ]  # fmt: skip
    for kernel in ("aten", CUDNN):
        rows += [(name, kernel, build) for name, build in _TORCH_BUILDERS.items()]
    return rows


# ---- ring-flash-attn


def _ring_flash_attn(folder: Path | None) -> ModuleType:
    # The package imports its transformers adapter, which breaks with every other release of transformers.
    stub = ModuleType("ring_flash_attn.adapters")
    stub.substitute_hf_flash_attn = stub.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    sys.modules.setdefault(stub.__name__, stub)
    return importlib.import_module("ring_flash_attn")


def _ring_flash_attn_zigzag(site: Site, kernel: str) -> Candidate:
    package = site.peers.package("ring-flash-attn")
    group = dist.group.WORLD
    if site.is_dense:

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return package.zigzag_ring_flash_attn_func(q[None], k[None], v[None], causal=True, group=group)[0]
    else:
        degree = site.settings.degree
        borders, longest = site.borders(degree), max(site.case.lengths) // degree

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return package.zigzag_ring_flash_attn_varlen_func(q, k, v, borders, longest, causal=True, group=group)

    return Candidate("ring-flash-attn zigzag", kernel, run, site.zigzag_tokens(), True, site.using(kernel))


def _ring_flash_attn_llama3(site: Site, kernel: str) -> Candidate:
    package = site.peers.package("ring-flash-attn")
    cut = package.llama3_flash_attn_prepare_cu_seqlens(
        site.borders(), causal=True, rank=site.rank, world_size=site.settings.degree
    )
    borders_q, borders_k, longest_q, longest_k, keys = cut
    key_heads = min(LLAMA3_KEY_HEADS, site.case.num_key_heads)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return package.llama3_flash_attn_varlen_func(
            q, k, v, borders_q, borders_k, longest_q, longest_k, heads_k_stride=key_heads, local_k_slice=keys,
            causal=True, group=dist.group.WORLD,
        )  # fmt: skip

    return Candidate("ring-flash-attn llama3", kernel, run, site.contiguous_tokens(), True, site.using(kernel))


# ---- yunchang


def _yunchang(folder: Path | None) -> ModuleType:
    return importlib.import_module("yunchang")


def _yunchang_layer(kind: str) -> Callable[[Site, str], Candidate]:
    def build(site: Site, kernel: str) -> Candidate:
        site.peers.package("yunchang")
        need_dense(site)
        layer = site.peers.yunchang_layers.get(kind)
        if layer is None:
            raise NotRunError("needs an even degree of at least 4")
        traders = {"ulysses": site.settings.degree, "ring": 1, "hybrid": 2}[kind]
        tokens = site.contiguous_tokens() if kind == "ulysses" else site.zigzag_tokens(traders)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return layer(q[None], k[None], v[None], causal=True)[0]

        return Candidate(f"yunchang {kind}", kernel, run, tokens, True, site.using(kernel))

    return build


# ---- DeepSpeed Ulysses


def _deepspeed(folder: Path | None) -> ModuleType:
    """Import DeepSpeed's sequence layer alone, over torch.distributed: the whole package wants a compiler."""
    source = None if folder is None else folder / "deepspeed" / "sequence" / "layer.py"
    if source is None or not source.exists():
        raise ImportError("no deepspeed/sequence/layer.py in the folder of the peers")
    nothing = SimpleNamespace()
    parts: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        "deepspeed.comm": {
            name: getattr(dist, name) for name in ("get_world_size", "all_to_all_single", "ProcessGroup")
        },
        "deepspeed.accelerator": {"get_accelerator": lambda: nothing},
        "deepspeed.module_inject": {},
        "deepspeed.module_inject.tp_shard": {"AutoTPMeta": None, "get_shard_size_list": None},
        "deepspeed.utils": {"groups": nothing},
        "deepspeed.sequence": {},
    }
    if importlib.util.find_spec("einops") is None:
        parts["einops"] = {"rearrange": None}
    for name, content in parts.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    spec = importlib.util.spec_from_file_location("deepspeed.sequence.layer", source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be loaded")
    layer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layer)
    return layer


def _deepspeed_ulysses(site: Site, kernel: str) -> Candidate:
    package = site.peers.package("DeepSpeed")
    packing = None if site.is_dense else site.packing()

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(site.peers.adapter.backend, q[0], k[0], v[0], packing)[None]

    layer = package.DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(q[None], k[None], v[None], 0)[0]

    return Candidate("DeepSpeed Ulysses", kernel, run, site.contiguous_tokens(), True, site.using(kernel))


# ---- torch


def _torch_context_parallel(rotation: str) -> Callable[[Site, str], Candidate]:
    def build(site: Site, kernel: str) -> Candidate:
        need_dense(site)
        need_cuda(site)
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        mesh = DeviceMesh.from_group(dist.group.WORLD, site.device.type)
        backend = SDPBackend.CUDNN_ATTENTION if kernel == CUDNN else SDPBackend.FLASH_ATTENTION

        @contextmanager
        def region() -> Iterator[None]:
            # The context shards a buffer in place; the inputs are shards already, so it gets another.
            buffer = torch.zeros(1, 2 * site.settings.degree, device=site.device)
            set_rotate_method(rotation)
            with sdpa_kernel(backend), context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
                yield

        name = f"torch context parallel {rotation}"
        return Candidate(name, kernel, sdpa, site.zigzag_tokens(), True, region)

    return build


_BUILDERS: dict[str, Callable[[Site, str], Candidate]] = {
    "ring-flash-attn zigzag": _ring_flash_attn_zigzag,
    "ring-flash-attn llama3": _ring_flash_attn_llama3,
    "yunchang ring": _yunchang_layer("ring"),
    "yunchang ulysses": _yunchang_layer("ulysses"),
    "yunchang hybrid": _yunchang_layer("hybrid"),
    "DeepSpeed Ulysses": _deepspeed_ulysses,
}
_TORCH_BUILDERS: dict[str, Callable[[Site, str], Candidate]] = {
    "torch context parallel allgather": _torch_context_parallel("allgather"),
    "torch context parallel alltoall": _torch_context_parallel("alltoall"),
}
