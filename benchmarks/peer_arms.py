"""Reading t_inst and t_post at every layer with other libraries: the code that a user writes.

Each peer is two functions: ``load`` makes its handle, once; ``read`` takes one batch of texts and
gives states [b, 2, l, d]. ``peers.py`` sorts the prompts by length, batches them for every peer
alike and sets the tokenizer to pad on the left, which few users do: the peers are shown at their
best.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

os.environ["TQDM_DISABLE"] = "1"


def rendered(tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[list[str], list[int], str]:
    """What every peer needs first: chat texts, both positions from the end, the closing text."""
    ask = dict(tokenize=False, add_generation_prompt=True)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p.text}], **ask) for p in prompts
    ]
    end = texts[0][texts[0].rindex(prompts[0].text) + len(prompts[0].text) :]
    post = len(tokenizer(end, add_special_tokens=False).input_ids)
    return texts, [-1 - post, -1], end


def load_nnsight(model: ChatModel) -> Any:
    """The handle of nnsight."""
    from nnsight import LanguageModel

    return LanguageModel(model.model, tokenizer=model.tokenizer)


def read_nnsight(lm: Any, texts: list[str], back: list[int], end: str) -> Tensor:
    """With nnsight's trace; left early, before the LM head."""
    saved = []
    with torch.no_grad(), lm.trace(texts) as tracer:
        saved.append(lm.model.layers[0].input[:, back].save())
        for layer in lm.model.layers:
            saved.append(layer.output[:, back].save())
        tracer.stop()
    return torch.stack(saved, dim=2)


def load_transformer_lens(model: ChatModel) -> Any:
    """The handle of TransformerLens: its bridge to a transformers model, a copy of its own."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.source, tokenizer=model.tokenizer, dtype=model.model.dtype, device="cpu"
    )


def read_transformer_lens(bridge: Any, texts: list[str], back: list[int], end: str) -> Tensor:
    """With TransformerLens' cache, of these hook points only."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{n}.hook_resid_post" for n in range(bridge.cfg.n_layers)]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(texts, prepend_bos=False, names_filter=names)
    return torch.stack([cache[name][:, back] for name in names], dim=2)


def load_plain(model: ChatModel) -> Any:
    """For libraries that take the model as it is."""
    return model.model, model.tokenizer


def read_steering_vectors(handle: Any, texts: list[str], back: list[int], end: str) -> Tensor:
    """With steering-vectors' recorder, and its own rule for padding."""
    from steering_vectors import record_activations
    from steering_vectors.token_utils import adjust_read_indices_for_padding

    model, tokenizer = handle
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad(), record_activations(model) as record:
        model(**batch)
    places = [torch.full((len(texts),), place) for place in back]
    at = [adjust_read_indices_for_padding(place, batch.attention_mask) for place in places]
    rows, columns = torch.arange(len(texts))[:, None], torch.stack(at, dim=1)
    return torch.stack([record[n][0][rows, columns] for n in sorted(record)], dim=2)


def read_repeng(handle: Any, texts: list[str], back: list[int], end: str) -> Tensor:
    """With repeng's reader, which reads the last token only: two passes."""
    from repeng.extract import batched_get_hiddens

    model, tokenizer = handle
    layers = list(range(model.config.num_hidden_layers))
    both = []
    for cut in ([text.removesuffix(end) for text in texts], texts):
        found = batched_get_hiddens(model, tokenizer, cut, layers, len(cut))
        both.append(torch.stack([torch.from_numpy(found[n]) for n in layers], dim=1))
    return torch.stack(both, dim=1)


def read_hidden_states(handle: Any, texts: list[str], back: list[int], end: str) -> Tensor:
    """With transformers' own ``output_hidden_states``."""
    model, tokenizer = handle
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    return torch.stack([hidden[:, back] for hidden in output.hidden_states], dim=2)


@dataclass(frozen=True)
class Peer:
    """A library, and how it is used."""

    name: str
    package: str
    load: Callable[[ChatModel], Any]
    read: Callable[[Any, list[str], list[int], str], Tensor]
    first: int = 0
    """The first layer that it can read."""

    normed: bool = False
    """Its last layer is after the final norm."""

    @property
    def installed(self) -> bool:
        """Whether this environment has it."""
        return find_spec(self.package) is not None

    @property
    def lines(self) -> int:
        """Lines of user code: loading, finding the positions, reading one batch."""
        return sum(lines_of(part) for part in (rendered, self.load, self.read))


PEERS = (
    Peer("nnsight", "nnsight", load_nnsight, read_nnsight),
    Peer("TransformerLens", "transformer_lens", load_transformer_lens, read_transformer_lens),
    Peer("steering-vectors", "steering_vectors", load_plain, read_steering_vectors, 1),
    Peer("repeng", "repeng", load_plain, read_repeng, 1, True),
    Peer("output_hidden_states", "transformers", load_plain, read_hidden_states, 0, True),
)


def lines_of(function: Any) -> int:
    """Lines of a function's body that hold code."""
    source = inspect.getsource(function)
    body = ast.parse(source).body[0].body
    first = body[1 if function.__doc__ else 0].lineno
    return sum(bool(line.strip()) for line in source.splitlines()[first - 1 :])
