"""The key-value store through which ranks find each other, and a barrier over it that can say who is missing.

Only keys are exchanged, so it works before any process group exists and while one is broken.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistStoreError, Store, TCPStore

from raysp.comm.errors import RankTimeoutError


def serve_store(host: str, *, timeout_s: float) -> tuple[Store, int]:
    """Serve a store on a free port of one interface; it lives as long as the returned object.

    Args:
        host: Address to listen on, and no other: ``127.0.0.1`` keeps it on this machine.
        timeout_s: How long a client waits for a key.

    Returns:
        The store and its port.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


def connect_store(host: str, port: int) -> Store:
    """Connect to a store that another process serves."""
    return TCPStore(host, port, is_master=False)


def await_ranks(
    store: Store, name: str, *, global_rank: int, ranks: Sequence[int], timeout_s: float, note: int = 0
) -> dict[int, int]:
    """Write this rank's arrival and wait until every rank of ``ranks`` has written its own.

    Args:
        store: The store of this epoch, shared by all ranks.
        name: The meeting; used once per epoch and set of ranks.
        global_rank: This process; one of ``ranks``.
        ranks: Global ranks that take part.
        timeout_s: Longest wait for all of them together.
        note: A number that the others get to know.

    Returns:
        The note of every rank.

    Raises:
        RankTimeoutError: Names the ranks whose arrival was not seen.
    """
    keys = {rank: f"arrived/{name}/{rank}" for rank in ranks}
    store.set(keys[global_rank], str(note))
    deadline_s = time.monotonic() + timeout_s
    for rank in ranks:
        remaining_s = max(0.001, deadline_s - time.monotonic())
        try:
            store.wait([keys[rank]], timedelta(seconds=remaining_s))
        except DistStoreError as error:
            missing = [other for other in ranks if not store.check([keys[other]])]
            raise RankTimeoutError(operation=name, missing_ranks=missing or [rank], timeout_s=timeout_s) from error
    return {rank: int(store.get(key)) for rank, key in keys.items()}
