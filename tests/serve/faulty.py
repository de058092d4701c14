"""A model that breaks when it is told to, by what the prompt says."""

import time

import torch


class Faulty:
    """Hands everything to a model, but breaks on some prompts."""

    def __init__(self, model):
        self._inner = model

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def capture(self, prompts, **how):
        prompts = list(prompts)
        said = " ".join(prompt.text for prompt in prompts)
        if "BREAK" in said:
            raise RuntimeError("the model broke")
        if "DIE" in said:
            raise SystemExit("the thread ends")
        if "HANG" in said:
            time.sleep(3600)
        if "SLOW" in said:
            time.sleep(0.5)
        for states in self._inner.capture(prompts, **how):
            if "NAN" in said:
                states.values.fill_(torch.nan)
            yield states
