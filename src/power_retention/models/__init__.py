"""Models: configuration, trunk and cache, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from power_retention.models.cache import PowerRetentionCache
from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.modeling import PowerRetentionForCausalLM, PowerRetentionModel
from power_retention.models.published import (
    BrumbyConfig,
    BrumbyForCausalLM,
    BrumbyModel,
    PowerCoderConfig,
    PowerCoderForCausalLM,
    PowerCoderModel,
)

for _config, _model, _language_model in (
    (PowerRetentionConfig, PowerRetentionModel, PowerRetentionForCausalLM),
    (BrumbyConfig, BrumbyModel, BrumbyForCausalLM),
    (PowerCoderConfig, PowerCoderModel, PowerCoderForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _language_model, exist_ok=True)

# Files hold each expert by itself, as those of the parents do; in memory they are stacked.
register_checkpoint_conversion_mapping(
    PowerRetentionConfig.model_type, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)

__all__ = [
    "BrumbyConfig",
    "BrumbyForCausalLM",
    "PowerCoderConfig",
    "PowerCoderForCausalLM",
    "PowerRetentionCache",
    "PowerRetentionConfig",
    "PowerRetentionForCausalLM",
    "PowerRetentionModel",
]
