"""The digest of a model's weights, to which a guard is bound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentguard.errors import ModelError

SAMPLE = 4096
"""Values of each tensor that enter the digest."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, shape and up to 4,096 evenly spaced values of every tensor.

    Any fine-tune, merge or quantisation changes it; an edit of a few single weights may not, which
    is what a guard's canaries are for. Where the weights lie changes nothing: those that are
    offloaded to memory or disk are fetched one at a time, those that are split over processes are
    gathered (so all processes must ask), and of quantised ones the packed parts are read.

    Raises:
        ModelError: if a weight was never loaded.
    """
    digest = hashlib.sha256()
    for name, kept in sorted(model.state_dict().items()):
        for part, tensor in _parts(name, _whole(model, name, kept.detach())):
            flat = tensor.reshape(-1)
            step = max(1, flat.numel() // SAMPLE) | 1  # odd, so that it meets every column
            sample = flat[::step].float().cpu().contiguous()
            digest.update(f"{part}{tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def reading_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where offloaded ones are fetched to."""
    weight = next(module.parameters())
    hook: Any = getattr(module, "_hf_hook", None)
    return weight.device if weight.device.type != "meta" else torch.device(hook.execution_device)


def _whole(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor"):  # a DTensor, whose shards lie with other processes
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return _fetched(model, name) if tensor.device.type == "meta" else tensor


def _fetched(model: nn.Module, name: str) -> Tensor:
    from accelerate.utils import align_module_device

    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if not hasattr(owner, "_hf_hook"):
        raise ModelError(f"The weight {name} was never loaded, so the model has no fingerprint.")
    with align_module_device(owner, torch.device("cpu")):
        tensor: Tensor = getattr(owner, leaf).detach().clone()
    return tensor


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a quantised one is packed of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()
    for attribute in inner:
        yield from _parts(f"{name}.{attribute}", getattr(tensor, attribute))
