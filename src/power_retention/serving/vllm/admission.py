"""Requests that name states are looked at where they arrive: what cannot be done is refused there, in a sentence.

An ordinary client passes the names as ``extra_body={"vllm_xargs": {"state": "book", "save_state": "book-2"}}``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from power_retention.errors import ArgumentError, PowerRetentionError
from power_retention.models.fingerprint import fingerprint_folder
from power_retention.serving.state_routes import status_of
from power_retention.serving.states import MissingState, StateDirectory, check_fits
from power_retention.serving.vllm.engine import ServingOptions, page_layout
from power_retention.serving.vllm.plugin import ARCHITECTURES
from power_retention.serving.vllm.versions import error_with_status

START, SAVE = "state", "save_state"
"""Fields of a request: the state to start from, and the name under which to keep what was read and written."""

_ADMITTED = "power_retention_job"

OWNER: ContextVar[str] = ContextVar("power_retention_owner", default="")
"""Whose states the request that is being handled may use, see :func:`power_retention.serving.states.owner_of`."""

_promised: dict[Path, None] = {}
"""Where the last requests of this process will save, so that the next may name it before the file is there."""

_MOST_PROMISES = 10_000


@dataclass(frozen=True)
class Job:
    """What a request wants with states, resolved.

    Attributes:
        start: name to start from, or "".
        save: name to save to, or "".
        owner: whose they are.
    """

    start: str
    save: str
    owner: str

    @classmethod
    def of(cls, request: Any) -> Job | None:
        """What an admitted request wants, None where it wants nothing."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        return cls(**extra[_ADMITTED]) if _ADMITTED in extra else None


class Refusal(VLLMValidationError):  # type: ignore[misc]
    """A request that is refused; servers answer all of its kind with the status 400.

    Attributes:
        status: the HTTP status that it should have.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def by(cls, error: PowerRetentionError) -> Refusal:
        """Because of an error of ours."""
        # In a request, a state that is not there is one wrong value among its fields.
        return cls(str(error), 400 if isinstance(error, MissingState) else status_of(error))


def install() -> None:
    """Look at every request that the engine's front end makes, and at every answer that a server gives, once a process."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    original, generate_as_ever = InputProcessor.process_inputs, AsyncLLM.generate
    if getattr(original, "looks_at_states", False):
        return

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if self.vllm_config.model_config.architecture in ARCHITECTURES:
            try:
                check_platform(self.vllm_config, request)
                admit(self.vllm_config, request)
            except PowerRetentionError as error:
                raise Refusal.by(error) from error
        return request

    @wraps(generate_as_ever)
    async def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate_as_ever(self, prompt, sampling_params, *args, **kwargs)
        async with aclosing(outputs):  # or the request of a client that hangs up would go on for a while
            try:
                async for output in outputs:
                    if any(answer.finish_reason == "error" for answer in output.outputs):
                        explain(self.vllm_config, sampling_params)
                    yield output
            except Refusal as refusal:
                if refusal.status == 400:
                    raise
                raise error_with_status(str(refusal), refusal.status) from refusal

    process_inputs.looks_at_states = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs, AsyncLLM.generate = process_inputs, generate


def check_platform(vllm_config: VllmConfig, request: Any) -> None:
    """Refuse what vLLM itself answers wrongly on a CPU.

    Its substitutes for Triton's kernels lose the temperatures of requests with drafts, and its sums over adapters take the last
    adapter for requests that have none.
    """
    params, drafts = request.sampling_params, vllm_config.speculative_config is not None
    if drafts and not HAS_TRITON and params is not None and params.temperature > 0:
        raise ArgumentError(
            f"With speculative decoding vLLM's CPU build cannot draw answers by chance (temperature={params.temperature}): ask "
            "with temperature 0, or serve without --speculative-config."
        )
    if vllm_config.lora_config is not None and request.lora_request is None and current_platform.is_cpu():
        raise ArgumentError(
            "With --enable-lora vLLM's CPU build cannot answer without an adapter: name one as the model, or serve the model "
            "alone."
        )


