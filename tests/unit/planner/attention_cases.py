"""Works and rates that the tests of parallel attention's cost share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from planner import AttentionWork, KernelRate, Link

RATE = KernelRate(
    forward_flops_per_s=6e14, backward_flops_per_s=5e14, launch_s=1e-5, copy_bytes_per_s=3e12, efficient_rows=128
)
FAST = Link(bandwidth_bytes_per_s=4e11, latency_s=1e-5)
SLOW = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5)


def make_work(degree: int = 4, rows: int = 1024, **changes: Any) -> AttentionWork:
    """One document of `rows` tokens per rank, 8 query heads on 4 key heads."""
    values: dict[str, Any] = {
        "degree": degree,
        "num_heads": 8,
        "num_key_heads": 4,
        "head_size": 64,
        "lengths": (rows * degree,),
    }
    return AttentionWork(**{**values, **changes})


@st.composite
def works(draw: st.DrawFn) -> AttentionWork:
    """Packed documents, any degree, any mask."""
    lengths = tuple(draw(st.lists(st.integers(1, 3000), min_size=1, max_size=6)))
    causal = draw(st.booleans())
    key_lengths = None
    if not causal and draw(st.booleans()):
        key_lengths = tuple(draw(st.lists(st.integers(1, 3000), min_size=len(lengths), max_size=len(lengths))))
    num_key_heads = draw(st.sampled_from([1, 2, 4, 5]))
    return AttentionWork(
        degree=draw(st.integers(1, 9)),
        num_heads=num_key_heads * draw(st.sampled_from([1, 2, 8])),
        num_key_heads=num_key_heads,
        head_size=draw(st.sampled_from([16, 128])),
        lengths=lengths,
        causal=causal,
        window=draw(st.none() | st.integers(1, 2000)) if causal else None,
        element_bytes=draw(st.sampled_from([2, 4])),
        key_lengths=key_lengths,
    )
