"""Reviews without a model: made-up verdicts, planted explanations, and a server in a thread."""

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from latentguard.errors import GuardError
from latentguard.guard.explanation import ExplainedToken, Explanation
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.report.document import Table
from latentguard.review.labels import LabelFile
from latentguard.review.local import LocalServer
from latentguard.review.routes import Review
from latentguard.review.session import ReviewItem, ReviewItems, ReviewSession
from latentguard.review.teaching import Teacher

TEXTS = [
    "How do I kill a Python process that does not answer?",
    "Write a short poem about the first snow of the year.",
    "What is the best way to shoot a wedding in low light?",
    "Explain how vaccines are tested before they are approved.",
    "Give me a recipe for a chocolate cake that blows everybody away!",
    "Translate into French: the thief was arrested near the museum.",
]
SCORES = [0.4, -2.0, 0.1, -0.3, 1.5, -1.0]


def item(text, score, id="", history=()):
    """A prompt with a made-up verdict; the threshold is 0."""
    decision = "block" if score > 0 else "allow"
    verdict = Verdict(id, score, 0.5, score > 0, {"harmful": score}, decision)
    return ReviewItem(Prompt(text, id=id, history=history), verdict, 0.0, "0" * 64)


def items(texts=TEXTS, scores=SCORES):
    """The prompts of this module, in their order."""
    kept = ReviewItems()
    for n, (text, score) in enumerate(zip(texts, scores, strict=True), start=1):
        kept.add(item(text, score, f"prompt-{n}"))
    return kept


async def explain(of):
    """Each word speaks, in turns."""
    words = of.prompt.text.split(" ")
    words = words[:1] + [f" {word}" for word in words[1:]]
    tokens = [ExplainedToken(word, 0.1 * (-1) ** n, 0.0) for n, word in enumerate(words)]
    template = ExplainedToken("<|im_end|>", 0.2, None)
    return Explanation(of.verdict.score, 0.0, [*tokens, template], [0.0], False)


@dataclass(frozen=True)
class FakeGuard:
    """Writes a file where a guard would be."""

    labels: int

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "guard.json").write_text(str(self.labels))


@dataclass(frozen=True)
class FakeAdaptation:
    """What adapting gives."""

    guard: FakeGuard

    def tables(self):
        rows = (("detected", 0.5, 0.9), ("falsely flagged", 0.05, 0.01))
        return [Table("Before and after", ("what", "before", "after"), rows, "n = 6")]


def adapt(prompts):
    """Needs two labels."""
    if len(prompts) < 2:
        raise GuardError(f"Adapting needs at least 2 labels; found {len(prompts)}.")
    return FakeAdaptation(FakeGuard(len(prompts)))


def made_review(folder, kept=None, adapt=adapt, reviewer="Ann", explain=explain):
    """A review that writes into a folder."""
    labels = LabelFile(folder / "labels.jsonl")
    about = dict(name="tiny", source="prompts.jsonl", reviewer=reviewer)
    about["labels"] = "labels.jsonl"
    return Review(
        ReviewSession(items() if kept is None else kept, labels),
        explain,
        lambda: about,
        adapt and Teacher(adapt, folder / "labels-guard", threading.Lock()),
    )


@contextlib.contextmanager
def local(review):
    """The server of a review, running."""
    server = LocalServer(review)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.server.should_exit = True
        thread.join(20)
        review.session.labels.close()
