"""Transport between ranks; besides FSDP and checkpoints, the only package that calls ``torch.distributed``."""

from torch.distributed import ProcessGroup

from raysp.comm.collectives import all_to_all_rows, other_ranks, start_all_gather_rows
from raysp.comm.communicator import ByteCounter, Communicator
from raysp.comm.communicators import Communicators, init_process
from raysp.comm.errors import RankLostError, RankTimeoutError
from raysp.comm.exchange import Message, PendingExchange, exchange
from raysp.comm.links import (
    LinkMeasurement,
    PairMeasurement,
    agree_on_slowest,
    measure_link,
    measure_pairs,
)
from raysp.comm.rendezvous import await_ranks, connect_store, serve_store
from raysp.comm.workspace import Lease, Workspace
from raysp.comm.world import all_reduce_sum, world_mesh

__all__ = [
    "ByteCounter",
    "Communicator",
    "Communicators",
    "Lease",
    "LinkMeasurement",
    "Message",
    "PairMeasurement",
    "PendingExchange",
    "ProcessGroup",
    "RankLostError",
    "RankTimeoutError",
    "Workspace",
    "agree_on_slowest",
    "all_reduce_sum",
    "all_to_all_rows",
    "await_ranks",
    "connect_store",
    "exchange",
    "init_process",
    "measure_link",
    "measure_pairs",
    "other_ranks",
    "serve_store",
    "start_all_gather_rows",
    "world_mesh",
]
