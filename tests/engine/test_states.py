"""States with names in the engine: read once, saved, gone on from, forked, refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import torch
from vllm import LLM, RequestOutput
from vllm.exceptions import VLLMValidationError

from power_retention.models import PowerRetentionCache
from power_retention.models.fingerprint import fingerprint_model
from power_retention.ops import PowerState
from power_retention.ops.state_file import save_states
from power_retention.serving.states import StateDirectory, owner_of
from power_retention.serving.vllm import admission


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "states")


def options(directory: StateDirectory, **more: object) -> dict[str, object]:
    return {"additional_config": {"power_retention": {"states": str(directory.path), **more}}}


def ask(engine: LLM, prompt: list[int], tokens: int = 12, **names: str) -> RequestOutput:
    (output,) = engines.generate(engine, [prompt], tokens, extra_args=names)
    engine.llm_engine.step()  # what an ended request leaves is saved by the next step
    return output


@pytest.mark.parametrize("caching", [False, True])
def test_saved_and_gone_on_from(
    caching: bool, directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), enable_prefix_caching=caching, block_size=16, **options(directory))
    model = engines.open_model(folder_of())
    book, question, more = engines.prompts_of((150, 9, 30))
    first = ask(engine, book, save_state="book")
    read = book + list(first.outputs[0].token_ids)
    state = directory.inspect("book")
    assert state.header.tokens_seen == len(read)
    assert state.header.model == fingerprint_model(model)
    second = ask(engine, question, state="book", save_state="book-2")
    assert engines.distance(model, [second], before=read) < engines.CLOSE
    read_on = read + question + list(second.outputs[0].token_ids)
    third = ask(engine, more, state="book-2")
    assert engines.distance(model, [third], before=read_on) < engines.CLOSE
    # The first is what it was, and so are requests that name nothing.
    for names, before in (({"state": "book"}, read), ({}, [])):
        output = ask(engine, question, **names)
        assert engines.distance(model, [output], before=before) < engines.CLOSE
    assert [path.name for path in directory.path.iterdir() if path.name.startswith(".")] == []


def test_one_file_for_the_engine_and_the_cache(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    model = engines.open_model(folder_of())
    book, question, ending = engines.prompts_of((70, 8, 11))
    cache = PowerRetentionCache(model.config.num_hidden_layers)
    directory.path.mkdir()
    with torch.inference_mode():
        model(torch.tensor([book]), past_key_values=cache)
    cache.save(directory.path_of("book"), model)
    engine = start(folder_of(), **options(directory))
    answer = ask(engine, question, state="book", save_state="answered")
    assert engines.distance(model, [answer], before=book) < engines.CLOSE
    read = book + question + list(answer.outputs[0].token_ids)
    loaded = PowerRetentionCache.load(directory.path_of("answered"), model)
    with torch.inference_mode():
        logits = model(torch.tensor([ending]), past_key_values=loaded).logits
        expected = model(torch.tensor([read + ending])).logits[:, len(read) :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_many_forks_at_once_thrown_out_and_back(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, **options(directory))
    model = engines.open_model(folder_of())
    (book,) = engines.prompts_of((100,))
    read = book + list(ask(engine, book, save_state="book").outputs[0].token_ids)
    prompts = engines.prompts_of((1, 40, 90, 17, 33, 5), seed=4)
    for i, prompt in enumerate(prompts):
        params = engines.sampling(30, extra_args={"state": "book"})
        engine.llm_engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
    outputs = [output for _ in range(7) for output in engine.llm_engine.step() if output.finished]
    directory.delete("book")  # those that started keep it
    assert engine.llm_engine.reset_prefix_cache(reset_running_requests=True)
    while engine.llm_engine.has_unfinished_requests():
        outputs += [output for output in engine.llm_engine.step() if output.finished]
    assert len(outputs) == len(prompts)
    assert engines.distance(model, outputs, before=read) < engines.CLOSE


def test_forks_share_cached_prefixes_and_others_do_not(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, **options(directory))
    model = engines.open_model(folder_of())
    book, prompt = engines.prompts_of((60, 70))
    read = book + list(ask(engine, book, save_state="book").outputs[0].token_ids)
    cold, forked, again = (ask(engine, prompt, **names) for names in ({}, {"state": "book"}, {"state": "book"}))
    assert (cold.num_cached_tokens, forked.num_cached_tokens) == (0, 0)
    assert (again.num_cached_tokens or 0) >= 48
    assert engines.distance(model, [cold]) < engines.CLOSE
    assert engines.distance(model, [forked, again], before=read) < engines.CLOSE


def test_a_conversation_under_one_name(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), **options(directory))
    model = engines.open_model(folder_of())
    read: list[int] = []
    for turn, prompt in enumerate(engines.prompts_of((30, 7, 21, 1))):
        names = {"state": "chat"} if turn else {}
        # No step between: the next request names what is not written yet.
        (output,) = engines.generate(engine, [prompt], 9, extra_args={**names, "save_state": "chat"})
        assert engines.distance(model, [output], before=read) < engines.CLOSE
        read += prompt + list(output.outputs[0].token_ids)
    engine.llm_engine.step()
    assert directory.inspect("chat").header.tokens_seen == len(read)


def test_a_request_waits_for_the_one_that_saves(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), **options(directory))
    book, question = engines.prompts_of((90, 6))
    for name, prompt, names in (
        ("r0", book, {"save_state": "book"}),
        ("r1", question, {"state": "book", "save_state": "next"}),
        ("r2", question, {"state": "next"}),
    ):
        engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, engines.sampling(8, extra_args=names))
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += [output for output in engine.llm_engine.step() if output.finished]
    read: list[int] = []
    for output in sorted(outputs, key=lambda output: output.request_id):
        assert engines.distance(engines.open_model(folder_of()), [output], before=read) < engines.CLOSE
        read += list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
    assert len(outputs) == 3


def test_an_answer_that_ends_by_itself_is_saved_with_its_end(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), **options(directory))
    (prompt,) = engines.prompts_of((40,))
    words = list(ask(engine, prompt, 12).outputs[0].token_ids)
    params = engines.sampling(12, extra_args={"save_state": "ended"}, stop_token_ids=[words[5]])
    (output,) = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    engine.llm_engine.step()
    length = len(output.outputs[0].token_ids)
    assert length == words.index(words[5]) + 1
    assert directory.inspect("ended").header.tokens_seen == 40 + length


def test_aborted_requests_save_nothing(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), **options(directory))
    params = engines.sampling(50, extra_args={"save_state": "gone"})
    engine.llm_engine.add_request("r", {"prompt_token_ids": [5] * 20}, params)
    for _ in range(3):
        engine.llm_engine.step()
    engine.llm_engine.abort_request(["r"])
    engine.llm_engine.step()
    assert directory.list() == []
    # Named by another in the meantime, it is missing: that request ends with an error, others go on.
    (other,) = engines.prompts_of((33,))
    broken, fine = (engines.sampling(5, extra_args=names) for names in ({"state": "gone"}, {}))
    outputs = engine.generate([{"prompt_token_ids": p} for p in ([7] * 9, other)], [broken, fine], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert engines.distance(engines.open_model(folder_of()), outputs[1:]) < engines.CLOSE


def test_a_folder_removed_while_a_request_waits_is_the_end_of_that_request_only(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), enable_prefix_caching=True, block_size=16, **options(directory))
    (book, other), outputs = engines.prompts_of((40, 33)), []
    ask(engine, book, save_state="book")
    for name, prompt, names in (("waits", book, {"state": "book"}), ("fine", other, {})):
        engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, engines.sampling(5, extra_args=names))
    shutil.rmtree(directory.path)
    while engine.llm_engine.has_unfinished_requests():
        outputs += [output for output in engine.llm_engine.step() if output.finished]
    found = {output.request_id.partition("-")[0]: output for output in outputs}
    assert found["waits"].outputs[0].finish_reason == "error"
    assert engines.distance(engines.open_model(folder_of()), [found["fine"]]) < engines.CLOSE


def test_a_state_that_was_not_there_is_explained(
    directory: StateDirectory, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    """To clients of the server, who would read of an internal error."""
    engine = start(folder_of(), **options(directory))
    ask(engine, [5] * 20, save_state="book")
    config = engine.llm_engine.vllm_config
    admission.explain(config, engines.sampling(4))  # no state of ours: vLLM says what it says
    with pytest.raises(admission.Refusal, match="no state called 'gone'") as missing:
        admission.explain(config, engines.sampling(4, extra_args={"state": "gone"}))
    with pytest.raises(admission.Refusal, match=r"'book' .* ask again") as changed:
        admission.explain(config, engines.sampling(4, extra_args={"state": "book"}))
    assert (missing.value.status, changed.value.status) == (400, 409)


def test_a_full_disk(
    directory: StateDirectory,
    start: Callable[..., LLM],
    folder_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before anything is read, where it can be known; else what was there is unchanged, and nothing else stays."""
    engine = start(folder_of(), **options(directory))
    prompt = [5] * 20
    ask(engine, prompt, save_state="book")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(admission.Refusal, match=r"the disk has 0\.0 MB left") as refused:
            ask(engine, prompt, save_state="book")
        assert refused.value.status == 507
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        for name in ("book", "new"):
            assert ask(engine, prompt, 7, save_state=name).outputs[0].finish_reason == "length"
    assert directory.inspect("book").header.tokens_seen == 32
    assert os.listdir(directory.path) == ["book.state"]
    assert ask(engine, prompt, state="new").outputs[0].finish_reason == "error"
    ask(engine, prompt, 7, save_state="book")
    assert directory.inspect("book").header.tokens_seen == 27


