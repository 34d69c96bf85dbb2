import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import VARIANTS, tiny_model

FIRST = {
    "ours first": "import power_retention; from transformers import AutoModelForCausalLM",
    "theirs first": "from transformers import AutoModelForCausalLM; import power_retention",
    "configurations first": (
        "import power_retention; from transformers import AutoConfig; from transformers import AutoModelForCausalLM"
    ),
    "a model of theirs first": "import power_retention; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
    "a part of theirs first": (
        "import power_retention; from transformers.modeling_layers import GradientCheckpointingLayer; "
        "from transformers import AutoModelForCausalLM"
    ),
    "in between": "from transformers import AutoConfig; import power_retention; from transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", FIRST)
def test_importing_the_package_is_enough(order: str, tmp_path: Path) -> None:
    tiny_model(**VARIANTS["llama"]).save_pretrained(tmp_path)
    program = f"{FIRST[order]}; print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "PowerRetentionForCausalLM", done.stderr[-2000:]


def test_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, power_retention; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
