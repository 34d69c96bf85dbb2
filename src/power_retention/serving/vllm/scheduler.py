"""vLLM's scheduler, whose drafts end where pages end.

With prefix caching the page of a full block is kept as the state after exactly that many tokens.  A step whose drafts went past
the end of a block would leave the page before it too short, and the next one too long.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class PageScheduler(Scheduler):  # type: ignore[misc]
    """Leaves away the drafts of a step that would not go into the page of its first token."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step."""
        page = self.vllm_config.cache_config.mamba_block_size
        for request in self.running:
            end = (request.num_computed_tokens // page + 1) * page
            del request.spec_token_ids[max(0, end - request.num_tokens) :]
        return super().schedule(*args, **kwargs)
