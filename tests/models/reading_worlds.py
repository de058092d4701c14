"""Tiny Llamas whose weights are set by hand: where refusal reads harm is known.

A word of the prompt is harmful (``Q``) or harmless (``Z``); every prompt ends in ``!``, which
is t_inst. Attention of one head of one block moves one number:

1. In block 1 the ``!`` reads the word. From layer 1 on t_inst holds harm, in both worlds.
2. In block 3 t_post reads harm: from the ``!`` (``t_inst`` world), or from the word itself
   (``word`` world).

All else attends to the first token, which holds nothing. A reply is ``I`` where t_post holds harm,
``S`` where it holds harmlessness, and ends.
"""

import torch
import transformers
from transformers import AutoModelForCausalLM

from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

WIDTH = 32
HARM, WORD, STOP, LAST, AT_STOP, SINK, AT_LAST, ONE = range(8)
"""What each number of the residual stream is: harm of a word, whether a token is a word, the
``!``, the template's last line end, harm at the ``!``, whether it is the first token, harm at
t_post, and a constant that keeps norms alike."""

FILLER = ("the sea", "a long day", "my old house", "two small birds in it", "rain", "some tea")


def prompts_of(harmful, count, *, refused=None, prefix=""):
    word = "Q" if harmful else "Z"
    refused = harmful if refused is None else refused
    return tuple(
        Prompt(
            f"{prefix}{word} tells me of {FILLER[n % 6]} and {FILLER[(n + n // 6 + 1) % 6]}!",
            id=f"{prefix}{word}{n}",
            harmful=harmful,
            refused=refused,
        )
        for n in range(count)
    )


def reading_world(reads, tokenizer):
    """A model whose t_post reads harm at ``t_inst``, or from the ``word`` itself."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", rope_theta=1e12),
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
    )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        _embed(network, tokenizer)
        _read(network.model.layers[0].self_attn, STOP, WORD, HARM, AT_STOP)
        source = (STOP, AT_STOP) if reads == "t_inst" else (WORD, HARM)
        _read(network.model.layers[2].self_attn, LAST, *source, AT_LAST)
        network.lm_head.weight[_id(tokenizer, "I"), AT_LAST] = 3.0
        network.lm_head.weight[_id(tokenizer, "S"), AT_LAST] = -3.0
        network.lm_head.weight[_id(tokenizer, "<|im_end|>"), ONE] = 1.0
    network.generation_config.eos_token_id = _id(tokenizer, "<|im_end|>")
    return ChatModel(network, tokenizer, source=f"reads-{reads}")


def _id(tokenizer, text):
    (index,) = tokenizer.encode(text, add_special_tokens=False)
    return index


def _embed(network, tokenizer):
    table = network.model.embed_tokens.weight
    table[:, ONE] = 4.0
    for text, harm in (("Q", 1.0), ("Z", -1.0)):
        table[_id(tokenizer, text), HARM] = harm
        table[_id(tokenizer, text), WORD] = 1.0
    table[_id(tokenizer, "!"), STOP] = 1.0
    table[_id(tokenizer, "\n"), LAST] = 1.0
    table[_id(tokenizer, "<|im_start|>"), SINK] = 1.0


def _read(attention, reader, key, value, target):
    """Head 0: tokens that hold ``reader`` attend to those of ``key``; all others to the sink.

    Of rotary pairs, the slowest is used, which does not turn over a few hundred tokens.
    """
    slow = 3
    attention.q_proj.weight[slow, reader] = 12.0
    attention.k_proj.weight[slow, key] = 12.0
    attention.q_proj.weight[slow + 4, ONE] = 1.0
    attention.k_proj.weight[slow + 4, SINK] = 6.0
    attention.v_proj.weight[0, value] = 1.0
    attention.o_proj.weight[target, 0] = 2.0
