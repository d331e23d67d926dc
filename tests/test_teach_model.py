"""Teaching a tiny Phi-4-multimodal: the model, what it computes while it learns, and the stages."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pipeline.audio.encoder_window import EncoderParams
from pipeline.audio.encoders import load_encoder
from pipeline.decode.loading import load_parts
from pipeline.decode.params import DecoderParams
from pipeline.decode.prompting import Question
from pipeline.decode.runner import Context
from pipeline.errors import ModelError
from pipeline.items import TRANSCRIBE, Embeddings, Snapshot, SnapshotKey
from pipeline.models.phi4.checkpoint import load_adapter, load_decoder, load_part
from pipeline.models.phi4.conformer import AudioProjection, ConformerEncoder, Projector
from pipeline.models.phi4.decoder import DecoderRow, Phi4Decoder
from pipeline.models.phi4.lora import Adapter
from pipeline.models.phi4.prompts import SOUND_SUMMARY, TEXT_SUMMARY, Phi4Prompter
from pipeline.models.phi4.siglip import SiglipEncoder, VisionProjection
from pipeline.models.phi4.tokenizer import Phi4Tokenizer
from pipeline.models.weights import ModelParams
from pipeline.teach.clips import Clip, Distortion, draw_spoken, joined
from pipeline.teach.gallery import SIZES_PX, Gallery, show
from pipeline.teach.hearing import Hearing
from pipeline.teach.language import (
    draw_frames,
    draw_row,
    draw_sayings,
    partial_transcription,
    texts_of_world,
    transcription,
    translation,
)
from pipeline.teach.lessons import Teacher
from pipeline.teach.model import MAX_TOKENS, Nano, instructions, make_tokenizer, new_model, save_checkpoint
from pipeline.teach.network import Network, Row
from pipeline.teach.stages import STAGES, STATE_FOLDER, Report, Teaching
from pipeline.teach.world import SECOND_LANGUAGE, WORDS, draw_saying, is_held_out
from pipeline.vision.frames_to_embeddings import FramesToEmbeddings
from pipeline.vision.params import VisionParams

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_MEGABYTES = 20
CLOSE = 1e-5
NUM_STEPS = 10  # of a whole teaching


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(texts_of_world(random.Random(0), 600), SECOND_LANGUAGE)


@pytest.fixture(scope="module")
def nano(tokenizer: Tokenizer) -> Nano:
    found = new_model(tokenizer, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        # What is zero at first would hide what is left out.
        for name, parameter in found.model.named_parameters():
            if name.endswith(("bias", ".b1", ".b2", "extensor")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for adapter in found.adapters.values():
            for parameter in adapter.tensors.values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def folder(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano")
    save_checkpoint(nano, directory)
    return directory


@pytest.fixture(scope="module")
def stored(folder: Path, tokenizer: Tokenizer, nano: Nano) -> Nano:
    """The model with its weights as they are stored, rounded."""
    found = new_model(tokenizer, seed=5)
    found.load_state({key: value.bfloat16().float() for key, value in nano.state().items()})
    return found


def spoken_clips(num_clips: int = 40) -> list[Clip]:
    """Something else for each word, so that there is something to hear without a tool that speaks."""
    generator = torch.Generator().manual_seed(1)
    sounds = {word: 4 + 3 * torch.randn(12, 80, generator=generator) for word in WORDS}
    clips = []
    for each in draw_spoken(0, num_clips):
        words = [word.strip(".?").lower() for word in each.text.split()]
        features = torch.cat([sounds[word] for word in words]).clamp_min(0).half()
        clips.append(Clip(each.text, features, each.voice.name, each.report))
    return clips


# Tokenizer


def test_every_text_of_the_world_comes_back_and_costs_a_token_a_word(tokenizer: Tokenizer) -> None:
    tokens = Phi4Tokenizer(tokenizer)
    assert tokenizer.get_vocab_size() <= MAX_TOKENS
    for text in texts_of_world(random.Random(99), 200):
        found = tokens.encode(text)
        assert tokens.decode(found) == text
        marks = sum(not character.isalnum() and not character.isspace() for character in text)
        assert len(found) <= len(text.split()) + marks + text.count("\n") + 1


def test_every_instruction_is_one_token(tokenizer: Tokenizer) -> None:
    tokens = Phi4Tokenizer(tokenizer)
    for instruction in instructions(SECOND_LANGUAGE):
        assert len(tokens.encode(instruction)) == 1
        assert tokens.decode(tokens.encode(instruction)) == instruction


def test_text_beyond_the_world_comes_back(tokenizer: Tokenizer) -> None:
    tokens = Phi4Tokenizer(tokenizer)
    for text in ("Grüße an 1024 Bären, naïve\n\tx<|end|>", "日本", "<sep>", " <sep> "):
        assert tokens.decode(tokens.encode(text)) == text


def test_one_list_of_texts_gives_one_tokenizer() -> None:
    first, second = (make_tokenizer(texts_of_world(random.Random(7), 50), SECOND_LANGUAGE) for _ in range(2))
    assert first.to_str() == second.to_str()


def test_a_chained_answer_goes_on_from_the_draft_of_the_service(tokenizer: Tokenizer, nano: Nano) -> None:
    teacher, tokens = Teacher(tokenizer, nano.config), Phi4Tokenizer(tokenizer)
    prompter = Phi4Prompter(tokens, nano.config)
    for index in range(50):
        sayings = draw_sayings(random.Random(index))
        transcript = tuple(tokens.encode(transcription(sayings).answer))
        lesson = translation(sayings)
        context = Context(Embeddings(SnapshotKey("s", 1, 1), np.zeros((3, 144), np.float32), 3_840))
        draft = prompter.prompt(Question(lesson.task, "en", (), None, "", context, transcript)).draft
        answer = teacher.answer(lesson)
        assert answer[: len(draft)] == draft
        assert prompter.text_of(lesson.task, answer[:-1]) == lesson.answer
        # The draft tells the end of the transcript and no more: a transcription has the same tokens.
        assert teacher.answer(transcription(sayings))[:-1] == transcript


# What is computed


def test_sounds_of_unequal_length_are_heard_as_the_service_hears_each(stored: Nano, folder: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    clips = [6 + 3 * torch.randn(steps, 80, generator=generator) for steps in (1, 97, 240, 33, 8)]
    encoder = ConformerEncoder(stored.config.audio, load_part(folder, "audio"))
    projection = AudioProjection(stored.config, load_decoder(folder).audio_projection)
    network = Network(stored)
    with torch.no_grad():
        heard, lengths = network.hear(clips)
        for projector in Projector:
            projected = network.project_sound(heard, projector)
            for index, expected in enumerate(encoder(clips)):
                assert lengths[index] == len(expected)
                assert (heard[index, : lengths[index]] - expected).abs().max() < CLOSE
                wanted = projection(expected, projector)
                assert (projected[index, : lengths[index]] - wanted).abs().max() < CLOSE


def test_pictures_are_seen_as_the_service_sees_them(stored: Nano, folder: Path) -> None:
    network, rng = Network(stored), random.Random(3)
    encoder = SiglipEncoder(stored.config.vision, load_part(folder, "vision"))
    projection = VisionProjection(stored.config.vision, load_decoder(folder).image_projection)
    pictures = [show(draw_frames(rng)[0], size_px, stored.config.vision, rng) for size_px in SIZES_PX]
    crops = [picture.crops for picture in pictures]
    assert {each.layout.num_crops for each in crops} == {2, 3, 5}
    with torch.no_grad():
        seen = network.look(crops)
        for each, part, found in zip(crops, seen, network.project_pictures(seen, crops), strict=True):
            expected = encoder(each.pixels, each.mask)
            assert (part - expected).abs().max() < CLOSE
            assert (found - projection(expected, each.layout)).abs().max() < CLOSE


@pytest.mark.parametrize("adapter", [None, "speech", "vision"])
def test_the_loss_is_that_of_the_decoder_of_the_service(stored: Nano, folder: Path, adapter: str | None) -> None:
    config = stored.config
    decoder = Phi4Decoder(
        config.decoder,
        load_decoder(folder).language,
        {Adapter(name): load_adapter(folder, name) for name in stored.adapters},
        num_slots=1,
        max_tokens=64,
        device=torch.device("cpu"),
    )
    rows = [Row((260, *range(3, 3 + size), 300), size - 4) for size in (20, 9)]
    expected = []
    for row in rows:
        lease = decoder.open(0, len(row.tokens), 1, Adapter(adapter or "none"))
        logits = decoder.logits(decoder.forward([DecoderRow(lease, 0, row.tokens)]))
        decoder.close(lease)
        chosen = logits.log_softmax(-1)[torch.arange(len(row.tokens) - 1), torch.tensor(row.tokens[1:])]
        expected += (-chosen[row.num_prompt_tokens - 1 :]).tolist()
    with torch.no_grad():
        found = Network(stored).loss(rows, adapter)  # type: ignore[arg-type]
    assert abs(float(found.answer) - np.mean(expected)) < 1e-4
    assert found.num_tokens == sum(len(row.tokens) for row in rows)


# Lessons


def test_no_lesson_has_a_sentence_that_is_held_out(tokenizer: Tokenizer, nano: Nano) -> None:
    teacher, rng = Teacher(tokenizer, nano.config), random.Random(8)
    rows = [draw_row(rng, teacher) for _ in range(300)]
    held_out = {draw_saying(random.Random(index), held_out=True).text for index in range(200)}
    for row in rows:
        text = teacher.tokenizer.decode(row.tokens)
        if TEXT_SUMMARY in text or SOUND_SUMMARY in text:
            continue  # "Belt eight is hot." may also be what is left of a report that says it otherwise
        assert not any(f">{sentence}<" in text for sentence in held_out)
    assert not any(is_held_out(each.text) for each in draw_spoken(1, 200))


def test_a_beginning_has_the_words_that_were_said_and_no_mark() -> None:
    assert partial_transcription("Pump three is hot.", 2).answer == "Pump three"
    assert partial_transcription("Pump three is hot.", 4).answer == "Pump three is hot"
    assert partial_transcription("Pump three is hot.", 0).answer == ""


def test_a_distorted_sound_is_another_one_and_repeatable() -> None:
    from pipeline.models.phi4.audio_features import AudioFeatures  # noqa: PLC0415

    distortion, clip = Distortion(AudioFeatures(80), 0), spoken_clips(20)[0]
    found = [distortion(clip.features, random.Random(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])
    assert all(torch.isfinite(each).all() and each.min() >= 0 for each in found)
    untouched, before, stretch = distortion(clip.features, random.Random(1), strength=0.0)
    assert torch.equal(untouched, clip.features.float())
    assert (before, stretch) == (0, 1.0)


def test_a_gallery_depends_on_its_seed_and_the_step_alone(nano: Nano) -> None:
    config, size_px = nano.config.vision, SIZES_PX[0]
    first, second, other = (Gallery(config, seed) for seed in (1, 1, 2))
    for _ in range(30):
        first.draw(5, size_px, random.Random(99))
    drawn = [gallery.draw(40, size_px, random.Random(3)) for gallery in (first, second, other)]
    assert drawn[0].scene == drawn[1].scene
    assert torch.equal(drawn[0].crops.pixels, drawn[1].crops.pixels)
    assert torch.equal(drawn[0].things, drawn[1].things)
    assert not torch.equal(drawn[0].crops.pixels, drawn[2].crops.pixels)
    assert not is_held_out(drawn[0].scene.description)
    sheets = [gallery.draw_sheet(40, random.Random(3)) for gallery in (first, second, other)]
    assert torch.equal(sheets[0].crops.pixels, sheets[1].crops.pixels)
    assert not torch.equal(sheets[0].crops.pixels, sheets[2].crops.pixels)
    # What is there at a step is gone some hundred steps later.
    early, late = ({first.draw(step, size_px, random.Random(i)).scene for i in range(40)} for step in (0, 2_000))
    assert len(early & late) < len(early) / 2


def test_clips_are_joined_with_pauses() -> None:
    clips = spoken_clips(20)[:3]
    whole = joined(clips, random.Random(0))
    assert len(whole) > sum(len(clip.features) for clip in clips)
    assert torch.equal(whole[: len(clips[0].features)], clips[0].features.float())
    assert torch.equal(whole[-len(clips[2].features) :], clips[2].features.float())


# Stages


def ticking() -> Callable[[], float]:
    """A clock on which every look takes one: a step spends as much as it looks."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def teaching(directory: Path, budget: float = NUM_STEPS, seed: int = 1) -> Teaching:
    return Teaching(directory, seed, budget, ticking(), spoken_clips)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the command has it: a thread for each part, and one within each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teaching, list[Report]]:
    directory = tmp_path_factory.mktemp("taught")
    whole = teaching(directory)
    reports = list(whole.run())
    save_checkpoint(whole.nano, directory)
    return directory, whole, reports


