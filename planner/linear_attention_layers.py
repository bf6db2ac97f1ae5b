"""Models whose layers are linear attention, all or some (hybrids), as the cost model sees them.

Linear layers have no quadratic time, and what their state scans move does not depend on the length: `a1` and the tables of
attention methods count for the softmax layers alone, the states are seconds per micro-batch by degree. A model without
softmax layers has ``a1 = 0`` and no K/V communication; its groups still carry the name of the cost model's primary
attention method, because a plan names one for every group of degree above 1, but no layer runs it.

With ``ulysses`` linear layers trade rows as softmax layers do, in proportion to the tokens, and no states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from planner.attention_rates import Network
from planner.cost_model import CostModel
from planner.errors import CostModelError
from planner.linear_attention_bytes import LINEAR_METHODS, STATE_SCANS
from planner.linear_attention_cost import LocalPass, linear_method_times
from planner.linear_attention_work import LinearAttentionShape, even_work
from planner.method_cost import Table
from planner.strict_json import as_int, as_number

AUTO = "auto"
_NO_WORK = LocalPass(whole_s=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerMix:
    """How many layers of a model are of which kind.

    Attributes:
        num_softmax_layers: With quadratic attention.
        num_linear_layers: With linear attention.
        shape: Of a linear layer; `None`: unknown, which a fit does not need.
        method: Of linear layers, one of `LINEAR_METHODS`, or ``"auto"``: any of them, call by call.
    """

    num_softmax_layers: int
    num_linear_layers: int = 0
    shape: LinearAttentionShape | None = None
    method: str = "lasp2"

    def __post_init__(self) -> None:
        for key in ("num_softmax_layers", "num_linear_layers"):
            as_int(getattr(self, key), key, CostModelError)
        if self.num_softmax_layers + self.num_linear_layers == 0:
            raise CostModelError("the model has no layers; expected softmax or linear ones.")
        if self.method not in (*LINEAR_METHODS, AUTO):
            raise CostModelError(f"method is {self.method!r}; expected one of {', '.join((*LINEAR_METHODS, AUTO))}.")

    @property
    def softmax_layer_share(self) -> float:
        """Share of the layers with quadratic attention."""
        return self.num_softmax_layers / (self.num_softmax_layers + self.num_linear_layers)

    @property
    def scaling_share(self) -> float:
        """By what a cost model may scale the times of softmax layers: 1 where linear layers move rows as they do."""
        return self.softmax_layer_share if self.method in STATE_SCANS else 1.0

    @property
    def exchanges_states(self) -> bool:
        """Whether linear layers move states."""
        return self.num_linear_layers > 0 and self.method != "ulysses"

    @property
    def exchanges_rows(self) -> bool:
        """Whether any layer moves something in proportion to the tokens."""
        return self.num_softmax_layers > 0 or self.method not in STATE_SCANS

    def to_content(self) -> dict[str, Any]:
        """Return JSON content for a cost model's metadata."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def state_exchange_table(layers: LayerMix, degrees: Iterable[int], network: Callable[[int], Network]) -> Table:
    """Derive the seconds per micro-batch in which states of all linear layers travel, by degree.

    ``num_linear_layers * (forward + backward)`` of one document over the whole group, the most that packed documents
    take, nothing hidden: for lasp2 ``latency + (d-1) * (state + transition) / bandwidth`` a pass.

    Args:
        layers: With a shape.
        degrees: Above 1, in any order.
        network: Returns the links of a group of a degree.

    Raises:
        CostModelError: The shape is unknown.
    """
    if layers.shape is None:
        raise CostModelError("the shape of the linear layers is unknown; expected heads and sizes. Give shape.")
    if not layers.exchanges_states:
        return ()
    table = []
    for degree in sorted(set(degrees)):
        work = even_work(degree, degree, layers.shape)
        method = "lasp2" if layers.method == AUTO else layers.method
        (time,) = linear_method_times(work, network(degree), _NO_WORK, _NO_WORK, (method,))
        table.append((degree, layers.num_linear_layers * time.total_s))
    return tuple(table)


def with_linear_layers(
    cost_model: CostModel, layers: LayerMix, *, state_exchange_s: Table, linear_s_per_token: float = 0.0
) -> CostModel:
    """Return the cost model of a softmax model with some or all layers replaced by linear attention.

    Args:
        cost_model: Of the model with softmax layers only.
        layers: After the replacement; of a method that exchanges states.
        state_exchange_s: See `state_exchange_table`.
        linear_s_per_token: Forward and backward of one linear layer's local operator, for one token.

    Raises:
        CostModelError: The cost model has linear layers already, or these exchange rows.
    """
    if cost_model.softmax_layer_share != 1:
        raise CostModelError(
            f"cost model {cost_model.name!r} has softmax_layer_share {cost_model.softmax_layer_share}; expected 1. Start "
            "from the one without linear layers."
        )
    if layers.num_linear_layers and layers.method not in STATE_SCANS:
        raise CostModelError(
            f"linear layers under {layers.method!r} may exchange rows; expected one of {', '.join(STATE_SCANS)}. "
            "Calibrate that model."
        )
    per_token_s = as_number(linear_s_per_token, "linear_s_per_token", CostModelError)
    changes: dict[str, Any] = {
        "softmax_layer_share": layers.softmax_layer_share,
        "state_exchange_by_degree_s": state_exchange_s,
        "a2_s_per_token": cost_model.a2_s_per_token + layers.num_linear_layers * per_token_s,
        "metadata": {**cost_model.metadata, "layers": layers.to_content()},
    }
    if layers.num_softmax_layers == 0:
        # No attention method runs, so no number of heads limits a degree.
        changes |= {"num_heads": None, "num_kv_heads": None}
    return dataclasses.replace(cost_model, **changes)
