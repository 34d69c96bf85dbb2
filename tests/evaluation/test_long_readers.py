"""Memories that questions share: forked, padded and read in segments, they answer as if each text had been read alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from power_retention.conversion.swap import swap_attention
from power_retention.evaluation.long.asking import Effort, ask, padded, write
from power_retention.evaluation.long.context import Context, Encoder, Question
from power_retention.evaluation.long.positions import BLOCK, losses_by_position, make_streams, rise
from power_retention.evaluation.long.readers import (
    AttentionReader,
    Reader,
    StateReader,
    WindowReader,
    _KeptKeys,
    matched_window,
)
from power_retention.layers.mixer import rotate
from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.sizes import state_bytes
from real_models import STORIES_FILES, read_llama2c_model, read_llama2c_tokenizer
from tiny_models import randomise

EXACT = {"rtol": 1e-4, "atol": 2e-4}
SMALL = Effort(tokens=256, memory_bytes=1 << 22)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return read_llama2c_model(STORIES_FILES / "checkpoint.bin")


@pytest.fixture(scope="module")
def student(teacher: LlamaForCausalLM) -> PowerRetentionForCausalLM:
    model = swap_attention(copy.deepcopy(teacher), key_bias=True)
    for mixer in model.mixers:  # a hard swap forgets within a token; this one remembers
        torch.nn.init.constant_(mixer.g_proj.bias, 5.0)
        torch.nn.init.normal_(mixer.k_bias, std=0.5, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(read_llama2c_tokenizer(STORIES_FILES / "tokenizer.bin"))


@pytest.fixture(scope="module")
def texts(encoder: Encoder, stories_text: Path) -> list[list[int]]:
    """Twelve stories of at least 200 tokens."""
    stories = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()[:60]]
    return [ids for ids in encoder.many(stories) if len(ids) >= 200][:12]


def readers(teacher: PreTrainedModel, student: PowerRetentionForCausalLM) -> dict[str, Reader]:
    return {
        "state": StateReader(student),
        "attention": AttentionReader(teacher),
        "window of everything": WindowReader(teacher, 512),
    }


def logits_alone(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", ["state", "attention", "window of everything"])
class TestSharing:
    def test_forks_padding_and_segments_change_nothing(
        self,
        kind: str,
        teacher: LlamaForCausalLM,
        student: PowerRetentionForCausalLM,
        texts: list[list[int]],
    ) -> None:
        reader = readers(teacher, student)[kind]
        contexts = torch.tensor([texts[0][:150], texts[1][:150]])
        prompts = [texts[2][:40], texts[3][:7], texts[4][:1]]
        rows = [1, 0, 1]
        with torch.inference_mode():
            memory = reader.begin(2)
            for part in contexts.split(64 if reader.segment(2, 128) else 150, dim=1):
                reader.read(memory, part)
            asked = reader.fork(memory, torch.tensor(rows))
            logits = reader.logits(reader.read(asked, *padded(prompts, torch.device("cpu"))))
            for steps in (1, 3):  # a step each, then some at once
                later = torch.tensor([texts[5 + i][:steps] for i in range(3)])
                after = reader.logits(reader.read(asked, later))
                prompts = [[*prompt, *more] for prompt, more in zip(prompts, later.tolist(), strict=True)]
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone = logits_alone(reader.model, [*contexts[row].tolist(), *prompt])
            torch.testing.assert_close(after[i], alone[-3:], **EXACT)
            torch.testing.assert_close(logits[i, : len(prompt) - 4], alone[150:-4], **EXACT)

    def test_a_fork_leaves_its_origin_alone(
        self, kind: str, teacher: LlamaForCausalLM, student: PowerRetentionForCausalLM, texts: list[list[int]]
    ) -> None:
        reader = readers(teacher, student)[kind]
        with torch.inference_mode():
            memory = reader.begin(1)
            reader.read(memory, torch.tensor([texts[0][:100]]))
            for text in texts[1:4]:
                reader.read(reader.fork(memory, torch.tensor([0, 0])), torch.tensor([text[:50]] * 2))
            after = reader.logits(reader.read(memory, torch.tensor([texts[5][:10]])))[0]
        torch.testing.assert_close(after, logits_alone(reader.model, texts[0][:100] + texts[5][:10])[100:], **EXACT)

    def test_answers_are_those_of_the_model_alone(
        self,
        kind: str,
        teacher: LlamaForCausalLM,
        student: PowerRetentionForCausalLM,
        texts: list[list[int]],
        encoder: Encoder,
    ) -> None:
        reader = readers(teacher, student)[kind]
        questions = (
            Question(" One day, a girl named", ("Lily",), (" Lily and Tom", " Max", " a big red ball")),
            Question(" They", ("were",), (" were happy", " saw the sun", " go")),
        )
        contexts = [Context("story", 300, seed, torch.tensor(texts[seed][:180]), questions) for seed in range(3)]
        answers = ask(reader, contexts, encoder, Effort(tokens=300, memory_bytes=6 * reader.bytes_a_row(300)))
        assert len(answers) == 6
        for answer in answers:
            before = [*answer.context.ids.tolist(), *encoder(answer.question.text)]
            for candidate, found in zip(answer.question.candidates, answer.likelihoods, strict=True):
                ids = encoder.after(answer.question.text, candidate)
                values = logits_alone(reader.model, before + ids)[len(before) - 1 : -1].log_softmax(-1)
                nats = float(values.gather(-1, torch.tensor(ids)[:, None]).sum())
                assert found == pytest.approx(nats / len(candidate.encode()), abs=1e-3)
            assert answer.nats == pytest.approx(-answer.likelihoods[0] * len(answer.question.candidates[0].encode()))
            ids = list(before)
            for _ in range(4):
                ids.append(int(logits_alone(reader.model, ids)[-1].argmax()))
            assert answer.generated.startswith(encoder.decode(ids[len(before) :]).rstrip())


class TestWindow:
    def test_sees_the_newest_tokens_and_no_others(self, teacher: LlamaForCausalLM, texts: list[list[int]]) -> None:
        ids = (texts[0] + texts[1])[:300]
        reader = WindowReader(teacher, 40)
        reader.sinks = 0
        place = torch.arange(300)
        seen = (place[:, None] >= place) & (place[:, None] - place < 40)
        mask = torch.zeros(300, 300).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            wanted = teacher(torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits[0]
            memory = reader.begin(1)
            parts = torch.tensor([ids]).split(20, dim=1)
            found = torch.cat([reader.logits(reader.read(memory, part)) for part in parts], 1)[0]
        torch.testing.assert_close(found, wanted, **EXACT)
        assert memory.places is not None
        assert memory.places.shape[1] <= 40 + 20 + 10

    def test_the_first_tokens_stay_right_before_the_window(self) -> None:
        torch.manual_seed(0)
        layer = _KeptKeys()
        raw, values = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8)
        frequencies = torch.cat((0.3 ** torch.arange(4.0),) * 2)

        def turned(keys: Tensor, positions: Tensor) -> Tensor:
            angles = positions[None, :, None] * frequencies
            return rotate(keys.transpose(1, 2), angles.cos(), angles.sin()).transpose(1, 2)

        def turn(by: float) -> tuple[Tensor, Tensor]:
            return (by * frequencies).cos()[None, None], (by * frequencies).sin()[None, None]

        layer.update(turned(raw, torch.arange(12.0)), values)
        layer.keep(torch.tensor([0, 1, 8, 9, 10, 11]), 2, *turn(6))
        torch.testing.assert_close(layer.keys[:, :, :2], turned(raw[:, :, :2], torch.tensor([6.0, 7.0])))
        torch.testing.assert_close(layer.keys[:, :, 2:], turned(raw[:, :, 8:], torch.arange(8.0, 12)))
        layer.keep(torch.arange(6), 2, *turn(9))
        torch.testing.assert_close(layer.keys[:, :, :2], turned(raw[:, :, :2], torch.tensor([9.0, 10.0])))
        assert torch.equal(layer.values, values[:, :, [0, 1, 8, 9, 10, 11]])

    def test_goes_on_past_the_window_it_was_trained_for(
        self, teacher: LlamaForCausalLM, texts: list[list[int]]
    ) -> None:
        """stories260K was trained on 512 tokens; with the first four kept, a window of 128 reads 2,000 as well."""
        ids = torch.tensor([[1, *[token for text in texts for token in text]][:2048]])
        reader = WindowReader(teacher, 128)
        kept = losses_by_position(reader, ids, SMALL)
        assert kept[-1].loss < kept[2].loss + 0.5
        reader.sinks = 0
        assert losses_by_position(reader, ids, SMALL)[-1].loss > kept[-1].loss

    def test_weighs_as_much_as_the_states(self, teacher: LlamaForCausalLM, student: PowerRetentionForCausalLM) -> None:
        window = matched_window(student, teacher)
        of_one = 5 * 4 * 2 * 8 * 2  # layers, heads, keys and values, width, bytes
        assert window == state_bytes(student.config) // of_one
        reader = StateReader(student)
        memory = reader.begin(1)
        reader.read(memory, torch.ones(1, 300, dtype=torch.long))
        assert memory.cache.nbytes == pytest.approx(reader.bytes_a_row(300), rel=0.01)

    def test_of_another_family(self) -> None:
        """Norms on queries and keys, grouped heads."""
        config = Qwen3Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        )  # fmt: skip
        model = randomise(Qwen3ForCausalLM(config).eval())
        ids = torch.randint(97, (1, 90), generator=torch.Generator().manual_seed(0))
        reader = WindowReader(model, 128)
        with torch.inference_mode():
            memory = reader.begin(1)
            found = torch.cat([reader.logits(reader.read(memory, part)) for part in ids.split(32, 1)], 1)[0]
        torch.testing.assert_close(found, logits_alone(model, ids[0].tolist()), **EXACT)


class TestPositions:
    @pytest.mark.parametrize("kind", ["state", "attention", "window of everything"])
    def test_are_those_of_one_forward(
        self, kind: str, teacher: LlamaForCausalLM, student: PowerRetentionForCausalLM, texts: list[list[int]]
    ) -> None:
        reader = readers(teacher, student)[kind]
        row = [token for text in texts for token in text]
        streams = torch.tensor([row[:512], row[512:1024]])
        bins = losses_by_position(reader, streams, SMALL)
        assert [(x.start, x.stop) for x in bins] == [(0, 64), (64, 128), (128, 256), (256, 512)]
        losses = torch.stack(
            [
                torch.nn.functional.cross_entropy(
                    logits_alone(reader.model, ids[:-1].tolist()), ids[1:], reduction="none"
                )
                for ids in streams
            ]
        )
        assert bins[0].loss == pytest.approx(float(losses[:, :63].mean()), abs=1e-3)
        assert bins[-1].loss == pytest.approx(float(losses[:, 255:].mean()), abs=1e-3)
        blocks = losses[:, 255:511].reshape(-1, BLOCK).mean(-1)
        assert bins[-1].error == pytest.approx(float(blocks.std() / len(blocks) ** 0.5), abs=1e-3)

    def test_the_teacher_goes_as_far_as_its_window(self, teacher: LlamaForCausalLM) -> None:
        streams = torch.randint(3, 500, (1, 2048), generator=torch.Generator().manual_seed(0))
        assert losses_by_position(AttentionReader(teacher), streams, SMALL)[-1].stop == 512

    def test_streams_share_no_text(self, encoder: Encoder, stories_text: Path) -> None:
        documents = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()[:20]]
        streams = make_streams(documents, encoder, streams=2, tokens=1024)
        assert streams.shape == (2, 1024)
        assert make_streams(documents, encoder, streams=1, tokens=2048)[0, :1024].equal(streams[0])
        short = make_streams(documents[:3], encoder, streams=1, tokens=1 << 20)
        assert short.shape[1] in (256, 512, 1024)

    def test_rise(self, teacher: LlamaForCausalLM, texts: list[list[int]]) -> None:
        """A text that turns into noise rises; one that goes on does not."""
        row = [token for text in texts for token in text][:1024]
        noise = torch.randint(3, 500, (512,), generator=torch.Generator().manual_seed(0)).tolist()
        reader = WindowReader(teacher, 256)
        for ids, rises in ((row, False), (row[:512] + noise, True)):
            found = rise(losses_by_position(reader, torch.tensor([ids]), SMALL), 512)
            assert found is not None
            assert (found["from"], found["to"]) == (512, 1024)
            assert (found["value"] > 3 * found["error"]) == rises
        assert rise(losses_by_position(reader, torch.tensor([row]), SMALL), 1024) is None


def test_writing_stops_at_the_end_of_a_text(teacher: LlamaForCausalLM, encoder: Encoder) -> None:
    reader = AttentionReader(teacher)
    eos = encoder.tokenizer.eos_token_id
    with torch.inference_mode():
        memory = reader.begin(2)
        reader.read(memory, torch.tensor([[1, 300]] * 2))
        first = torch.full((2, 512), -1.0)
        first[0, eos], first[1, 300] = 1.0, 1.0
        ended, goes_on = write(reader, memory, first, 6, encoder)
    assert ended == []
    assert goes_on[0] == 300
