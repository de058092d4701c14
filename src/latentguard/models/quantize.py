"""Quantised weights: a model whose linear layers hold what 8 or 4 bits can say, inside a ``with``.

Weights are quantised by bitsandbytes and at once put back in the model's dtype, so any CPU can
compute with them: 8 bits is its int8 format (nearest level, one scale for each output channel), 4
bits its NF4 in blocks of 64. Activations keep their dtype, unlike in LLM.int8. Embeddings and the
output head stay as they are, as in both libraries' defaults. The weights are put back bit for bit.
Sources: Dettmers et al. (2022), LLM.int8; Dettmers et al. (2023), QLoRA.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentguard.errors import ModelError, require_extra
from latentguard.models.chat_model import ChatModel

Bits = Literal[8, 4]


@contextmanager
def quantized_weights(model: ChatModel, bits: Bits) -> Iterator[ChatModel]:
    """The model with weights of 8 or 4 bits, inside a ``with``.

    Raises:
        MissingExtra: if bitsandbytes is not installed.
        ModelError: if the model has no linear layer.
    """
    require_extra("bitsandbytes", "quantize", "Quantising weights")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of kernels that are not needed here
    layers = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    inner = [layer for layer in layers if layer is not model.model.get_output_embeddings()]
    if not inner:
        raise ModelError("This model has no linear layer whose weights could be quantised.")
    before = [layer.weight.detach().cpu().clone() for layer in inner]
    try:
        with torch.no_grad():
            for layer in inner:
                layer.weight.copy_(round_weight(layer.weight, bits))
        yield ChatModel(
            model.model,
            model.tokenizer,
            source=f"{model.source}, {bits}-bit weights",
            template=model.chat.template,
        )
    finally:
        with torch.no_grad():
            for layer, weight in zip(inner, before, strict=True):
                layer.weight.copy_(weight)


def round_weight(weight: Float[Tensor, "out inner"], bits: Bits) -> Float[Tensor, "out inner"]:
    """The weight as that many bits represent it, in its own dtype."""
    from bitsandbytes import functional  # slow to import

    if bits == 4:
        codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        restored: Tensor = functional.dequantize_4bit(codes, state)
        return restored.to(weight.dtype)
    levels, scales, _ = functional.int8_vectorwise_quant(weight.half())
    restored = functional.int8_vectorwise_dequant(levels, scales)
    return restored.to(weight.dtype)
