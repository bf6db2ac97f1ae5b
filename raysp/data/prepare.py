"""``raysp prepare``: text, JSON lines or Parquet -> tokenized Parquet that ``TokenDataset`` opens.

The output folder holds ``data-NNNNN.parquet`` (``input_ids``, ``length``, ``source``, for chats ``loss_mask``),
``tokenizer/tokenizer.json`` and ``dataset.json``. Input streams: memory holds a few megabytes of text at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from raysp.data import tokenization
from raysp.data.dataset import DATASET_FILE
from raysp.data.documents import (
    Format,
    InputFile,
    RawDocument,
    ReadCounts,
    detect_format,
    find_input_files,
    read_documents,
)
from raysp.data.staging import check_replaceable, staged_folder
from raysp.data.writer import DocumentWriter
from raysp.errors import InputError

SCHEMA_VERSION = 1
TOKENIZER_FILE = "tokenizer/tokenizer.json"
# A BPE of a few ten thousand tokens gains nothing from more text than this, but takes longer.
TRAINING_SAMPLE_BYTES = 32 * 2**20

_BATCH_CHARS = 2 * 2**20
_BATCH_DOCUMENTS = 4096
_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far the work is.

    Attributes:
        stage: ``training the tokenizer`` or ``tokenizing``.
        done_bytes: Of the input files; grows when a file is finished.
        total_bytes: Of all of them.
        num_documents: Written so far.
        num_tokens: Written so far.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    num_documents: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """What is in the output folder.

    Attributes:
        path: The folder.
        info: The content of ``dataset.json``.
        already_prepared: It was there before, made from the same input with the same settings.
        examples: For each count of left-out input above 0, the first one.
    """

    path: Path
    info: dict[str, Any]
    already_prepared: bool
    examples: dict[str, str]


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_format: Literal["auto", "text", "jsonl", "parquet"] = "auto",
    text_column: str = "text",
    end_token: str | None = None,
    training_sample_bytes: int = TRAINING_SAMPLE_BYTES,
    overwrite: bool = False,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PreparedDataset:
    """Tokenize documents and write them as a dataset.

    Args:
        source: A folder, or one file. Rows of JSON lines and Parquet have ``input_ids``, ``messages`` or
            ``text_column``.
        output: Folder to write; new, empty, or made by the same call before (then nothing is done).
        tokenizer: ``tokenizer.json``, or a folder with it. ``input_ids`` need none.
        train_tokenizer: Vocabulary size of a byte-level BPE to train on the input instead.
        include: Patterns (``*.py``) of which a file must match one; see ``find_input_files``.
        exclude: Patterns of files and folders to leave out.
        input_format: ``auto``: by the names of the files; see ``detect_format``.
        text_column: Column of the text.
        end_token: Token that ends a document; default ``<|endoftext|>``, or the tokenizer's own.
        training_sample_bytes: Input up to this size is all used to train the tokenizer; of more, an even sample of the
            documents of about this size.
        overwrite: Replace a dataset that is there.
        progress: Told after every batch.

    Raises:
        InputError: The input, the tokenizer or the output cannot be used.
        RayspError: The output cannot be written.
    """
    source, output = Path(source), Path(output)
    _check_places(source, output)
    files = find_input_files(source, include=include, exclude=exclude, skip=[output])
    format_ = detect_format(files) if input_format == "auto" else input_format
    loaded = None if tokenizer is None else tokenization.load_tokenizer(Path(tokenizer))
    settings = {
        "schema_version": SCHEMA_VERSION,
        "format": format_,
        "include": list(include),
        "exclude": list(exclude),
        "text_column": text_column,
        "end_token": end_token,
        "train_tokenizer": train_tokenizer,
        "training_sample_bytes": training_sample_bytes if train_tokenizer else None,
        "tokenizer_sha256": tokenization.tokenizer_sha256(loaded[0]) if loaded else None,
    }
    request = _request_sha256(settings, files)
    before = _existing_info(output)
    if before is not None and before.get("request_sha256") == request and not overwrite:
        return PreparedDataset(output, before, True, {})
    check_replaceable(output, marker=DATASET_FILE, overwrite=overwrite)
    job = _Job(files, format_, text_column, progress or (lambda _: None))
    trained, encoder = job.make_encoder(loaded, train_tokenizer, training_sample_bytes, end_token)
    counts = ReadCounts()
    with staged_folder(output) as folder:
        writer = DocumentWriter(folder, with_loss_mask=job.kind in ("messages", "input_ids with loss_mask"))
        job.tokenize(encoder, writer, counts)
        if trained is not None:
            (folder / TOKENIZER_FILE).parent.mkdir()
            trained.save(str(folder / TOKENIZER_FILE))
        info = _info(source, settings, request, trained, writer, counts)
        _check_vocabulary(writer.max_token_id, info["vocab_size"])
        (folder / DATASET_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return PreparedDataset(output, info, False, dict(counts.examples))


class _Job:
    def __init__(
        self,
        files: Sequence[InputFile],
        format_: Format,
        text_column: str,
        progress: Callable[[PrepareProgress], None],
    ) -> None:
        self._files = files
        self._format: Format = format_
        self._text_column = text_column
        self._progress = progress
        self._total_bytes = sum(file.size_bytes for file in files)
        self.kind = self._first_kind()

    def make_encoder(
        self,
        loaded: tuple[Tokenizer, str | None] | None,
        vocab_size: int | None,
        sample_bytes: int,
        end_token: str | None,
    ) -> tuple[Tokenizer | None, tokenization.DocumentEncoder | None]:
        """The tokenizer to keep with the data, and how to encode with it; none for ready-made tokens."""
        if loaded is not None and vocab_size is not None:
            raise InputError("--tokenizer and --train-tokenizer exclude each other; expected one. Leave one out.")
        if self.kind.startswith("input_ids"):
            if vocab_size is not None:
                raise InputError("the input is tokenized already; expected text to train on. Drop --train-tokenizer.")
            return (loaded[0] if loaded else None), None
        if loaded is None and vocab_size is None:
            raise InputError(
                "no tokenizer is given; expected --tokenizer PATH (a tokenizer.json) or --train-tokenizer VOCAB_SIZE. "
                "Add one, for example --train-tokenizer 8192."
            )
        if loaded is not None:
            return loaded[0], tokenization.DocumentEncoder(
                loaded[0], end_token=end_token, configured_end_token=loaded[1]
            )
        trained = tokenization.train_tokenizer(self._training_texts(sample_bytes), vocab_size or 0)
        return trained, tokenization.DocumentEncoder(trained, end_token=end_token)

    def tokenize(
        self, encoder: tokenization.DocumentEncoder | None, writer: DocumentWriter, counts: ReadCounts
    ) -> None:
        """Write every document that has content."""
        batch: list[RawDocument] = []
        num_chars = 0
        for document, done_bytes in self._documents(counts):
            if not _has_content(document):
                counts.add("empty_documents", document.source)
                continue
            batch.append(document)
            num_chars += _num_chars(document)
            if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
                self._write(batch, encoder, writer, done_bytes)
                batch, num_chars = [], 0
        self._write(batch, encoder, writer, self._total_bytes)
        writer.close()
        if not writer.num_documents:
            raise self._nothing_usable(counts)

    def _write(
        self,
        batch: list[RawDocument],
        encoder: tokenization.DocumentEncoder | None,
        writer: DocumentWriter,
        done_bytes: int,
    ) -> None:
        for tokenized in encoder.encode(batch) if encoder else map(tokenization.ready_made, batch):
            writer.add(tokenized)
        self._progress(
            PrepareProgress("tokenizing", done_bytes, self._total_bytes, writer.num_documents, writer.num_tokens)
        )

    def _documents(self, counts: ReadCounts) -> Iterator[tuple[RawDocument, int]]:
        done_bytes = 0
        current: InputFile | None = None
        for file, document in read_documents(self._files, self._format, counts, text_column=self._text_column):
            if current is not None and file is not current:
                done_bytes += current.size_bytes
            current = file
            if _kind(document) != self.kind:
                raise InputError(
                    f"{document.source} holds {_kind(document)}, but the input began with {self.kind}; expected one "
                    "kind. Prepare them separately, with --include or --exclude."
                )
            yield document, done_bytes

    def _first_kind(self) -> str:
        counts = ReadCounts()
        for _, document in read_documents(self._files, self._format, counts, text_column=self._text_column):
            return _kind(document)
        raise self._nothing_usable(counts)

    def _training_texts(self, sample_bytes: int) -> Iterator[str]:
        share = min(sample_bytes / max(self._total_bytes, 1), 1.0)
        room = sample_bytes
        for index, (document, done_bytes) in enumerate(self._documents(ReadCounts())):
            # Multiples of the golden ratio are spread evenly, so every part of the input contributes alike.
            if (index * _GOLDEN_RATIO_64 % 2**64) / 2**64 >= share:
                continue
            for text in _texts(document):
                for start in range(0, len(text), _BATCH_CHARS):
                    yield text[start : start + _BATCH_CHARS]
                room -= len(text)
            self._progress(PrepareProgress("training the tokenizer", done_bytes, self._total_bytes))
            if room <= 0 and share < 1:
                break

    def _nothing_usable(self, counts: ReadCounts) -> InputError:
        reasons = [f"{number} {name.replace('_', ' ')}" for name, number in counts.as_dict().items() if number]
        found = f" ({', '.join(reasons)})" if reasons else ""
        return InputError(
            f"no document in {len(self._files)} files can be used{found}; expected UTF-8 text, or rows with text, "
            "input_ids or messages. Correct the input, --include or --format."
        )


def _kind(document: RawDocument) -> str:
    if document.text is not None:
        return "text"
    if document.messages is not None:
        return "messages"
    return "input_ids" if document.loss_mask is None else "input_ids with loss_mask"


def _texts(document: RawDocument) -> list[str]:
    return [document.text] if document.text is not None else [content for _, content in document.messages or ()]


def _num_chars(document: RawDocument) -> int:
    return len(document.input_ids) if document.input_ids is not None else sum(map(len, _texts(document)))


def _has_content(document: RawDocument) -> bool:
    if document.input_ids is not None:
        return bool(document.input_ids)
    return any(text and not text.isspace() for text in _texts(document))


def _check_places(source: Path, output: Path) -> None:
    if source.exists() and source.resolve().is_relative_to(output.resolve()):
        raise InputError(
            f"the input {source} lies inside the output {output}; expected another folder. Change --output."
        )


def _check_vocabulary(max_token_id: int, vocab_size: int | None) -> None:
    if vocab_size is not None and max_token_id >= vocab_size:
        raise InputError(
            f"the input has token id {max_token_id}, but the tokenizer {vocab_size} tokens; expected ids below that. "
            "Give the tokenizer that made them."
        )


def _existing_info(output: Path) -> dict[str, Any] | None:
    try:
        info = json.loads((output / DATASET_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(info, dict) and len(list(output.glob("data-*.parquet"))) == info.get("files")
    return info if complete else None


def _request_sha256(settings: dict[str, Any], files: Sequence[InputFile]) -> str:
    listing = [[file.name, file.size_bytes, file.modified_ns] for file in files]
    return hashlib.sha256(json.dumps([settings, listing], sort_keys=True).encode()).hexdigest()


def _info(
    source: Path,
    settings: dict[str, Any],
    request: str,
    tokenizer: Tokenizer | None,
    writer: DocumentWriter,
    counts: ReadCounts,
) -> dict[str, Any]:
    lengths = np.asarray(writer.lengths, dtype=np.int64)
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99], method="inverted_cdf").tolist()
    return {
        "schema_version": SCHEMA_VERSION,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "length": {"min": int(lengths.min()), "p50": p50, "p90": p90, "p99": p99, "max": int(lengths.max())},
        "left_out": counts.as_dict(),
        "files": writer.num_files,
        "vocab_size": None if tokenizer is None else tokenization.vocab_size_of(tokenizer),
        "tokenizer": None if tokenizer is None else TOKENIZER_FILE,
        "tokenizer_sha256": None if tokenizer is None else tokenization.tokenizer_sha256(tokenizer),
        "source": str(source.resolve()),
        "settings": settings,
        "request_sha256": request,
    }
