"""Where lengths come from: a lengths file, a Parquet file, a dataset folder, or the name of a shipped distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planner import list_distributions, load_distribution, read_lengths, split_lengths
from raysp.errors import InputError

SAMPLE_SEQUENCES = 100_000


def distribution_of(source: str | Path) -> str | None:
    """The shipped distribution that `source` names, or none: a file of that name comes first."""
    name = str(source)
    return name if not Path(source).exists() and name in list_distributions() else None


def read_length_source(
    source: str | Path,
    *,
    num: int = SAMPLE_SEQUENCES,
    seed: int = 0,
    max_length: int | None = None,
    drop_empty: bool = False,
) -> Sequence[int]:
    """Read the lengths of a source, in tokens.

    Args:
        source: A lengths file, a Parquet file, a dataset folder, or the name of a shipped distribution where there is
            no such file.
        num: Sequences to draw from a distribution. Everything else gives all the sequences that it has.
        seed: Of the draws from a distribution.
        max_length: Split longer documents: those of a dataset as training does, others with
            `planner.split_lengths`. None splits nothing.
        drop_empty: Leave out documents that have no tokens.

    Raises:
        InputError: The dataset cannot be used, or there is neither such a file nor such a distribution.
        planner.LengthsError: The lengths file is malformed.
    """
    path = Path(source)
    name = distribution_of(source)
    if name is not None:
        return [int(length) for length in load_distribution(name).sample(num, seed=seed, max_length=max_length)]
    if not path.exists() and path.name == str(source) and not path.suffix:
        raise InputError(
            f"there is no file and no distribution {str(source)!r}; expected a file or one of "
            f"{', '.join(list_distributions())}."
        )
    if path.is_dir() or path.suffix == ".parquet":
        from raysp.data.dataset import TokenDataset

        dataset = TokenDataset.open(path, max_length=max_length, drop_empty=drop_empty)
        return [int(length) for length in dataset.sequence_lengths]
    lengths = read_lengths(path, drop_empty=drop_empty)
    return lengths if max_length is None else [int(length) for length in split_lengths(lengths, max_length)]
