"""raysp: elastic long-context training on Ray with heterogeneous sequence-parallel groups."""

__version__ = "0.1.0"
