"""Memory of buffers that live for one call, kept from call to call.

A call takes a *lease* and asks it for buffers by role. When it ends, the memory goes back and the next call gets it:
layers, forward and backward, and micro-batches of any lengths share the largest buffer of each role. Two leases at a time
never share any. What a call returns, or keeps for its backward, must not come from here.

On CUDA memory is kept apart by the stream that was current when the lease began. A buffer may be given out again on that
stream as soon as all work on it is in that stream's order: its kernels, and exchanges that were waited for there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from types import TracebackType

import torch
from torch import Tensor

_Place = tuple[Hashable, torch.device, int]


class Workspace:
    """What ended leases left.

    Attributes:
        num_allocations: Buffers that were allocated so far, because none was there or none was large enough.
    """

    def __init__(self) -> None:
        self.num_allocations = 0
        # Ascending by size; more than one where leases were taken at the same time.
        self._free: dict[_Place, list[_Buffer]] = {}
        # The backward of a call may run in another thread than the forward of the next.
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Memory that waits for a lease."""
        with self._lock:
            return sum(buffer.num_bytes for buffers in self._free.values() for buffer in buffers)

    def lease(self, device: torch.device) -> Lease:
        """Begin a call on the current stream of a device; use it as a context."""
        return Lease(self, device)

    def release(self) -> None:
        """Let go of all memory that no lease has; on CUDA it goes to torch's allocator."""
        with self._lock:
            self._free.clear()

    def _take(self, place: _Place, num_bytes: int) -> _Buffer:
        with self._lock:
            buffers = self._free.get(place)
            # A smaller one is dropped: each role keeps its largest.
            found = buffers.pop() if buffers else None
            if found is not None and found.num_bytes >= num_bytes:
                return found
            self.num_allocations += 1
        return _Buffer(num_bytes, place[1])

    def _give_back(self, buffers: dict[_Place, _Buffer]) -> None:
        with self._lock:
            for place, buffer in buffers.items():
                free = self._free.setdefault(place, [])
                free.append(buffer)
                free.sort(key=lambda each: each.num_bytes)


class Lease:
    """Buffers of one call; made by ``Workspace.lease``. They are gone when it ends.

    After an error nothing is given back: an exchange that failed may still write.
    """

    def __init__(self, workspace: Workspace, device: torch.device) -> None:
        self._workspace = workspace
        self._device = device
        self._stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self._taken: dict[_Place, _Buffer] = {}

    def empty(self, role: Hashable, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor with any content, valid until the same role is asked for again.

        Args:
            role: What it is for. Who asks again has work on what it got before in the order of the lease's stream.
            shape: Of the tensor.
            dtype: Of the tensor.
        """
        shape = tuple(shape)
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype, device=self._device)
        place = (role, self._device, self._stream)
        buffer = self._taken.get(place)
        if buffer is None or buffer.num_bytes < num_bytes:
            buffer = self._taken[place] = self._workspace._take(place, num_bytes)
        return buffer.view(shape, dtype)

    def copy_of(self, role: Hashable, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a contiguous copy, in another dtype if one is given; the tensor itself where it is all that already."""
        dtype = tensor.dtype if dtype is None else dtype
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        return self.empty(role, tensor.shape, dtype).copy_(tensor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._workspace._give_back(self._taken)
        self._taken = {}


class _Buffer:
    """Bytes, and the view of them that was asked for last: the same call comes again and again."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        # What is made in inference mode cannot be written to outside it.
        with torch.inference_mode(False):
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._viewed: tuple[tuple[int, ...], torch.dtype] | None = None
        self._view = self._bytes

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first bytes as a tensor."""
        if self._viewed != (shape, dtype):
            size = math.prod(shape) * dtype.itemsize
            with torch.inference_mode(False):
                self._view = self._bytes[:size].view(dtype).view(shape)
            self._viewed = shape, dtype
        return self._view
