"""Find by words and by letters: BM25 with the snapshot's own statistics, and trigrams that survive misreadings."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

BM25_K1: Final = 1.2
BM25_B: Final = 0.75
SCORE_SCALE: Final = 1_000_000
"""Scores are integers in millionths."""
GRAM_CHARS_MAX: Final = 200
"""Characters of a text that are cut into trigrams."""

_WORD: Final = re.compile(r"\w+")
_CONFUSABLE: Final = str.maketrans({"0": "o", "1": "l", "i": "l", "|": "l", "!": "l", "ı": "l", "í": "l"})


def plain(text: str) -> str:
    """NFKC, case folded, white space collapsed: the form in which texts are compared."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def words(text: str) -> list[str]:
    """The words of a text in the compared form."""
    return _WORD.findall(plain(text))


def folded(text: str) -> str:
    """The compared form with look-alike characters (O/0, l/1/I) made one, and nothing but letters and digits."""
    return "".join(_WORD.findall(plain(text).translate(_CONFUSABLE)))


def grams(text: str) -> set[str]:
    """Trigrams of the folded text with a mark at either end; also those of one- and two-letter texts."""
    marked = f"\x02{folded(text)[:GRAM_CHARS_MAX]}\x03"
    return {marked[i : i + 3] for i in range(max(1, len(marked) - 2))} if len(marked) > 2 else set()


def _postings(documents: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for number, keys in enumerate(documents):
        for key in keys:
            out.setdefault(key, []).append(number)
    return out


class WordIndex:
    """BM25 (Robertson, k1 = 1.2, b = 0.75) over documents numbered 0…n−1."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        self._counts = counts
        self._lengths: NDArray[np.float64] = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        self._mean = max(1.0, float(self._lengths.mean())) if texts else 1.0
        self._postings = _postings(counts)

    def idf(self, word: str) -> float:
        """Weight of a word here: ln(1 + (n − df + ½) / (df + ½))."""
        found = len(self._postings.get(word, ()))
        return math.log(1 + (len(self._counts) - found + 0.5) / (found + 0.5))

    def scores(self, query: str) -> NDArray[np.int64]:
        """(n,) BM25 score of every document in millionths."""
        total = np.zeros(len(self._counts), dtype=np.float64)
        for word in sorted(set(words(query))):
            places = self._postings.get(word)
            if not places:
                continue
            at = np.array(places, dtype=np.int64)
            tf = np.array([self._counts[i][word] for i in places], dtype=np.float64)
            norm = BM25_K1 * (1 - BM25_B + BM25_B * self._lengths[at] / self._mean)
            total[at] += self.idf(word) * tf * (BM25_K1 + 1) / (tf + norm)
        return np.rint(total * SCORE_SCALE).astype(np.int64)

    def coverage(self, query: str) -> NDArray[np.int64]:
        """(n,) share of the query's words, weighted by idf, that a document holds; in millionths."""
        asked = sorted(set(words(query)))
        whole = math.fsum(self.idf(word) for word in asked)
        total = np.zeros(len(self._counts), dtype=np.float64)
        for word in asked:
            total[np.array(self._postings.get(word, ()), dtype=np.int64)] += self.idf(word)
        return np.rint(total / whole * SCORE_SCALE).astype(np.int64) if whole else total.astype(np.int64)


class GramIndex:
    """Overlap of character trigrams with documents of one or more texts, numbered 0…n−1."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        sets = [[grams(text) for text in document if text] for document in texts]
        self._sizes: NDArray[np.int64] = np.array([sum(len(one) for one in many) for many in sets], dtype=np.int64)
        self._postings = _postings([set[str]().union(*many) for many in sets])

    def scores(self, query: str) -> NDArray[np.int64]:
        """(n,) mean of the share of the query's trigrams held and the Dice overlap, in millionths."""
        asked = grams(query)
        hits = np.zeros(len(self._sizes), dtype=np.int64)
        for gram in asked:
            hits[np.array(self._postings.get(gram, ()), dtype=np.int64)] += 1
        if not asked:
            return hits
        held = hits * SCORE_SCALE // len(asked)
        dice = 2 * hits * SCORE_SCALE // np.maximum(1, self._sizes + len(asked))
        return (held + dice) // 2
