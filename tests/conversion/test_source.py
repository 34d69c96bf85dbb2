from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, GPT2Config, PreTrainedTokenizerFast

from power_retention.conversion.families import SUPPORTED_MODEL_TYPES
from power_retention.conversion.source import (
    Source,
    fingerprint_tokenizer,
    fingerprint_weights,
    open_source,
    open_tokenizer,
)
from power_retention.errors import PowerRetentionError, SourceError
from real_models import write_stories_gguf

STORY = (
    "Once upon a time, there was a little boy named Tim. Tim had a red ball that he loved to play with every day. "
    "One day, Tim went to the park with his mom. He saw a big dog and was scared."
)
PARAGRAPH = (
    "The river rises in the hills north of the town and runs for forty miles through farmland before it reaches the "
    "sea. In the nineteenth century it was dredged so that barges could carry coal to the mills along its banks, and "
    "several of the locks from that time still work."
)


@pytest.fixture
def stories_copy(stories_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_dir, tmp_path / "model"))


@pytest.fixture
def weights(stories_copy: Path) -> Path:
    return stories_copy / "model.safetensors"


@pytest.fixture(scope="session")
def gguf_head(smollm2_gguf: Path) -> bytes:
    """The header of the real file, and a little of its tensors."""
    with smollm2_gguf.open("rb") as file:
        return file.read(4 << 20)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source: str | Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@torch.no_grad()
def loss(source: Source, text: str) -> float:
    ids = source.tokenizer(text, return_tensors="pt").input_ids
    return float(source.model(input_ids=ids, labels=ids).loss)


