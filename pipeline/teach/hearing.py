"""Stage 3: hearing. The conformer, the projection of speech and the speech adapter learn; the language model stays.

Each part of a step has sounds of about one length, and each sound one task. Beside the loss of the answers there is one
of a layer that is thrown away afterwards: it spells the words straight from what the conformer gives (CTC, Graves et
al. 2006), which is what makes the conformer listen at all in so short a time. For half of the stage there is nothing
else: as long as little is heard, what the language model asks of the conformer drowns what the words ask. Then the
projection and the adapter learn to read what the conformer gives, and then all of it together.

Where the words are spelled right it is also known when each was said, and from then on beginnings of sentences are
taught: live text is written while somebody is speaking.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.conformer import TOKEN_STEPS, Projector
from pipeline.teach.clips import Clip, Distortion, joined
from pipeline.teach.language import (
    MAX_JOINED,
    SUMMARISE,
    partial_transcription,
    transcription,
    translation,
)
from pipeline.teach.learning import Part
from pipeline.teach.lessons import Lesson, Teacher
from pipeline.teach.network import Network, Row
from pipeline.teach.world import WORDS, saying_of, summary_of, tokens_of_text

_SPELLING_SHARE, _READING_SHARE = 0.5, 0.6
"""Of the stage: until when words alone are taught, and until when the conformer is left as it is."""
_CLEAN_SHARE, _DISTORTED_SHARE = 0.06, 0.25
"""Of the stage: between them distortions grow from none to all."""
_BATCH_TOKENS = (200, 380)
"""Positions of sound in a part, while words alone are taught and later: many small steps find the words sooner."""
_MAX_CLIPS = 16
_CTC_WEIGHT = 0.7
_BLANK = 0
_WORD = {word: 1 + index for index, word in enumerate(WORDS)}

_PARTIAL_SHARE = 0.2
_TRANSLATION_SHARE = 0.45
_CHAINED_SHARE = 0.85
_SILENT_SHARE = 0.03
_JOINED_SHARE, _SUMMARY_SHARE = 0.15, 0.08  # of parts, once sentences alone are known
_SENTENCES_ALONE = 0.35  # of the stage
_SUMMARISED = (2, 6)
_REPORT_SHARE = 0.6  # of the summaries; the others are of sentences by chance, of which few have to do with each other
_MAX_TROUBLES = 2
_FIRST_SHARE, _GROWTH = 0.3, 2.0  # of the sounds, from short to long
_MIN_PARTIAL_STEPS = 16


class Hearing:
    """The stage's steps over `clips`, which are short to long."""

    def __init__(self, network: Network, teacher: Teacher, clips: Sequence[Clip], seed: int) -> None:
        self._network, self._teacher = network, teacher
        self.clips = sorted(clips, key=lambda clip: len(clip.features))
        config = network.nano.config
        self._distortion = Distortion(AudioFeatures(config.audio.num_mels), seed)
        self._by_voice = {
            voice: list(group)
            for voice, group in groupby(sorted(self.clips, key=lambda clip: clip.voice), key=lambda clip: clip.voice)
        }
        reports: dict[int, list[Clip]] = {}
        for clip in clips:
            if clip.report >= 0:
                reports.setdefault(clip.report, []).append(clip)
        self._reports = list(reports.values())
        self.speller = nn.Linear(config.audio.width, len(WORDS) + 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.speller.weight.copy_(torch.randn(self.speller.weight.shape, generator=generator) / 12.0)
            self.speller.bias.zero_()

    def set_normalisation(self) -> None:
        """Set mean and spread of the features to those of the sounds, as they will be stored."""
        embedding = self._network.audio.encoder.encoder_embedding
        chosen = torch.cat([clip.features.float() for clip in self.clips[:: max(1, len(self.clips) // 300)]])
        embedding.global_mean.copy_(chosen.mean(0).bfloat16())
        embedding.global_invstd.copy_((1 / chosen.std(0)).bfloat16())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        audio = self._network.audio
        found = {f"encoder.{name}": value for name, value in audio.encoder.named_parameters()}
        found |= {f"audio.{name}": value for name, value in audio.named_parameters() if "for_speech" in name}
        found |= {f"speller.{name}": value for name, value in self.speller.named_parameters()}
        return found | {f"speech:{key}": value for key, value in self._network.nano.adapters["speech"].tensors.items()}

    def part(self, number: int, rng: random.Random, progress: float) -> Part:
        """Return one part of a step."""
        del number
        draw = rng.random() if progress > _SENTENCES_ALONE else 1.0
        if draw < _SUMMARY_SHARE:
            return self._joined_part(rng, progress, is_summary=True)
        if draw < _SUMMARY_SHARE + _JOINED_SHARE:
            return self._joined_part(rng, progress, is_summary=False)
        share = min(1.0, _FIRST_SHARE + _GROWTH * progress)
        chosen = self._draw_batch(rng, max(1, int(len(self.clips) * share)), _BATCH_TOKENS[progress >= _SPELLING_SHARE])
        sounds: list[Tensor] = []
        lessons: list[Lesson] = []
        spelled: list[str] = []
        whole: list[tuple[int, Clip, int, float]] = []
        strength = min(1.0, max(0.0, progress - _CLEAN_SHARE) / (_DISTORTED_SHARE - _CLEAN_SHARE))
        for clip in chosen:
            sound, before, stretch = self._distortion(clip.features, rng, chosen, strength)
            text, lesson = clip.text, None
            if rng.random() < _SILENT_SHARE:
                sound, text = self._distortion.silence(len(sound), rng), ""
                lesson = Lesson(transcription([]).task, "")
            elif clip.ends and rng.random() < _PARTIAL_SHARE:
                sound, lesson = self._cut(clip, sound, before, stretch, rng)
                text = lesson.answer
            else:
                whole.append((len(sounds), clip, before, stretch))
            sounds.append(sound)
            spelled.append(text)
            lessons.append(lesson or _draw_lesson([clip], rng))
        loss, told, num_tokens, log_probs = self._learn(sounds, lessons, spelled, progress)

        def time_all() -> None:
            for index, clip, before, stretch in whole:
                self.time_words(clip, log_probs[: -(-len(sounds[index]) // TOKEN_STEPS), index], before, stretch)

        return Part(loss, told, num_tokens, time_all)

    def _draw_batch(self, rng: random.Random, count: int, num_tokens: int) -> list[Clip]:
        """Return sounds of about one length, from the shortest `count`."""
        first = rng.randrange(count)
        length = self.clips[first].num_tokens
        size = min(_MAX_CLIPS, max(1, num_tokens // max(1, length)))
        near = range(max(0, first - 2 * size), min(count, first + 2 * size))
        return [self.clips[index] for index in rng.sample(near, min(size, len(near)))]

    def _cut(self, clip: Clip, sound: Tensor, before: int, stretch: float, rng: random.Random) -> tuple[Tensor, Lesson]:
        """Return the beginning of `sound`, and what was said in it."""
        cut = rng.randint(min(_MIN_PARTIAL_STEPS, len(sound)), len(sound))
        cut -= cut % TOKEN_STEPS if cut > TOKEN_STEPS else 0
        # What was said to its end must be written, or ends of finals are left out too.
        said = (cut - before) / (len(clip.features) * stretch)
        return sound[:cut], partial_transcription(clip.text, sum(end <= said for end in clip.ends))

    def _joined_part(self, rng: random.Random, progress: float, *, is_summary: bool) -> Part:
        """Learn from several sentences of one voice: transcribe and translate two or three, summarise two to six."""
        sounds, lessons, spelled = [], [], []
        num_tokens = 0
        while num_tokens < _BATCH_TOKENS[progress >= _SPELLING_SHARE]:
            clips = self._draw_clips(rng, is_summary=is_summary)
            sayings = [saying_of(clip.text) for clip in clips]
            if is_summary and sum(saying.event is not None for saying in sayings) > _MAX_TROUBLES + 1:
                continue
            sound, _, _ = self._distortion(joined(clips, rng), rng, clips)
            sounds.append(sound)
            spelled.append(" ".join(clip.text for clip in clips))
            lessons.append(Lesson(SUMMARISE, summary_of(sayings)) if is_summary else _draw_lesson(clips, rng))
            num_tokens += -(-len(sound) // TOKEN_STEPS)
        loss, told, num_tokens, _ = self._learn(sounds, lessons, spelled, progress)
        return Part(loss, told, num_tokens)

    def _draw_clips(self, rng: random.Random, *, is_summary: bool) -> list[Clip]:
        """Return sentences of one voice, as they are said one after the other."""
        if is_summary and self._reports and rng.random() < _REPORT_SHARE:
            return rng.choice(self._reports)
        # As often as it speaks: by the voice of any sentence.
        clips = self._by_voice[rng.choice(self.clips).voice]
        return [
            rng.choice(clips) for _ in range(rng.randint(*_SUMMARISED) if is_summary else rng.randint(2, MAX_JOINED))
        ]

    def _learn(
        self, sounds: Sequence[Tensor], lessons: Sequence[Lesson], spelled: Sequence[str], progress: float
    ) -> tuple[Tensor, dict[str, float], int, Tensor]:
        """Return the loss, what to tell of it, the number of tokens, and [tokens, sounds, words] of the speller."""
        is_reading = _SPELLING_SHARE <= progress < _READING_SHARE
        with torch.set_grad_enabled(not is_reading):
            heard, lengths = self._network.hear(sounds)
        words, log_probs = self._spell(heard, lengths, spelled)
        if progress < _SPELLING_SHARE:
            return words, {"words": words.item()}, sum(lengths), log_probs
        projected = self._network.project_sound(heard, Projector.SPEECH)
        rows = []
        for index, (lesson, length) in enumerate(zip(lessons, lengths, strict=True)):
            tokens, num_prompt_tokens = self._teacher.tokens(lesson, length)
            rows.append(Row(tokens, num_prompt_tokens, sound=projected[index, :length]))
        answered = self._network.loss(rows, "speech")
        told = {"words": words.item(), "answers": answered.answer.item()}
        return answered.answer + _CTC_WEIGHT * words, told, answered.num_tokens, log_probs

    def _spell(self, heard: Tensor, lengths: Sequence[int], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the loss of spelling `texts`, and how probable each word is, [tokens, sounds, words]."""
        log_probs = self.speller(heard).log_softmax(-1).transpose(0, 1)
        words = [[_WORD[word] for word in tokens_of_text(text)] for text in texts]
        flat = torch.tensor([word for each in words for word in each], dtype=torch.long)
        counts = torch.tensor([len(each) for each in words])
        loss = F.ctc_loss(log_probs, flat, torch.tensor(lengths), counts, _BLANK, zero_infinity=True)
        return loss, log_probs.detach()

    def time_words(self, clip: Clip, log_probs: Tensor, before: int, stretch: float) -> None:
        """Take from [tokens, words] where each word of `clip` ends, if all of them are spelled right."""
        path = log_probs.argmax(-1).tolist()
        found, place = [], 0
        for word, run in groupby(path):
            place += len(list(run))
            if word != _BLANK:
                found.append((word, place * TOKEN_STEPS))
        if [word for word, _ in found] == [_WORD[word] for word in tokens_of_text(clip.text)]:
            size = len(clip.features) * stretch
            clip.ends = tuple((end - before) / size for _, end in found)


def _draw_lesson(clips: Sequence[Clip], rng: random.Random) -> Lesson:
    sayings = [saying_of(clip.text) for clip in clips]
    if rng.random() < _TRANSLATION_SHARE:
        return translation(sayings, is_chained=rng.random() < _CHAINED_SHARE)
    return transcription(sayings)
