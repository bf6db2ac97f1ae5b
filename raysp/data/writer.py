"""Tokenized documents to ``data-NNNNN.parquet``, in row groups small enough for cheap random access."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysp.data.tokenization import TokenizedDocument

# Reading any sequence decodes its row group: 262,144 tokens take about 1 ms. A longer document is alone in its group.
ROW_GROUP_TOKENS = 2**18
FILE_TOKENS = 2**26


class DocumentWriter:
    """Writes documents in the order they come.

    Args:
        folder: Existing folder for the files.
        with_loss_mask: Write the ``loss_mask`` column; documents without one get all tokens as targets.
    """

    def __init__(self, folder: Path, *, with_loss_mask: bool) -> None:
        self._folder = folder
        self._with_loss_mask = with_loss_mask
        self._waiting: list[TokenizedDocument] = []
        self._waiting_tokens = 0
        self._file_tokens = 0
        self._writer: pq.ParquetWriter | None = None
        self._lengths = array("q")
        self.num_tokens = 0
        self.num_files = 0
        self.max_token_id = -1

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every document written so far."""
        return self._lengths

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, document: TokenizedDocument) -> None:
        """Append a document of at least one token."""
        length = len(document.input_ids)
        if self._waiting and self._waiting_tokens + length > ROW_GROUP_TOKENS:
            self._write_row_group()
        self._waiting.append(document)
        self._waiting_tokens += length
        self._lengths.append(length)
        self.num_tokens += length
        self.max_token_id = max(self.max_token_id, int(document.input_ids.max()))

    def close(self) -> None:
        """Write what waits and finish the file."""
        self._write_row_group()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_row_group(self) -> None:
        if not self._waiting:
            return
        if self._writer is not None and self._file_tokens >= FILE_TOKENS:
            self._writer.close()
            self._writer = None
        table = self._table()
        if self._writer is None:
            path = self._folder / f"data-{self.num_files:05d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=["source"])
            self.num_files += 1
            self._file_tokens = 0
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._file_tokens += self._waiting_tokens
        self._waiting, self._waiting_tokens = [], 0

    def _table(self) -> pa.Table:
        lengths = np.asarray([len(document.input_ids) for document in self._waiting], dtype=np.int64)
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        ids = np.concatenate([document.input_ids for document in self._waiting])
        columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, type=pa.int32())), "length": lengths}
        if self._with_loss_mask:
            masks = np.concatenate([_mask_of(document) for document in self._waiting])
            columns["loss_mask"] = pa.ListArray.from_arrays(offsets, pa.array(masks))
        columns["source"] = [document.source for document in self._waiting]
        return pa.table(columns)


def _mask_of(document: TokenizedDocument) -> NDArray[np.bool_]:
    return np.ones(len(document.input_ids), dtype=np.bool_) if document.loss_mask is None else document.loss_mask