class TestDirectory:
    def test_opens_in_float32_and_tells_a_story(self, stories_dir: Path) -> None:
        source = open_source(str(stories_dir))
        assert (source.name, source.kind) == ("stories260k", "directory")
        assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
        assert not source.model.training
        assert source.tokenizer.decode(source.tokenizer(STORY).input_ids) == STORY
        assert loss(source, STORY) < 1.6

    def test_greedy_text_is_the_one_llama2c_prints(self, stories_dir: Path) -> None:
        source = open_source(stories_dir)
        start = torch.tensor([[source.tokenizer.bos_token_id]])
        ids = source.model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=64, do_sample=False, pad_token_id=2
        )
        assert source.tokenizer.decode(ids[0], skip_special_tokens=True).startswith(
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
            "One day, she saw a big, red ball."
        )

    def test_weights_keep_another_dtype_if_asked(self, stories_dir: Path) -> None:
        source = open_source(stories_dir, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in source.model.parameters()} == {torch.bfloat16}

    def test_opens_sharded_weights_to_the_same_model(self, stories_dir: Path, tmp_path: Path) -> None:
        source = open_source(stories_dir)
        source.model.save_pretrained(tmp_path, max_shard_size="300KB")
        source.tokenizer.save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert open_source(tmp_path).fingerprint == source.fingerprint

    def test_transformers_stays_as_talkative_as_it_was(
        self, stories_dir: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        open_source(stories_dir)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
        assert capfd.readouterr() == ("", "")


class TestFingerprint:
    def test_is_stable(self, stories_dir: Path) -> None:
        first = open_source(stories_dir).fingerprint
        assert first == open_source(stories_dir).fingerprint
        assert len(first) == 16
        int(first, 16)

    def test_feels_one_bit_of_one_weight(self, stories_dir: Path) -> None:
        source = open_source(stories_dir)
        weight = source.model.model.layers[2].mlp.up_proj.weight.data.view(torch.int32)
        weight[5, 7] ^= 1
        assert fingerprint_weights(source.model) != source.fingerprint
        weight[5, 7] ^= 1
        assert fingerprint_weights(source.model) == source.fingerprint

    def test_feels_two_weights_changing_places(self, stories_dir: Path) -> None:
        source = open_source(stories_dir)
        layers = source.model.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        assert fingerprint_weights(source.model) != source.fingerprint

    def test_depends_on_the_dtype(self, stories_dir: Path) -> None:
        assert open_source(stories_dir, dtype=torch.float16).fingerprint != open_source(stories_dir).fingerprint


class TestNothingThere:
    @pytest.mark.parametrize(
        "source", ["./nowhere", "nowhere/at/all", "/nowhere", "~/nowhere", "model.gguf", "a b", "org/model.safetensors"]
    )
    def test_neither_path_nor_hub_id(self, source: str) -> None:
        assert refusal(source).startswith(f"{source} does not exist, and is not a hub id")

    def test_a_path_object_is_never_a_hub_id(self) -> None:
        assert "does not exist" in refusal(Path("org/name"))

    def test_a_file_of_another_kind(self, weights: Path) -> None:
        assert "is not a model: pass a Hugging Face directory" in refusal(weights)

    def test_a_directory_of_something_else(self, tmp_path: Path) -> None:
        assert "has no config.json, so it is not a Hugging Face model directory." in refusal(tmp_path)

    def test_a_directory_around_a_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        assert refusal(tmp_path).endswith(f"pass the file {tmp_path / 'model.gguf'} instead.")

    def test_every_refusal_is_the_package_s_own(self) -> None:
        with pytest.raises(PowerRetentionError):
            open_source("./nowhere")


class TestWrongModel:
    """Each is refused by its configuration: the directories hold no weights."""

    def config(self, directory: Path, config: dict[str, Any]) -> Path:
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def test_unsupported_model_type(self, tmp_path: Path) -> None:
        message = refusal(self.config(tmp_path, GPT2Config().to_dict()))
        assert "model_type 'gpt2'" in message
        assert all(model_type in message for model_type in SUPPORTED_MODEL_TYPES)

    def test_no_model_type(self, tmp_path: Path) -> None:
        assert "model_type None" in refusal(self.config(tmp_path, {"hidden_size": 64}))

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        assert "is an encoder-decoder model (bart)" in refusal(self.config(tmp_path, BartConfig().to_dict()))

    def test_already_converted(self, tmp_path: Path) -> None:
        message = refusal(self.config(tmp_path, {"model_type": "power_retention"}))
        assert "is already a power-retention model" in message

    def test_quantised(self, tmp_path: Path) -> None:
        config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
        assert "has quantised weights (gptq)" in refusal(self.config(tmp_path, config))

    def test_config_is_not_json(self, stories_copy: Path) -> None:
        path = stories_copy / "config.json"
        path.write_bytes(path.read_bytes()[:100])
        assert "config.json of" in (message := refusal(stories_copy))
        assert "is not JSON" in message

    def test_config_is_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("[1]")
        assert "holds a list instead of an object" in refusal(tmp_path)

    def test_config_with_a_wrong_field(self, stories_copy: Path) -> None:
        edit_config(stories_copy, hidden_size="wide")
        assert "cannot be loaded" in refusal(stories_copy)


class TestDamagedWeights:
    def test_none(self, stories_copy: Path, weights: Path) -> None:
        weights.unlink()
        assert "has no weights: neither model.safetensors nor" in refusal(stories_copy)

    @pytest.mark.parametrize("length", [0, 5, 8, 1000, -1, -100_000])
    def test_truncated(self, stories_copy: Path, weights: Path, length: int) -> None:
        weights.write_bytes(weights.read_bytes()[:length])
        assert refusal(stories_copy).startswith(f"{weights} is truncated or damaged")

    def test_header_longer_than_the_file(self, stories_copy: Path, weights: Path) -> None:
        weights.write_bytes(struct.pack("<Q", 1 << 40) + weights.read_bytes()[8:])
        assert refusal(stories_copy).startswith(f"{weights} is truncated or damaged")

    def test_flipped_header_byte(self, stories_copy: Path, weights: Path) -> None:
        content = bytearray(weights.read_bytes())
        content[8] ^= 0xFF
        weights.write_bytes(content)
        assert refusal(stories_copy).startswith(f"{weights} is truncated or damaged")

    def test_missing_shard(self, stories_dir: Path, tmp_path: Path) -> None:
        open_source(stories_dir).model.save_pretrained(tmp_path, max_shard_size="300KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert f"lacks {shard.name} of the" in refusal(tmp_path)

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}'])
    def test_empty_index(self, stories_copy: Path, weights: Path, content: str) -> None:
        weights.unlink()
        (stories_copy / "model.safetensors.index.json").write_text(content)
        assert "names no weight files" in refusal(stories_copy)

    def change(self, weights: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})

    def test_missing_weight_is_never_random(self, stories_copy: Path, weights: Path) -> None:
        self.change(weights, lambda tensors: tensors.pop("model.layers.3.self_attn.v_proj.weight"))
        message = refusal(stories_copy)
        assert "lacks weights that its configuration asks for: model.layers.3.self_attn.v_proj.weight." in message

    def test_many_missing_weights_are_counted(self, stories_copy: Path) -> None:
        edit_config(stories_copy, num_hidden_layers=6)
        assert "model.layers.5." in (message := refusal(stories_copy))
        assert message.endswith("and 6 more.")

    def test_untied_model_without_its_head(self, stories_copy: Path) -> None:
        edit_config(stories_copy, tie_word_embeddings=False)
        assert "lm_head.weight" in refusal(stories_copy)

    def test_weight_without_a_place_is_never_dropped(self, stories_copy: Path) -> None:
        edit_config(stories_copy, num_hidden_layers=4)
        assert "has weights that its configuration has no place for: model.layers.4." in refusal(stories_copy)

    def test_the_recomputed_buffer_of_old_llamas_is(self, stories_copy: Path, weights: Path) -> None:
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        self.change(weights, lambda tensors: tensors.update(buffer))
        open_source(stories_copy)

    def test_a_tied_head_stored_twice_is_fine(self, stories_copy: Path, weights: Path) -> None:
        before = open_source(stories_copy).fingerprint
        embedding = load_file(weights)["model.embed_tokens.weight"].clone()
        self.change(weights, lambda tensors: tensors.update({"lm_head.weight": embedding}))
        assert open_source(stories_copy).fingerprint == before

    def test_weights_of_another_shape(self, stories_copy: Path) -> None:
        edit_config(stories_copy, intermediate_size=128)
        refusal(stories_copy)


