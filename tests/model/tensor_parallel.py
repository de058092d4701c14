"""One of several processes that share a model: ``torchrun tensor_parallel.py MODEL OUT``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from latentguard.model.hf import ChatModel
from latentguard.prompts import Prompt
from latentguard.states import States

PROMPTS = [Prompt(f"Tell me of thing {n}" + " and more" * (n % 5), id=str(n)) for n in range(20)]

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = ChatModel.load(sys.argv[1], tp_plan="auto")
    split = [name for name, p in model.model.named_parameters() if hasattr(p, "full_tensor")]
    assert len(split) >= 4 * 7, split
    States.collect(model.capture(PROMPTS)).save(
        Path(sys.argv[2]) / f"{dist.get_rank()}.safetensors"
    )
    dist.destroy_process_group()
