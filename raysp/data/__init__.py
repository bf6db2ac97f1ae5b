"""Parquet in and out, tokenizing, and deterministic global batches. Importing this loads no heavy library.

``TokenDataset`` (``raysp.data.dataset``) needs pyarrow and ``prepare`` (``raysp.data.prepare``) tokenizers as well, so
both are imported from their modules.
"""

from raysp.data.loader import BatchLoader, Cursor, GlobalBatch

__all__ = ["BatchLoader", "Cursor", "GlobalBatch"]
