"""Disguises: writing that a reader sees through and that a model's tokens do not.

``uncover`` takes them off, one function each. A function leaves a text alone unless the whole of it
looks disguised: what other scripts, mathematics, code and shouting look like stays as it is, as
far as a rule can tell. What is undone is only ever read besides the text itself.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from functools import cache

import regex
from confusable_homoglyphs import confusables

WORD = regex.compile(r"\w+")
OVERRIDE = re.compile("\u202e([^\u202c\u2069]*)[\u202c\u2069]?")
UNSEEN = regex.compile(
    r"(?<=[\p{Latin}[\p{ASCII}--\d]])[\p{Cf}\p{Mn}]++|(?<!\p{Cf})\p{Cf}++(?=\p{Latin})", regex.V1
)
FOREIGN = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)
BASE64 = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
SENTENCE = re.compile(r"[^.?!:\n]+[.?!:\n]*")
BETWEEN = re.compile(r"^\W*(?=\w*[A-Za-z])(?=\w*[013457])(?!\w*[2689_])[\w@$]+\W*$", re.ASCII)
LETTERS = re.compile(r"[\w@$]+")
CAPITAL, SMALL, RISING = re.compile("[A-Z]"), re.compile("[a-z]"), re.compile("[a-z][A-Z]")
LEET = str.maketrans("013457@$", "oieastas")
COMMON = frozenset("a an and are can do for how i in is it my of on the to what with you".split())
"""Words that hardly any English sentence is without."""
MOVED = frozenset(codecs.encode(word, "rot13") for word in COMMON)


def overrides(text: str) -> str:
    """What stands backwards under a right-to-left override, forwards."""
    return OVERRIDE.sub(lambda found: found[1][::-1], text)


def unseen(text: str) -> str:
    """Without characters of no width, and without marks that make no letter with a Latin one."""
    composed = unicodedata.normalize("NFC", text)
    found = UNSEEN.sub("", composed)
    return text if found == composed else found


def lookalikes(text: str) -> str:
    """Words in letters that look Latin, in Latin letters.

    Those are words that mix Latin letters with others, and whole ones if no word of the text is
    truly of another script.
    """
    words = {word: _latin(word) for word in WORD.findall(text) if not word.isascii()}
    wanted = {word: to for word, to in words.items() if to != word and not FOREIGN.search(to)}
    if any(FOREIGN.search(to) for to in words.values()):
        wanted = {word: to for word, to in wanted.items() if regex.search("[A-Za-z]", word)}
    if not any(len(word) > 2 or regex.search("[A-Za-z]", word) for word in wanted):
        return text
    return unicodedata.normalize("NFKC", WORD.sub(lambda w: wanted.get(w[0], w[0]), text))


def _latin(word: str) -> str:
    return "".join(map(_letter, word))


@cache
def _letter(letter: str) -> str:
    """The ASCII letter that it is a form of (NFKC), or that it looks like (Unicode TR 39)."""
    if letter < "\u0250" or not letter.isalpha():
        return letter
    like = [unicodedata.normalize("NFKC", letter)]
    for known in confusables.is_confusable(letter, preferred_aliases=[]) or ():
        like += [one["c"] for one in known["homoglyphs"]]
    found = next((one for one in like if len(one) == 1 and one.isascii() and one.isalpha()), letter)
    return "I" if found == "l" and letter.isupper() else found  # to TR 39, these are one


def spacing(text: str) -> str:
    """Words whose letters stand apart, put together; two blanks part words then."""
    words = text.split()
    single = sum(len(word) == 1 and word.isalpha() for word in words)
    if len(words) < 8 or single < 0.6 * len(words):
        return text
    return " ".join(regex.sub(r"\s", "", word) for word in regex.split(r"\s{2,}", text.strip()))


def base64_text(text: str) -> str:
    """What base64 in the text says, alone: what stands around it is read with the text itself."""
    said = (_decoded(code) for code in BASE64.findall(text))
    return "\n".join(filter(None, said)) or text


def _decoded(code: str) -> str:
    try:
        text = base64.b64decode(code, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return text if text.isprintable() and " " in text else ""


def rot13(text: str) -> str:
    """The sentences that are English once each letter is moved by 13 places, moved, and alone."""
    sentences = [(_moved(sentence), sentence) for sentence in SENTENCE.findall(text)]
    if not any(moved > 1 for moved, _ in sentences):
        return text
    return codecs.encode("".join(s for moved, s in sentences if moved >= 0), "rot13").strip()


def _moved(sentence: str) -> int:
    """By how much more it looks moved than plain."""
    return _count(sentence, MOVED) - 2 * _count(sentence, COMMON)


def _count(text: str, words: frozenset[str]) -> int:
    return len(words.intersection(text.lower().split()))


def leetspeak(text: str) -> str:
    """Words whose letters are digits that look like them, in letters."""
    words = text.split()
    odd = [word for word in words if len(word) < 40 and BETWEEN.search(word)]
    if len(odd) < 3 or len(odd) < 0.3 * len(words):
        return text
    return LETTERS.sub(lambda found: found[0].translate(LEET), text)


def case(text: str) -> str:
    """Shouting, and upper and lower case by chance, in lower case."""
    capitals, small = len(CAPITAL.findall(text)), len(SMALL.findall(text))
    shouted = capitals >= 20 and capitals > 4 * small
    odd = sum(RISING.search(word) is not None for word in text.split())
    return text.capitalize() if shouted or odd >= max(3, 0.3 * len(text.split())) else text


DISGUISES = {
    "direction override": overrides,
    "unseen characters": unseen,
    "look-alikes": lookalikes,
    "spaced letters": spacing,
    "base64": base64_text,
    "rot13": rot13,
    "leetspeak": leetspeak,
    "case": case,
}
"""In the order in which they are taken off."""

ROUNDS = 4
"""How often, at the most: what one hides, another may hide again."""


def uncover(text: str) -> tuple[str, tuple[str, ...]]:
    """The text beneath, and the names of the disguises; the text itself if there is none."""
    beneath, names = text, dict[str, None]()
    for _ in range(ROUNDS):
        first = beneath
        for name, undone in DISGUISES.items():
            before, beneath = beneath, undone(beneath)
            names |= {name: None} if before != beneath else {}
        if beneath == first:
            break
    return (beneath, tuple(names)) if beneath.strip() and beneath != text else (text, ())
