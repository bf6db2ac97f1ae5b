"""The actor that holds the TCPStore through which workers find each other."""

from __future__ import annotations

import ray

from raysp.comm import serve_store


class Rendezvous:
    """Holds one store on a free port for the lifetime of a run.

    Args:
        loopback: Listen on 127.0.0.1 alone, for a cluster of one machine.
        timeout_s: How long a client waits for a key.
    """

    def __init__(self, *, loopback: bool, timeout_s: float) -> None:
        self._host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._store, self._port = serve_store(self._host, timeout_s=timeout_s)

    def address(self) -> tuple[str, int]:
        """Host and port of the store."""
        return self._host, self._port
