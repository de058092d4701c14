"""A guard on disk: ``guard.json``, ``guard.safetensors`` and a model card, in one folder.

No pickle. The JSON names the digest of the tensors, so that files of two guards cannot be mixed,
and the digest of its own content. A digest notices accidents; against intent there is
``signature``.
torch is imported where tensors are made: ``latentguard show`` reads the rest in a moment.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentguard.errors import GuardError
from latentguard.files import write_all_atomic
from latentguard.models.sources import DEFAULT, DEFAULT_HUB_ID, HUB_ID

if TYPE_CHECKING:
    from torch import Tensor

    from latentguard.guard.signature import VerifyKey

SCHEMA = 3
JSON_FILE, TENSOR_FILE, CARD_FILE = "guard.json", "guard.safetensors", "README.md"
SIGNATURE_FILE = "guard.sig"
POLES = ("positive", "negative")
LIBRARY = "latentguard"
"""The tag by which guards are found on the Hub."""

KEYS = frozenset(
    "schema tensors_sha256 content_sha256 fingerprint reading probe axes threshold bound platt "
    "spread canaries fitted deobfuscation chunking thresholds quadrants categories replies "
    "early_exit queries reference adaptation".split()
)
"""What the JSON of this schema may hold: what a newer version wrote would be dropped unseen."""

OPTIONAL_KEYS = ("queries", "replies", "early_exit", "reference", "adaptation")
"""Keys that are left out where there is nothing: older guards have none of them."""

T = TypeVar("T")

SCORE_RANGE = 20.0
"""Scores lie within so many standard deviations of the canaries' scores."""


def write_folder(
    folder: str | Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str
) -> None:
    """Write a guard: all under temporary names and to the disk, then renamed, the JSON last."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(packed).hexdigest()
    content = {"schema": SCHEMA, "tensors_sha256": digest, **record}
    content["content_sha256"] = content_digest(content)
    write_all_atomic(
        {
            folder / TENSOR_FILE: packed,
            folder / CARD_FILE: card,
            folder / JSON_FILE: json.dumps(content, indent=1),
        }
    )


def content_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of what a guard's JSON holds, but for this digest; spaces and order do not count."""
    rest = {key: value for key, value in record.items() if key != "content_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_folder(
    folder: str | Path, verify_key: VerifyKey | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``write_folder`` wrote.

    Args:
        folder: Of the guard.
        verify_key: What it has to be signed with, if anything.

    Raises:
        GuardError: if a file is missing or damaged, the schema is unknown, the files belong to
            different guards, or the signature is not by the key.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    record, packed = _read_checked(Path(folder), verify_key)
    try:
        return record, load(packed)
    except SafetensorError as error:
        raise GuardError(f"{Path(folder) / TENSOR_FILE} holds no tensors ({error}).") from None


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what JSON holds of a guard; the digest of its tensors is checked.

    Raises:
        GuardError: as ``read_folder``.
    """
    return _read_checked(Path(folder))[0]


def read_card(folder: str | Path, record: Mapping[str, Any]) -> str | None:
    """The model card in a guard's folder, without its YAML.

    None unless it names this guard's weights and threshold.

    Args:
        folder: Of the guard.
        record: What ``read_record`` read there.
    """
    try:
        card = (Path(folder) / CARD_FILE).read_text("utf-8")
        marks = _card_title(record), _card_threshold(record), _card_weights(record)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or a damaged record
        return None
    if not all(mark in card for mark in marks):
        return None
    return card[card.index(marks[0]) :]


def _read_checked(
    folder: Path, verify_key: VerifyKey | None = None
) -> tuple[dict[str, Any], bytes]:
    """The JSON and the packed tensors of a guard: of one schema, and of one guard."""
    packed = _read(folder / TENSOR_FILE)
    text = _read(folder / JSON_FILE)
    if verify_key is not None:
        verify_key.require_signed(folder, text)
    try:
        record = json.loads(text)
    except ValueError:
        raise GuardError(f"{folder / JSON_FILE} is not JSON; fit the guard again.") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise GuardError(
            f"{folder / JSON_FILE} has schema {schema!r}, expected {SCHEMA}: it was written by "
            "another version of latentguard, or is no guard."
        )
    if hashlib.sha256(packed).hexdigest() != record.get("tensors_sha256"):
        raise GuardError(
            f"{folder / TENSOR_FILE} is damaged or belongs to another guard: its digest is not the "
            f"one in {JSON_FILE}. Restore both files, or fit the guard again."
        )
    if record.get("content_sha256", content_digest(record)) != content_digest(record):
        raise GuardError(
            f"{folder / JSON_FILE} was changed after it was written: its digest is not that of its "
            "content. Restore the file, or fit and calibrate the guard again."
        )
    if unknown := set(record) - KEYS:
        raise GuardError(
            f"{folder / JSON_FILE} holds {', '.join(sorted(unknown))}, which this version of "
            "latentguard does not know: it was written by a newer one. Use that."
        )
    return record, packed


def read_optional(record: Any, read: Callable[[Any], T]) -> T | None:
    """What is read of a record; None if there is none."""
    return None if record is None else read(record)


def read_field(
    name: str,
    read: Callable[[Any, dict[str, Tensor]], T],
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> T | None:
    """One part, from its record and its tensors; None if there is none."""
    own_record = record.get(name) if name in OPTIONAL_KEYS else record[name]
    if own_record is None:
        return None
    prefix = f"{name}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    return read(own_record, own)


def require_sound(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check shapes and numbers: an undefined threshold would flag nothing, and say nothing of it.

    Raises:
        ValueError: if a tensor has another shape than the rest says, or a number is not finite.
    """
    import torch

    probe = record["probe"]
    axes = record["axes"]
    rows = len(probe["layers"])
    width = tensors["weight"].shape[-1]
    shapes = {f"{a['name']}.{pole}": (rows, width) for a in axes for pole in POLES}
    shapes["weight"] = rows * len(record["reading"]["positions"]), width
    for name, shape in shapes.items():
        if not rows or tensors[name].shape != shape or not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} is not {shape[0]} x {shape[1]} finite numbers")
    _require_sound_numbers(record)


