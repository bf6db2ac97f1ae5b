"""The actor that holds the TCPStore through which workers find each other."""

from __future__ import annotations

import socket
from datetime import timedelta

import ray


class Rendezvous:
    """Holds one TCPStore on a free port for the lifetime of a run.

    Args:
        loopback: Listen on 127.0.0.1 alone, for a cluster of one machine.
        timeout_s: How long a client waits for a key.
    """

    def __init__(self, *, loopback: bool, timeout_s: float) -> None:
        from torch.distributed import TCPStore

        self._host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self._host, 0))
        listener.listen()
        self._port: int = listener.getsockname()[1]
        self._store = TCPStore(
            self._host,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )

    def address(self) -> tuple[str, int]:
        """Host and port of the store."""
        return self._host, self._port
