"""The digest of a model's weights, to which a guard is bound."""

from __future__ import annotations

import hashlib

from torch import nn

SAMPLE = 4096
"""Values of each tensor that enter the digest."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, shape and up to 4,096 evenly spaced values of every tensor.

    Any fine-tune, merge or quantisation changes it; an edit of a few single weights may not, which
    is what a guard's canaries are for.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLE) | 1  # odd, so that it meets every column
        sample = flat[::step].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
