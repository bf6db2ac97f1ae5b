"""Text and chats to token ids with a ``tokenizers`` tokenizer, trained here or read from a file.

Chats are rendered as ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`` per message. Only the content of assistant messages
and the ``<|im_end|>`` after it are targets. Text never becomes a control token: a document that contains the
characters ``<|endoftext|>`` is encoded as those characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raysp.data.documents import RawDocument
from raysp.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
TARGET_ROLE = "assistant"
SPECIAL_TOKENS = (END_OF_DOCUMENT, MESSAGE_START, MESSAGE_END)
# 256 bytes and the special tokens: anything can be encoded with these.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_OTHER_END_TOKENS = ("<|end_of_text|>", "</s>", "<eos>")
# An encoding needs some hundred bytes a token, so longer texts are encoded in parts, cut after a line.
_MAX_PART_CHARS = 2**20
# Training takes time quadratic in the length of a word: a megabyte of base64 would stall it for hours.
_LONG_WORD = re.compile(r"\S{256}|\s{256}")


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """One document as tokens.

    Attributes:
        input_ids: int32 ``[length]``; empty where the document has no content.
        loss_mask: bool ``[length]``, or none where every token is a target.
        source: Where it comes from.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None
    source: str


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: What to learn from.
        vocab_size: Tokens wanted, at least ``MIN_VOCAB_SIZE``. Little text gives fewer.

    Raises:
        InputError: ``vocab_size`` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"--train-tokenizer {vocab_size} is too small; expected at least {MIN_VOCAB_SIZE} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens). Try 8192."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in _without_long_words(text)), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> tuple[Tokenizer, str | None]:
    """Read a ``tokenizer.json``, or a folder with one; nothing is downloaded and no code is run.

    Returns:
        The tokenizer, and the end token that ``tokenizer_config.json`` beside it names, if any.

    Raises:
        InputError: There is none, or it is not readable.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no tokenizer.json; expected one, or a folder with one. Names are not downloaded.")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception for malformed files
        raise InputError(f"cannot read {file}: {error}; expected a tokenizers JSON file. Save it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, _configured_end_token(file.parent / "tokenizer_config.json")


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of what the tokenizer does."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def ready_made(document: RawDocument) -> TokenizedDocument:
    """A document that came as ``input_ids``, as it is: no end token is added."""
    mask = None if document.loss_mask is None else np.asarray(document.loss_mask, dtype=np.bool_)
    return TokenizedDocument(np.asarray(document.input_ids, dtype=np.int32), mask, document.source)


class DocumentEncoder:
    """Encodes texts and chats, each closed by one ``end_token``.

    Args:
        tokenizer: How to encode. Its special tokens are not recognised in text from here on.
        end_token: Closes a document; none takes ``<|endoftext|>``, or the tokenizer's own.
        configured_end_token: What ``load_tokenizer`` found.

    Raises:
        InputError: The tokenizer has no such token.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, end_token: str | None = None, configured_end_token: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._end_id = _end_token_id(tokenizer, end_token, configured_end_token)

    def encode(self, documents: Sequence[RawDocument]) -> list[TokenizedDocument]:
        """Encode some documents at once, on all cores."""
        plans = [_segments(document) for document in documents]
        parts = [list(_parts(segment.text)) for plan in plans for segment in plan]
        encodings = iter(
            self._tokenizer.encode_batch_fast([text for texts in parts for text in texts], add_special_tokens=False)
        )
        segment_ids = iter([[token for _ in texts for token in next(encodings).ids] for texts in parts])
        return [
            self._join(document, plan, [next(segment_ids) for _ in plan])
            for document, plan in zip(documents, plans, strict=True)
        ]

    def _join(
        self, document: RawDocument, plan: Sequence[_Segment], segment_ids: Sequence[list[int]]
    ) -> TokenizedDocument:
        ids: list[int] = []
        mask_parts: list[NDArray[np.bool_]] = []
        for segment, tokens in zip(plan, segment_ids, strict=True):
            control = self._tokenizer.token_to_id(segment.control) if segment.control else None
            tokens = tokens if control is None else [control]
            ids.extend(tokens)
            mask_parts.append(np.full(len(tokens), segment.is_target, dtype=np.bool_))
        is_chat = document.messages is not None
        if ids:
            ids.append(self._end_id)
            mask_parts.append(np.zeros(1, dtype=np.bool_))
        loss_mask = np.concatenate(mask_parts) if is_chat and mask_parts else None
        return TokenizedDocument(np.asarray(ids, dtype=np.int32), loss_mask, document.source)


@dataclass(frozen=True, slots=True)
class _Segment:
    text: str
    is_target: bool
    # The single token to use where the tokenizer has it; otherwise its characters are encoded.
    control: str | None = None


def _segments(document: RawDocument) -> list[_Segment]:
    if document.text is not None:
        return [_Segment(document.text, True)]
    segments: list[_Segment] = []
    for role, content in document.messages or ():
        is_target = role == TARGET_ROLE
        segments += [
            _Segment(MESSAGE_START, False, MESSAGE_START),
            _Segment(f"{role}\n", False),
            _Segment(content, is_target),
            _Segment(MESSAGE_END, is_target, MESSAGE_END),
            _Segment("\n", False),
        ]
    return segments


def _without_long_words(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_WORD.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _MAX_PART_CHARS:
        line_end = text.rfind("\n", start, start + _MAX_PART_CHARS) + 1
        stop = line_end if line_end > start else start + _MAX_PART_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _end_token_id(tokenizer: Tokenizer, end_token: str | None, configured: str | None) -> int:
    candidates = [end_token] if end_token else [END_OF_DOCUMENT, configured, *_OTHER_END_TOKENS]
    for candidate in candidates:
        found = tokenizer.token_to_id(candidate) if candidate else None
        if found is not None:
            return int(found)
    looked_for = ", ".join(candidate for candidate in candidates if candidate)
    raise InputError(
        f"the tokenizer has no token to end a document (looked for {looked_for}); expected one. "
        "Name it with --end-token."
    )


def _configured_end_token(path: Path) -> str | None:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Smallest number that all ids are below, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
