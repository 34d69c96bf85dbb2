"""Where a conversion starts: a pretrained softmax model from a directory, the hub or a GGUF file.

Whatever can be wrong with a source is looked for before its weights are loaded, and refused with one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import mmap
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.conversion.families import CONVERTED_MODEL_TYPES, SUPPORTED_MODEL_TYPES
from power_retention.errors import SourceError

SourceKind = Literal["directory", "hub", "gguf"]

_GGUF_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt")
# Buffers that Llama checkpoints of before 2024 carry and that are recomputed from the configuration.
_RECOMPUTED_WEIGHTS = "rotary_emb.inv_freq"
_HUB_TIMEOUT_S = 10
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


@dataclass(frozen=True)
class Source:
    """A pretrained model, ready to be converted.

    Attributes:
        model: the model in evaluation mode, on the CPU, its weights in the dtype asked for.
        tokenizer: its tokenizer, with the chat template if the source has one.
        name: the directory's name, the hub id, or the GGUF file's name without its ending.
        kind: where it came from.
        fingerprint: of its weights, see ``fingerprint_weights``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    kind: SourceKind
    fingerprint: str


def open_source(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Source:
    """Open a pretrained model: a Hugging Face directory, a GGUF file or a hub id.

    Args:
        source: a path, or a hub id such as ``HuggingFaceTB/SmolLM2-135M``; a path that exists wins over a hub id.
        dtype: the dtype of the weights, whatever the source holds.

    Raises:
        SourceError: nothing is there, it is damaged or incomplete, or its kind of model cannot be converted.
    """
    kind = _source_kind(source)
    path, name = Path(source).expanduser(), str(source)
    if kind == "hub":
        path = _download(name)
    elif kind == "gguf":
        name = path.stem
    else:
        name = path.resolve().name
    with _quiet_transformers():
        model, tokenizer = _open_gguf(path, dtype) if kind == "gguf" else _open_directory(path, str(source), dtype)
    _check_vocabulary(tokenizer, model, str(source))
    model.config._name_or_path = tokenizer.name_or_path = name
    return Source(model, tokenizer, name, kind, fingerprint_weights(model))


def open_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a model directory (converted or not), a GGUF file or a hub id; no weights are read.

    Raises:
        SourceError: nothing is there, or it holds no tokenizer that can be loaded.
    """
    kind, path, where = _source_kind(source), Path(source).expanduser(), str(source)
    with _quiet_transformers(), contextlib.ExitStack() as opened:
        if kind == "directory":
            _check_tokenizer_files(path, where)
        elif kind == "gguf":
            _check_packages(path)
            directory = opened.enter_context(_alone(path))
            opened.enter_context(contextlib.redirect_stderr(io.StringIO()))
        opened.enter_context(_loading("tokenizer", where))
        if kind == "gguf":
            return _gguf_tokenizer(path, directory)
        return AutoTokenizer.from_pretrained(
            path if kind == "directory" else where, local_files_only=kind == "directory"
        )


_PROBE = "It cost 1,234.50 euros — naïve?\n\tdef f(x):  return x**2  # 你好, мир 🙂"


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hex digits that tell tokenizers apart by what they do: vocabulary, end token, and a probe's ids.

    A tokenizer keeps its fingerprint when it is saved and opened again.
    """
    what = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def fingerprint_weights(model: nn.Module) -> str:
    """Sixteen hex digits that change when any weight does.

    SHA-256 over each parameter's name, dtype, shape and bytes as they are in memory: the same model opened in another
    dtype has another fingerprint. One pass over the weights, about a second per GB, and no copy of them.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _source_kind(source: str | Path) -> SourceKind:
    path = Path(source).expanduser()
    if path.is_dir():
        return "directory"
    if path.is_file():
        _check_is_gguf(path)
        return "gguf"
    if isinstance(source, Path) or not _is_plausible_hub_id(source):
        raise SourceError(f"{source} does not exist, and is not a hub id such as 'HuggingFaceTB/SmolLM2-135M'.")
    return "hub"


def _is_plausible_hub_id(name: str) -> bool:
    if name.startswith((".", "~", "/")) or name.endswith((".gguf", ".safetensors", ".bin")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_is_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return
    if path.suffix == ".gguf":
        raise SourceError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'; download it again.")
    raise SourceError(f"{path} is not a model: pass a Hugging Face directory, a GGUF file or a hub id.")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and warnings; what matters in them is checked here and raised."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(what: str, where: str) -> Iterator[None]:
    # Files that pass every check here can still be wrong, and the libraries below raise some thirty classes on them.
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise SourceError(f"The {what} of {where} cannot be loaded: {type(error).__name__}: {reason}") from error


def _download(name: str) -> Path:
    """Fetch a model's files into the hub's cache, its configuration first, so that a wrong kind costs no download."""
    try:
        cached_only = not _hub_answers(name)
        config = Path(hf_hub_download(name, "config.json", local_files_only=cached_only))
        _check_config(_read_json(config, name), name)
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=cached_only))
    except GatedRepoError as error:
        raise SourceError(
            f"{name} is gated: accept its terms on its hub page and log in with 'hf auth login', or pass a directory."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{name} is neither a path here nor a model that the hub shows you.") from error
    except RemoteEntryNotFoundError as error:
        raise SourceError(f"{name} on the hub has no config.json, so it is not a Hugging Face model.") from error
    except OSError as error:
        raise SourceError(
            f"{name} is not a path here, and it could not be fetched from the hub ({type(error).__name__}): "
            "without a connection, pass the path of a local Hugging Face directory or GGUF file."
        ) from error


def _hub_answers(name: str) -> bool:
    """Ask once: downloads retry for half a minute before they look into the cache."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        raise
    except Exception:  # whichever HTTP library the hub's client was built on has its own classes
        return False
    return True


def _open_directory(directory: Path, where: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_config(_read_config(directory, where), where)
    for path in _weight_files(directory, where):
        _check_safetensors(path)
    _check_tokenizer_files(directory, where)
    with _loading("tokenizer", where):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return _load_model(directory, where, dtype, use_safetensors=True), tokenizer


def _check_tokenizer_files(directory: Path, where: str) -> None:
    # transformers 5 makes an empty tokenizer of a directory without one, and one that never merges without merges.txt.
    if not any(all((directory / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        choices = ", ".join(" with ".join(names) for names in _TOKENIZER_FILES)
        raise SourceError(f"{where} has no tokenizer: none of {choices} is there.")


def _read_config(directory: Path, where: str) -> dict[str, Any]:
    path = directory / "config.json"
    if path.is_file():
        return _read_json(path, where)
    files = sorted(directory.glob("*.gguf"))
    hint = f"; pass the file {files[0]} instead" if files else ""
    raise SourceError(f"{where} has no config.json, so it is not a Hugging Face model directory{hint}.")


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path.name} of {where} is not JSON ({error}); download or copy it again.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path.name} of {where} holds a {type(content).__name__} instead of an object.")
    return content


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse every kind of model that cannot be converted."""
    model_type = config.get("model_type")
    supported = ", ".join(SUPPORTED_MODEL_TYPES)
    if model_type in CONVERTED_MODEL_TYPES:
        raise SourceError(f"{where} is already a power-retention model: there is nothing to convert.")
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"{where} is an encoder-decoder model ({model_type}); only decoders can be converted: {supported}."
        )
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise SourceError(f"{where} has model_type {model_type!r}, which cannot be converted; supported: {supported}.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise SourceError(f"{where} has quantised weights ({method}): pass the model that it was quantised from.")


def _weight_files(directory: Path, where: str) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise SourceError(f"{where} has no weights: neither {_WEIGHTS} nor {_INDEX} is there.")
    weight_map = _read_json(directory / _INDEX, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{_INDEX} of {where} names no weight files; download or copy it again.")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise SourceError(f"{where} lacks {', '.join(missing)} of the {len(names)} weight files that its index names.")
    return [directory / name for name in names]


def _check_safetensors(path: Path) -> None:
    # Opening reads the header alone, and compares the lengths it promises with the file's.
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is truncated or damaged ({error}); download or copy it again.") from error


def _load_model(directory: Path, where: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    factory: Any = AutoModelForCausalLM  # typed as if it returned the model alone
    with _loading("model", where):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = factory.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    model, info = loaded
    _check_loading_info(info, where)
    return model


def _check_loading_info(info: Mapping[str, Any], where: str) -> None:
    # transformers fills a missing weight with random numbers and drops one it has no place for, with a mere warning.
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(_RECOMPUTED_WEIGHTS)}
    for names, complaint in (
        (info["missing_keys"], "lacks weights that its configuration asks for"),
        (unexpected, "has weights that its configuration has no place for"),
        ({str(entry) for entry in info["mismatched_keys"]}, "has weights of another shape than its configuration's"),
    ):
        if names:
            raise SourceError(f"{where} {complaint}: {_enumerate(names)}.")


def _enumerate(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, where: str) -> None:
    # Added tokens are not counted: a padding token past the embedding's end is common and never looked up.
    embedded = model.get_input_embeddings().get_parameter("weight").shape[0]
    if not 0 < tokenizer.vocab_size <= embedded:
        raise SourceError(
            f"The tokenizer of {where} has {tokenizer.vocab_size} tokens and its model {embedded}: "
            "they do not belong together."
        )


def _check_packages(path: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SourceError(
                f"Reading {path} takes the package {package!r}, which is not installed: "
                "run 'pip install power-retention[gguf]'."
            )


def _open_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_packages(path)
    _check_gguf(path)
    where = str(path)
    # The reader's own bars and notices go to stderr past transformers' logging.
    with _alone(path) as directory, contextlib.redirect_stderr(io.StringIO()):
        with _loading("tokenizer", where):
            tokenizer = _gguf_tokenizer(path, directory)
        with _loading("configuration", where):
            config = AutoConfig.from_pretrained(directory, gguf_file=path.name)
        model = _load_model(directory, where, dtype, config=config, gguf_file=path.name, **_dequantize_options())
    _forget_quantization(model)
    return model, tokenizer


def _gguf_tokenizer(path: Path, directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer inside; transformers 5.17 takes the token that begins a text for the one that ends it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, gguf_file=path.name)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ends = _read_gguf_header(data, path).metadata.get("tokenizer.ggml.eos_token_id")
    if ends is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends)
    return tokenizer


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A directory with nothing but the file: transformers would prefer the tokenizer.json of a model next to it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / path.name).symlink_to(path.resolve())
        yield Path(directory)


def _dequantize_options() -> dict[str, Any]:
    """Ask for plain weights: where the 'kernels' package is installed transformers would keep them packed."""
    config_class = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config_class(dequantize=True)} if config_class else {}


def _forget_quantization(model: Any) -> None:
    """Clear the marks that make ``save_pretrained`` refuse a model read from a GGUF, whose weights are plain now."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_gguf(path: Path) -> None:
    """Refuse a damaged or truncated GGUF file, and one whose model would not survive the reading."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _read_gguf_header(data, path)
        size = len(data)
    architecture = header.metadata.get("general.architecture")
    _check_config({"model_type": architecture}, str(path))
    if architecture not in _GGUF_MODEL_TYPES:
        raise SourceError(
            f"{path} is a {architecture} model; of those only a Hugging Face directory or hub id can be converted, GGUF files "
            f"of {', '.join(_GGUF_MODEL_TYPES)}."
        )
    end = max((_tensor_end(tensor, header.data_start, path) for tensor in header.tensors), default=header.data_start)
    if end > size:
        raise SourceError(
            f"{path} is truncated: its tensors end at byte {end:,} and the file at {size:,}; download it again."
        )
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise SourceError(f"{path} has no tokenizer inside.")
    if header.metadata.get(f"{architecture}.expert_count"):
        raise SourceError(f"{path} is a mixture of experts, which cannot be converted.")
    _check_gguf_rotary(header, str(architecture), path)


def _check_gguf_rotary(header: _GGUFHeader, architecture: str, path: Path) -> None:
    # transformers drops both without a word, and the model would rotate by other angles than it was trained with.
    scaled = header.metadata.get(f"{architecture}.rope.scaling.type", "none") != "none"
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        raise SourceError(
            f"{path} rescales its rotary angles, which cannot be read from a GGUF: "
            "pass the Hugging Face directory or hub id of the same model."
        )


class _GGUFTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class _GGUFHeader(NamedTuple):
    metadata: dict[str, Any]  # arrays as their length
    tensors: list[_GGUFTensor]
    data_start: int


def _read_gguf_header(data: mmap.mmap, path: Path) -> _GGUFHeader:
    cursor = _GGUFCursor(data, path)
    _, version = cursor.numbers("4sI")
    if version not in (2, 3):
        raise SourceError(f"{path} has GGUF version {version}; versions 2 and 3 can be read.")
    tensor_count, metadata_count = cursor.numbers("QQ")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.text()
        metadata[key] = cursor.value(*cursor.numbers("I"))
    tensors = [_read_gguf_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damage()
    return _GGUFHeader(metadata, tensors, math.ceil(cursor.position / alignment) * alignment)


def _read_gguf_tensor(cursor: _GGUFCursor) -> _GGUFTensor:
    name = cursor.text()
    (dimensions,) = cursor.numbers("I")
    if dimensions > 8:
        raise cursor.damage()
    shape = cursor.numbers(f"{dimensions}Q")
    return _GGUFTensor(name, shape, *cursor.numbers("IQ"))


def _tensor_end(tensor: _GGUFTensor, data_start: int, path: Path) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    except (ValueError, KeyError):
        raise SourceError(
            f"{path} stores {tensor.name} in the unknown format {tensor.type_id}: "
            "the file is damaged, or newer than the installed gguf package."
        ) from None
    return int(data_start + tensor.offset + math.prod(tensor.shape) // block * block_bytes)


class _GGUFCursor:
    """Reads a GGUF header front to back, and never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def damage(self) -> SourceError:
        return SourceError(f"{self.path} is truncated or damaged within its header; download it again.")

    def skip(self, length: int) -> int:
        start = self.position
        if start + length > len(self.data):
            raise self.damage()
        self.position = start + length
        return start

    def numbers(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _GGUF_STRING:
            return self.text()
        if kind == _GGUF_ARRAY:
            return self.array_length()
        if kind not in _GGUF_SCALARS:
            raise self.damage()
        return self.numbers(_GGUF_SCALARS[kind])[0]

    def array_length(self) -> int:
        element, count = self.numbers("IQ")
        if element in _GGUF_SCALARS:
            self.skip(count * struct.calcsize(_GGUF_SCALARS[element]))
        elif element == _GGUF_STRING:
            for _ in range(count):
                self.skip(*self.numbers("Q"))
        else:
            raise self.damage()
        return int(count)
