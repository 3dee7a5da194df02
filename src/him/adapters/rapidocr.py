"""Reads text with PP-OCRv6 small (detection and recognition) from the models inside the `rapidocr` wheel.

Only the decoding steps and the model files of `rapidocr` are used; the two ONNX sessions are made here, so that
threads and optimisation are fixed, nothing is ever resized before detection, and no download path exists.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import metadata, util
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol, cast

import cv2
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.errors import MissingPartError

DETECTION_MODEL: Final = "PP-OCRv6_det_small.onnx"
RECOGNITION_MODEL: Final = "PP-OCRv6_rec_small.onnx"
_STRIDE_PX: Final = 32
"""The detector works on multiples of this; a picture is padded up to it, never scaled."""
_LINE_HEIGHT_PX: Final = 48
_LINE_WIDTH_MIN_PX: Final = 320
_LINE_WIDTH_MAX_PX: Final = 4800
_DETECTION: Final[dict[str, Any]] = {
    "thresh": 0.3,
    "box_thresh": 0.5,
    "max_candidates": 3000,
    "unclip_ratio": 1.6,
    "score_mode": "fast",
    "use_dilation": True,
}
_DETECTION_THREADS: Final = 2
_RECOGNITION_WORKERS: Final = 2
"""Crops read side by side on one thread each: 1.2 to 1.4 times faster than one crop on two threads, same bits."""
_OPTIMISATION: Final = "ORT_ENABLE_ALL"
_PACKAGES: Final = ("rapidocr", "onnxruntime", "numpy")

_Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _Boxes(Protocol):
    """The detector's post-processing: probability map (1, 1, h, w) → quads (n, 4, 2) and their scores."""

    def __call__(
        self, pred: NDArray[np.float32], ori_shape: tuple[int, int]
    ) -> tuple[NDArray[np.float32], list[float]]: ...


class _Decode(Protocol):
    """The recogniser's decoding: (n, steps, characters) → n (text, confidence) pairs and their words."""

    def __call__(self, preds: NDArray[np.float32]) -> tuple[list[tuple[str, float]], list[Any]]: ...


