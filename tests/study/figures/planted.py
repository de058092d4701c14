"""A model that says what a rule makes it say, and one that may not be asked."""

from latentguard.prompts import Reply


class Planted:
    """The states of a real model, and replies by a rule: (prompt, intervention) -> text."""

    def __init__(self, model, rule):
        self.model, self.rule = model, rule

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sweep(self, prompts, interventions, *, progress=None, watch=(), **how):
        return [[self._reply(p, one, watch) for p in prompts] for one in interventions]

    def _reply(self, prompt, one, watch):
        """A word that the reply begins with is likely, as any other is not."""
        text = self.rule(prompt, one)
        watched = tuple((word, -1.0 if text.startswith(word) else -5.0) for word in watch)
        return Reply(prompt, text, (0,), True, one.label if one else "", watched)


class Silent:
    """A model that must not be asked anything."""

    def __init__(self, model):
        self.fingerprint, self.depth, self.post = model.fingerprint, model.depth, model.post
