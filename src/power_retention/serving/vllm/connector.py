"""States with names go in and out of pages through vLLM's own interface for what is kept outside the engine.

The scheduler's half says in each step which pages to write to files and which to fill from them; the workers' half does so
before the step computes anything: first what ended requests leave, whose pages may be given away in the same step, then what
new ones start from.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from power_retention.errors import PowerRetentionError, StateError
from power_retention.ops import PowerState
from power_retention.ops.state_file import load_states
from power_retention.serving.states import check_fits, verified
from power_retention.serving.vllm.admission import Job, directory_of, fingerprint_of
from power_retention.serving.vllm.metadata import PowerRetentionMetadata
from power_retention.serving.vllm.mixer import PowerRetentionMixer
from power_retention.serving.vllm.page import BASE, SEEN

logger = init_logger(f"vllm.{__name__}")

SCRATCH_PAGE = 0
"""The page that vLLM gives to nobody."""


@dataclass(frozen=True)
class Load:
    """A page to fill from a file."""

    page: int
    path: Path


@dataclass(frozen=True)
class Save:
    """A page to write to a file.

    Attributes:
        page: of the request that ended.
        job: under which name.
        tokens: of the request, its answer included.
        last: the last of them, which the engine has not read yet.
    """

    page: int
    job: Job
    tokens: int
    last: int


@dataclass
class StateJobs(KVConnectorMetadata):
    """What workers do with states before a step.

    Attributes:
        saves: first,
        loads: then.
        failing: first pages of requests that cannot be served.
    """

    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    failing: set[int] = field(default_factory=set)


class StateConnector(KVConnectorBase_V1, SupportsHMA):
    """Both halves, of which each process has one."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = vllm_config
        self.page_tokens: int = vllm_config.cache_config.mamba_block_size or vllm_config.model_config.max_model_len
        self.pins: dict[str, Path] = {}  # what running requests started from
        self.saving: dict[str, tuple[str, str]] = {}  # under which name of whom requests will save
        self.broken: set[str] = set()  # requests that can never start
        self.salts: dict[str, str] = {}
        self.secret = secrets.token_hex(16)  # nobody's own salt is one of ours
        self.pages: dict[str, Sequence[int]] = {}  # of requests that start in this step
        self.saves: list[Save] = []
        if role == KVConnectorRole.SCHEDULER:
            directory_of(vllm_config, "").remove_remains()
        self.failing: set[int] = set()

    # ── the scheduler's half ─────────────────────────────────────────────────────────────────────────────────────────

    def on_new_request(self, request: Any) -> None:
        """Hold on to what a request starts from, unless it is yet to be written."""
        job = Job.of(request)
        if job is None:
            return
        if job.save:
            self.saving[request.request_id] = (job.save, job.owner)
        if job.start:
            self.salt(request, request.request_id)
            if not self.is_awaited(request, job):
                self.pin(request, job)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Whether a request can start now: (0, …) it can, (None, …) in a later step, (1, True) never."""
        job, name = Job.of(request), request.request_id
        if job is None or not job.start:
            return 0, False
        if name in self.broken:
            return 1, True
        if name in self.pins and not self.pins[name].exists():
            logger.error("Request %s fails: the state %r was removed with its folder.", name, job.start)
            del self.pins[name]
            self.broken.add(name)
            self.salt(request, name)  # or the page by which it fails could be a prefix that others have, too
            return None, False
        if name not in self.pins:
            if not self.is_awaited(request, job):
                self.pin(request, job)
            return None, False
        return 0, False

    def is_awaited(self, request: Any, job: Job) -> bool:
        """Whether a state is yet to be written: by a request that has ended or, where nothing is there, by one that runs."""
        wanted = (job.start, job.owner)
        if any((save.job.save, save.job.owner) == wanted for save in self.saves):
            return True
        if directory_of(self.config, job.owner).path_of(job.start).exists():
            return False
        return any(saved == wanted for other, saved in self.saving.items() if other != request.request_id)

    def pin(self, request: Any, job: Job) -> None:
        """Hold on to the file that a request starts from: thrown out, it starts again from the same."""
        name = request.request_id
        try:
            pinned = directory_of(self.config, job.owner).pin(job.start)
            self.pins[name] = pinned
            header = verified(job.start, pinned, fingerprint_of(self.config))
            check_fits(job.start, header, self.config.model_config.hf_config)
            self.salt(request, header.checksum)
        except PowerRetentionError as error:
            logger.error("Request %s fails: %s", name, error)
            self.broken.add(name)

    def salt(self, request: Any, past: str) -> None:
        """What follows another past is another prefix: what is cached of it serves forks of the same state only."""
        given = (request.cache_salt or "").removesuffix(self.salts.pop(request.request_id, ""))
        self.salts[request.request_id] = f" after {self.secret} {past}"
        request.cache_salt = given + self.salts[request.request_id]
        request.block_hashes.clear()
        request.update_block_hashes()

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which pages a starting request was given."""
        job = Job.of(request)
        if job is None or not job.start:
            return
        (pages,) = blocks.get_block_ids()
        if num_external_tokens:
            self.failing.add(pages[0])
        else:
            self.pages[request.request_id] = pages

    def build_connector_meta(self, scheduler_output: Any) -> StateJobs:
        """What is to be done before this step."""
        jobs = StateJobs(self.saves, [], self.failing)
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        resumed = scheduler_output.scheduled_cached_reqs
        computed |= dict(zip(resumed.req_ids, resumed.num_computed_tokens, strict=True))
        for name, pages in self.pages.items():
            if not computed[name]:
                last = scheduler_output.num_scheduled_tokens[name] - 1
                jobs.loads.append(Load(pages[last // self.page_tokens], self.pins[name]))
        self.pages, self.saves, self.failing = {}, [], set()
        return jobs

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Note what an ended request leaves; its page stays as it is until the workers have seen to it."""
        self.saving.pop(request.request_id, None)
        self.salts.pop(request.request_id, None)
        self.broken.discard(request.request_id)
        if request.request_id in self.pins:
            self.pins.pop(request.request_id).unlink(missing_ok=True)
        job = Job.of(request)
        whole = request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
        if job is not None and job.save and whole and block_ids and request.num_output_tokens:
            self.saves.append(Save(block_ids[-1], job, request.num_tokens, request.output_token_ids[-1]))
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """All layers are one group."""
        return self.request_finished(request, block_ids[0] if block_ids else [])

    # ── the workers' half ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def layers(self) -> dict[str, PowerRetentionMixer]:
        """Our layers by name, in order."""
        return self.config.compilation_config.static_forward_context  # type: ignore[no-any-return]

    @torch.no_grad()
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Called first in every step, before any page is written to."""
        for save in kv_connector_metadata.saves:
            try:
                self.save(save)
            except (PowerRetentionError, OSError) as error:
                logger.error("The state %r was not saved: %s", save.job.save, error)
        for load in kv_connector_metadata.loads:
            self.load(load)

    def save(self, save: Save) -> None:
        """Write what a request read and wrote, its last token included, to a file."""
        states, seen, wanted = self.read_all(save)
        if seen != wanted:
            raise StateError(f"its page had read {seen} tokens where {wanted} were expected.")
        states = [_of_all_workers(state) for state in states]
        if get_tensor_model_parallel_rank() == 0:
            directory = directory_of(self.config, save.job.owner)
            directory.save(save.job.save, states, model=fingerprint_of(self.config), tokens_seen=seen)

    def read_all(self, save: Save) -> tuple[list[PowerState], int, int]:
        """States that have read the whole request, the tokens that were read, and those that there are."""
        layers = list(self.layers.values())
        base, seen = (int(layers[0].pages.record[save.page, place]) for place in (BASE, SEEN))
        wanted = base + save.tokens
        untrue = max(0, seen - (wanted - 1))  # drafts that were rejected, or stand behind the end of the answer
        states, seen = [layer.take(save.page, untrue) for layer in layers], seen - untrue
        if seen == wanted - 1:
            # The page may be a cached prefix by now: the last token is read in another.
            for layer, state in zip(layers, states, strict=True):
                layer.put(SCRATCH_PAGE, state, seen, whole=False)
            self.read_one(save.last)
            states, seen = [layer.take(SCRATCH_PAGE) for layer in layers], seen + 1
        return states, seen, wanted

    def read_one(self, token: int) -> None:
        """Let the model read one token on from the scratch page."""
        first = next(iter(self.layers.values()))
        device = first.pages.record.device
        metadata = PowerRetentionMetadata.of_one_token(SCRATCH_PAGE, device)
        model = first.model()
        assert model is not None
        with set_forward_context(dict.fromkeys(self.layers, metadata), self.config, num_tokens=1, skip_compiled=True):
            model(torch.tensor([token], device=device), torch.zeros(1, dtype=torch.long, device=device))

    def load(self, load: Load) -> None:
        """Fill a page from a file that the scheduler has checked."""
        states, header = load_states(load.path, verify=False)
        for layer, state in zip(self.layers.values(), states, strict=True):
            layer.put(load.page, state, header.tokens_seen)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The requests of these pages end with an error."""
        return set(self._get_connector_metadata().failing)  # type: ignore[attr-defined]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Everything was loaded before."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was loaded before."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """States are saved whole, when a request has ended."""

    def wait_for_save(self) -> None:
        """Nothing is saved behind anyone's back."""


def _of_all_workers(state: PowerState) -> PowerState:
    """The heads of all workers, side by side."""
    memory, normalizer = (tensor_model_parallel_all_gather(part.contiguous(), dim=1) for part in state[:2])
    return state._replace(memory=memory, normalizer=normalizer)
