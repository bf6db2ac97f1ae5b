"""What a worker reserves, and refusals of clusters that are too small. Pure decisions; no Ray is started."""

from __future__ import annotations

import pytest

from raysp.cluster.ray_session import worker_resources
from raysp.config import ClusterConfig
from raysp.errors import InputError


def test_local_cpu_workers_share_the_cores() -> None:
    resources = worker_resources(ClusterConfig(num_workers=4), {"CPU": 2.0}, is_local=True)
    assert (resources.device, resources.num_cpus, resources.num_gpus) == ("cpu", 0.5, 0)
    assert resources.bundle() == {"CPU": 0.5}


def test_gpus_are_used_where_there_are_any_one_per_worker() -> None:
    resources = worker_resources(ClusterConfig(num_workers=2), {"CPU": 32.0, "GPU": 2.0}, is_local=True)
    assert (resources.device, resources.num_gpus) == ("cuda", 1)
    assert resources.bundle() == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("config", "totals", "is_local", "message"),
    [
        (ClusterConfig(num_workers=4), {"CPU": 32.0, "GPU": 2.0}, False, "num_workers = 4, but the cluster has 2 GPUs"),
        (ClusterConfig(num_workers=9), {"CPU": 2.0}, True, "expected at most 8 workers"),
        (ClusterConfig(num_workers=4), {"CPU": 2.0}, False, "num_workers = 4 with 1 CPUs each, but the cluster has 2"),
        (ClusterConfig(num_workers=1, device="cuda"), {"CPU": 2.0}, True, "the cluster has 0 GPUs"),
        (ClusterConfig(num_workers=4, cpus_per_worker=0.6), {"CPU": 2.0}, True, "with 0.6 CPUs each"),
    ],
)
def test_more_workers_than_the_cluster_has_are_refused(
    config: ClusterConfig, totals: dict[str, float], is_local: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        worker_resources(config, totals, is_local=is_local)
