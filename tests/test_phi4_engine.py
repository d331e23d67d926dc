"""Phi-4-multimodal on the decode engine: requests of every kind, against the whole model in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Phi4MultimodalForCausalLM

from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import SnapshotEncoder, load_encoder
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine
from pipeline.decode.guards import COMPRESSION, GuardParams
from pipeline.decode.loading import load_parts
from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import DecoderParts, Question
from pipeline.decode.runner import Context, Lease, Pick, Row, RowResult
from pipeline.decode.scheduler import SchedulerParams
from pipeline.items import (
    TRANSCRIBE,
    DecodeRequest,
    Embeddings,
    Failure,
    FailureKind,
    Frame,
    FrameSet,
    Hypothesis,
    JobKey,
    Outcome,
    Pictures,
    RequestKey,
    Snapshot,
    SnapshotKey,
    Task,
    TaskKind,
)
from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.checkpoint import load_adapter, load_config
from pipeline.models.phi4.crops import cut_crops
from pipeline.models.phi4.lora import Adapter
from pipeline.models.phi4.prompts import Phi4Prompter
from pipeline.models.phi4.runner import Phi4Runner
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams
from tests.models import NO_GUARDS, content, run_dry

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_NEW = 12
SLOT_TOKENS = 640
MAX_CROPS = 6
TO_GERMAN = Task(TaskKind.TRANSLATE, "de")
SUMMARISE, DESCRIBE, ANSWER = Task(TaskKind.SUMMARISE), Task(TaskKind.DESCRIBE), Task(TaskKind.ANSWER)
KINDS = ("sound", "long sound", "translation", "picture", "pictures", "question", "spoken question", "text")


@dataclass(frozen=True)
class Asked:
    """One request, its context, and what that was made of."""

    request: DecodeRequest
    context: Context
    samples: np.ndarray | None = None
    frames: tuple[Frame, ...] = ()

    def with_key(self, key: RequestKey) -> Asked:
        return replace(self, request=replace(self.request, key=key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelParams:
    return ModelParams(name=str(folder), device="cpu")


@pytest.fixture(scope="module")
def ears(model: ModelParams) -> SnapshotEncoder:
    return load_encoder(model, EncoderParams(), None)


@pytest.fixture(scope="module")
def eyes(model: ModelParams) -> FramesToEmbeddings:
    return FramesToEmbeddings(model, VisionParams(max_crops=MAX_CROPS))


@pytest.fixture(scope="module")
def parts(model: ModelParams) -> DecoderParts:
    return load_parts(model, decoder_params())


@pytest.fixture(scope="module")
def whole(folder: Path) -> Phi4MultimodalForCausalLM:
    network = Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    # transformers 5.23 computes pictures without padding with causal attention (test_phi4_vision.py).
    for layer in network.model.embed_tokens_extend.image_embed.img_processor.encoder.layers:
        layer.self_attn.is_causal = False
    return network


@pytest.fixture(scope="module")
def asked(ears: SnapshotEncoder, eyes: FramesToEmbeddings) -> dict[str, Asked]:
    return {kind: ask(kind, ears, eyes) for kind in KINDS}


def decoder_params(**scheduler: int) -> DecoderParams:
    return DecoderParams(
        guards=NO_GUARDS.model_copy(update={"max_tokens": MAX_NEW, "min_token_cap": MAX_NEW}),
        scheduler=SchedulerParams(**{"num_slots": 4, **scheduler}),
        slot_tokens=SLOT_TOKENS,
        max_description_tokens=MAX_NEW,
        max_summary_tokens=MAX_NEW,
        max_answer_tokens=MAX_NEW,
    )


def engine_of(parts: DecoderParts, **scheduler: int) -> DecodeEngine:
    return DecodeEngine(ModelParams(), decoder_params(**scheduler), parts=parts)


def sound_of(seconds: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(round(16_000 * seconds)) * 3_000
    return (noise * np.hanning(len(noise))).astype(np.int16)


def frame_of(width_px: int, height_px: int, seed: int) -> Frame:
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    return Frame(0, pixels)


def ask(kind: str, ears: SnapshotEncoder, eyes: FramesToEmbeddings) -> Asked:
    samples, frames, text = None, (), ""
    key: RequestKey = SnapshotKey("s", 1 + KINDS.index(kind), 1)
    tasks: tuple[Task, ...] = (TRANSCRIBE,)
    if kind in ("sound", "long sound", "translation"):
        samples = sound_of(20.1 if kind == "long sound" else 1.3, seed=len(kind))
        tasks = (TRANSCRIBE, TO_GERMAN) if kind == "translation" else tasks
    else:
        task = {"text": SUMMARISE, "picture": DESCRIBE, "pictures": DESCRIBE}.get(kind, ANSWER)
        tasks, key = (task,), JobKey("s", task.kind, 1 + KINDS.index(kind))
        samples = sound_of(1.7, seed=9) if kind == "spoken question" else None
        text = {"text": "The pump is off. Close the valve.", "question": "What is on the left?"}.get(kind, "")
        sizes = {"picture": [(130, 100)], "pictures": [(56, 56), (60, 40)], "text": []}.get(kind, [(112, 56)])
        frames = tuple(frame_of(*size, seed=index) for index, size in enumerate(sizes))
    sound = pictures = None
    if samples is not None:
        [sound] = ears.encode([Snapshot(key, 0, True, 0, samples, None, (), (), tasks)])
        assert isinstance(sound, Embeddings)
    if frames:
        assert isinstance(key, JobKey)
        [pictures] = eyes.encode([FrameSet(key, frames)])
        assert isinstance(pictures, Pictures)
    request = DecodeRequest(key, True, None, (), (), tasks, text=text)
    return Asked(request, Context(sound, pictures), samples, frames)


def answer(engine: DecodeEngine, item: Asked) -> list[Outcome]:
    engine.submit(item.request, item.context)
    return run_dry(engine)


def tokens_of(outcome: Outcome) -> tuple[int, ...]:
    assert isinstance(outcome, Hypothesis), outcome
    return outcome.tokens


@contextmanager
def adapted(whole: Phi4MultimodalForCausalLM, folder: Path, adapter: Adapter) -> Iterator[None]:
    """The whole model with an adapter's products added to its weights, in float64 for the sum."""
    before: list[tuple[Tensor, Tensor]] = []
    if adapter is not Adapter.NONE:
        found = load_adapter(folder, adapter.value)
        for name, weight in whole.model.named_parameters():
            a, b = (found.tensors.get(name.replace(".weight", f".lora_{side}.weight")) for side in "AB")
            if a is not None and b is not None:
                before.append((weight, weight.detach().clone()))
                weight.data += found.scale * (b.double() @ a.double()).float()
    try:
        yield
    finally:
        for weight, value in before:
            weight.data.copy_(value)


