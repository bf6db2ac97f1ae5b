"""What ``raysp prepare`` reads: folders of text, JSON lines and Parquet, streamed as raw documents.

Nothing is tokenized here. What cannot be read is counted in ``ReadCounts`` and left out; only input that can never
work (no file, no usable column) is an error.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow.parquet as pq

from raysp.data.parquet import READ_ERRORS, unreadable
from raysp.errors import InputError

Format = Literal["text", "jsonl", "parquet"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json-lines", ".jsonl.gz", ".ndjson.gz", ".json-lines.gz")
_ROWS_PER_READ = 32
_BINARY_PROBE_BYTES = 8192


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read.

    Attributes:
        path: Where it is.
        name: Its path below the input folder, with ``/``; the ``source`` of its documents.
        size_bytes: By the file system.
        modified_ns: Likewise.
    """

    path: Path
    name: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class RawDocument:
    """One document before tokenizing; exactly one of the first three is set.

    Attributes:
        text: Plain text.
        messages: Chat turns as ``(role, content)``.
        input_ids: Tokens, already.
        loss_mask: With ``input_ids`` only: whether each token is a target.
        source: Where it comes from.
    """

    source: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    input_ids: tuple[int, ...] | None = None
    loss_mask: tuple[bool, ...] | None = None


