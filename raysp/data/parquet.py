"""One Parquet file of tokenized documents: its checks, its lengths, and its row groups as arrays.

Columns: ``input_ids`` (list of integers), and optionally ``length`` (integer) and ``loss_mask`` (list of booleans,
true where the token is a target). What the documents become (pieces, splits) is the business of ``dataset``.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysp.errors import InputError, first_line

# pyarrow reports a broken file as ArrowInvalid, ArrowException or OSError, depending on the place of the damage.
READ_ERRORS = (pa.ArrowException, OSError, ValueError)
_ROWS_PER_READ = 1024


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """The documents of one row group, decoded.

    Attributes:
        token_ids: Integers ``[num_tokens]``, all documents one after the other.
        is_target: bool ``[num_tokens]``, or none where the file has no ``loss_mask``.
        ends: int64 ``[num_documents + 1]``; document ``i`` is ``token_ids[ends[i]:ends[i + 1]]``.
    """

    token_ids: NDArray[np.integer]
    is_target: NDArray[np.bool_] | None
    ends: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return self.token_ids.nbytes + self.ends.nbytes + (0 if self.is_target is None else self.is_target.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class DocumentFile:
    """What is kept of one file while it is closed.

    Attributes:
        path: The file.
        lengths: int64 ``[num_documents]``, tokens of each document.
        row_group_starts: int64 ``[num_row_groups + 1]``, first document of each row group, then the number of them.
        has_loss_mask: Whether the documents say which tokens are targets.
        max_token_id: Largest id by the file's statistics; none where it has none.
        min_token_id: Smallest id, likewise.
        digest: SHA-256 of the size and the footer; changes when the content does.
    """

    path: Path
    lengths: NDArray[np.int64]
    row_group_starts: NDArray[np.int64]
    has_loss_mask: bool
    max_token_id: int | None
    min_token_id: int | None
    digest: str

    @classmethod
    def open(cls, path: Path) -> DocumentFile:
        """Check the schema of a file and read the lengths of its documents, never all of its tokens at once.

        Raises:
            InputError: The file is no readable Parquet, or a column is missing or of another type.
        """
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                has_length, has_loss_mask = _check_schema(file.schema_arrow, path)
                groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
                lengths = _read_lengths(file) if has_length else _count_lengths(file)
                smallest, largest = _id_statistics(groups)
            starts = np.cumsum([0] + [group.num_rows for group in groups], dtype=np.int64)
            digest = _footer_digest(path)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        return cls(path, lengths, starts, has_loss_mask, largest, smallest, digest)

    def read_row_group(self, index: int) -> RowGroup:
        """Decode one row group.

        Raises:
            InputError: The row group is damaged, or its ``length`` or ``loss_mask`` does not fit its ``input_ids``.
        """
        columns = ["input_ids", "loss_mask"] if self.has_loss_mask else ["input_ids"]
        try:
            with pq.ParquetFile(self.path) as file:
                table = file.read_row_group(index, columns=columns, use_threads=False)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        token_ids, counts = _flatten(table.column("input_ids"), self.path, "input_ids")
        start, stop = (int(row) for row in self.row_group_starts[index : index + 2])
        self._check_equal(counts, self.lengths[start:stop], start, "length")
        is_target = None
        if self.has_loss_mask:
            is_target, mask_counts = _flatten(table.column("loss_mask"), self.path, "loss_mask")
            self._check_equal(counts, mask_counts, start, "loss_mask")
        return RowGroup(token_ids, is_target, np.concatenate(([0], np.cumsum(counts))))

    def _check_equal(self, counts: NDArray[np.int64], others: NDArray[np.int64], first_row: int, column: str) -> None:
        if len(counts) == len(others) and np.array_equal(counts, others):
            return
        row = int(np.argmax(counts != others)) if len(counts) == len(others) else 0
        said = int(others[row]) if column == "length" else f"{int(others[row])} values"
        raise InputError(
            f"{self.path}: row {first_row + row} has {int(counts[row])} input_ids, but its {column} says {said}; "
            "expected the same number. Write the file again, or prepare the data with raysp prepare."
        )


def unreadable(path: Path, error: BaseException) -> InputError:
    """The one-line error for a file that pyarrow cannot read."""
    reason = first_line(error)
    return InputError(
        f"cannot read {path}: {reason.rstrip('.')}; expected a complete Parquet file. "
        "Write it again, or prepare the data with raysp prepare."
    )


def _check_schema(schema: pa.Schema, path: Path) -> tuple[bool, bool]:
    if "input_ids" not in schema.names:
        raise InputError(
            f"{path} has no input_ids column (it has {', '.join(schema.names) or 'none'}); expected a list of integers "
            "per document. Tokenize the data with raysp prepare."
        )
    _check_column(
        schema, path, "input_ids", _is_list_of(schema.field("input_ids").type, pa.types.is_integer), "list<int>"
    )
    has_length, has_loss_mask = "length" in schema.names, "loss_mask" in schema.names
    if has_length:
        _check_column(schema, path, "length", pa.types.is_integer(schema.field("length").type), "int64")
    if has_loss_mask:
        fits = _is_list_of(schema.field("loss_mask").type, pa.types.is_boolean)
        _check_column(schema, path, "loss_mask", fits, "list<bool>")
    return has_length, has_loss_mask


def _check_column(schema: pa.Schema, path: Path, name: str, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(
            f"{path}: column {name} is {schema.field(name).type}; expected {expected}. "
            "Convert it, or prepare the data with raysp prepare."
        )


def _is_list_of(data_type: pa.DataType, is_value: object) -> bool:
    is_list = pa.types.is_list(data_type) or pa.types.is_large_list(data_type) or pa.types.is_fixed_size_list(data_type)
    return is_list and bool(is_value(data_type.value_type))  # type: ignore[operator]


def _read_lengths(file: pq.ParquetFile) -> NDArray[np.int64]:
    column = file.read(columns=["length"], use_threads=False).column("length")
    return np.asarray(column.cast(pa.int64()).fill_null(0).to_numpy(), dtype=np.int64)


def _count_lengths(file: pq.ParquetFile) -> NDArray[np.int64]:
    # Parquet keeps list borders among the values, so this decodes them once, a few rows at a time.
    counts = [
        pc.fill_null(pc.list_value_length(batch.column(0)), 0).cast(pa.int64()).to_numpy(zero_copy_only=False)
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ, columns=["input_ids"], use_threads=False)
    ]
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def _flatten(column: pa.ChunkedArray, path: Path, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    counts = pc.fill_null(pc.list_value_length(column), 0).cast(pa.int64()).to_numpy()
    values = pc.list_flatten(column)
    if values.null_count:
        raise InputError(
            f"{path}: column {name} has {values.null_count} missing values inside its lists; expected none."
        )
    return values.to_numpy(), counts


def _id_statistics(groups: list[pq.RowGroupMetaData]) -> tuple[int | None, int | None]:
    lows: list[int] = []
    highs: list[int] = []
    for group in groups:
        chunks = (group.column(index) for index in range(group.num_columns))
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == "input_ids")
        statistics = chunk.statistics if chunk.is_stats_set else None
        if statistics is None or not statistics.has_min_max:
            if chunk.num_values:
                return None, None
            continue
        lows.append(int(statistics.min))
        highs.append(int(statistics.max))
    return (min(lows), max(highs)) if lows else (None, None)


def _footer_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 8)
        (footer_bytes,) = struct.unpack("<I", file.read(4))
        file.seek(size - 8 - footer_bytes)
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()
