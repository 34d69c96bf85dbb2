"""vLLM's scheduler for drafts that can be taken back.

What stands in a state cannot be taken back, and prompts are read into the state at once: the last token of a prompt is read
alone, without the drafts that vLLM adds to have all rows of a step as long.

With prefix caching the page of a full block is kept as the state after exactly that many tokens.  A step whose drafts went past
the end of a block would leave the page before it too short, and the next one too long: drafts end where pages end.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class DraftScheduler(Scheduler):  # type: ignore[misc]
    """Leaves away drafts that could not be taken back."""

    dynamic_sd_lookup: list[int] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dynamic_sd_lookup is None:
            # Where the number of drafts may change, rows differ in length anyway, and vLLM adds none.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step."""
        cache = self.vllm_config.cache_config
        for request in self.running if cache.enable_prefix_caching else ():
            end = (request.num_computed_tokens // cache.mamba_block_size + 1) * cache.mamba_block_size
            del request.spec_token_ids[max(0, end - request.num_tokens) :]
        return super().schedule(*args, **kwargs)