def test_a_short_teaching_goes_through_all_stages_and_loads(taught: tuple[Path, Teaching, list[Report]]) -> None:
    directory, whole, reports = taught
    assert [report.stage for report in reports if report.is_end] == [stage.name for stage in STAGES]
    assert {report.stage for report in reports if not report.is_end} == {stage.name for stage in STAGES}
    assert all(np.isfinite(list(report.losses.values())).all() for report in reports)
    assert whole.is_done
    assert sum(path.stat().st_size for path in directory.glob("**/*.safetensors")) < MAX_MEGABYTES * 1e6
    model = ModelParams(name=str(directory), device="cpu")
    parts = load_parts(model, DecoderParams())
    assert parts.tier == "phi4"
    FramesToEmbeddings(model, VisionParams())
    samples = np.zeros(16_000, np.int16)
    snapshot = Snapshot(SnapshotKey("s", 1, 1), 0, True, 0, samples, None, (), (), (TRANSCRIBE,))
    [sound] = load_encoder(model, EncoderParams(), None).encode([snapshot])
    assert isinstance(sound, Embeddings)


def test_each_stage_teaches_its_parts_and_leaves_the_others(taught: tuple[Path, Teaching, list[Report]]) -> None:
    _, whole, _ = taught
    begun = new_model(whole.nano.tokenizer, seed=1).state()
    changed = {key for key, value in whole.nano.state().items() if not torch.equal(value, begun[key])}
    assert any("embed_tokens.weight" in key for key in changed)
    assert any("audio_embed.encoder.encoders" in key for key in changed)
    assert any("vision_speech" in key for key in changed)
    assert any("img_processor.encoder.layers.2" in key for key in changed)
    assert {key.partition(":")[0] for key in changed if ":" in key} == {"speech", "vision"}
    # Layers that nothing computes with stay as they began.
    assert not any("img_processor.encoder.layers.3" in key or "img_processor.head" in key for key in changed)