def _require_sound_numbers(record: Mapping[str, Any]) -> None:
    canaries = record["canaries"]
    if not canaries:
        raise ValueError("there are no canaries, so another model would not be noticed")
    scores = [canary["score"] for canary in canaries]
    threshold = record["threshold"]
    spread = record["spread"]
    numbers = [threshold, spread, record["probe"]["bias"], *record["platt"], *scores]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    if not 0 < spread <= SCORE_RANGE * (max(scores) - min(scores)):
        raise ValueError(f"a spread of {spread:g} is not that of the canaries' scores")
    reach = SCORE_RANGE * spread
    low = min(scores) - reach
    high = max(scores) + reach
    if not low <= threshold <= high:
        raise ValueError(
            f"a threshold of {threshold:g} is out of the range of scores, {low:.3g} to {high:.3g}"
        )
    for number, canary in enumerate(canaries):
        flagged = canary["score"] > threshold
        if canary.get("flagged", flagged) != flagged:
            raise ValueError(f"the decision on canary {number} is not that of the threshold")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GuardError(
            f"{path} cannot be read: {error.strerror}. Expected a guard folder, as written by "
            "'latentguard fit --out FOLDER'."
        ) from None


def _card_title(record: Mapping[str, Any]) -> str:
    return f"# Latent guard for {record['fingerprint']['model']}\n"


def _card_threshold(record: Mapping[str, Any]) -> str:
    return f"- Threshold {record['threshold']:.6g}: "


def _card_weights(record: Mapping[str, Any]) -> str:
    return f"- Bound to weights {record['fingerprint']['weights'][:12]},"


def model_card(record: Mapping[str, Any], *, promise: str, notes: Sequence[str] = ()) -> str:
    """What a guard is and promises, for people.

    Args:
        record: What the guard's JSON holds.
        promise: What its threshold promises.
        notes: Paragraphs on its optional fields.
    """
    model = record["fingerprint"]
    layers = record["probe"]["layers"]
    training = record["fitted"] or {}
    counts = [training.get(side, "an unknown number of") for side in ("harmful", "harmless")]
    silence = "" if record.get("replies") else ", and says nothing of the model's replies"
    return f"""{_card_title(record)}
Reads `{record["reading"]["name"]}` ({", ".join(record["reading"]["positions"])}) at layers
{layers[0]} to {layers[-1]} with the `{record["probe"]["kind"]}` probe.

- Fitted on {counts[0]} harmful and {counts[1]} harmless prompts.
{_card_threshold(record)}{promise}.
{_card_weights(record)} tokenizer {model["tokenizer"][:12]}, chat template
  {model["template"][:12]}, dtype {model["dtype"]}; any other model is refused.
{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes)}
The promise holds for harmless prompts drawn like those that the guard was calibrated on. A guard of
this kind does not stop a determined adversary{silence}.

Made by latentguard; `latentguard show FOLDER` prints its figures.
"""


def _operating_point(record: Mapping[str, Any]) -> str:
    """What the threshold of a calibrated guard was chosen for: its kind."""
    point = (record["thresholds"] or {}).get("operating_point")
    return str(point["goal"]["name"]) if point else "max-fpr"


def card_head(record: Mapping[str, Any], *, license: str | None = None) -> str:
    """The YAML that the Hugging Face Hub reads at the top of a model card.

    Strings are written as JSON, which is YAML, too.
    """
    name = str(record["fingerprint"]["model"])
    base = DEFAULT_HUB_ID if name == DEFAULT else name
    auroc = (record["fitted"] or {}).get("cross_validated_auroc")
    lines = [f"library_name: {LIBRARY}", "pipeline_tag: text-classification"]
    lines.append(f"tags: [{LIBRARY}, safety, guardrail, interpretability]")
    if "/" in base and HUB_ID.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
    if license:
        lines.append(f"license: {json.dumps(license)}")
    if auroc is not None:
        lines.append("metrics: [roc_auc]")
        lines.append(f"cross_validated_auroc: {auroc}")
    if bound := record["bound"]:
        lines.append(f"max_false_positive_rate: {bound['max_fpr']}")
        lines.append(f"operating_point: {json.dumps(_operating_point(record))}")
    return "\n".join(["---", *lines, "---", "", ""])