def generated_by(
    whole: Phi4MultimodalForCausalLM, folder: Path, parts: DecoderParts, item: Asked, task: Task
) -> list[int]:
    """What transformers' `generate` says to the same prompt, given sound and pictures as they came."""
    config, prompter = load_config(folder), parts.prompter
    question = Question(task, None, (), None, item.request.text, item.context)
    prompt = prompter.prompt(question).tokens
    arguments: dict[str, Tensor] = {}
    if item.samples is not None:
        steps = AudioFeatures(config.audio.num_mels)(torch.from_numpy(item.samples.astype(np.float32) / 32_768))
        arguments["audio_input_features"] = steps[None]
        arguments["audio_embed_sizes"] = torch.tensor([-(-len(steps) // 8)])
    if item.frames:
        crops = [cut_crops(torch.from_numpy(frame.pixels), config.vision, MAX_CROPS) for frame in item.frames]
        assert len(crops) == 1, "the reference is asked about one picture at a time here"
        layout = crops[0].layout
        arguments["image_pixel_values"] = crops[0].pixels[None]
        arguments["image_sizes"] = torch.tensor([[layout.rows * layout.crop_size, layout.columns * layout.crop_size]])
        arguments["image_attention_mask"] = crops[0].mask[None].float()
    adapter = Adapter.VISION if item.frames else Adapter.NONE if item.samples is None else Adapter.SPEECH
    special = [
        token for token in range(prompter.num_text_tokens, config.decoder.vocab_size) if token not in prompter.ends
    ]
    with adapted(whole, folder, adapter), torch.inference_mode():
        found = whole.generate(
            torch.tensor([prompt]),
            **arguments,
            max_new_tokens=MAX_NEW,
            do_sample=False,
            eos_token_id=sorted(prompter.ends),
            suppress_tokens=sorted(special),
        )
    return [token for token in found[0, len(prompt) :].tolist() if token not in prompter.ends]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pictures"])
def test_the_engine_says_what_the_whole_model_says(
    asked: dict[str, Asked], parts: DecoderParts, whole: Phi4MultimodalForCausalLM, folder: Path, kind: str
) -> None:
    item = asked[kind]
    outcomes = answer(engine_of(parts), item)
    assert [outcome.task for outcome in outcomes] == list(item.request.tasks)
    for outcome in outcomes:
        assert outcome.task is not None
        expected = generated_by(whole, folder, parts, item, outcome.task)
        tokens = tokens_of(outcome)
        # Behind the transcript that it verifies a translation has room for as many tokens again.
        assert list(tokens[: len(expected)]) == expected
        assert len(tokens) >= MAX_NEW or len(tokens) == len(expected)


@pytest.mark.parametrize("tokens_per_step", [8, 61, 512])
def test_requests_of_every_kind_at_once_equal_each_alone_whatever_the_pieces(
    asked: dict[str, Asked], parts: DecoderParts, tokens_per_step: int
) -> None:
    alone = {kind: answer(engine_of(parts), asked[kind]) for kind in KINDS}
    engine = engine_of(parts, tokens_per_step=tokens_per_step, num_slots=4)
    for kind in KINDS:
        engine.submit(asked[kind].request, asked[kind].context)
    found = run_dry(engine)
    for kind in KINDS:
        mine = [content(outcome) for outcome in found if outcome.key == asked[kind].request.key]
        assert mine == [content(outcome) for outcome in alone[kind]]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_right=st.integers(0, MAX_NEW),
    wrong=st.lists(st.integers(0, 262) | st.sampled_from([-1, 10**9]), max_size=20),
    kind=st.sampled_from(["sound", "long sound", "picture"]),
)
def test_any_draft_gives_what_no_draft_gives(
    asked: dict[str, Asked], parts: DecoderParts, num_right: int, wrong: list[int], kind: str
) -> None:
    item = asked[kind]
    [plain] = answer(engine_of(parts), item)
    draft = (*tokens_of(plain)[:num_right], *wrong)
    [drafted] = answer(engine_of(parts), replace(item, request=replace(item.request, draft=draft)))
    assert content(drafted) == content(plain)


def fed_tokens(parts: DecoderParts, item: Asked, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of a request feeds."""
    fed: list[int] = []
    run = Phi4Runner.run

    def counted(runner: Phi4Runner, rows: Sequence[Row]) -> list[RowResult]:
        fed.append(sum(len(row.tokens) for row in rows))
        return run(runner, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Phi4Runner, "run", counted)
        answer(engine_of(parts), item)
    return fed


def test_a_translation_is_computed_behind_the_sound_that_was_computed_for_the_transcript(
    asked: dict[str, Asked], parts: DecoderParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = asked["translation"]
    [transcript, _] = answer(engine_of(parts), item)
    assert item.context.sound is not None
    question = Question(TO_GERMAN, None, (), None, "", item.context, tokens_of(transcript))
    prompt = parts.prompter.prompt(question)
    fed = fed_tokens(parts, item, monkeypatch)
    # The prompt of the translation without `<|user|>`, the sound, and what both instructions begin with.
    begin = max(fed[1:])
    num_shared = 1 + len(item.context.sound.values) + len("Transcribe the audio ")
    assert begin == len(prompt.tokens) - num_shared + len(prompt.draft)


class Speaker:
    """Says known texts: one after `Transcribe the audio clip`, another one after every other prompt."""

    def __init__(self, engine: DecodeEngine, parts: DecoderParts, transcript: str, other: str) -> None:
        assert isinstance(parts.prompter, Phi4Prompter)
        encode = parts.prompter._tokenizer.encode
        self._engine = engine
        end = min(parts.prompter.ends)
        self._says = {
            is_transcript: [*encode(text), end] for is_transcript, text in ((True, transcript), (False, other))
        }

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        [row], [active] = rows, self._engine._active.values()
        says = self._says[active.task == TRANSCRIBE]
        first = row.position - active.sequence.num_prompt_tokens + 1
        places = range(first + row.pick_from, first + len(row.tokens))
        return [RowResult(tuple(Pick(says[min(place, len(says) - 1)], -0.1) for place in places), None)]


TALK = (
    "I would like to thank everybody for coming today, because the budget for next year has to be settled before "
    "Friday, and we still have no numbers from the two factories in the south."
)


@pytest.mark.parametrize(
    ("transcript", "separator", "translation", "text", "guard"),
    [
        # The language that is spoken was not told, and is the one asked for.
        (TALK, " <sep> ", TALK, TALK, None),
        (TALK, "\n<sep>\n", TALK, TALK, None),
        (TALK, " <sep> ", f"{TALK} {TALK} {TALK}", TALK, COMPRESSION),
        (TALK, " ", TALK, "", COMPRESSION),
    ],
)
def test_a_translation_may_say_again_what_the_transcript_said_but_not_itself(
    asked: dict[str, Asked],
    parts: DecoderParts,
    monkeypatch: pytest.MonkeyPatch,
    *,
    transcript: str,
    separator: str,
    translation: str,
    text: str,
    guard: str | None,
) -> None:
    params = decoder_params().model_copy(
        update={"guards": GuardParams(min_token_cap=448, max_tokens=1_000), "slot_tokens": 4_096}
    )
    engine = DecodeEngine(ModelParams(), params, parts=parts)
    monkeypatch.setattr(type(parts.runner), "max_new_tokens", lambda _, num: 4_096 - num)
    monkeypatch.setattr(type(parts.runner), "open", lambda *_, **__: Lease(0, 1, 4_096, 0))
    monkeypatch.setattr(type(parts.runner), "renew", lambda _, lease, *__: lease)
    monkeypatch.setattr(type(parts.runner), "close", lambda *_, **__: None)
    speaker = Speaker(engine, parts, transcript, f"{transcript}{separator}{translation}")
    monkeypatch.setattr(parts.runner, "run", speaker.run)
    [transcribed, translated] = answer(engine, asked["translation"])
    assert isinstance(transcribed, Hypothesis)
    assert isinstance(translated, Hypothesis)
    assert (transcribed.text, transcribed.guard) == (transcript, None)
    assert translated.guard == guard
    assert translated.text.startswith(text)
    assert len(translated.text) <= len(text) + (0 if guard is None else 20)


def test_a_final_takes_the_slot_of_a_scene_which_is_described_later_all_the_same(
    asked: dict[str, Asked], parts: DecoderParts
) -> None:
    alone = {kind: answer(engine_of(parts), asked[kind]) for kind in ("picture", "sound")}
    engine = engine_of(parts, num_slots=1)
    engine.submit(asked["picture"].request, asked["picture"].context)
    for _ in range(3):
        assert engine.step() == []
    engine.submit(asked["sound"].request, asked["sound"].context)
    found = run_dry(engine)
    assert [content(outcome) for outcome in found] == [content(o) for o in (*alone["sound"], *alone["picture"])]


def test_a_text_ends_before_the_position_where_the_rotary_factors_change(
    ears: SnapshotEncoder, eyes: FramesToEmbeddings, parts: DecoderParts, folder: Path
) -> None:
    limit = load_config(folder).decoder.rope.original_max_positions
    item = ask("sound", ears, eyes)
    for num_left in (1, 5):
        num_sound = limit - num_left - len(parts.prompter.prompt(question_of(item)).tokens)
        samples = sound_of((num_sound + len(item.context.sound.values)) * 0.08, seed=3)  # type: ignore[union-attr]
        [sound] = ears.encode([replace_samples(item, samples)])
        assert isinstance(sound, Embeddings)
        near = replace(item, context=Context(sound))
        assert len(parts.prompter.prompt(question_of(near)).tokens) == limit - num_left
        [outcome] = answer(engine_of(parts), near)
        if num_left == 1:
            assert isinstance(outcome, Failure)
            assert "leaves no room for text" in outcome.message
        else:
            assert isinstance(outcome, Hypothesis)
            assert (len(outcome.tokens), outcome.guard) == (num_left - 1, "token_cap")


def question_of(item: Asked) -> Question:
    return Question(TRANSCRIBE, None, (), None, "", item.context)


def replace_samples(item: Asked, samples: np.ndarray) -> Snapshot:
    return Snapshot(item.request.key, 0, True, 0, samples, None, (), (), (TRANSCRIBE,))


def broken_contexts(item: Asked, picture: Asked) -> list[tuple[str, Context, str]]:
    sound, pictures = item.context.sound, picture.context.pictures
    assert sound is not None
    assert pictures is not None
    values = pictures.pictures[0].values

    def with_values(changed: np.ndarray) -> Context:
        return Context(None, replace(pictures, pictures=(replace(pictures.pictures[0], values=changed),)))  # type: ignore[type-var, union-attr]

    return [
        ("width", Context(replace(sound, values=sound.values[:, :7])), r"float32\[\d+, 7\]"),
        ("nan", Context(replace(sound, values=np.full_like(sound.values, np.nan))), "not finite"),
        ("empty", Context(replace(sound, values=sound.values[:0])), r"float32\[0, 32\]"),
        ("long", Context(replace(sound, values=np.tile(sound.values, (60, 1)))), "no room for text"),
        ("crops", with_values(values[1:]), "a picture is"),
        ("infinite picture", with_values(np.full_like(values, np.inf)), "not finite"),
        ("nothing", Context(), "about sound, and there is none"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_a_bad_context_fails_alone_with_what_is_wrong(asked: dict[str, Asked], parts: DecoderParts, case: int) -> None:
    good = asked["sound"]
    _, context, message = broken_contexts(good, asked["picture"])[case]
    task = DESCRIBE if context.pictures is not None else TRANSCRIBE
    key = SnapshotKey("other", 1, 1)
    engine = engine_of(parts)
    engine.submit(good.request, good.context)
    engine.submit(replace(good.request, key=key, tasks=(task,)), context)
    failure, *others = run_dry(engine)
    assert isinstance(failure, Failure)
    assert (failure.key, failure.kind) == (key, FailureKind.FAILED)
    assert re.search(message, failure.message), failure.message
    assert [content(o) for o in others] == [content(o) for o in answer(engine_of(parts), good)]


def test_requests_of_every_kind_are_answered_in_bfloat16(model: ModelParams, asked: dict[str, Asked]) -> None:
    rough = load_parts(model.model_copy(update={"final_dtype": "bfloat16"}), decoder_params())
    assert (rough.runner.partial_dtype, rough.runner.final_dtype) == ("bfloat16", "bfloat16")
    engine = engine_of(rough)
    for kind, item in asked.items():
        outcomes = answer(engine, item)
        assert [outcome.task for outcome in outcomes] == list(item.request.tasks), kind
        assert all(isinstance(outcome, Hypothesis) for outcome in outcomes), outcomes


def test_no_slot_stays_open(asked: dict[str, Asked], parts: DecoderParts) -> None:
    engine = engine_of(parts)
    for kind in KINDS:
        engine.submit(asked[kind].request, asked[kind].context)
    engine.step()
    for kind in KINDS:
        engine.cancel(asked[kind].request.key)
    assert not engine.has_work
    assert isinstance(parts.runner, Phi4Runner)
    assert parts.runner.decoder.memory.num_open == 0
