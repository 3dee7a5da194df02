"""Find by words and by letters: BM25 with the snapshot's own statistics, and trigrams that survive misreadings."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

BM25_K1: Final = 1.2
BM25_B: Final = 0.75
SCORE_SCALE: Final = 1_000_000
"""Scores are integers in millionths."""
GRAM_CHARS_MAX: Final = 200
"""Characters of a text that are cut into trigrams."""

TEXTS_KEPT: Final = 16_384
"""Compared forms kept in memory; they are pure."""

_WORD: Final = re.compile(r"\w+")
_CONFUSABLE: Final = str.maketrans({"0": "o", "1": "l", "i": "l", "|": "l", "!": "l", "ı": "l", "í": "l"})


@lru_cache(maxsize=TEXTS_KEPT)
def plain(text: str) -> str:
    """NFKC, case folded, white space collapsed: the form in which texts are compared."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def words(text: str) -> list[str]:
    """The words of a text in the compared form."""
    return _WORD.findall(plain(text))


@lru_cache(maxsize=TEXTS_KEPT)
def folded(text: str) -> str:
    """The compared form with look-alike characters (O/0, l/1/I) made one, and nothing but letters and digits."""
    return "".join(_WORD.findall(plain(text).translate(_CONFUSABLE)))


def grams(text: str) -> set[str]:
    """Trigrams of the folded text with a mark at either end; also those of one- and two-letter texts."""
    marked = f"\x02{folded(text)[:GRAM_CHARS_MAX]}\x03"
    return {marked[i : i + 3] for i in range(max(1, len(marked) - 2))} if len(marked) > 2 else set()


def _arrays(postings: Mapping[str, list[int]]) -> dict[str, NDArray[np.int32]]:
    return {key: np.array(places, dtype=np.int32) for key, places in postings.items()}


class WordIndex:
    """BM25 (Robertson, k1 = 1.2, b = 0.75) over documents numbered 0…n−1."""

    def __init__(self, texts: Sequence[str]) -> None:
        places: dict[str, list[int]] = {}
        often: dict[str, list[int]] = {}
        lengths: list[int] = []
        for number, text in enumerate(texts):
            counts = Counter(words(text))
            lengths.append(counts.total())
            for word, count in counts.items():
                places.setdefault(word, []).append(number)
                often.setdefault(word, []).append(count)
        self._places = _arrays(places)
        self._often = _arrays(often)
        mean = sum(lengths) / len(lengths) if lengths else 1.0
        size = np.array(lengths, dtype=np.float64) / max(1.0, mean)
        self._norm: NDArray[np.float64] = BM25_K1 * (1 - BM25_B + BM25_B * size)

    def idf(self, word: str) -> float:
        """Weight of a word here: ln(1 + (n − df + ½) / (df + ½))."""
        found = len(self._places.get(word, ()))
        return math.log(1 + (len(self._norm) - found + 0.5) / (found + 0.5))

    def scores(self, query: str) -> NDArray[np.int64]:
        """(n,) BM25 score of every document in millionths."""
        total = np.zeros(len(self._norm), dtype=np.float64)
        for word in sorted(set(words(query))):
            at = self._places.get(word)
            if at is not None:
                often = self._often[word]
                total[at] += self.idf(word) * (BM25_K1 + 1) * often / (often + self._norm[at])
        return np.rint(total * SCORE_SCALE).astype(np.int64)

    def coverage(self, query: str) -> NDArray[np.int64]:
        """(n,) share of the query's words, weighted by idf, that a document holds; in millionths."""
        asked = sorted(set(words(query)))
        whole = math.fsum(self.idf(word) for word in asked)
        total = np.zeros(len(self._norm), dtype=np.float64)
        for word in asked:
            at = self._places.get(word)
            if at is not None:
                total[at] += self.idf(word)
        return np.rint(total / whole * SCORE_SCALE).astype(np.int64) if whole else total.astype(np.int64)


class GramIndex:
    """Overlap of character trigrams with documents of one or more texts, numbered 0…n−1."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        places: dict[str, list[int]] = {}
        sizes: list[int] = []
        for number, document in enumerate(texts):
            sets = [grams(text) for text in document if text]
            sizes.append(sum(len(one) for one in sets))
            for gram in sets[0] if len(sets) == 1 else set[str]().union(*sets):
                places.setdefault(gram, []).append(number)
        self._sizes: NDArray[np.int64] = np.array(sizes, dtype=np.int64)
        self._places = _arrays(places)

    def scores(self, query: str) -> NDArray[np.int64]:
        """(n,) mean of the share of the query's trigrams held and the Dice overlap, in millionths."""
        asked = grams(query)
        hits = np.zeros(len(self._sizes), dtype=np.int64)
        for gram in asked:
            at = self._places.get(gram)
            if at is not None:
                hits[at] += 1
        if not asked:
            return hits
        held = hits * SCORE_SCALE // len(asked)
        dice = 2 * hits * SCORE_SCALE // np.maximum(1, self._sizes + len(asked))
        return (held + dice) // 2