@pytest.mark.parametrize("stage_name", ["language", "hearing", "seeing", "spoken questions"])
def test_an_interrupted_teaching_ends_as_one_that_was_not(
    taught: tuple[Path, Teaching, list[Report]], tmp_path: Path, stage_name: str
) -> None:
    _, whole, _ = taught
    for report in teaching(tmp_path).run():
        if report.stage == stage_name and not report.is_end:
            break  # whatever was not written by now is lost
    resumed = teaching(tmp_path)
    list(resumed.run())
    expected = whole.nano.state()
    assert resumed.spent == whole.spent
    assert [key for key, value in resumed.nano.state().items() if not torch.equal(value, expected[key])] == []


def test_what_is_learned_does_not_depend_on_how_many_threads_there_are(
    taught: tuple[Path, Teaching, list[Report]], tmp_path: Path
) -> None:
    _, whole, reports = taught
    alone = Teaching(tmp_path, 1, NUM_STEPS, ticking(), spoken_clips, num_workers=1)
    assert list(alone.run()) == reports
    expected = whole.nano.state()
    assert [key for key, value in alone.nano.state().items() if not torch.equal(value, expected[key])] == []


def test_a_teaching_that_is_done_is_done(taught: tuple[Path, Teaching, list[Report]]) -> None:
    directory, whole, _ = taught
    again = teaching(directory)
    assert again.is_done
    assert list(again.run()) == []
    expected = whole.nano.state()
    assert all(torch.equal(value, expected[key]) for key, value in again.nano.state().items())


