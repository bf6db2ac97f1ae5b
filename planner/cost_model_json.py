"""The JSON of a cost model, versions 1 and 2: keys, and values as `planner.cost_model.CostModel` takes them.

Version 1 has the keys of one method, one recompute policy and no topology; it is read, never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import CostModelError
from planner.method_cost import read_methods, read_recompute_policies, read_table, table_content
from planner.strict_json import check_keys, parse_object

SCHEMA_VERSION = 2

REQUIRED_NUMBERS = ("a1_s_per_token2", "a2_s_per_token", "b1_s", "bytes_per_token", "model_state_bytes_total")
OPTIONAL_NUMBERS = ("b2_s", "model_state_bytes_fixed", "fixed_step_s")
OPTIONAL_NUMBERS_2 = ("method_fixed_s", "half_length_tokens", "per_sequence_s", "state_exchange_s", "zero_traffic_s")
SHARES = ("overlap", "softmax_layer_share", "zero_overlap")
# Left out where empty, so that cost models without linear layers keep their hash.
STATE_TABLES = ("state_exchange_by_degree_s", "state_exchange_between_nodes_s")
TABLES = ("communication_s", "between_nodes_s", *STATE_TABLES)

_REQUIRED = ("name", *REQUIRED_NUMBERS, "memory_limit_bytes", "communication_s")
_OPTIONAL = (*OPTIONAL_NUMBERS, "attention", "num_heads", "metadata")
_OPTIONAL_2 = (
    *OPTIONAL_NUMBERS_2,
    *SHARES,
    "between_nodes_s",
    "methods",
    "recompute_policies",
    "causal_factor",
    "unsharded_state_bytes",
    "gpus_per_node",
    "num_kv_heads",
    *STATE_TABLES,
)


def parse_cost_model(text: str, what: str) -> dict[str, Any]:
    """Parse the text of a cost model into the keyword arguments of `CostModel`.

    Raises:
        CostModelError: Not a JSON object, unknown or missing key, other schema version, or a malformed table.
    """
    content = parse_object(text, what=what, error=CostModelError)
    version = content.pop("schema_version", None)
    if version not in (1, SCHEMA_VERSION) or isinstance(version, (bool, float)):
        raise CostModelError(
            f"{what} has schema_version {version!r}; this raysp reads versions 1 and {SCHEMA_VERSION}."
        )
    optional = _OPTIONAL if version == 1 else (*_OPTIONAL, *_OPTIONAL_2)
    check_keys(content, required=_REQUIRED, optional=optional, what=what, error=CostModelError)
    for key in TABLES:
        if key in content:
            content[key] = read_table(content[key], key)
    if "methods" in content:
        content["methods"] = read_methods(content["methods"])
    if "recompute_policies" in content:
        content["recompute_policies"] = read_recompute_policies(content["recompute_policies"])
    return content


def cost_model_content(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON content of the fields of a `CostModel`, every key present but those of empty `STATE_TABLES`."""
    left_out = {key for key in STATE_TABLES if not fields[key]}
    return {
        "schema_version": SCHEMA_VERSION,
        **{key: value for key, value in fields.items() if key not in left_out},
        **{key: table_content(fields[key]) for key in TABLES if key not in left_out},
        "methods": [method.to_content() for method in fields["methods"]],
        "recompute_policies": [policy.to_content() for policy in fields["recompute_policies"]],
        "metadata": dict(fields["metadata"]),
    }