class RapidTextReader:
    """`ports.TextReader` on the CPU; loads its 31 MB of models on first use, may be shared between threads.

    Raises:
        MissingPartError: on first use, when `rapidocr` or its models are not installed.
    """

    def __init__(self) -> None:
        self._lock = Lock()

    def pin(self) -> str:
        """Hex BLAKE3 over model bytes, settings, library versions and this module's own text."""
        with self._lock:
            return self._pin

    def detect(self, picture: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        """Quads of text in an (h, w, 3) RGB picture, in picture pixels, sorted top to bottom."""
        height, width = picture.shape[:2]
        if height == 0 or width == 0:
            return []
        with self._lock:
            run, boxes = self._detector
        padded = cv2.copyMakeBorder(
            cv2.cvtColor(picture, cv2.COLOR_RGB2BGR),
            0,
            -height % _STRIDE_PX,
            0,
            -width % _STRIDE_PX,
            cv2.BORDER_REPLICATE,
        )
        values = np.ascontiguousarray(_normal(padded)[np.newaxis])
        quads, _ = boxes(run(values), (padded.shape[0], padded.shape[1]))
        found = [
            [(min(max(int(x), 0), width - 1), min(max(int(y), 0), height - 1)) for x, y in quad]
            for quad in quads.tolist()
        ]
        return sorted(found, key=lambda quad: [(y, x) for x, y in quad])

    def recognise(self, crops: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        """(text, confidence 0…1) of each (h, w, 3) RGB crop.

        Each crop runs by itself: the bits of a result differ between batch sizes and paddings (measured), and a
        remembered result must not depend on its neighbours.
        """
        with self._lock:
            run, decode = self._recogniser
        if len(crops) < _RECOGNITION_WORKERS:
            return [_read(run, decode, crop) for crop in crops]
        with ThreadPoolExecutor(_RECOGNITION_WORKERS) as pool:
            return list(pool.map(partial(_read, run, decode), crops))

    @cached_property
    def _models(self) -> Path:
        spec = util.find_spec("rapidocr")
        if spec is None or spec.origin is None:
            raise MissingPartError("reading text needs the package `rapidocr`", fix="pip install 'him[ocr]'")
        folder = Path(spec.origin).parent / "models"
        for name in (DETECTION_MODEL, RECOGNITION_MODEL):
            if not (folder / name).is_file():
                message = f"the installed `rapidocr` has no model {name}"
                raise MissingPartError(message, place=str(folder), fix="pip install 'rapidocr==3.10.*'")
        return folder

    @cached_property
    def _pin(self) -> str:
        digest = blake3()
        settings = (_STRIDE_PX, _LINE_HEIGHT_PX, _LINE_WIDTH_MIN_PX, _LINE_WIDTH_MAX_PX, sorted(_DETECTION.items()))
        threads = (_DETECTION_THREADS, _RECOGNITION_WORKERS, _OPTIMISATION)
        versions = [(name, metadata.version(name)) for name in _PACKAGES] + [("cv2", cv2.__version__)]
        for part in (
            (self._models / DETECTION_MODEL).read_bytes(),
            (self._models / RECOGNITION_MODEL).read_bytes(),
            repr((settings, threads, versions)).encode(),
            Path(__file__).read_bytes(),
        ):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    @cached_property
    def _detector(self) -> tuple[_Run, _Boxes]:
        run, _ = _session(self._models / DETECTION_MODEL, _DETECTION_THREADS)
        return run, _boxes()

    @cached_property
    def _recogniser(self) -> tuple[_Run, _Decode]:
        run, characters = _session(self._models / RECOGNITION_MODEL, 1)
        return run, _decode(characters)


def _normal(picture: NDArray[Any]) -> NDArray[np.float32]:
    """(h, w, 3) uint8 → (3, h, w) float32 in −1…1, as both models were trained."""
    scale, half = np.float32(1 / 127.5), np.float32(1)
    return picture.astype(np.float32).transpose(2, 0, 1) * scale - half


def _read(run: _Run, decode: _Decode, crop: NDArray[np.uint8]) -> tuple[str, float]:
    """Text and confidence of one (h, w, 3) RGB crop, scaled to 48 px height and padded by its own width alone."""
    height, width = crop.shape[:2]
    if height == 0 or width == 0:
        return "", 0.0
    scaled = min(max(-(-_LINE_HEIGHT_PX * width // height), 1), _LINE_WIDTH_MAX_PX)
    padded = max(_LINE_WIDTH_MIN_PX, scaled + -scaled % _STRIDE_PX)
    line = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), (scaled, _LINE_HEIGHT_PX))
    values = np.zeros((1, 3, _LINE_HEIGHT_PX, padded), dtype=np.float32)
    values[0, :, :, :scaled] = _normal(line)
    results, _ = decode(run(values))
    text, confidence = results[0]
    return text, float(confidence)


def _session(model: Path, threads: int) -> tuple[_Run, list[str]]:
    """A session's run function and the characters listed in the model, if any."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]  # the package ships none; values leave here typed

    library: Any = onnxruntime
    options: Any = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(library.GraphOptimizationLevel, _OPTIMISATION)
    options.log_severity_level = 4
    session: Any = library.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])
    name = str(session.get_inputs()[0].name)
    listed = cast("dict[str, str]", session.get_modelmeta().custom_metadata_map)

    def run(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", session.run(None, {name: values})[0])

    return run, listed.get("character", "").splitlines()


def _boxes() -> _Boxes:
    """The library's post-processing of detection, with its logger silenced."""
    from rapidocr.ch_ppocr_det.utils import DBPostProcess

    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
    return cast("_Boxes", DBPostProcess(**_DETECTION))


def _decode(characters: list[str]) -> _Decode:
    """The library's CTC decoding over the model's own characters, with its logger silenced."""
    from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
    return cast("_Decode", CTCLabelDecode(character=characters))
