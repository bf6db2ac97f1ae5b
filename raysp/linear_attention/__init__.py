"""Exact linear attention of packed documents over the ranks of a sequence-parallel group."""

from raysp.linear_attention.chooser import METHODS
from raysp.linear_attention.kernels import KERNELS
from raysp.linear_attention.parallel import parallel_linear_attention
from raysp.linear_attention.recurrence import naive_linear_attention
from raysp.linear_attention.short_convolution import short_convolution

__all__ = ["KERNELS", "METHODS", "naive_linear_attention", "parallel_linear_attention", "short_convolution"]
