"""Early exit: calibrate it, and scan prompts of which some leave the pass early.

Axis names in shapes: n prompts, p positions, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.cascade import Cascade
from latentguard.guard.early_exit import EarlyExit, bound_lost
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import prompt_digest, require_unseen
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import PROMPTS_PER_STATES, ChatModel
from latentguard.models.early_exit import capture_staying
from latentguard.probes.probe import Probe
from latentguard.probes.ridge import Design, Ridge
from latentguard.prompts import Prompt, PromptLike, as_prompts
from latentguard.states import Backend, Progress, States, no_progress, progress_bar

STRENGTH = 0.3
"""Ridge penalty of the estimate, in units of the mean eigenvalue of the Gram matrix. Scores have
no noise of labels, so a small one does best. Chosen for the default guard, sets of
``benchmarks/early_exit.py`` in sight."""


def calibrate_early_exit(
    guard: LatentGuard,
    model: ChatModel,
    training: Sequence[Prompt],
    prompts: Sequence[Prompt],
    *,
    max_lost: float,
    confidence: float = 0.95,
    progress: Progress = no_progress,
) -> EarlyExit:
    """Fit the estimate, and set the cut under which prompts leave.

    Args:
        guard: Calibrated, without an early exit.
        model: Its model.
        training: The estimate is fitted on these; labels are not used.
        prompts: Like the traffic to come, harmful ones too; none of ``training``.
        max_lost: Share of the prompts that the whole pass does not allow which may leave.
        confidence: Of the bound.
        progress: Called with the number of prompts just read.

    Raises:
        GuardError: if the guard has not the linear probe, or allows too many of the prompts,
            or was fitted on them.
    """
    require_early_exit(guard, max_lost)
    seen = {prompt_digest(prompt) for prompt in training}
    require_unseen(prompts, [*guard.all_training_digests, *seen])
    read = partial(read_first_layer, guard, model, progress=progress)
    probe = fit_estimate(guard.probe.layers[0], *read(training))
    short = [prompt for prompt in prompts if len(guard.plan(prompt)) == 1]
    states, scores = read(short)
    estimates = probe(states).double().numpy()
    bound = bound_lost(estimates, scores.numpy(), guard.lowest_threshold, max_lost, confidence)
    left = int((estimates < -bound.threshold).sum())
    return EarlyExit(probe, bound, left, len(short), guard.digest)


def require_early_exit(guard: LatentGuard, max_lost: float) -> None:
    """Check that a guard can have an early exit, before its model is loaded.

    Raises:
        GuardError: if it has not the linear probe, or the share does not lie between 0 and 1.
    """
    if not 0 < max_lost < 1:
        raise GuardError(
            f"Expected a share of lost prompts between 0 and 1, such as 0.02; found {max_lost}."
        )
    if guard.probe.kind != "linear":
        raise GuardError(
            "An early exit needs a guard with the linear probe, whose first layer lies at a third "
            f"of the depth; this one has the {guard.probe.kind} probe."
        )


def read_first_layer(
    guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt], *, progress: Progress
) -> tuple[Float[Tensor, "n p d"], Float[Tensor, "n"]]:
    """States at the guard's first layer, and scores of the whole pass."""
    texts = [guard.reading.prepare(prompt) for prompt in prompts]
    parts, scores = list[Tensor](), list[float]()
    batches = model.capture(
        texts,
        positions=guard.positions,
        layers=guard.probe.layers,
        queries=guard.reading.queries,
        progress=progress,
    )
    for states in batches:
        parts.append(states.values[:, :, 0].clone())  # a view would keep all layers
        scores += [one.score for one in guard.measure(states)]
    return torch.cat(parts), torch.tensor(scores)


def fit_estimate(layer: int, states: Float[Tensor, "n p d"], scores: Float[Tensor, "n"]) -> Probe:
    """The ridge that predicts scores of the whole pass from states at a layer."""
    design = Design(states, scores[:, None], torch.ones(len(scores)))
    weight, bias = Ridge(design, STRENGTH).solve()
    return Probe("linear", (layer,), weight[0], float(bias[0]))


def scan_corpus(
    guard: LatentGuard | Cascade,
    backend: Backend,
    prompts: Iterable[PromptLike],
    *,
    progress: Progress | None = None,
) -> Iterator[Verdict]:
    """As ``guard.scan``, but some prompts leave the pass early, if that was calibrated.

    - Several texts are read of a long prompt, a chat and what looks obfuscated: these never leave.
    - A guard with a second opinion reads each prompt whole.

    Raises:
        PromptError: if a prompt is empty or too long.
        GuardError: if a number is not finite (fail closed).
    """
    early = None if isinstance(guard, Cascade) else guard.usable_early_exit
    if isinstance(guard, Cascade) or early is None or not isinstance(backend, ChatModel):
        yield from guard.scan(backend, prompts, progress=progress)
        return
    guard.require_match(backend.fingerprint)
    with progress_bar("scan", prompts, progress) as advance:
        for verdict in _scan_groups(guard, early, backend, as_prompts(prompts)):
            advance(1)
            yield verdict


def _scan_groups(
    guard: LatentGuard, early: EarlyExit, model: ChatModel, prompts: Iterable[Prompt]
) -> Iterator[Verdict]:
    source = iter(prompts)
    while group := list(islice(source, PROMPTS_PER_STATES)):
        plans = [guard.plan(prompt) for prompt in group]
        short = [n for n, variants in enumerate(plans) if len(variants) == 1]
        brief = _short_verdicts(guard, early, model, [group[n] for n in short])
        verdicts = dict(zip(short, brief, strict=True))
        several = [n for n in range(len(group)) if n not in verdicts]
        whole = guard.score_prompts(model, [group[n] for n in several])
        verdicts |= zip(several, (guard.combine(one).verdict for one in whole), strict=True)
        for n in range(len(group)):
            yield verdicts[n]


def _short_verdicts(
    guard: LatentGuard, early: EarlyExit, model: ChatModel, prompts: Sequence[Prompt]
) -> Iterator[Verdict]:
    """Verdicts on prompts of which one text is read."""
    texts = [guard.reading.prepare(prompt) for prompt in prompts]
    read = capture_staying(
        model,
        texts,
        early.probe,
        cut=early.cut,
        positions=guard.positions,
        layers=guard.probe.layers,
        queries=guard.reading.queries,
    )
    states = States(
        read.values,
        tuple(prompts[n] for n in read.numbers),
        guard.positions,
        guard.probe.layers,
        model.fingerprint,
    )
    verdicts = dict(zip(read.numbers, guard.judge(states), strict=True))
    for n, prompt in enumerate(prompts):
        yield verdicts.get(n) or _allowed(guard, prompt, float(read.estimates[n]))


def _allowed(guard: LatentGuard, prompt: Prompt, estimate: float) -> Verdict:
    """The verdict on a prompt that left early."""
    return Verdict(
        id=prompt.id,
        score=estimate,
        probability=guard.probability(estimate),
        flagged=False,
        beliefs={},
        calibrated=guard.bound is not None,
        operating_point=guard.operating_point,
        left_early=True,
    )
