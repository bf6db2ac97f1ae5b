"""Workspace: what a lease had, the next one gets; two at a time share nothing; no more is kept than the largest."""

from __future__ import annotations

import random

import pytest
import torch

from raysp.comm import Workspace

CPU = torch.device("cpu")


def test_the_next_lease_gets_the_same_memory() -> None:
    workspace = Workspace()
    addresses = []
    for _ in range(3):
        with workspace.lease(CPU) as lease:
            tensors = [lease.empty(role, (5, 3), torch.float32) for role in ("keys", "sums")]
            assert all(tensor.shape == (5, 3) and tensor.is_contiguous() for tensor in tensors)
            addresses.append([tensor.data_ptr() for tensor in tensors])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == 2
    assert workspace.num_allocations == 2
    assert workspace.held_bytes == 2 * 5 * 3 * 4


def test_shorter_and_other_dtypes_use_the_same_memory() -> None:
    workspace = Workspace()
    for shape, dtype in (
        ((8, 4), torch.float64),
        ((7, 4), torch.float64),
        ((3,), torch.bfloat16),
        ((8, 4), torch.float64),
    ):
        with workspace.lease(CPU) as lease:
            tensor = lease.empty("keys", shape, dtype)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert workspace.num_allocations == 1


def test_two_leases_at_a_time_share_nothing() -> None:
    workspace = Workspace()
    for _ in range(2):
        with workspace.lease(CPU) as outer:
            first = outer.empty("keys", (4,), torch.float32).fill_(1.0)
            with workspace.lease(CPU) as inner:
                inner.empty("keys", (4,), torch.float32).fill_(2.0)
            assert first.tolist() == [1.0] * 4
    assert workspace.num_allocations == 2


def fail_with_a_buffer(workspace: Workspace) -> None:
    with workspace.lease(CPU) as lease:
        lease.empty("keys", (4,), torch.float32)
        raise RuntimeError("lost")


def test_after_an_error_nothing_is_given_out_again() -> None:
    workspace = Workspace()
    with pytest.raises(RuntimeError, match="lost"):
        fail_with_a_buffer(workspace)
    assert workspace.held_bytes == 0


def test_each_role_keeps_its_largest_buffer_alone() -> None:
    workspace, generator = Workspace(), random.Random(0)
    largest = {"keys": 0, "sums": 0}
    for _ in range(200):
        with workspace.lease(CPU) as lease:
            for role in largest:
                for _ in range(2):
                    rows = generator.randrange(0, 1000)
                    lease.empty(role, (rows, 2), torch.float32)
                    largest[role] = max(largest[role], 8 * rows)
    assert workspace.held_bytes == sum(largest.values())
    assert workspace.num_allocations < 30
    workspace.release()
    assert workspace.held_bytes == 0


def test_a_copy_is_made_only_where_it_is_needed() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    with Workspace().lease(CPU) as lease:
        assert lease.copy_of("sent", rows) is rows
        assert lease.copy_of("sent", rows.T).tolist() == rows.T.tolist()
        assert lease.copy_of("sent", rows.T).is_contiguous()
        assert lease.copy_of("sent", rows, torch.float64).dtype == torch.float64


def test_memory_of_inference_serves_training_too() -> None:
    workspace = Workspace()
    with torch.inference_mode(), workspace.lease(CPU) as lease:
        lease.empty("keys", (4,), torch.float32).zero_()
    with workspace.lease(CPU) as lease:
        assert lease.empty("keys", (4,), torch.float32).fill_(1.0).tolist() == [1.0] * 4
    assert workspace.num_allocations == 1