class TestTokenizer:
    def test_missing(self, stories_copy: Path) -> None:
        (stories_copy / "tokenizer.json").unlink()
        assert "has no tokenizer: none of tokenizer.json," in refusal(stories_copy)

    def test_damaged(self, stories_copy: Path) -> None:
        path = stories_copy / "tokenizer.json"
        path.write_bytes(path.read_bytes()[:2000])
        assert refusal(stories_copy).startswith(f"The tokenizer of {stories_copy} cannot be loaded")

    def test_of_another_model(self, stories_copy: Path, smollm2: Source) -> None:
        smollm2.tokenizer.save_pretrained(stories_copy)
        assert "has 49152 tokens and its model 512: they do not belong together" in refusal(stories_copy)

    def test_the_end_is_what_a_gguf_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where transformers, as 5.17 does, reads the token that begins a text instead."""
        path = write_stories_gguf(tmp_path / "stories.gguf")
        loaded = PreTrainedTokenizerFast.from_pretrained

        def confused(*where: Any, **options: Any) -> PreTrainedTokenizerFast:
            tokenizer = loaded(*where, **options)
            tokenizer.eos_token = "<s>"
            return tokenizer

        usual = open_tokenizer(path)
        monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", confused)
        for tokenizer in (usual, open_tokenizer(path), open_source(path).tokenizer):
            assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
            assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(usual)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes; it knows org/stories and some that are not to be had."""

    COMMIT = "a" * 40
    ERRORS: ClassVar = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "bare": (404, "EntryNotFound")}
    directory: ClassVar[Path]
    fetched: ClassVar[list[str]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path = urlsplit(self.path).path.strip("/").split("/")
        status, error = self.ERRORS.get(path[0], (200, ""))
        content = b""
        if path[0] == "api":
            files = [{"type": "file", "path": file.name, "size": 1, "oid": ""} for file in self.directory.iterdir()]
            content = json.dumps(files if "tree" in path else {"id": "org/stories", "sha": self.COMMIT}).encode()
        elif not error:
            content = (self.directory / path[-1]).read_bytes()
            if self.command == "GET":
                self.fetched.append(path[-1])
        self.send_response(status)
        self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("ETag", f'"{path[-1]}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content


class TestHub:
    @pytest.fixture(autouse=True)
    def hub(self, stories_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A hub on this machine, and the directory of the model it has."""
        Hub.directory, Hub.fetched = stories_copy, []
        with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
            thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
            template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
            yield stories_copy
            server.shutdown()
            thread.join()

    def test_downloads_once(self, stories_dir: Path, hub: Path) -> None:
        source = open_source("org/stories")
        assert (source.name, source.kind) == ("org/stories", "hub")
        assert source.fingerprint == open_source(stories_dir).fingerprint
        assert Hub.fetched.count("model.safetensors") == 1
        open_source("org/stories")
        assert Hub.fetched.count("model.safetensors") == 1

    def test_wrong_kind_costs_no_download_of_weights(self, hub: Path) -> None:
        edit_config(hub, model_type="mamba")
        assert refusal("org/stories").startswith("org/stories has model_type 'mamba'")
        assert Hub.fetched == ["config.json"]

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("missing/model", "is neither a path here nor a model that the hub shows you"),
            ("gated/model", "is gated: accept its terms on its hub page"),
            ("bare/model", "on the hub has no config.json"),
        ],
    )
    def test_not_to_be_had(self, name: str, complaint: str) -> None:
        assert refusal(name).startswith(f"{name} {complaint}")

    def test_no_answer_from_a_hub_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert "could not be fetched from the hub" in refusal("org/stories")


class TestHubOffline:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def cached(self, stories_dir: Path, hub: Path, name: str) -> Path:
        """A model in the hub's cache, as a download leaves it."""
        folder, commit = hub / f"models--{name.replace('/', '--')}", "a" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(stories_dir, folder / "snapshots" / commit))

    @pytest.mark.parametrize("name", ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M"])
    def test_unreachable(self, name: str) -> None:
        message = refusal(name)
        assert message.startswith(f"{name} is not a path here, and it could not be fetched from the hub")
        assert "pass the path of a local" in message

    def test_cached_model_opens_without_a_connection(self, stories_dir: Path, tmp_path: Path) -> None:
        self.cached(stories_dir, tmp_path / "hub", "karpathy/stories")
        source = open_source("karpathy/stories")
        assert (source.name, source.kind) == ("karpathy/stories", "hub")
        assert source.fingerprint == open_source(stories_dir).fingerprint

    def test_wrong_kind_is_seen_before_the_weights_are_fetched(self, stories_dir: Path, tmp_path: Path) -> None:
        snapshot = self.cached(stories_dir, tmp_path / "hub", "karpathy/stories")
        edit_config(snapshot, model_type="mamba")
        (snapshot / "model.safetensors").unlink()
        assert refusal("karpathy/stories").startswith("karpathy/stories has model_type 'mamba'")


class TestGGUF:
    def test_holds_the_same_model_as_the_directory(self, stories_dir: Path, tmp_path: Path) -> None:
        source = open_source(write_stories_gguf(tmp_path / "stories.gguf"))
        directory = open_source(stories_dir)
        assert source.fingerprint == directory.fingerprint
        ids = source.tokenizer(STORY, add_special_tokens=False).input_ids
        assert ids == directory.tokenizer(STORY).input_ids
        source.tokenizer.add_bos_token = False
        assert loss(source, STORY) == pytest.approx(loss(directory, STORY), abs=1e-5)

    def test_is_not_taken_in_by_another_model_beside_it(self, stories_copy: Path) -> None:
        path = stories_copy / "tokenizer.json"
        path.write_text(path.read_text().replace("▁Lily", "▁Anna"))
        source = open_source(write_stories_gguf(stories_copy / "stories.gguf"))
        assert "▁Lily" in source.tokenizer.get_vocab()

    def test_mixture_of_experts(self, tmp_path: Path) -> None:
        assert "is a mixture of experts" in refusal(write_stories_gguf(tmp_path / "moe.gguf", expert_count=8))

    def test_rescaled_rotary_angles(self, tmp_path: Path) -> None:
        path = write_stories_gguf(tmp_path / "yarn.gguf", rope__scaling__type="yarn")
        assert "rescales its rotary angles" in refusal(path)

    def test_reads_english(self, smollm2: Source) -> None:
        assert (smollm2.name, smollm2.kind) == ("SmolLM2-135M-Instruct.Q4_1", "gguf")
        assert {parameter.dtype for parameter in smollm2.model.parameters()} == {torch.float32}
        assert loss(smollm2, PARAGRAPH) < 3.6
        assert loss(smollm2, STORY) < 2.5

    def test_chat_template_survives(self, smollm2: Source, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "Hello"}]
        prompt = smollm2.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        smollm2.tokenizer.save_pretrained(tmp_path)
        saved = AutoTokenizer.from_pretrained(tmp_path)
        assert saved.chat_template == smollm2.tokenizer.chat_template
        assert saved(PARAGRAPH).input_ids == smollm2.tokenizer(PARAGRAPH).input_ids

    def test_saves_as_a_directory_of_the_same_weights(self, smollm2: Source, tmp_path: Path) -> None:
        smollm2.model.save_pretrained(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert fingerprint_weights(saved) == smollm2.fingerprint
        assert not hasattr(copy.deepcopy(smollm2.model).config, "quantization_config")

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_without_the_extra(self, smollm2_gguf: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
        assert "run 'pip install power-retention[gguf]'" in refusal(smollm2_gguf)


class TestDamagedGGUF:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "model.gguf"

    def test_wrong_magic(self, path: Path, gguf_head: bytes) -> None:
        path.write_bytes(b"GGML" + gguf_head[4:])
        assert "is not a GGUF file: it starts with b'GGML'" in refusal(path)

    def test_empty(self, path: Path) -> None:
        path.touch()
        assert "it starts with b''" in refusal(path)

    @pytest.mark.parametrize("version", [1, 4, 3 << 24])
    def test_unknown_version(self, path: Path, gguf_head: bytes, version: int) -> None:
        path.write_bytes(gguf_head[:4] + struct.pack("<I", version) + gguf_head[8:])
        assert f"has GGUF version {version}; versions 2 and 3 can be read" in refusal(path)

    @pytest.mark.parametrize("length", [4, 6, 20, 40, 5_000, 1_000_000])
    def test_cut_within_the_header(self, path: Path, gguf_head: bytes, length: int) -> None:
        path.write_bytes(gguf_head[:length])
        assert "is truncated or damaged within its header" in refusal(path)

    def test_cut_within_the_tensors(self, path: Path, gguf_head: bytes) -> None:
        path.write_bytes(gguf_head)
        assert "its tensors end at byte 98,362,432 and the file at 4,194,304" in refusal(path)

    def test_cut_by_one_byte(self, path: Path, smollm2_gguf: Path) -> None:
        shutil.copyfile(smollm2_gguf, path)
        with path.open("r+b") as file:
            file.truncate(98_362_431)
        assert "is truncated" in refusal(path)

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            (
                struct.pack("<Q", 20) + b"general.architecture",
                struct.pack("<Q", 1 << 62) + b"general.architecture",
                "header",
            ),
            (b"general.architecture\x08", b"general.architecture\x0d", "header"),
            (b"general.architecture", b"general.architectura", "model_type None"),
            (struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"bloom", "model_type 'bloom'"),
            (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "has no tokenizer inside"),
        ],
    )
    def test_changed_header(self, path: Path, gguf_head: bytes, old: bytes, new: bytes, complaint: str) -> None:
        assert old in gguf_head
        path.write_bytes(gguf_head.replace(old, new, 1))
        with path.open("r+b") as file:
            file.truncate(98_362_432)
        assert complaint in refusal(path)

    def test_unknown_tensor_format(self, path: Path, gguf_head: bytes) -> None:
        entry = struct.pack("<Q", 17) + b"token_embd.weight" + struct.pack("<I", 2) + struct.pack("<QQ", 576, 49152)
        at = gguf_head.index(entry) + len(entry)
        path.write_bytes(gguf_head[:at] + struct.pack("<I", 200) + gguf_head[at + 4 :])
        assert "stores token_embd.weight in the unknown format 200" in refusal(path)
