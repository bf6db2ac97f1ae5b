"""A transformers decoder with parallel attention, returning summed losses instead of logits.

The attention of the model is swapped through transformers' ``AttentionInterface``; nothing else of it changes.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from raysp.attention import SequenceLayout, parallel_attention
from raysp.config import ModelConfig
from raysp.errors import InputError, first_line
from raysp.train.loss import summed_cross_entropy

ATTENTION_NAME = "raysp"
# transformers 5 still reads these from older configurations.
_VERSION_4_FIELDS = ("rope_theta", "rope_scaling", "torch_dtype", "architectures", "transformers_version")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class AttentionContext:
    """How the tokens of a forward pass lie on the ranks of a group; handed to every attention layer.

    Not a dataclass: FSDP walks through those among a module's arguments to look for tensors.

    Args:
        layout: The documents and who holds which of their tokens.
        group: Process group of the SP group; ``None`` for degree 1.
        group_rank: This process's place in the group.
        method: Parallel attention method.
        kernel: Block kernel.
    """

    def __init__(self, *, layout: SequenceLayout, group: Any, group_rank: int, method: str, kernel: str) -> None:
        self.layout = layout
        self.group = group
        self.group_rank = group_rank
        self.method = method
        self.kernel = kernel


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_context: AttentionContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls; query ``[1, Hq, T, D]``, key and value ``[1, Hk, T, D]`` -> ``[1, T, Hq, D]``."""
    if attention_context is None or attention_mask is not None or dropout:
        raise InputError(
            "raysp's attention was called without its context, with a mask or with dropout; expected causal packed "
            "documents without dropout. Run the model through raysp.train and set attention_dropout = 0."
        )
    context = attention_context
    num_rows = query.shape[2]
    num_tokens = context.layout.local_tokens(context.group_rank)
    q, k, v = (tensor[0].transpose(0, 1)[:num_tokens] for tensor in (query, key, value))
    out = parallel_attention(
        q,
        k,
        v,
        layout=context.layout,
        group=context.group,
        method=context.method,
        causal=True,
        scale=scaling,
        kernel=context.kernel,
    )
    if num_rows > num_tokens:
        # A rank without tokens runs one dummy row: transformers fails on an empty one.
        out = torch.cat([out, out.new_zeros(num_rows - num_tokens, *out.shape[1:])])
    return out.unsqueeze(0), None


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
        """
        for module in self._recomputing:
            module.gradient_checkpointing = recompute
        hidden = self.model.model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            attention_context=attention_context,
        ).last_hidden_state
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

    if config.path is not None:
        if not Path(config.path).is_dir():
            raise InputError(f"model.path {config.path!r} is not a folder; expected one with config.json and weights.")
        try:
            resolved = AutoConfig.from_pretrained(config.path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read the model in {config.path!r}: {_reason(error)}.") from error
    else:
        table = _config_table(config.config)
        if vocab_size is not None:
            table.setdefault("vocab_size", vocab_size)
        table.setdefault("max_position_embeddings", max_length)
        model_type = table.pop("model_type", None)
        _check_fields(model_type, table)
        try:
            resolved = AutoConfig.for_model(model_type, **table)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"model.config with model_type = {model_type!r} is not understood: {_reason(error)}. "
                "Expected a transformers model type such as 'llama' and its fields."
            ) from error
        except Exception as error:  # huggingface_hub's strict dataclass errors share no public base class
            if type(error).__module__.partition(".")[0] not in ("huggingface_hub", "transformers"):
                raise
            raise InputError(f"model.config does not fit {model_type!r}: {_reason(error)}.") from error
    _check_supported(resolved, vocab_size=vocab_size, max_length=max_length)
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
        InputError: Weights are missing or not safetensors, or the layers cannot be recomputed.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
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
    _allow_recompute(model)
    model.train()
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


def _check_fields(model_type: Any, table: dict[str, Any]) -> None:
    """Refuse fields that the model's configuration does not have; transformers would keep them without a word."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return  # the caller's own error names it
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *_VERSION_4_FIELDS}
    unknown = sorted(set(table) - known)
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


def _check_supported(model_config: Any, *, vocab_size: int | None, max_length: int) -> None:
    name = model_config.model_type
    layer_types = set(getattr(model_config, "layer_types", None) or ["full_attention"])
    sliding = (
        getattr(model_config, "sliding_window", None) if getattr(model_config, "use_sliding_window", True) else None
    )
    if layer_types != {"full_attention"} or sliding is not None:
        raise InputError(
            f"the model {name!r} has layers {sorted(layer_types)} (sliding_window = {sliding}); expected full attention "
            "in every layer. Sequence parallelism for other layers is not supported yet."
        )
    for experts in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(model_config, experts, None):
            raise InputError(
                f"the model {name!r} has {experts} = {getattr(model_config, experts)}; expected a dense model."
            )
    for dropout in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(model_config, dropout, 0.0):
            raise InputError(f"{name!r} has {dropout} = {getattr(model_config, dropout)}; expected 0. Set it to 0.")
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


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".")