def test_another_seed_or_budget_is_refused(taught: tuple[Path, Teaching, list[Report]]) -> None:
    directory, _, _ = taught
    with pytest.raises(ModelError, match="was begun with"):
        teaching(directory, seed=2)
    with pytest.raises(ModelError, match="was begun with"):
        teaching(directory, budget=20)


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ModelError, match="Remove"):
        teaching(tmp_path)


def test_the_losses_of_reading_fall(tmp_path: Path) -> None:
    reports = itertools.islice(teaching(tmp_path, budget=10_000).run(), 24)
    found = [report.losses["answers"] for report in reports]
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:4])


def test_words_are_timed_where_they_are_spelled_right(tokenizer: Tokenizer) -> None:
    nano = new_model(tokenizer, seed=1)
    hearing = Hearing(Network(nano), Teacher(tokenizer, nano.config), spoken_clips(), 0)
    clip = Clip("Pump three.", torch.zeros(80, 80).half(), "slt")
    path = [0, 0, WORDS.index("pump") + 1, WORDS.index("pump") + 1, 0, WORDS.index("three") + 1, 0, 0, 0, 0]
    log_probs = torch.full((10, len(WORDS) + 1), -9.0)
    log_probs[torch.arange(10), torch.tensor(path)] = 0.0
    hearing.time_words(clip, log_probs, 0, 1.0)
    assert clip.ends == pytest.approx((0.4, 0.6))
    hearing.time_words(clip, log_probs, 8, 2.0)
    assert clip.ends == pytest.approx((0.15, 0.25))
    log_probs[5] = log_probs[0]
    clip.ends = ()
    hearing.time_words(clip, log_probs, 0, 1.0)
    assert clip.ends == ()
