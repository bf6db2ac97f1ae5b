"""Which method runs. Pure: a function of names and numbers.

``auto``: a group of one is ``local``; ``ulysses`` where the heads divide, because it moves the least data; ``ring``
otherwise, because it runs any degree.
"""

from __future__ import annotations

from raysp.attention.methods.all_gather import AllGather
from raysp.attention.methods.call import Method
from raysp.attention.methods.local import Local
from raysp.attention.methods.ring import KeyRing
from raysp.attention.methods.rsa import RingSelfAttention
from raysp.attention.methods.token_ring import TokenRing
from raysp.attention.methods.ulysses import (
    Ulysses,
    UlyssesRing,
    check_heads,
    heads_divide,
    neighbours_that_trade,
)
from raysp.errors import InputError

METHODS = ("auto", "ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "ulysses_ring", "rsa", "local")


def resolve_method_name(name: str, *, degree: int, num_heads: int, num_key_heads: int) -> str:
    """Find the name of the method that will run.

    Args:
        name: One of ``METHODS``.
        degree: Ranks of the group; at 1 every method is ``local``.
        num_heads: Query heads.
        num_key_heads: Key heads.

    Raises:
        InputError: The method is unknown, not supported yet, or cannot run this degree.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}.")
    if degree == 1:
        return "local"
    if name == "local":
        raise InputError(f"method 'local' needs a group of one, the layout has degree {degree}. Use 'auto'.")
    if name == "auto":
        return "ulysses" if heads_divide(degree, num_heads, num_key_heads) else "ring"
    if name == "ulysses":
        check_heads(degree, num_heads, num_key_heads)
    if name == "ulysses_ring":
        neighbours_that_trade(degree, num_heads, num_key_heads)
    return name


def make_method(name: str) -> Method:
    """Make the executor of a resolved name."""
    executors: dict[str, Method] = {
        "local": Local(),
        "ring": KeyRing(bidirectional=False),
        "bidirectional_ring": KeyRing(bidirectional=True),
        "token_ring": TokenRing(),
        "all_gather": AllGather(),
        "ulysses": Ulysses(),
        "rsa": RingSelfAttention(),
        "ulysses_ring": UlyssesRing(KeyRing(bidirectional=False)),
    }
    return executors[name]
