"""What the attention benchmark must show: shares of the ideal, and each target of the project met or missed.

Pure: functions of the rows that the ranks reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.attention_cases import DENSE, ERROR, MEMORY, ONE_GPU, SPEED, tokens_text

Row = dict[str, Any]
AUTO, OURS = "raysp auto", "raysp "
# Two measurements of the same code differ by about this much.
LEVEL = 1.01
AUTO_MARGIN = 1.03
LEAD_OVER_FA2 = 1.5
MAX_ERROR_RATIO = 1.2
MAX_PEAK_RATIO = 1.1


@dataclass(frozen=True)
class Target:
    """One target and the row that is farthest from it.

    Attributes:
        what: The measured quantity.
        worst: Its worst value.
        where: The row with that value.
        wanted: The bound.
        at_least: Whether the bound is a lower one.
        num_met: Rows that keep it.
        num_rows: All rows it is about.
    """

    what: str
    worst: float
    where: str
    wanted: float
    at_least: bool
    num_met: int
    num_rows: int

    @property
    def is_met(self) -> bool:
        """Whether every row keeps it."""
        return self.num_met == self.num_rows

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.is_met else f"MISSED by {self.num_rows - self.num_met} of {self.num_rows} rows"
        return f"{self.what}: {self.worst:.3f} ({self.where}), target {sign} {self.wanted:g}: {verdict}"


def case_key(row: Row) -> tuple[Any, ...]:
    """What rows of one table share."""
    return tuple(row[name] for name in ("kind", "link", "heads", "tokens_per_rank", "mix"))


def judged(rows: Iterable[Row], degree: int) -> list[Row]:
    """Add ``forward_share``, ``both_share`` and ``..._above_ideal_s`` to the rows whose kernel ran on one GPU too."""
    rows = [dict(row) for row in rows]
    ideal = {
        (*case_key(row), row["kernel"], way): row[f"{way}_s"] / degree
        for row in rows
        if row["name"] == ONE_GPU and "both_s" in row
        for way in ("forward", "both")
    }
    for row in rows:
        for way in ("forward", "both"):
            ideal_s = ideal.get((*case_key(row), row["kernel"], way))
            if ideal_s is not None and row["name"] != ONE_GPU and f"{way}_s" in row:
                row[f"{way}_share"] = ideal_s / row[f"{way}_s"]
                row[f"{way}_above_ideal_s"] = row[f"{way}_s"] - ideal_s
    return rows


def targets(rows: Sequence[Row]) -> list[Target]:
    """Say for every target whether the judged rows reach it; targets that no row is about are left out."""
    speed = [row for row in rows if row["kind"] == SPEED and "both_s" in row]
    ours = [row for row in speed if row["name"].startswith(OURS)]
    found = [*_share_targets(ours), *_peer_targets(speed), _auto_target(ours)]
    errors = [row for row in rows if row["kind"] == ERROR and row["name"].startswith(OURS) and "rms_ratio" in row]
    found.append(
        _at_most("RMS error / one GPU's, causal", [(r["rms_ratio"], _label(r)) for r in errors], MAX_ERROR_RATIO)
    )
    steps = [row for row in rows if row["kind"] == MEMORY and "growth_bytes" in row]
    found.append(_at_most("bytes more after many steps", [(row["growth_bytes"], _label(row)) for row in steps], 0.0))
    peaks = [row for row in (*steps, *ours) if row.get("formula_bytes") and row.get("peak_bytes")]
    fits = [(row["peak_bytes"] / row["formula_bytes"], _label(row)) for row in peaks]
    found.append(_at_most("peak memory / formula", fits, MAX_PEAK_RATIO))
    return [target for target in found if target is not None]


def _share_targets(ours: Sequence[Row]) -> list[Target | None]:
    """NVLink, FA4, 32/8 heads, forward and backward."""
    rows = [
        row
        for row in ours
        if (row["link"], row["kernel"], row["heads"], row["name"]) == ("nvlink", "fa4", "32/8", AUTO)
        and "both_share" in row
    ]
    wanted: list[tuple[str, Callable[[Row], bool], float]] = [
        ("16K and more", lambda row: row["mix"] == DENSE and row["tokens_per_rank"] >= 16384, 0.94),
        ("8K", lambda row: row["mix"] == DENSE and row["tokens_per_rank"] == 8192, 0.85),
        ("packed, 8K and more", lambda row: row["mix"] != DENSE and row["tokens_per_rank"] >= 8192, 0.80),
    ]
    return [
        _at_least(
            f"auto on fa4, share of ideal, {what}", [(r["both_share"], _label(r)) for r in rows if about(r)], least
        )
        for what, about, least in wanted
    ]


def _peer_targets(speed: Sequence[Row]) -> list[Target | None]:
    """The best of raysp against the best peer of the same case, and against peers on the kernel that they ship with."""
    level: list[tuple[float, str]] = []
    lead: list[tuple[float, str]] = []
    for rows in _grouped(speed, lambda row: (*case_key(row), row["kernel"])):
        ours = [row for row in rows if row["name"].startswith(OURS)]
        peers = [row for row in rows if row.get("peer")]
        for way in ("forward_s", "both_s"):
            if ours and peers:
                best, rival = (min(group, key=lambda row: row[way]) for group in (ours, peers))
                level.append((best[way] / rival[way], f"{_label(best)}, {way[:-2]}, against {rival['name']}"))
    for rows in _grouped(speed, lambda row: case_key(row)):
        ours = [row for row in rows if row["name"].startswith(OURS) and row["kernel"] == "fa4"]
        peers = [row for row in rows if row.get("peer") and row["kernel"] == "aten"]
        if ours and peers and rows[0]["link"] == "nvlink":
            best, rival = (min(group, key=lambda row: row["both_s"]) for group in (ours, peers))
            lead.append((rival["both_s"] / best["both_s"], f"{_label(best)}, against {rival['name']}"))
    return [
        _at_most("best raysp row / best peer on the same kernel", level, LEVEL),
        _at_least("best peer on FA2 / best raysp row on fa4, nvlink", lead, LEAD_OVER_FA2),
    ]


def _auto_target(ours: Sequence[Row]) -> Target | None:
    values = []
    for rows in _grouped(ours, lambda row: (*case_key(row), row["kernel"])):
        auto = [row for row in rows if row["name"] == AUTO]
        others = [row for row in rows if row["name"] != AUTO]
        for way in ("forward_s", "both_s"):
            if auto and others:
                best = min(others, key=lambda row: row[way])
                values.append((auto[0][way] / best[way], f"{_label(auto[0])}, {way[:-2]}, against {best['name']}"))
    return _at_most("auto / best method", values, AUTO_MARGIN)


def _at_least(what: str, values: Sequence[tuple[float, str]], wanted: float) -> Target | None:
    if not values:
        return None
    worst, where = min(values)
    return Target(what, worst, where, wanted, True, sum(value >= wanted for value, _ in values), len(values))


def _at_most(what: str, values: Sequence[tuple[float, str]], wanted: float) -> Target | None:
    if not values:
        return None
    worst, where = max(values)
    return Target(what, worst, where, wanted, False, sum(value <= wanted for value, _ in values), len(values))


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _label(row: Row) -> str:
    tokens = tokens_text(row["tokens_per_rank"])
    return f"{row['link']} {row['heads']} {row['mix']} {tokens} {row['name'].removeprefix(OURS)}/{row['kernel']}"
