"""The tokenized corpus as sequences: random access by id, few tokens in memory.

A *document* is a row of the Parquet files. A *sequence* is a document, or one of the nearly equal consecutive pieces
that a document longer than ``max_length`` is cut into; nothing is ever dropped. Ids count sequences in the order of
the files (sorted by name) and their rows.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysp.data.order import SPLIT_STREAM, shuffled_order
from raysp.data.parquet import DocumentFile, RowGroup
from raysp.errors import InputError

DATASET_FILE = "dataset.json"
_CACHE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One training example.

    Attributes:
        input_ids: int64 ``[length]``.
        is_target: bool ``[length]``; ``is_target[i]`` says that token ``i`` is predicted, from token ``i - 1``. The
            first token is never a target, neither of a document nor of a later piece of a split one.
    """

    input_ids: NDArray[np.int64]
    is_target: NDArray[np.bool_]


class TokenDataset:
    """Tokenized documents in Parquet. Make one with ``TokenDataset.open``.

    Every process opens the files for itself; any number may read at once, threads included. Decoded row groups are
    kept up to 128 MiB, so memory stays bounded where single row groups are small, as ``raysp prepare`` writes them.

    Attributes:
        sequence_lengths: int64 ``[num_sequences]``, tokens of every sequence, all pieces counted.
        vocab_size: Size of the tokenizer's vocabulary by ``dataset.json``; none without one.
        tokenizer_path: The ``tokenizer.json`` the documents were made with; none where it is not known.
        max_token_id: Largest id by the statistics of the files; none where a file has none.
    """

    def __init__(
        self,
        files: Sequence[DocumentFile],
        *,
        root: Path,
        max_length: int | None,
        drop_empty: bool,
        info: dict[str, Any],
    ) -> None:
        self._files = tuple(files)
        self._root = root
        self._file_starts = np.cumsum([0] + [len(file.lengths) for file in files], dtype=np.int64)
        document_lengths = np.concatenate([file.lengths for file in files])
        self._document_rows = _kept_rows(document_lengths, drop_empty=drop_empty)
        self._document_lengths = document_lengths[self._document_rows]
        self._pieces = _Pieces.cut(self._document_lengths, max_length)
        self.sequence_lengths = self._pieces.stops - self._pieces.starts
        self.sequence_lengths.setflags(write=False)
        self.vocab_size: int | None = info.get("vocab_size")
        self.tokenizer_path = _tokenizer_path(root, info)
        highs = [file.max_token_id for file in files if len(file.lengths)]
        self.max_token_id = None if None in highs or not highs else max(high for high in highs if high is not None)
        self._cache: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, max_length: int | None = None, drop_empty: bool = False) -> TokenDataset:
        """Open a folder with ``*.parquet`` (what ``raysp prepare`` writes), or one Parquet file.

        Args:
            path: The folder or the file.
            max_length: Documents with more tokens are cut into the fewest pieces that hold at most this many, as
                equal as possible; none cuts nothing.
            drop_empty: Leave out documents without tokens, instead of refusing them.

        Raises:
            InputError: Nothing readable is there, a column is of another type, a document is empty, or a token id is
                outside the vocabulary.
        """
        if max_length is not None and max_length < 1:
            raise InputError(f"data.max_length is {max_length}; expected at least 1. Raise it, or leave it out.")
        location = Path(path)
        root, paths = _find_files(location)
        files = [DocumentFile.open(file) for file in paths]
        if not sum(len(file.lengths) for file in files):
            raise InputError(f"{location} has no document; expected at least 1. Prepare some with raysp prepare.")
        dataset = cls(files, root=root, max_length=max_length, drop_empty=drop_empty, info=_read_info(root))
        if dataset.vocab_size is not None:
            dataset.check_vocab_size(dataset.vocab_size)
        return dataset

    @property
    def num_sequences(self) -> int:
        """Documents and pieces of documents."""
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Rows of the files, without dropped ones."""
        return len(self._document_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.sequence_lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' footers and all sequence lengths: a checkpoint keeps it to notice changed data."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(file.digest.encode())
        digest.update(self.sequence_lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def check_vocab_size(self, vocab_size: int) -> None:
        """Refuse ids that a model of this vocabulary has no embedding for, as far as file statistics tell.

        Raises:
            InputError: An id is negative or at least ``vocab_size``.
        """
        for file in self._files:
            for bad in (file.min_token_id, file.max_token_id):
                if bad is not None and not 0 <= bad < vocab_size:
                    raise _bad_token_id(file.path, bad, vocab_size)

    def sequence(self, sequence_id: int) -> TokenSequence:
        """Read one sequence; decodes its row group where that is not in memory.

        Raises:
            InputError: The id does not exist, the file is damaged or changed, or a token id is out of range.
        """
        if not 0 <= sequence_id < self.num_sequences:
            raise InputError(f"sequence {sequence_id} does not exist; expected 0 to {self.num_sequences - 1}.")
        document = int(self._pieces.documents[sequence_id])
        row = int(self._document_rows[document])
        file_index = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        row_in_file = row - int(self._file_starts[file_index])
        starts = self._files[file_index].row_group_starts
        group_index = int(np.searchsorted(starts, row_in_file, side="right")) - 1
        group = self._row_group(file_index, group_index)
        first = int(group.ends[row_in_file - int(starts[group_index])])
        start, stop = first + int(self._pieces.starts[sequence_id]), first + int(self._pieces.stops[sequence_id])
        input_ids = group.token_ids[start:stop].astype(np.int64)
        is_target = (
            np.ones(stop - start, dtype=np.bool_) if group.is_target is None else group.is_target[start:stop].copy()
        )
        is_target[0] = False
        return TokenSequence(input_ids, is_target)

    def document_of(self, sequence_id: int) -> int:
        """The document a sequence comes from; pieces of one document have the same."""
        return int(self._pieces.documents[sequence_id])

    def split(self, validation_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Divide the sequences by document: pieces of one document stay on one side.

        Depends on the number of documents, the fraction and the seed alone.

        Args:
            validation_fraction: Share of the documents held out, in [0, 1); above 0 at least one document is, and at
                least one stays for training.
            seed: Chooses them, at least 0.

        Returns:
            Training and validation sequence ids, each int64 and ascending.

        Raises:
            InputError: The fraction is outside [0, 1), or there is only one document to divide.
        """
        if not 0 <= validation_fraction < 1:
            raise InputError(f"data.validation_fraction is {validation_fraction}; expected 0 or more and less than 1.")
        num_held_out = 0
        if validation_fraction > 0:
            if self.num_documents < 2:
                raise InputError(
                    "1 document cannot be divided into training and validation; expected at least 2. "
                    "Set data.validation_fraction = 0."
                )
            num_held_out = min(max(round(validation_fraction * self.num_documents), 1), self.num_documents - 1)
        order = shuffled_order(self.num_documents, stream=SPLIT_STREAM, seed=seed)
        held_out = np.zeros(self.num_documents, dtype=np.bool_)
        held_out[order[:num_held_out]] = True
        is_validation = held_out[self._pieces.documents]
        return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)

    def _row_group(self, file_index: int, group_index: int) -> RowGroup:
        key = (file_index, group_index)
        with self._lock:
            group = self._cache.get(key)
            if group is not None:
                self._cache.move_to_end(key)
                return group
        file = self._files[file_index]
        group = file.read_row_group(group_index)
        self._check_ids(group, file)
        with self._lock:
            self._cache[key] = group
            num_bytes = sum(kept.num_bytes for kept in self._cache.values())
            while num_bytes > _CACHE_BYTES and len(self._cache) > 1:
                num_bytes -= self._cache.popitem(last=False)[1].num_bytes
        return group

    def _check_ids(self, group: RowGroup, file: DocumentFile) -> None:
        if not len(group.token_ids):
            return
        smallest, largest = int(group.token_ids.min()), int(group.token_ids.max())
        if smallest < 0:
            raise _bad_token_id(file.path, smallest, self.vocab_size)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise _bad_token_id(file.path, largest, self.vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def cut(cls, lengths: NDArray[np.int64], max_length: int | None) -> _Pieces:
        counts = np.ones_like(lengths) if max_length is None else -(-lengths // max_length)
        documents = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
        first_pieces = np.cumsum(counts) - counts
        index = np.arange(len(documents), dtype=np.int64) - first_pieces[documents]
        per_document, in_document = lengths[documents], counts[documents]
        return cls(documents, index * per_document // in_document, (index + 1) * per_document // in_document)


def _kept_rows(lengths: NDArray[np.int64], *, drop_empty: bool) -> NDArray[np.int64]:
    empty = lengths < 1
    if empty.any() and not drop_empty:
        raise InputError(
            f"sequence {int(np.argmax(empty))} has 0 tokens; expected at least 1. "
            "Drop empty documents or set data.drop_empty = true."
        )
    kept = np.flatnonzero(~empty)
    if not len(kept):
        raise InputError("every document has 0 tokens; expected at least one with some. Prepare the data again.")
    return kept


def _find_files(location: Path) -> tuple[Path, list[Path]]:
    if location.is_dir():
        paths = sorted(path for path in location.glob("*.parquet") if path.is_file())
        if not paths:
            raise InputError(f"{location} has no .parquet file; expected what raysp prepare writes. Run raysp prepare.")
        return location, paths
    if not location.is_file():
        raise InputError(
            f"{location} does not exist; expected a folder with Parquet files or one such file. Correct data.path, or "
            "make it with raysp prepare."
        )
    return location.parent, [location]


def _read_info(root: Path) -> dict[str, Any]:
    path = root / DATASET_FILE
    if not path.is_file():
        return {}
    try:
        info: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}. Prepare the data again with raysp prepare.") from error
    if not isinstance(info, dict):
        raise InputError(f"{path} is not a JSON object; expected what raysp prepare writes. Prepare the data again.")
    vocab_size = info.get("vocab_size")
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise InputError(f"{path}: vocab_size is {vocab_size!r}; expected a positive integer. Prepare the data again.")
    return info


def _tokenizer_path(root: Path, info: dict[str, Any]) -> Path | None:
    relative = info.get("tokenizer")
    path = root / relative if isinstance(relative, str) else None
    return path if path is not None and path.is_file() else None


def _bad_token_id(path: Path, token_id: int, vocab_size: int | None) -> InputError:
    expected = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1} (vocabulary of {vocab_size})"
    return InputError(
        f"{path} has token id {token_id}; expected {expected}. Prepare the data with the tokenizer of the model."
    )
