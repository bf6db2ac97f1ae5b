"""A transformers decoder with parallel attention, returning summed losses instead of logits.

The attention of the model is swapped through transformers' ``AttentionInterface``, Gated DeltaNet layers by their forward
pass; nothing else of it changes.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from raysp.config import ModelConfig
from raysp.errors import InputError, first_line
from raysp.train.gated_delta_net import shard_gated_delta_nets
from raysp.train.loss import summed_cross_entropy
from raysp.train.model_support import check_supported, prepare_transformers
from raysp.train.row_check import check_calls, check_rows_are_apart
from raysp.train.sequence_mixing import ATTENTION_NAME, AttentionContext

# transformers 5 still reads these from older configurations.
_VERSION_4_FIELDS = ("rope_theta", "rope_scaling", "torch_dtype", "architectures", "transformers_version")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class LanguageModelLoss(nn.Module):
    """A causal language model whose forward returns the sum of its token losses.

    FSDP2 roots here, so that the output embedding is whole while the loss is formed.
    """

    def __init__(self, model: Any, *, loss_chunk_tokens: int, loss_kernel: str) -> None:
        super().__init__()
        self.model: Any = model
        self._loss_chunk_tokens = loss_chunk_tokens
        self._loss_kernel = loss_kernel
        self._recomputing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_context: AttentionContext,
        *,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Sum of cross-entropies over the rows of this rank.

        Args:
            input_ids: ``[T]`` tokens of this rank, in its layout's local order.
            position_ids: ``[T]`` position of each inside its document.
            labels: ``[T]`` next token of the same document, ``-100`` where there is none.
            attention_context: The SP group.
            recompute: Keep the inputs of the decoder layers alone and run them again in the backward pass. Ranks of one
                group must agree: their layers communicate both times.

        Returns:
            Scalar.

        Raises:
            RayspError: A layer mixed its tokens in another way than through the context.
        """
        for module in self._recomputing:
            module.gradient_checkpointing = recompute
        hidden = self.model.model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            attention_context=attention_context,
        ).last_hidden_state
        check_calls(self.model, attention_context.calls)
        return summed_cross_entropy(
            hidden[0],
            self.model.lm_head.weight,
            labels,
            chunk_rows=self._loss_chunk_tokens,
            kernel=self._loss_kernel,
        )

    def zero_loss(self, *, every_parameter: bool) -> torch.Tensor:
        """A loss of exactly zero whatever the weights hold, with gradient zero.

        Args:
            every_parameter: Give every parameter a gradient; otherwise one small one, enough to run a backward pass.

        Returns:
            Scalar.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not every_parameter:
            parameters = [min(parameters, key=torch.Tensor.numel)]
        return torch.stack([parameter.flatten()[:0].sum() for parameter in parameters]).sum()


def read_model_config(config: ModelConfig, *, vocab_size: int | None, max_length: int) -> Any:
    """Resolve ``model.path`` or ``model.config`` to a transformers configuration and check that raysp can run it.

    Args:
        config: The ``model`` section.
        vocab_size: Of the dataset's tokenizer; fills a configuration that does not say.
        max_length: Longest sequence, tokens; fills ``max_position_embeddings`` where it is not given.

    Raises:
        InputError: It cannot be read, is not a supported decoder, or does not fit the data.
    """
    from transformers import AutoConfig

    prepare_transformers()
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise InputError(f"model.path {config.path!r} is not a folder; expected one with config.json and weights.")
        try:
            resolved = AutoConfig.from_pretrained(config.path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read the model in {config.path!r}: {_reason(error)}.") from error
    else:
        table = _config_table(config.config)
        model_type = table.pop("model_type", None)
        known = _known_fields(model_type)
        _check_fields(model_type, table, known)
        for field, value in (("vocab_size", vocab_size), ("max_position_embeddings", max_length)):
            if value is not None and (field in known or not known):
                table.setdefault(field, value)
        try:
            resolved = AutoConfig.for_model(model_type, **table)
        except Exception as error:  # huggingface_hub's strict dataclass errors share no public base class
            strict = type(error).__module__.partition(".")[0] in ("huggingface_hub", "transformers")
            if not strict and not isinstance(error, (ValueError, KeyError, TypeError)):
                raise
            if known:
                # A strict dataclass names the field in the first line and what was expected in the next.
                reason = " ".join(str(error).split()).rstrip(".:")
                raise InputError(f"model.config does not fit {model_type!r}: {reason}.") from error
            raise InputError(
                f"model.config with model_type = {model_type!r} is not understood: {_reason(error)}. "
                "Expected a transformers model type such as 'llama' and its fields."
            ) from error
    check_supported(resolved, vocab_size=vocab_size, max_length=max_length)
    return resolved


def model_identity(model_config: Any) -> dict[str, Any]:
    """The fields of a transformers configuration that make it this model: no names, versions or storage types."""
    content = json.loads(model_config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"):
        content.pop(key, None)
    return {key: value for key, value in content.items() if not key.startswith("_")}


def build_model(
    config: ModelConfig, model_config: Any, *, dtype: torch.dtype, device: torch.device, seed: int
) -> nn.Module:
    """Instantiate the model whole on ``device``, equal on every rank: weights from ``model.path`` or from ``seed``.

    Args:
        config: The ``model`` section.
        model_config: From :func:`read_model_config`.
        dtype: Of the stored parameters (the compute type is FSDP's affair).
        device: Where to build it.
        seed: For random weights.

    Returns:
        The model, able to recompute its decoder layers; whether it does is for each forward pass of
        :class:`LanguageModelLoss` to say.

    Raises:
        InputError: Weights are missing or not safetensors, the layers cannot be recomputed, or tokens see each other in ways
            that raysp does not run.
    """
    from transformers import AutoModelForCausalLM

    prepare_transformers()
    torch.manual_seed(seed)
    if config.path is not None:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path,
                output_loading_info=True,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the weights in {config.path!r}: {_reason(error)}.") from error
        model, report = loaded
        wrong = {
            kind: sorted(map(str, report.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected", "mismatched")
        }
        for kind, names in wrong.items():
            if names:
                raise InputError(
                    f"the weights in {config.path!r} do not fit their config.json: {len(names)} {kind} tensors, the first "
                    f"is {names[0]}. Give a complete model of one kind."
                )
        model.to(device)
    else:
        # Drawn in fp32 whatever the dtype, so that runs which differ in it alone start from the same weights.
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=torch.float32, attn_implementation=ATTENTION_NAME, trust_remote_code=False
            )
        model.to(dtype)
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products know no fp64
    shard_gated_delta_nets(model)
    model.train()
    check_rows_are_apart(model)
    _allow_recompute(model)
    result: nn.Module = model
    return result


def _allow_recompute(model: Any) -> None:
    """Give the layers transformers' non-reentrant checkpoint function; their flags are set by each forward pass."""
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"{type(model).__name__} does not support gradient checkpointing; expected a decoder of the Llama family."
        )
    # Renamed in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _known_fields(model_type: Any) -> set[str]:
    """The fields of a model type's configuration; none where transformers does not know the type."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return set()  # the caller's own error names it
    config_class = CONFIG_MAPPING[model_type]
    return {*config_class().to_dict(), *config_class.attribute_map, *_VERSION_4_FIELDS}


def _check_fields(model_type: Any, table: dict[str, Any], known: set[str]) -> None:
    """Refuse fields that the model's configuration does not have; transformers would keep them without a word."""
    unknown = sorted(set(table) - known) if known else []
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(
            f"model.config has the unknown key {unknown[0]!r} for {model_type!r}{hint} Remove or correct it."
        )


def _config_table(config: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(config, dict):
        return dict(config)
    try:
        table = json.loads(Path(str(config)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read model.config {config!r}: {_reason(error)}. Expected a JSON file.") from error
    if not isinstance(table, dict):
        raise InputError(f"model.config {config!r} holds a {type(table).__name__}; expected a JSON object.")
    return table


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".")
