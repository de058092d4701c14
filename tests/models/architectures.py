"""Tiny random models, one for each architecture, built from their configurations."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from latentguard.models.chat_model import ChatModel

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,  # large enough for attention to matter
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=8)),
    "gemma": ("GemmaConfig", dict(head_dim=8)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, sliding_window=16)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8, sliding_window=16)),
    "mistral": ("MistralConfig", dict(sliding_window=16)),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "neox": ("GPTNeoXConfig", dict(num_key_value_heads=None)),
    "gpt2": ("GPT2Config", dict(n_positions=512, num_key_value_heads=None, n_inner=64)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(num_experts=4, **EXPERTS)),
}
"""Four experts and four blocks: the list of blocks must not be confused with one of experts."""

LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
HYBRIDS = {
    "bamba": ("BambaConfig", dict(attn_layer_indices=[1, 3], **MAMBA)),
    "falcon_h1": ("FalconH1Config", dict(mamba_d_ssm=64, head_dim=8, **MAMBA)),
    "lfm2": ("Lfm2Config", dict(full_attn_idxs=[1, 3])),
    "minimax": ("MiniMaxConfig", dict(head_dim=8, num_local_experts=4)),
    "qwen3_5": ("Qwen3_5TextConfig", dict(head_dim=8, **LINEAR)),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(attention_window_size=16, lru_width=32)),
}
"""Blocks that remember other things than keys and values."""

LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
STREAMS = dict(laurel_rank=8, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
ODD = {
    "phi3_long": (
        "Phi3Config",
        dict(original_max_position_embeddings=48, rope_parameters=LONGROPE),
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        dict(head_dim=8, altup_num_inputs=2, activation_sparsity_pattern=None, **STREAMS),
    ),
}
"""Positions that are scaled beyond 48 tokens; blocks that hand on several vectors a token."""


WIDE = dict(hidden_size=64, intermediate_size=128)
"""Matrices whose rows are as long as a block of NF4; bitsandbytes takes no shorter ones."""


def chat_model(architecture, tokenizer, *, dtype=torch.float32, seed=0, **wanted):
    """A ChatModel with random weights; of other sizes where they are given."""
    kind, extra = (ARCHITECTURES | HYBRIDS | ODD)[architecture]
    sizes = SIZES | extra | dict(vocab_size=len(tokenizer)) | wanted
    config = getattr(transformers, kind)(**{k: v for k, v in sizes.items() if v is not None})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return ChatModel(model, tokenizer, source=f"tiny-{architecture}")


def hidden_states(chat_model, ids, **inputs):
    """What Hugging Face itself calls the hidden states of one row: L + 1 tensors [s d]."""
    with torch.no_grad():
        output = chat_model.model(torch.tensor([ids]), output_hidden_states=True, **inputs)
    return [state[0] for state in output.hidden_states]