def test_refused_before_anything_is_served(
    directory: StateDirectory, tmp_path: Path, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    engine = start(folder_of(), **options(directory, max_states=2))
    prompt = [5] * 20
    ask(engine, prompt, save_state="book")
    ask(engine, prompt, save_state="altered")
    content = bytearray(directory.existing("altered").read_bytes())
    content[-9] ^= 4
    directory.existing("altered").write_bytes(content)
    refused = [
        ({"state": "nothing"}, {}, "no state called 'nothing'"),
        ({"state": "../book"}, {}, "no name of a state"),
        ({"state": "/etc/passwd"}, {}, "no name of a state"),
        ({"state": "altered"}, {}, "altered"),
        ({"state": 7}, {}, "no name of a state"),
        ({"save_state": "third"}, {}, "2 are kept already"),
        ({"save_state": "book"}, {"stop": ["end"]}, "stop strings"),
        ({"save_state": "book"}, {"n": 2, "temperature": 1}, "n=2"),
    ]
    for names, sampling, sentence in refused:
        with pytest.raises(VLLMValidationError, match=sentence):
            engine.generate(
                [{"prompt_token_ids": prompt}], engines.sampling(4, extra_args=names, **sampling), use_tqdm=False
            )
    assert directory.inspect("book").header.tokens_seen == 32
    # A file that says it is this model's, and is not.
    state = PowerState(torch.zeros(2, 2, 36, 8), torch.zeros(2, 2, 36), 2, 8)
    model = directory.inspect("book").header.model
    save_states(directory.path_of("forged"), [state] * 2, model=model, tokens_seen=3)
    with pytest.raises(VLLMValidationError, match="sequences, layers, heads"):
        ask(engine, prompt, state="forged")
    # Owners have states of their own.
    token = admission.OWNER.set(owner_of("a key"))
    try:
        with pytest.raises(VLLMValidationError, match="no state called 'book'"):
            ask(engine, prompt, state="book")
        ask(engine, prompt + prompt, save_state="book")
    finally:
        admission.OWNER.reset(token)
    assert directory.inspect("book").header.tokens_seen == 32
    assert StateDirectory(directory.path, owner=owner_of("a key")).inspect("book").header.tokens_seen == 52
    # Another model's state.
    other = start(folder_of(qkv_bias=True), **options(directory))
    with pytest.raises(VLLMValidationError, match="belongs to the model"):
        ask(other, prompt, state="book")
    shutil.rmtree(directory.path)
    plain = start(folder_of())
    with pytest.raises(VLLMValidationError, match="keeps no states"):
        ask(plain, prompt, state="book")


def test_promises_are_not_kept_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that saves under ever new names holds on to the last of them only, each once."""
    monkeypatch.setattr(admission, "_promised", {})
    monkeypatch.setattr(admission, "_MOST_PROMISES", 3)
    for name in ("a", "b", "a", "c", "d"):
        admission._promise(tmp_path / name)
    assert [path.name for path in admission._promised] == ["a", "c", "d"]
