"""Deobfuscation: decodes writing that a reader sees through and that a model's tokens do not.

``deobfuscate`` gives the decoded texts, with one function for each obfuscation. A function leaves a
text alone unless it looks obfuscated: other scripts, mathematics, code and shouting stay as they
are, as far as a rule can tell. A decoded text is only ever read besides the text itself.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from collections.abc import Callable
from functools import cache

import regex
from confusable_homoglyphs import confusables

RULES = 1
"""Version of the rules; part of a guard's digest."""

PILED = regex.compile(r"(?<=\p{M}{30})\p{M}+")
"""More marks than any script puts on a letter (Unicode's stream-safe text); slow to compose."""
UNSEEN = regex.compile(
    r"(?<=[\p{Latin}[\p{ASCII}--\d]])[[\p{Cf}\p{Cc}\p{DI}\p{Me}\u0334-\u0338]--[\t\n\r]]++"
    r"|(?<!\p{Cf})\p{Cf}++(?=\p{Latin})",
    regex.V1,
)
"""What has no width, or strikes through, where it touches Latin letters."""
PLAIN = re.compile(r"[ -~\t\n\r]*")
LATIN, MARKED = regex.compile(r"\p{Latin}"), regex.compile(r"\p{M}(?<=[\p{Latin}\p{ASCII}]\p{M}+)")
FOREIGN = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)
WORD, ASCII = regex.compile(r"\w+"), re.compile("[A-Za-z]")
OVERRIDE, OVERRIDDEN = re.compile("[\u202c\u202e\u2069]"), re.compile("\u202e([^\u202c\u2069]+)")
APART = re.compile(r"(?<!\S)(?:\S {1,3}){5,}\S(?!\S)")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{20,}")
SENTENCE = re.compile(r"[^.?!:\n]+[.?!:\n]*")
LEETISH = re.compile(r"^\W*(?=[\w@$]*[A-Za-z])(?=[\w@$]*[013457@$])[A-Za-z013457@$]+\W*$", re.ASCII)
RISING = re.compile("[a-z][A-Z]")
LEET, LEET_WORD = str.maketrans("013457@$", "oieastas"), re.compile(r"[\w@$]+")
COMMON = frozenset(
    "a all an and any are can do for from get give how i if in is it make me my not of on out tell "
    "that the this to use what when where which who with write you your".split()
)
"""Words that hardly any English sentence is without."""
ROTATED = frozenset(codecs.encode(word, "rot13") for word in COMMON)


def unseen(text: str) -> str:
    """Without what has no width or strikes through; without marks, if many make no letter."""
    if PLAIN.fullmatch(text):
        return text
    lean = PILED.sub("", text)
    composed = unicodedata.normalize("NFC", lean)
    visible = UNSEEN.sub("", composed)
    marks = MARKED.findall(visible)
    if len(marks) > 3 and 4 * len(marks) > len(LATIN.findall(visible)):
        visible = MARKED.sub("", unicodedata.normalize("NFD", visible))
    return text if visible == composed and lean == text else visible


def forms(text: str) -> str:
    """Letters shaped by typesetting (wide, bold, circled, ...), three or more, as plain ones."""
    if text.isascii():
        return text
    shaped = [letter for letter in text if _form(letter) != letter]
    letters = sum(map(str.isalpha, map(_form, shaped)))
    return "".join(map(_form, text)) if letters > 2 else text


@cache
def _form(letter: str) -> str:
    """The printable ASCII that it is a form of (NFKC)."""
    if letter < "\u0250":
        return letter
    plain = unicodedata.normalize("NFKC", letter)
    return plain if len(plain) == 1 and "!" <= plain <= "~" else letter


def lookalikes(text: str) -> str:
    """Words in letters that look Latin, in Latin letters.

    Those are words that mix Latin letters with others, and whole ones if no word of the text is
    truly of another script.
    """
    if text.isascii():
        return text
    latin = {
        word: "".join(map(_latin_lookalike, word))
        for word in WORD.findall(text)
        if not word.isascii()
    }
    replaced = {w: to for w, to in latin.items() if to != w and not FOREIGN.search(to)}
    mixed = {w: to for w, to in replaced.items() if ASCII.search(w)}
    if any(FOREIGN.search(to) for to in latin.values()):
        replaced = mixed
    if not mixed and not any(len(word) > 2 for word in replaced):
        return text
    return str(WORD.sub(lambda match: replaced.get(match[0], match[0]), text))


@cache
def _latin_lookalike(letter: str) -> str:
    """The ASCII letter that it looks like (Unicode TR 39)."""
    if letter < "\u0250" or not letter.isalpha():
        return letter
    entries = confusables.is_confusable(letter, preferred_aliases=[]) or ()
    lookalikes = (one["c"] for entry in entries for one in entry["homoglyphs"])
    ascii_letters = (one for one in lookalikes if len(one) == 1 and ASCII.match(one))
    lookalike = next(ascii_letters, letter)
    return "I" if lookalike == "l" and letter.isupper() else lookalike  # to TR 39, these are one


