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


class WeightsDigest:
    """The digest of weights that come one by one, such as while a checkpoint is loaded."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Begin; values are rounded to ``dtype``, as loading does, if it is given."""
        self._dtype = dtype
        self._samples: dict[str, list[tuple[str, bytes]]] = {}

    def add(self, name: str, tensor: Tensor, part: str = "") -> None:
        """Add a tensor, or one of the parts that a quantised one consists of."""
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLE) | 1  # odd, so that it meets every column
        sample = flat[::step].to(self._dtype or flat.dtype).float().cpu().contiguous()
        label = f"{part.removeprefix(name)}{tuple(tensor.shape)}"
        self._samples.setdefault(name, []).append((label, sample.numpy().tobytes()))

    def alias(self, name: str, of: str) -> None:
        """Add a tied tensor, which a checkpoint may leave out."""
        if of in self._samples:
            self._samples[name] = self._samples[of]

    @property
    def digest(self) -> str:
        """SHA-256 over name, shape and up to 8,191 evenly spaced values of every tensor."""
        digest = hashlib.sha256()
        for name, parts in sorted(self._samples.items()):
            for label, sample in parts:
                digest.update(f"{name}{label}".encode())
                digest.update(sample)
        return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """The digest of a model of transformers, whose names are those of its checkpoint.

    Any fine-tune, merge or quantisation changes it. An edit of a few single weights may not, which
    is what a guard's canaries are for. Where the weights lie changes nothing:

    - Weights that are offloaded to memory or disk are fetched one at a time.
    - Weights that are sharded over processes are gathered, so all processes must ask.
    - Of quantised weights the packed parts are read.

    Raises:
        ModelError: if a weight was never loaded.
    """
    weights = WeightsDigest()
    for name, stored in sorted(model.state_dict().items()):
        for part, tensor in _parts(name, _whole(model, name, stored.detach())):
            weights.add(name, tensor, part)
    return weights.digest


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where offloaded ones are fetched to."""
    weight = next(module.parameters())
    hook: Any = getattr(module, "_hf_hook", None)
    return weight.device if weight.device.type != "meta" else torch.device(hook.execution_device)


def _whole(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor"):  # a DTensor, whose shards lie with other processes
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return _fetch(model, name) if tensor.device.type == "meta" else tensor


def _fetch(model: nn.Module, name: str) -> Tensor:
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