@dataclass(slots=True)
class ReadCounts:
    """What was left out, and one example of each for the report."""

    unreadable_files: int = 0
    binary_files: int = 0
    undecodable_files: int = 0
    invalid_rows: int = 0
    empty_documents: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, example: str) -> None:
        """Count one more of ``what``, a field of this class."""
        setattr(self, what, getattr(self, what) + 1)
        self.examples.setdefault(what, example)

    def as_dict(self) -> dict[str, int]:
        """The counts alone."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "examples"}


def find_input_files(
    location: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), skip: Sequence[Path] = ()
) -> list[InputFile]:
    """The files of an input, ordered by name.

    A pattern matches the name of a file or its path below the folder; an exclude pattern also the name of any folder
    on the way. Hidden files and folders (``.git``) are left out, links to folders are not followed.

    Args:
        location: A folder, or one file (to which no pattern applies).
        include: Keep files that match one of these; empty keeps all.
        exclude: Leave these out.
        skip: Folders to leave out, for example the output.

    Raises:
        InputError: Nothing is there, or no file is left.
    """
    if location.is_file():
        return [_input_file(location, location.name)]
    if not location.is_dir():
        raise InputError(f"{location} does not exist; expected a folder or a file with documents. Correct the path.")
    skipped = {path.resolve() for path in skip}
    files: list[InputFile] = []
    for folder, folder_names, file_names in os.walk(location):
        base = Path(folder)
        folder_names[:] = [
            name
            for name in folder_names
            if not name.startswith(".") and not _matches(name, base / name, location, exclude)
        ]
        if skipped:
            folder_names[:] = [name for name in folder_names if (base / name).resolve() not in skipped]
        for name in file_names:
            path = base / name
            if name.startswith(".") or not path.is_file() or _matches(name, path, location, exclude):
                continue
            if not include or _matches(name, path, location, include):
                files.append(_input_file(path, path.relative_to(location).as_posix()))
    if not files:
        patterns = f" that matches {', '.join(include)}" if include else ""
        raise InputError(f"{location} has no file{patterns}; expected at least one. Correct --include or --exclude.")
    return sorted(files, key=lambda file: file.name)


def detect_format(files: Sequence[InputFile]) -> Format:
    """``parquet`` or ``jsonl`` where every file is named so, else ``text`` (one document a file)."""
    names = [file.name.lower() for file in files]
    if all(name.endswith(".parquet") for name in names):
        return "parquet"
    return "jsonl" if all(name.endswith(_JSONL_SUFFIXES) for name in names) else "text"


def read_documents(
    files: Sequence[InputFile], format_: Format, counts: ReadCounts, *, text_column: str = "text"
) -> Iterator[tuple[InputFile, RawDocument]]:
    """Stream the documents of some files, in order, each with its file.

    Rows are read from the first of these columns that a file has: ``input_ids`` (with ``loss_mask``), ``messages``,
    ``text_column``.

    Raises:
        InputError: A file has none of the columns, or a Parquet file is damaged.
    """
    for file in files:
        if format_ == "text":
            document = _read_text(file, counts)
            if document is not None:
                yield file, document
            continue
        rows = _parquet_rows(file, text_column) if format_ == "parquet" else _jsonl_rows(file, text_column, counts)
        for number, column, row in rows:
            document = _row_document(row, column, f"{file.name}:{number}")
            if document is None:
                counts.add("invalid_rows", f"{file.name}:{number}")
            else:
                yield file, document


def _input_file(path: Path, name: str) -> InputFile:
    status = path.stat()
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


def _matches(name: str, path: Path, root: Path, patterns: Sequence[str]) -> bool:
    if not patterns:
        return False
    below_root = path.relative_to(root).as_posix()
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(below_root, p.strip("/")) for p in patterns)


def _read_text(file: InputFile, counts: ReadCounts) -> RawDocument | None:
    try:
        content = file.path.read_bytes()
    except OSError:
        counts.add("unreadable_files", file.name)
        return None
    if b"\0" in content[:_BINARY_PROBE_BYTES]:
        counts.add("binary_files", file.name)
        return None
    try:
        return RawDocument(file.name, text=content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        counts.add("undecodable_files", file.name)
        return None


def _jsonl_rows(file: InputFile, text_column: str, counts: ReadCounts) -> Iterator[tuple[int, str, dict[str, Any]]]:
    column: str | None = None
    try:
        with _open_lines(file.path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = _parse_object(line)
                if row is None:
                    counts.add("invalid_rows", f"{file.name}:{number}")
                    continue
                column = column or _usable_column(list(row), file, text_column)
                yield number, column, row
    except (OSError, EOFError, zlib.error):
        # A truncated or damaged gzip stream: what came before it is kept.
        counts.add("unreadable_files", file.name)


def _open_lines(path: Path) -> BinaryIO:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return cast(BinaryIO, opener(path, "rb"))


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet_rows(file: InputFile, text_column: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(file.path) as parquet:
            names = parquet.schema_arrow.names
            column = _usable_column(names, file, text_column)
            columns = [column, "loss_mask"] if column == "input_ids" and "loss_mask" in names else [column]
            number = 0
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
                for row in batch.to_pylist():
                    yield number, column, row
                    number += 1
    except READ_ERRORS as error:
        raise unreadable(file.path, error) from error


def _usable_column(names: Sequence[str], file: InputFile, text_column: str) -> str:
    for column in ("input_ids", "messages", text_column):
        if column in names:
            return column
    raise InputError(
        f"{file.path} has the columns {', '.join(names) or 'none'}; expected {text_column}, input_ids or messages. "
        "Name the column of the text with --text-column."
    )


def _row_document(row: dict[str, Any], column: str, source: str) -> RawDocument | None:
    value = row.get(column)
    if column == "messages":
        messages = _parse_messages(value)
        return None if messages is None else RawDocument(source, messages=messages)
    if column == "input_ids":
        return _parse_tokens(value, row.get("loss_mask"), source, has_loss_mask="loss_mask" in row)
    return RawDocument(source, text=value) if isinstance(value, str) else None


def _parse_tokens(value: Any, loss_mask: Any, source: str, *, has_loss_mask: bool) -> RawDocument | None:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        return None
    if not has_loss_mask:
        return RawDocument(source, input_ids=tuple(value))
    loss_mask = [True] * len(value) if loss_mask is None else loss_mask
    if not isinstance(loss_mask, list) or len(loss_mask) != len(value):
        return None
    return RawDocument(source, input_ids=tuple(value), loss_mask=tuple(bool(flag) for flag in loss_mask))


def _parse_messages(value: Any) -> tuple[tuple[str, str], ...] | None:
    if not isinstance(value, list):
        return None
    messages: list[tuple[str, str]] = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = _joined_content(message.get("content")) if isinstance(message, dict) else None
        if not isinstance(role, str) or content is None:
            return None
        messages.append((role, content))
    return tuple(messages)


def _joined_content(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