def spacing(text: str) -> str:
    """Letters that stand apart, put together where that makes English; two blanks part words."""
    return APART.sub(lambda match: _join_letters(match[0]), text)


def _join_letters(letters: str) -> str:
    words = " ".join("".join(word.split()) for word in re.split(" {2,}", letters))
    return words if _count(words, COMMON) else letters


def leetspeak(text: str) -> str:
    """Words whose letters are digits that look like them, in letters, where that makes English."""
    odd = [word for word in text.split() if len(word) < 40 and LEETISH.search(word)]
    if len(odd) < 3 or not _count(" ".join(odd).translate(LEET), COMMON):
        return text
    return LEET_WORD.sub(lambda match: match[0].translate(LEET), text)


def case(text: str) -> str:
    """Shouting, and capitals by chance, in small letters."""
    words = WORD.findall(text)
    odd = {word.lower(): word for word in words if RISING.search(word)}
    chance = len(odd) > max(2, 0.15 * len(words)) and _capitals("".join(odd.values())) > 0.33
    shouted = sum(map(str.isupper, text)) >= 20 and _capitals(text) > 0.8
    return text.capitalize() if chance or shouted else text


def _capitals(text: str) -> float:
    """Their share of the letters that have a case."""
    upper, lower = sum(map(str.isupper, text)), sum(map(str.islower, text))
    return upper / max(upper + lower, 1)


def overridden(text: str) -> str:
    """What stands under a right-to-left override, as it is seen."""
    return "\n".join(part[::-1] for part in OVERRIDDEN.findall(text))


def in_base64(text: str) -> str:
    """What base64 in the text says."""
    return "\n".join(filter(None, map(_decoded, BASE64.findall(text))))


def _decoded(code: str) -> str:
    try:
        whole = code.translate({45: 43, 95: 47}) + "=" * (-len(code) % 4)
        text = base64.b64decode(whole, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return text if " " in text and all(c.isprintable() or c.isspace() for c in text) else ""


def in_rot13(text: str) -> str:
    """The sentences that are English once each letter is moved by 13 places."""
    sentences = [(_rotated(sentence), sentence) for sentence in SENTENCE.findall(text)]
    if not any(more > 1 for more, _ in sentences):
        return ""
    return codecs.encode("".join(s for more, s in sentences if more >= 0), "rot13").strip()


def _rotated(sentence: str) -> int:
    """By how much more it looks moved than plain."""
    return _count(sentence, ROTATED) - 2 * _count(sentence, COMMON)


def _count(text: str, words: frozenset[str]) -> int:
    return len(words.intersection(text.lower().split()))


Rules = dict[str, Callable[[str], str]]

IN_PLACE: Rules = {
    "unseen characters": unseen,
    "letter forms": forms,
    "look-alikes": lookalikes,
    "spaced letters": spacing,
    "leetspeak": leetspeak,
    "case": case,
}
"""Decoded in place, in this order."""

EMBEDDED: Rules = {
    "direction override": overridden,
    "base64": in_base64,
    "rot13": in_rot13,
}
"""Decoded and read alone: what stands around it is read with the text itself."""

OBFUSCATIONS = (*IN_PLACE, *EMBEDDED)
"""The name of each."""

ROUNDS = 4
"""How often all are tried, at the most: what one hides, another may hide again."""


def deobfuscate(text: str) -> dict[str, tuple[str, ...]]:
    """Each decoded text, and the names of the obfuscations; nothing if the text looks plain.

    Examples:
        >>> deobfuscate("Good m\u200borning to you")
        {'Good morning to you': ('unseen characters',)}
    """
    decoded = [decode_in_place(text)]
    if OVERRIDE.sub("", decoded[0][0]) == OVERRIDE.sub("", text):
        decoded = []  # without its override alone, a text reads to a model as it stands
    visible, _ = decode_in_place(text, "unseen characters", "letter forms")
    for name, decode in EMBEDDED.items():
        if code := decode(text) or decode(visible):
            plain, more = decode_in_place(code)
            decoded.append((plain, (name, *more)))
    return {plain: names for plain, names in decoded if plain.strip() and plain != text}


def decode_in_place(text: str, *only: str) -> tuple[str, tuple[str, ...]]:
    """The text with its obfuscations decoded in place, and their names.

    Args:
        text: Any.
        only: Keys of ``IN_PLACE``; all if there are none.
    """
    names = dict[str, None]()
    for _ in range(ROUNDS):
        first = text
        for name in only or IN_PLACE:
            before = text
            text = IN_PLACE[name](text)
            if text != before:
                names[name] = None
        if text == first:
            break
    return text, tuple(names)