def admit(vllm_config: VllmConfig, request: Any) -> None:
    """Check the states that a request names, and note in it what the engine is to do.

    Raises:
        ArgumentError: the request cannot be served with them.
        StateError: a state is missing, damaged or of another model, or a name is none.
        FullDirectory: there is no room for what is to be saved.
    """
    params = request.sampling_params
    extra = dict(params.extra_args or {}) if params is not None else {}
    # Nobody but this function says what is admitted.
    extra.pop(_ADMITTED, None)
    start, save = extra.get(START, ""), extra.get(SAVE, "")
    if start or save:
        directory = directory_of(vllm_config, OWNER.get())
        if start:
            _check_start(directory, start, vllm_config)
        if save:
            _check_save(directory, save, params, vllm_config)
        extra[_ADMITTED] = asdict(Job(start, save, OWNER.get()))
    if params is not None and params.extra_args is not None:
        params.extra_args = extra


def explain(vllm_config: VllmConfig, params: Any) -> None:
    """Say why a request with a state failed: the engine tells its front end that it did, and no more.

    Raises:
        Refusal: what is wrong with the state that it was to start from; nothing is raised where it was to start from none.
    """
    start = (params.extra_args or {}).get(START, "")
    if not start or vllm_config.model_config.architecture not in ARCHITECTURES:
        return
    try:
        directory = directory_of(vllm_config, OWNER.get())
        header = directory.verify(start, model=fingerprint_of(vllm_config))
        check_fits(start, header, vllm_config.model_config.hf_config)
    except PowerRetentionError as error:
        raise Refusal.by(error) from error
    raise Refusal(f"The state {start!r} was replaced or deleted while the request waited for its turn; ask again.", 409)


def directory_of(vllm_config: VllmConfig, owner: str) -> StateDirectory:
    """The states that an owner has at this server."""
    options = ServingOptions.of(vllm_config)
    if options.states is None:
        raise ArgumentError(
            'This server keeps no states; start it with --additional-config \'{"power_retention": {"states": "FOLDER"}}\'.'
        )
    return StateDirectory(options.states, max_states=options.max_states, max_bytes=options.max_bytes, owner=owner)


@lru_cache(maxsize=4)
def fingerprint(model: str, revision: str | None, downloads: str | None) -> str:
    """The fingerprint of the model being served, a folder or a name on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, revision=revision, cache_dir=downloads, local_files_only=True))
    return fingerprint_folder(folder)


def fingerprint_of(vllm_config: VllmConfig) -> str:
    """The fingerprint of an engine's model."""
    model = vllm_config.model_config
    return fingerprint(model.model, model.revision, vllm_config.load_config.download_dir)


def _check_start(directory: StateDirectory, name: str, vllm_config: VllmConfig) -> None:
    path = directory.path_of(name)
    try:
        header = directory.verify(name, model=fingerprint_of(vllm_config))
    except MissingState:
        if path in _promised:
            return  # the engine waits for it
        raise
    _promised.pop(path, None)
    check_fits(name, header, vllm_config.model_config.hf_config)


def _check_save(directory: StateDirectory, name: str, params: Any, vllm_config: VllmConfig) -> None:
    if params.n != 1:
        raise ArgumentError(f"{SAVE} keeps one answer, and n={params.n} were asked for: ask for one.")
    if params.stop:
        raise ArgumentError(
            f"{SAVE} cannot be used with stop strings, which are found after more was written than they end: use "
            "stop_token_ids, or max_tokens."
        )
    layout, layers = page_layout(vllm_config), vllm_config.model_config.hf_config.num_hidden_layers
    directory.check_room(name, layers * layout.state_bytes * vllm_config.parallel_config.tensor_parallel_size)
    _promise(directory.path_of(name))


def _promise(path: Path) -> None:
    """The oldest are forgotten: not every name that is saved to is ever started from."""
    _promised.pop(path, None)
    _promised[path] = None
    if len(_promised) > _MOST_PROMISES:
        del _promised[next(iter(_promised))]
