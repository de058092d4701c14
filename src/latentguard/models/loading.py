"""Loading a chat model: number format, placement, quantisation; one sentence if it fails."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentguard.errors import ModelError
from latentguard.models.sources import resolve

PLACEMENT_OPTIONS = {"device_map", "quantization_config"}
"""Options of transformers that decide where the model goes."""

UNLIMITED = 1 << 62
"""Tokens that a model reads whose configuration names no limit."""

SCHEMES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""How weights can be quantised on loading, and the package that does it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as transformers loads it."""

    network: Any
    """The causal LM (an ``nn.Module``)."""

    tokenizer: Any
    """Its tokenizer."""

    scheme: str
    """How it was quantised: a key of ``SCHEMES``; empty if it was not."""


def load_checkpoint(
    source: str | Path, dtype: str, device: str | None, options: dict[str, Any]
) -> Checkpoint:
    """Load a model and its tokenizer; see ``ChatModel.load``.

    Raises:
        ModelError: if it cannot be found or loaded; says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(str(source))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    number, _, scheme = dtype.partition("/")
    if number == "auto":
        number = "float32" if device == "cpu" else "bfloat16"
    try:
        kind = getattr(torch, number)
        if scheme:
            quantized = {"quantization_config": quantization_config(scheme, kind)}
            options = {"device_map": {"": device}} | options | quantized
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **options)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise _load_error(source, error) from error
    is_placed = PLACEMENT_OPTIONS & options.keys() or is_sharded(model)
    return Checkpoint(model if is_placed else model.to(device), tokenizer, scheme)


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer alone, which is quick.

    Raises:
        ModelError: if it cannot be found or loaded; says why.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(str(source)))
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise _load_error(source, error) from error


def _load_error(source: str | Path, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0]
    return ModelError(
        f"'{source}' could not be loaded as a chat model: {reason} Expected a Hub id, a "
        "folder, a GGUF file, or 'default'."
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes have parts of its weights, as with ``tp_plan`` under torchrun."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def context_length(model: Any) -> int:
    """How many tokens a model of transformers reads, prompt and reply together."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED)


def unscaled_length(model: Any) -> int:
    """How many tokens a batch may have before all of it gets other positions (LongRoPE)."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    scaled = [kind for kind in kinds if kind.get("rope_type") in ("longrope", "dynamic")]
    limits = [int(kind.get("original_max_position_embeddings") or UNLIMITED) for kind in scaled]
    return min(limits, default=UNLIMITED)


def cache_argument(model: Any) -> str:
    """What a model calls the cache in its forward and its output: ``cache`` since 5.24."""
    return _cache_argument(type(model).forward)


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def quantization_config(scheme: str, number: torch.dtype) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``; it computes in ``number``.

    Raises:
        ModelError: if there is no such scheme, or its package is missing.
    """
    if scheme not in SCHEMES:
        schemes = " and ".join(SCHEMES)
        raise ModelError(f"There is no quantisation '{scheme}': expected {schemes}.")
    try:
        return _int8_config() if scheme == "int8" else _nf4_config(number)
    except ImportError as error:
        package = SCHEMES[scheme]
        raise ModelError(
            f"Quantising to {scheme} needs {package}: pip install {package} ({error})."
        ) from None


def _int8_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _nf4_config(number: torch.dtype) -> Any:
    import bitsandbytes  # noqa: F401 (transformers says it is missing only while loading)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=number
    )
