"""Fits the confidence of answers on the calibration pages, which share no package with the shipped screens.

    python -m bench.calibrate --cache FOLDER            share right by class, and a fit by cross-validation
    python -m bench.calibrate --cache FOLDER --write    and write src/him/data/calibrator.json
    python -m bench.calibrate --cache FOLDER --wrong    and show every goal answered wrongly

Each page is seen twice, from pixels alone and with its accessibility tree; what was seen is kept in FOLDER by content.
The truth (boxes in goals.jsonl) comes from the DOM. The model is a logistic with a ridge, fitted by Newton's method
with numpy alone; the reported figures are of pages left out of each fit.
"""

import argparse
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.examples import hits
from bench.measure import calibration_error, share, show
from him.adapters.minilm import MiniLmEncoder
from him.adapters.rapidocr import RapidTextReader
from him.config import ACCEPT_CONFIDENCE, OCR_HALO_PX
from him.index import FrameScene, SnapshotRows, row_texts
from him.perception import parse_tree, pins, see
from him.query import Answer, answer, fuse, parse
from him.query.calibrate import FEATURES, Calibrator, features_of, shipped
from him.query.locate import box_shown
from him.query.plan import grid_of
from him.query.score import TIE_MARGIN, Match
from him.query.search import by_meaning, by_words, embed, fuse_scores
from him.types import BlobId, Box, Entry, QueryPlan, Scene, TileKey

PAGES = Path(__file__).parent / "pages" / "calibration"
MODEL = Path(__file__).parent.parent / "src" / "him" / "data" / "calibrator.json"
FOLDS = 5
RIDGE = 1.0
BOOTSTRAPS = 400
BLOB = bytes(32)
SIGN = {
    "lexical": 1, "exact": 1, "part": 0, "labelled": 0, "beside": 0, "role": 1, "role_wrong": -1, "control_unseen": -1,
    "click_unseen": -1, "button_unseen": -1, "heading_unasked": -1, "meaning": 1, "words": 1, "seen": 1,
    "margin": 1, "rivals": -1, "length": 0,
}  # fmt: skip
"""Which way each feature may speak; 0 either."""
SIGNS = np.array([SIGN[name] for name in FEATURES])


class Example(NamedTuple):
    """A goal whose best match stands alone: its features, whether it was right, and the page it belongs to."""

    features: tuple[float, ...]
    right: bool
    page: str
    kind: str


class FolderMemo:
    """`ports.Memo` as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, kind: str, key: bytes) -> Path:
        return self._folder / f"{kind}-{hashlib.sha256(key).hexdigest()[:40]}"

    def get(self, kind: str, key: bytes) -> bytes | None:
        path = self._path(kind, key)
        return path.read_bytes() if path.exists() else None

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            self._path(kind, key).write_bytes(value)


def picture(folder: Path, name: str) -> NDArray[np.uint8]:
    """A page's pixels, (h, w, 3) RGB."""
    return cv2.cvtColor(cv2.imread(str(folder / f"{name}.png")), cv2.COLOR_BGR2RGB)


class Pages:
    """`query.QuerySource` over pictures in a folder."""

    def __init__(self, folder: Path, scenes: Sequence[FrameScene]) -> None:
        self._scenes = scenes
        self._picture = cache(partial(picture, folder))
        self._rows: dict[str | None, SnapshotRows] = {}

    def rows(self, frame: str | None) -> SnapshotRows:
        if frame not in self._rows:
            self._rows[frame] = SnapshotRows.of([one for one in self._scenes if frame in (None, one.frame)])
        return self._rows[frame]

    def entry(self, key: TileKey) -> Entry | None:
        return Entry(BlobId(BLOB), bytes(16))

    def tile_id(self, key: TileKey) -> bytes:
        return BLOB

    def tile(self, key: TileKey) -> NDArray[np.uint8]:
        return self._picture(key.frame)[512 * key.y : 512 * key.y + 512, 512 * key.x : 512 * key.x + 512]


class Still:
    """A clock that stands and a recorder that forgets: quality is measured here, not speed."""

    def now_ns(self) -> int:
        return 1

    def monotonic_ns(self) -> int:
        return 1

    def effect(self, name: str, make: Callable[[], bytes]) -> bytes:
        return make()

    def step(self, name: str, inputs: bytes, output: bytes) -> None:
        pass


