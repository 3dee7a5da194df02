"""How sure a text, perhaps misread, is the text that is asked for. Pure functions."""

from collections import Counter
from typing import Final

from him.index.text import folded, plain, words

FULL: Final = 1000
"""Likeness is per mille."""
EXACT: Final = 940
"""A text match from here on is the same text, up to look-alike characters, spaces and punctuation."""
EDIT_CHARS_MAX: Final = 120
FUZZY_MIN: Final = 550
"""Below this likeness two texts have nothing to do with each other."""
ANOTHER_MAX: Final = 600
"""The best that texts with other digits or another word can reach: "Page 1" and "Page 2" look alike and are never the
same."""
WORD_MIN: Final = 600
"""Likeness that each word of a misread text keeps to its own."""
_ALIKE: Final = str.maketrans(
    {"5": "s", "8": "b", "2": "z", "v": "u", "c": "e", "y": "u", "q": "g", "9": "g", "t": "f"}
)


def _distance(a: str, b: str) -> int:
    """Levenshtein distance, bit-parallel (Myers 1999, Hyyrö's form): one step a character of `b`."""
    if not a:
        return len(b)
    at: dict[str, int] = {}
    for place, char in enumerate(a):
        at[char] = at.get(char, 0) | (1 << place)
    last, full = 1 << (len(a) - 1), (1 << len(a)) - 1
    more, less, distance = full, 0, len(a)
    for char in b:
        same = at.get(char, 0)
        across = (((same & more) + more) ^ more) | same | less
        grown, shrunk = less | ~(across | more), more & across
        distance += 1 if grown & last else -1 if shrunk & last else 0
        grown, shrunk = (grown << 1) | 1, shrunk << 1
        more, less = (shrunk | ~(across | grown)) & full, grown & across & full
    return distance


def _fuzzy(a: str, b: str) -> int:
    """0…1000 likeness of two folded texts, a look-alike letter counting half; 0 below FUZZY_MIN."""
    longest = max(len(a), len(b))
    # Texts without half their letters in common cannot reach FUZZY_MIN: most pairs end here.
    if longest > EDIT_CHARS_MAX or 2 * (Counter(a) & Counter(b)).total() < longest:
        return 0
    cost = _distance(a, b) + _distance(a.translate(_ALIKE), b.translate(_ALIKE))
    likeness = FULL - FULL * cost // (2 * longest)
    return likeness if likeness >= FUZZY_MIN else 0


def inside(target: str, text: str) -> tuple[int, int] | None:
    """(start, end) of `target` in a longer `text` where it stands at word borders; both in the compared form."""
    at = text.find(target) if 0 < len(target) < len(text) else -1
    while at >= 0:
        end = at + len(target)
        before, after = text[at - 1 : at], text[end : end + 1]
        if not (before.isalnum() and target[0].isalnum()) and not (after.isalnum() and target[-1].isalnum()):
            return at, end
        at = text.find(target, at + 1)
    return None


def _has_other_word(target: str, text: str) -> bool:
    """Whether two texts of as many words differ in a whole word: "Close account" is no misread "Create account"."""
    asked, shown = words(target), words(text)
    if len(asked) < 2 or len(asked) != len(shown):
        return False
    pairs = zip(map(folded, asked), map(folded, shown), strict=True)
    return any(a != b and FULL - FULL * _distance(a, b) // max(len(a), len(b)) < WORD_MIN for a, b in pairs)


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def similarity(target: str, text: str) -> int:
    """0…1000: how sure `text`, perhaps misread, is the text `target` asks for."""
    target, text = plain(target), plain(text)
    if not target or not text:
        return 0
    if target == text:
        return FULL
    bare, bare_text = folded(target), folded(text)
    if bare and bare == bare_text:
        return 985 if _digits(target) == _digits(text) else 950
    if not bare or not bare_text:
        return 0
    if bare.replace("rn", "m") == bare_text.replace("rn", "m"):
        return EXACT
    score = min(_fuzzy(bare, bare_text), EXACT - 1)
    if score > ANOTHER_MAX and (_digits(target) != _digits(text) or _has_other_word(target, text)):
        score = ANOTHER_MAX
    if part := inside(target, text):
        score = max(score, (580 if part[0] == 0 else 520) + 320 * len(target) // len(text))
    if inside(text, target):
        score = max(score, 250 + 200 * len(text) // len(target))
    return score
