"""Who failed first: notes that ranks leave in the epoch's store when an exchange fails.

A rank whose exchange fails accuses the peers that it was waiting for. A peer that only failed in turn leaves a note of
its own, so the chain of notes leads to the ranks that left none: those died, or hang.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch.distributed import Store

# How long a rank that failed in turn may take to say so: its error is raised by the same closed connection.
_NOTE_WAIT_S = 2.0
_POLL_S = 0.02


@dataclass(frozen=True)
class FailureNote:
    """What one rank saw when its exchange failed.

    Attributes:
        accused: Global ranks that it was waiting for.
        timed_out: They were late; otherwise their connection broke.
        reason: First line of the transport's message.
    """

    accused: tuple[int, ...]
    timed_out: bool
    reason: str


@dataclass(frozen=True)
class RootCause:
    """The ranks at the end of a chain of notes, and the note that accuses them.

    Attributes:
        ranks: Global ranks that failed first.
        reporter: Global rank that was waiting for them.
        note: Of the reporter.
    """

    ranks: tuple[int, ...]
    reporter: int
    note: FailureNote


def root_cause(global_rank: int, notes: Mapping[int, FailureNote]) -> RootCause:
    """Follow the accusations from one rank's note to the ranks that left none.

    A broken connection proves more than a late rank, which may itself have been waiting, so it decides. Where every
    accused rank left a note (a link between living ranks broke), the rank's own note stands.

    Args:
        global_rank: Where to start.
        notes: By global rank, that of ``global_rank`` among them.
    """
    reached = [global_rank]
    for reporter in reached:
        reached += [rank for rank in notes[reporter].accused if rank in notes and rank not in reached]
    accusing = [rank for rank in reached if any(accused not in notes for accused in notes[rank].accused)]
    deciding = [rank for rank in accusing if not notes[rank].timed_out] or accusing
    if not deciding:
        return RootCause(notes[global_rank].accused, global_rank, notes[global_rank])
    ranks = sorted({accused for rank in deciding for accused in notes[rank].accused if accused not in notes})
    return RootCause(tuple(ranks), deciding[0], notes[deciding[0]])


def post_note(store: Store, global_rank: int, note: FailureNote) -> None:
    """Leave this rank's note; it can be read when this returns."""
    store.set(_key(global_rank), json.dumps(asdict(note)))
    # A store does not answer a set; this answer comes after it.
    store.check([_key(global_rank)])


def find_root_cause(
    store: Store, global_rank: int, note: FailureNote, *, note_wait_s: float = _NOTE_WAIT_S
) -> RootCause:
    """Read the notes of those who are accused, and of those whom they accuse, and follow them.

    Args:
        store: The epoch's store.
        global_rank: This process.
        note: Of this process.
        note_wait_s: Longest wait for the note of one rank.
    """
    notes = {global_rank: note}
    deadlines_s: dict[int, float] = {}
    while True:
        silent = {accused for known in notes.values() for accused in known.accused if accused not in notes}
        now_s = time.monotonic()
        for rank in silent:
            deadlines_s.setdefault(rank, now_s + note_wait_s)
        found = [rank for rank in silent if store.check([_key(rank)])]
        for rank in found:
            fields = json.loads(store.get(_key(rank)))
            notes[rank] = FailureNote(tuple(fields["accused"]), fields["timed_out"], fields["reason"])
        if not found:
            if all(now_s >= deadlines_s[rank] for rank in silent):
                return root_cause(global_rank, notes)
            time.sleep(_POLL_S)


def _key(global_rank: int) -> str:
    return f"failed/{global_rank}"