def seen(page: Path, folder: Path, reader: RapidTextReader, encoder: MiniLmEncoder, *, tree: bool) -> FrameScene:
    """A page's scene with vectors, from the cache when picture, tree and rules are those of before."""
    nodes = parse_tree(page.with_suffix(".tree.json").read_bytes()) if tree else None
    known = json.dumps([hashlib.sha256(page.read_bytes()).hexdigest(), pins(reader, nodes), encoder.pin()])
    place = folder / f"scene-{hashlib.sha256(known.encode()).hexdigest()[:40]}"
    if place.exists():
        scene = msgspec.json.decode(place.read_bytes(), type=Scene)
    else:
        scene = see(picture(page.parent, page.stem), reader, FolderMemo(folder / "memo"), nodes).scene
        place.write_bytes(msgspec.json.encode(scene))
    texts = row_texts(scene)
    digest = hashlib.sha256(json.dumps([encoder.pin(), texts]).encode()).hexdigest()[:40]
    kept = folder / f"vectors-{digest}.npy"
    if not kept.exists():
        np.save(kept, encoder.encode(texts))
    return FrameScene(page.stem, scene, np.load(kept))


def judged(goal: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether the answer is right: the centre in an accepted box, or the right way of not answering."""
    if goal["class"] in ("absent", "ambiguous"):
        return found["status"] == goal["class"]
    return found["found"] and hits(goal, found["frame"], found["bbox"])


def shown(source: Pages, match: Match) -> Box:
    """The box that would be answered for a match."""
    rows = source.rows(match.frame)
    cells = grid_of(rows.frames[0].scene).cells(match.box.grown(OCR_HALO_PX))
    keys = [TileKey("screen", match.frame, 0, y, x) for y, x in cells]
    blank = QueryPlan("", "", "", match.frame, (), (), ((match.frame, match.box),), ACCEPT_CONFIDENCE, 1)
    state = fuse(blank, {key: source.tile(key) for key in keys}, source, rows=rows)
    return box_shown(state, match)


def example(goal: dict[str, Any], source: Pages, encoder: MiniLmEncoder) -> Example | None:
    """What the model learns from: the best match of a goal, unless it is tied (a tie abstains whatever p is)."""
    asked, rows = parse(goal["goal"]), source.rows(goal["frame"])
    matches: list[Match] = fuse_scores(rows, asked, by_meaning(rows, embed(asked, encoder)), by_words(rows, asked))
    if not matches or (len(matches) > 1 and matches[0].evidence - matches[1].evidence < TIE_MARGIN):
        return None
    best = matches[0]
    right = goal["class"] in ("text", "field") and hits(goal, best.frame, list(shown(source, best)))
    # A goal that names no page and means none is put with the page that answered it.
    return Example(features_of(asked, best, matches[1:]), right, goal["screen"] or best.frame, goal["class"])


def fit(values: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Weights and bias of a logistic on (n, k) features, with a ridge on standardised weights (Newton's method)."""
    mean, spread = values.mean(axis=0), values.std(axis=0)
    spread[spread < 1e-9] = 1.0
    inputs = np.hstack([(values - mean) / spread, np.ones((len(values), 1))])
    weights = np.zeros(inputs.shape[1])
    ridge = np.full(inputs.shape[1], RIDGE)
    ridge[-1] = 1e-6
    for _ in range(60):
        p = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        slope = inputs.T @ (p - right) + ridge * weights
        curve = (inputs * (p * (1 - p))[:, None]).T @ inputs + np.diag(ridge)
        weights -= np.linalg.solve(curve, slope)
    found = weights[:-1] / spread
    return found, float(weights[-1] - found @ mean)


def signed(values: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """`fit` without the features whose weight would have the wrong sign: chance makes such on few pages."""
    use = np.ones(values.shape[1], dtype=bool)
    while True:
        found, bias = fit(values[:, use], right)
        wrong = found * SIGNS[use] < 0
        if not wrong.any():
            weights = np.zeros(values.shape[1])
            weights[use] = found
            return weights, bias
        # The worst alone: dropping it may set others right.
        use[np.flatnonzero(use)[np.argmax(np.abs(found) * wrong)]] = False


def held_out(examples: Sequence[Example]) -> list[float]:
    """Probability of each example from a fit on the other folds; a page is whole in one fold."""
    values = np.array([one.features for one in examples])
    right = np.array([one.right for one in examples], dtype=np.float64)
    fold = np.array([zlib.crc32(one.page.encode()) % FOLDS for one in examples])
    out = np.zeros(len(examples))
    for number in range(FOLDS):
        test = fold == number
        weights, bias = signed(values[~test], right[~test])
        out[test] = 1 / (1 + np.exp(-np.clip(values[test] @ weights + bias, -30, 30)))
    return [float(p) for p in out]


def interval(examples: Sequence[Example], probabilities: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the calibration error, by drawing pages again (seeded)."""
    by_page: dict[str, list[tuple[float, bool]]] = {}
    for one, p in zip(examples, probabilities, strict=True):
        by_page.setdefault(one.page, []).append((p, one.right))
    rng, pages = np.random.default_rng(7), sorted(by_page)
    errors = []
    for _ in range(BOOTSTRAPS):
        drawn = [pages[i] for i in rng.integers(0, len(pages), len(pages))]
        errors.append(calibration_error([pair for page in drawn for pair in by_page[page]]))
    return round(float(np.percentile(errors, 2.5)), 4), round(float(np.percentile(errors, 97.5)), 4)


def answers(goals: Sequence[dict[str, Any]], source: Pages, encoder: MiniLmEncoder, model: Calibrator) -> list[Answer]:
    """Every goal answered without a deadline."""
    still = Still()
    return [
        answer(
            goal["goal"], source, still, still, encoder, frame=goal["frame"], budget_ms=1_000_000,
            snapshot_id="", directory="", calibrator=model,
        )
        for goal in goals
    ]  # fmt: skip


def report(arm: str, goals: Sequence[dict[str, Any]], given: Sequence[Answer], *, wrong: bool) -> None:
    """Print the share right by class, and what was wrong."""
    pairs = list(zip(goals, [one.as_json() for one in given], strict=True))
    for kind in ("text", "field", "absent", "ambiguous"):
        ok = [judged(goal, found) for goal, found in pairs if goal["class"] == kind]
        print(show(share("calibrate", f"{arm}: {kind}", sum(ok), len(ok)), as_json=False))
    sure = [judged(goal, found) for goal, found in pairs if found["status"] == "accepted"]
    print(show(share("calibrate", f"{arm}: accepted that are right", sum(sure), len(sure)), as_json=False))
    if not wrong:
        return
    for goal, found in pairs:
        if not judged(goal, found):
            near = [(c["text"][:30], c["type"], c["bbox"], c["confidence"]) for c in found["candidates"][:3]]
            print(f"  {goal['class']} {goal['goal']!r} {goal['screen']} {goal['boxes'][:2]} → {found['status']} {near}")


def model_of(examples: Sequence[Example], probabilities: Sequence[float], goals: int, pages: int) -> Calibrator:
    """The model fitted on everything, with the figures of the pages left out."""
    right = np.array([float(one.right) for one in examples])
    weights, bias = signed(np.array([one.features for one in examples]), right)
    pairs = [(p, one.right) for one, p in zip(examples, probabilities, strict=True)]
    return Calibrator(
        version=1,
        features=FEATURES,
        weights=tuple(round(float(w), 6) for w in weights),
        bias=round(bias, 6),
        n=len(examples),
        split=f"{FOLDS} folds by page over {pages} pages; error from pages left out",
        ece=round(calibration_error(pairs), 4),
        ece_interval=interval(examples, probabilities),
        provenance=f"bench/calibrate.py on bench/pages/calibration: {goals} goals, seen from pixels and with trees; "
        f"best matches that stand alone; logistic with ridge {RIDGE}",
    )


def main() -> None:
    """Run the goals, fit, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was seen, kept between runs")
    parser.add_argument("--write", action="store_true", help="write the fitted calibrator into the package")
    parser.add_argument("--wrong", action="store_true", help="show the goals answered wrongly")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    goals = [json.loads(line) for line in (args.pages / "goals.jsonl").read_text().splitlines()]
    pictures = sorted(args.pages.glob("*.png"))
    reader, encoder = RapidTextReader(), MiniLmEncoder()
    sources: dict[str, Pages] = {}
    for arm, tree in (("pixels", False), ("tree", True)):
        sources[arm] = Pages(args.pages, [seen(page, args.cache, reader, encoder, tree=tree) for page in pictures])
    examples = [one for source in sources.values() for goal in goals if (one := example(goal, source, encoder))]
    probabilities = held_out(examples)
    model = model_of(examples, probabilities, len(goals), len(pictures))
    for arm, source in sources.items():
        report(arm, goals, answers(goals, source, encoder, model if args.write else shipped()), wrong=args.wrong)
    print(f"fit on {model.n}: ECE {model.ece} {model.ece_interval}, held out")
    for threshold in (0.5, 0.9, ACCEPT_CONFIDENCE):
        ok = [one.right for one, p in zip(examples, probabilities, strict=True) if p >= threshold]
        print(show(share("calibrate", f"held out: right at p ≥ {threshold}", sum(ok), len(ok)), as_json=False))
        possible = sum(one.right for one in examples)
        print(f"         coverage of the {possible} right ones: {sum(ok) / max(1, possible):.3f}")
    for name, weight in zip(FEATURES, model.weights, strict=True):
        print(f"  {name:<16}{weight:>9.3f}")
    print(f"  {'bias':<16}{model.bias:>9.3f}   (all finite: {all(map(math.isfinite, model.weights))})")
    if args.write:
        MODEL.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=1) + b"\n")


if __name__ == "__main__":
    main()
