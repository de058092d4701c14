"""Small real tokenizers, trained in memory, with the quirks of those that models ship with.

Byte-level BPE is what ChatML, Llama-3, Phi-4 and DeepSeek models have; sentencepiece-like BPE with
byte fallback is what Llama-2, Mistral, Gemma, Zephyr and Phi-3 models have.
"""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "You are a helpful assistant. Answer the user's question about the system in plain words.",
    "What is the capital of France, and how many people live there today?",
    "Explain how a bicycle stays upright; use short sentences, please.\n\nThank you!",
    "Schreibe ein Gedicht über den Frühling. Qu'est-ce que c'est? ¿Dónde está la casa?",
    "Please write code: for (i = 0; i < 10; i++) { print(i); }\n  return None",
]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The splits of GPT-4, Qwen and Llama-3, nearly."""


def special(*texts, **flags):
    """Added tokens that the tokenizer marks as special."""
    return [AddedToken(text, special=True, normalized=False, **flags) for text in texts]


def ordinary(*texts, **flags):
    """Added tokens that it does not mark: <think>, runs of white space, ..."""
    return [AddedToken(text, special=False, normalized=False, **flags) for text in texts]


def byte_level(template, added, *, bos=None, normalizer=None, ignore_merges=False):
    """A byte-level tokenizer; ``bos`` is put in front when special tokens are asked for."""
    trained = json.loads(_trained_bytes())
    trained["model"]["ignore_merges"] = ignore_merges
    backend = Tokenizer.from_str(json.dumps(trained))
    if normalizer is not None:
        backend.normalizer = normalizer
    return wrapped(backend, template, added, bos=bos)


def sentencepiece(template, added, *, style="llama", bos="<s>", eos="</s>"):
    """A sentencepiece-like tokenizer with byte fallback; special tokens are inside its vocabulary.

    ``style`` says where "▁" goes: ``llama`` in front of each piece between added tokens (legacy),
    ``mistral`` in front of the whole text only, ``gemma`` nowhere.
    """
    backend = Tokenizer.from_str(_trained_pieces(bos, eos))
    decoded = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style != "gemma":  # the blank that was put in front is taken away again
        decoded.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoded)
    if style == "llama":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif style == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return wrapped(backend, template, [*special("<unk>", bos, eos), *added], bos=bos, eos=eos)


def wrapped(backend, template, added=(), *, bos=None, eos=None):
    """The tokenizer as transformers hands it out."""
    backend.add_tokens(list(added))
    if bos is not None:
        start = (bos, backend.token_to_id(bos))
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[start])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _trained_bytes():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return backend.to_str()


@functools.cache
def _trained_pieces(bos, eos):
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", bos, eos, *fallback], show_progress=False
    )
    backend.train_from_iterator([text + "\n▁▁ ▁▁▁▁" for text in SENTENCES * 4], trainer)
    spec = json.loads(backend.to_str())
    return json.dumps(spec | {"added_tokens": [], "pre_tokenizer": None})
