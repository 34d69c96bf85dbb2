"""Models: configuration, trunk and cache, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from power_retention.models.cache import PowerRetentionCache
from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.modeling import PowerRetentionForCausalLM, PowerRetentionModel

AutoConfig.register(PowerRetentionConfig.model_type, PowerRetentionConfig, exist_ok=True)
AutoModel.register(PowerRetentionConfig, PowerRetentionModel, exist_ok=True)
AutoModelForCausalLM.register(PowerRetentionConfig, PowerRetentionForCausalLM, exist_ok=True)

__all__ = ["PowerRetentionCache", "PowerRetentionConfig", "PowerRetentionForCausalLM", "PowerRetentionModel"]
