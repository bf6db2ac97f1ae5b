"""Exact attention of packed documents over the ranks of a sequence-parallel group."""

from raysp.attention.chooser import METHODS, check_method
from raysp.attention.explain import explain_methods
from raysp.attention.kernels import KERNELS
from raysp.attention.layout import SequenceLayout
from raysp.attention.parallel import parallel_attention
from raysp.attention.reference import reference_attention
from raysp.attention.relayout import relayout
from raysp.attention.sparse import sparse_parallel_attention

__all__ = [
    "KERNELS",
    "METHODS",
    "SequenceLayout",
    "check_method",
    "explain_methods",
    "parallel_attention",
    "reference_attention",
    "relayout",
    "sparse_parallel_attention",
]
