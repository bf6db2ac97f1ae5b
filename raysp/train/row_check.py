"""Whether rows of a model see each other through raysp alone, found by running it rather than by its name.

Every layer is run on a few rows with all that mixes them turned into something that does not. What still passes from one
row to another is a recurrence, a convolution or an attention of the model's own, whose states every rank would silently
begin anew.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysp.errors import InputError, RayspError
from raysp.train.gated_delta_net import is_gated_delta_net
from raysp.train.sequence_mixing import MixingCall

_NUM_ROWS = 6
_CHANGED_ROW = 2
# Rows are computed together, and another order of rows may change rounding; mixing changes far more than that.
_TOLERANCE = 1e-3
# What transformers calls the state that a layer keeps between calls; who asks for one mixes rows.
_STATE_ARGUMENTS = {
    "past_key_values",
    "past_key_value",
    "layer_past",
    "cache_params",
    "cache",
    "cache_position",
    "state",
}
_MIXING_MODULES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class LayerFacts:
    """How one decoder layer mixes rows; see :class:`~raysp.train.sequence_mixing.MixingCall`."""

    kind: str
    num_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    window: int | None


class RowsApart:
    """A context in which no row sees another; it notes the calls like a real one."""

    def __init__(self) -> None:
        self.calls: list[MixingCall] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None) -> Tensor:
        """Every query gets its own row's value."""
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)

    def attend_linearly(
        self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, beta: Tensor | None, rule: str, scale: float
    ) -> Tensor:
        """Every row gets its own value."""
        return v

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every row sees itself, through the filter's last weight."""
        return x * weight[:, -1]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        InputError: They are not where the Llama family keeps them.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(getattr(model, "lm_head", None), "weight"):
        raise InputError(
            f"{type(model).__name__} has no model.layers and lm_head; expected a decoder of the Llama family."
        )
    return layers


def check_layer_modules(model: Any, own_layers: tuple[type[nn.Module], ...]) -> None:
    """Refuse decoder layers that hold something which mixes rows by itself; needs no weights.

    Args:
        model: A causal language model, on any device.
        own_layers: Classes that mix through raysp.

    Raises:
        InputError: Names the layer and what it holds.
    """
    for index, layer in enumerate(decoder_layers(model)):
        ours = {
            id(part)
            for module in layer.modules()
            if isinstance(module, own_layers) or is_gated_delta_net(module)
            for part in module.modules()
        }
        for name, module in layer.named_modules():
            mixes = isinstance(module, _MIXING_MODULES) or (name and _keeps_state(module))
            if mixes and id(module) not in ours and not _asks_attention_interface(module):
                raise InputError(
                    f"layer {index} has {name} ({type(module).__name__}), which mixes tokens in its own way: a recurrence, a "
                    "convolution or an attention that raysp does not run over several ranks. Expected attention by "
                    "transformers' attention interface, or the linear attention of linear_llama, qwen3_next or qwen3_5_text."
                )


def record_layers(model: Any) -> tuple[LayerFacts, ...]:
    """Run the model once on rows that do not see each other, and return how each layer asked to mix them.

    Works on the meta device, hence without weights.

    Raises:
        InputError: A layer does not ask exactly once.
    """
    context = RowsApart()
    positions = torch.arange(_NUM_ROWS, device=model.lm_head.weight.device)
    _hidden(model, positions % model.config.vocab_size, positions, context)
    calls = calls_by_layer(model, context.calls)
    return tuple(
        LayerFacts(call.kind, call.num_heads, call.num_key_heads, call.key_size, call.value_size, call.window)
        for call in calls
    )


def calls_by_layer(model: Any, calls: Iterable[MixingCall]) -> list[MixingCall]:
    """The call of each decoder layer in a forward pass.

    Raises:
        InputError: A layer did not mix its tokens through raysp exactly once, so its attention may have run on one rank's
            tokens alone.
    """
    layers = decoder_layers(model)
    layer_of = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    found = {layer_of.get(id(call.module), -1): call for call in calls}
    counts = Counter(layer_of.get(id(call.module), -1) for call in calls)
    for index, layer in enumerate(layers):
        if counts[index] != 1:
            raise InputError(
                f"layer {index} ({type(layer).__name__}) mixed its tokens through raysp {counts[index]} times in a forward "
                "pass; expected once. Such layers are not supported."
            )
    return [found[index] for index in range(len(layers))]


@torch.no_grad()
def check_rows_are_apart(model: Any) -> None:
    """Refuse a model whose rows see each other, or depend on where they lie, by any way but raysp's; needs weights.

    Changing one row may change no other, and rows in another order, with their positions, must give the same results. The
    model is run as it is trained, so dropout and noise in routers show as well.

    Raises:
        InputError: Names the first layer whose rows do.
    """
    device = model.lm_head.weight.device
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    positions = torch.arange(_NUM_ROWS, device=device)
    ids = (7 * positions + 1) % model.config.vocab_size
    changed = ids.clone()
    changed[_CHANGED_ROW] = (ids[_CHANGED_ROW] + 3) % model.config.vocab_size
    others = positions != _CHANGED_ROW

    plain, moved, altered = (
        _layer_outputs(model, rows, where)
        for rows, where in ((ids, positions), (ids[order], positions[order]), (changed, positions))
    )
    logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, attention_context=RowsApart())
    for index, (layer, a, b, c) in enumerate(
        zip([*decoder_layers(model), model.model], plain, moved, altered, strict=True)
    ):
        for difference in ((a[order] - b).abs().max(), (a[others] - c[others]).abs().max()):
            if not difference <= _TOLERANCE * a.abs().max():
                where = f"layer {index}" if index < len(plain) - 1 else "the model"
                raise InputError(
                    f"{where} ({type(layer).__name__}) mixes tokens in its own way, depends on their place in the batch or "
                    "draws random numbers; expected tokens to see each other through attention that raysp runs alone. Such "
                    "layers are not supported."
                )
    expected = plain[-1] @ model.lm_head.weight.T
    if not (logits.logits[0] - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        raise InputError(
            f"{type(model).__name__} changes its logits after the output embedding (a bias, a scale or a soft cap); expected "
            "lm_head alone, of which the loss is formed without ever holding all logits."
        )


def check_calls(model: Any, calls: Iterable[MixingCall]) -> None:
    """The guard of every training pass; see :func:`calls_by_layer`.

    Raises:
        RayspError: A layer was run without raysp, whatever was found when the model was built.
    """
    try:
        calls_by_layer(model, calls)
    except InputError as error:
        raise RayspError(str(error)) from error


def _layer_outputs(model: Any, ids: Tensor, positions: Tensor) -> list[Tensor]:
    """What each decoder layer and the whole decoder return for the rows, each ``[R, E]``."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        outputs.append(_hidden(model, ids, positions, RowsApart()))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _hidden(model: Any, ids: Tensor, positions: Tensor, context: Any) -> Tensor:
    hidden: Tensor = model.model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, attention_context=context
    ).last_hidden_state[0]
    return hidden


def _keeps_state(module: nn.Module) -> bool:
    return bool(_STATE_ARGUMENTS & set(inspect.signature(module.forward).parameters))


def _asks_attention_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())
