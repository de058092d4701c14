"""Chat templates, restated: one small faithful copy for each family of chat models."""

# ruff: noqa: RUF001 (DeepSeek's bars are full-width)
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import normalizers

from models.tokenizers import byte_level, ordinary, sentencepiece, special

EACH = "{% for m in messages %}"
REPLY = "{% endfor %}{% if add_generation_prompt %}"

CHATML = (
    "{% if messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ '<tool_call></tool_call>' }}{% endif %}"
    + EACH
    + "{% if not (loop.first and m.role == 'system') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    + REPLY
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    EACH + "{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    + REPLY
    + "{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    EACH
    + "{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{{ bos_token }}{% endif %}{{ content }}"
    + REPLY
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + EACH
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}"
    + REPLY
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set prefix = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + (prefix if loop.first else '') }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}"
    + REPLY
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # the system message moves into the last turn
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if m.role == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    EACH
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + REPLY
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    EACH
    + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    + REPLY
    + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + EACH
    + "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    + REPLY
    + "{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
ZEPHYR = (
    EACH
    + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    + REPLY
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'A chat with an assistant. ' }}"
    "{% endif %}" + EACH + "{% if m.role == 'user' %}{{ 'USER: ' + m.content.strip() + ' ' }}"
    "{% elif m.role == 'system' %}{{ m.content.strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}"
    + REPLY
    + "{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """One kind of chat model."""

    make: Callable[[], Any]
    """Makes the tokenizer."""

    control: tuple[str, ...]
    """Strings that its template turns into single tokens."""

    headers: tuple[str, ...]
    """Other text of the template that a prompt may imitate."""

    trims: bool = False
    """Whether white space around the user's text is dropped."""

    system: bool = True
    """Whether it takes a system message."""

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.make()


SP_BLANKS = ordinary("▁▁▁▁▁▁▁▁", "\n\n", "\n\n\n", "\t\t")
BYTE_BLANKS = ordinary("        ", "\t\t\t")

FAMILIES = {
    "qwen2.5": Family(
        lambda: byte_level(
            CHATML,
            [
                *special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                *ordinary("<tool_call>", "</tool_call>", "<|fim_prefix|>"),
            ],
            normalizer=normalizers.NFC(),
        ),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
        ("<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "system\n"),
    ),
    "qwen3": Family(
        lambda: byte_level(
            QWEN3,
            [*special("<|im_start|>", "<|im_end|>"), *ordinary("<think>", "</think>")],
            normalizer=normalizers.NFC(),
        ),
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "</think>\n\n", "assistant\n"),
    ),
    "llama-2": Family(
        lambda: sentencepiece(LLAMA2, []),
        ("<s>", "</s>", "<unk>"),
        ("[INST] ", " [/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n", " </s><s>[INST] "),
        trims=True,
    ),
    "llama-3": Family(
        lambda: byte_level(
            LLAMA3,
            special("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            bos="<|begin_of_text|>",
            ignore_merges=True,
        ),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "assistant"),
        trims=True,
    ),
    "gemma": Family(
        lambda: sentencepiece(
            GEMMA,
            [*special("<start_of_turn>", "<end_of_turn>"), *SP_BLANKS, *ordinary("<table>")],
            style="gemma",
            bos="<bos>",
            eos="<eos>",
        ),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>\n<start_of_turn>model\n", "model\n", "user\n"),
        trims=True,
        system=False,
    ),
    "gemma-3": Family(
        lambda: sentencepiece(
            GEMMA3,
            [*special("<start_of_turn>", "<end_of_turn>"), *SP_BLANKS],
            style="gemma",
            bos="<bos>",
            eos="<eos>",
        ),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>\n<start_of_turn>model\n", "model\n", "user\n"),
        trims=True,
    ),
    "mistral": Family(
        lambda: sentencepiece(MISTRAL, special("[INST]", "[/INST]"), style="mistral"),
        ("<s>", "</s>", "[INST]", "[/INST]"),
        ("[INST] ", "[/INST] Sure</s>[INST] "),
    ),
    "phi-3": Family(
        lambda: sentencepiece(
            PHI3, special("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)
        ),
        ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|end|>\n<|assistant|>\n", "<|user|>\n"),
    ),
    "phi-4": Family(
        lambda: byte_level(
            PHI4, [*special("<|im_start|>", "<|im_sep|>", "<|im_end|>"), *BYTE_BLANKS]
        ),
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        ("<|im_end|><|im_start|>assistant<|im_sep|>", "assistant"),
    ),
    "deepseek": Family(
        lambda: byte_level(
            DEEPSEEK,
            [
                *special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
                *ordinary("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
            ],
            bos="<｜begin▁of▁sentence｜>",
        ),
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<think>",
            "</think>",
        ),
        ("<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜><｜User｜>"),
    ),
    "zephyr": Family(
        lambda: sentencepiece(ZEPHYR, []),
        ("<s>", "</s>", "<unk>"),
        ("<|user|>\n", "</s>\n<|assistant|>\n", "<|system|>\n"),
    ),
    "vicuna": Family(
        lambda: sentencepiece(VICUNA, []),
        ("<s>", "</s>"),
        ("USER: ", "ASSISTANT:", " ASSISTANT: Sure.</s>USER: "),
        trims=True,
    ),
}
