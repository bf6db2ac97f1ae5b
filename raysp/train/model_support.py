"""Which transformers models raysp can train, decided from their configuration before any worker starts."""

from __future__ import annotations

import copy
from typing import Any

import torch

from raysp.errors import InputError, first_line
from raysp.train.gated_delta_net import shard_gated_delta_nets
from raysp.train.row_check import LayerFacts, check_layer_modules, record_layers
from raysp.train.sequence_mixing import ATTENTION_NAME, attention_function

_DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout")
_ROUTER_NOISES = ("router_jitter_noise", "input_jitter_noise")
# Values of these at which logits are those of lm_head alone.
_LOGIT_CHANGES = {"final_logit_softcapping": (None, 0), "logit_scale": (None, 1), "logits_scaling": (None, 1)}
# Frequencies that follow the longest position in the batch, which differs from rank to rank.
_ROPE_OF_THE_BATCH = ("dynamic", "longrope")
# What transformers raises where a configuration asks for the impossible.
_FAILURES = (RuntimeError, TypeError, AttributeError, KeyError, ValueError, AssertionError, ImportError)


def prepare_transformers() -> None:
    """Make raysp's attention and models known to transformers; may be called again."""
    from transformers import AttentionInterface

    from raysp.train.linear_llama import register

    AttentionInterface.register(ATTENTION_NAME, attention_function)
    register()


def check_supported(model_config: Any, *, vocab_size: int | None, max_length: int) -> tuple[LayerFacts, ...]:
    """Refuse a model that raysp would train wrongly, or not at all, with the reason.

    The model is built and run once on the meta device, which takes about a second for a large one.

    Args:
        model_config: A transformers configuration.
        vocab_size: Of the dataset.
        max_length: Longest sequence, tokens.

    Returns:
        How each layer mixes tokens.

    Raises:
        InputError: Names the field or layer and what was expected.
    """
    _check_fields(model_config)
    _check_data(model_config, vocab_size=vocab_size, max_length=max_length)
    model = _meta_model(model_config)
    try:
        check_layer_modules(model, own_linear_layers())
        facts = record_layers(model)
    except InputError as error:
        raise InputError(f"the model {model_config.model_type!r} is not supported: {error}") from error
    except _FAILURES as error:
        raise InputError(
            f"the layers of the model {model_config.model_type!r} cannot be run to see how they mix tokens: "
            f"{first_line(error).rstrip('.')}. Expected a decoder like those of the Llama, Qwen or Mistral families."
        ) from error
    if getattr(model.lm_head, "bias", None) is not None:
        raise InputError(
            f"the model {model_config.model_type!r} has a bias in its output embedding; expected none. Such models are not "
            "supported."
        )
    _check_declared(model_config, facts)
    return facts


def own_linear_layers() -> tuple[type[torch.nn.Module], ...]:
    """raysp's own layers of linear attention."""
    from raysp.train.linear_layer import LinearAttention

    return (LinearAttention,)


def _meta_model(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    prepare_transformers()
    try:
        # bf16, since experts' grouped products know no other type there.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config), dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
            )
    except _FAILURES as error:
        raise InputError(
            f"the model {model_config.model_type!r} cannot be built: {first_line(error).rstrip('.')}. Correct its "
            "configuration."
        ) from error
    shard_gated_delta_nets(model)
    return model


def _check_fields(model_config: Any) -> None:
    name = model_config.model_type
    if model_config.get_text_config() is not model_config:
        raise InputError(
            f"{name!r} has a language model beside other parts; expected a language model alone. Use its text model's "
            f"configuration, {model_config.get_text_config().model_type!r}."
        )
    for field in (*_DROPOUTS, *_ROUTER_NOISES):
        if getattr(model_config, field, None):
            raise InputError(f"{name!r} has {field} = {getattr(model_config, field)}; expected 0. Set it to 0.")
    if getattr(model_config, "output_router_logits", False):
        raise InputError(
            f"{name!r} has output_router_logits = True, which asks for the routers' auxiliary loss; expected False: that "
            "loss is no sum over tokens and would depend on how they are planned. Set output_router_logits = false."
        )
    for field, allowed in _LOGIT_CHANGES.items():
        if getattr(model_config, field, None) not in allowed:
            raise InputError(
                f"{name!r} has {field} = {getattr(model_config, field)}; expected {allowed[1]}: the loss is formed of the "
                "output embedding alone. Such models are not supported."
            )
    rope = getattr(model_config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in _ROPE_OF_THE_BATCH:
            raise InputError(
                f"{name!r} has rope_type = {parameters['rope_type']!r}, whose frequencies follow the longest sequence of a "
                "batch; expected one that does not depend on it, such as 'default', 'linear', 'llama3' or 'yarn'."
            )


def _check_data(model_config: Any, *, vocab_size: int | None, max_length: int) -> None:
    if vocab_size is not None and model_config.vocab_size < vocab_size:
        raise InputError(
            f"the model knows {model_config.vocab_size} tokens, the dataset uses {vocab_size}; expected at least as "
            "many. Prepare the data with the model's tokenizer or enlarge vocab_size."
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and longest < max_length:
        raise InputError(
            f"the longest sequence has {max_length} tokens, the model's max_position_embeddings is {longest}; expected "
            "at least as many. Set data.max_length or max_position_embeddings."
        )


def _check_declared(model_config: Any, facts: tuple[LayerFacts, ...]) -> None:
    """What layers ask for must be what the configuration says: transformers may put the difference into a mask."""
    window = getattr(model_config, "sliding_window", None)
    if not getattr(model_config, "use_sliding_window", True):
        window = None
    default = "full_attention" if window is None else "sliding_attention"
    declared = getattr(model_config, "layer_types", None) or [default] * len(facts)
    for index, (layer_type, layer) in enumerate(zip(declared, facts, strict=False)):
        if layer_type != layer.kind or layer.window not in (None, window):
            raise InputError(
                f"layer {index} of {model_config.model_type!r} is declared {layer_type} (sliding_window = {window}) and runs "
                f"as {layer.kind} (window {layer.window}); expected full_attention, sliding_attention or "
                "linear_attention, done as declared. Such layers are not supported."
            )
