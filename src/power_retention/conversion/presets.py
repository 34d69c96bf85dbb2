"""The family by name: parents from 135 million to 235 billion parameters, and the power-retention models that follow."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from power_retention.conversion.families import parent_config_to_ours
from power_retention.errors import SourceError
from power_retention.models import PowerRetentionConfig


@dataclass(frozen=True)
class Preset:
    """A named parent.

    Attributes:
        name: lower case, such as ``qwen3-14b``.
        parent: its hub id.
        parameters: of the parent, as published.
        parent_fields: of the parent's config.json.
    """

    name: str
    parent: str
    parameters: int
    parent_fields: dict[str, Any]

    def parent_config(self) -> PreTrainedConfig:
        """The parent's configuration."""
        return AutoConfig.for_model(**self.parent_fields)

    def config(self, *, p: int = 2, gate_bias: bool = True, key_bias: bool = False) -> PowerRetentionConfig:
        """The configuration of the power-retention model."""
        model_type = self.parent_fields["model_type"]
        return parent_config_to_ours(
            self.parent_config(),
            p=p,
            gate_bias=gate_bias,
            key_bias=key_bias,
            chunk_size=None,
            parent={"name": self.parent, "model_type": model_type},
        )


@cache
def presets() -> dict[str, Preset]:
    """Every preset by its name, smallest first within a family."""
    text = files("power_retention.conversion").joinpath("presets.toml").read_text(encoding="utf-8")
    return {
        name: Preset(name, entry["parent"], entry["parameters"], entry["config"])
        for name, entry in tomllib.loads(text).items()
    }


def preset(name: str) -> Preset:
    """The preset of a name, whatever its case.

    Raises:
        SourceError: there is none.
    """
    found = presets().get(name.lower())
    if found is None:
        raise SourceError(f"There is no preset {name!r}; there are {', '.join(presets())}.")
    return found


def resolve_config(model: str) -> PowerRetentionConfig:
    """The configuration of a power-retention model by preset name, folder, or hub id whose config.json is cached.

    A Transformer stands for the model that converting it would give.  Nothing is downloaded.

    Raises:
        SourceError: there is no such model here, or it cannot be converted.
    """
    if model.lower() in presets():
        return preset(model).config()
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{model} is no preset ({', '.join(presets())}), no folder with a config.json, and no hub id whose configuration "
            "is cached here: name one of these."
        ) from error
    if isinstance(config, PowerRetentionConfig):
        return config
    return parent_config_to_ours(config, p=2, gate_bias=True, key_bias=False, chunk_size=None, parent={"name": model})
