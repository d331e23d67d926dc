from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder as ReferenceEncoder

from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import WhisperCheckpoint, load_checkpoint
from pipeline.models.whisper.encoder import WhisperEncoder
from pipeline.models.whisper.log_mel import LogMel
from tests.media import read_pcm
from tests.tiny_whisper import save_tiny, tiny_reference


def features(num_windows: int, num_steps: int, num_mels: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_windows, num_steps, num_mels, generator=torch.Generator().manual_seed(seed)) * 0.5


@torch.inference_mode()
def reference_embeddings(model: ReferenceEncoder, mels: torch.Tensor) -> torch.Tensor:
    """Run transformers' modules over a window of any length: the first positions of the table, nothing padded."""
    x = torch.nn.functional.gelu(model.conv1(mels.transpose(1, 2)))
    x = torch.nn.functional.gelu(model.conv2(x)).transpose(1, 2)
    x = x + model.embed_positions.weight[: x.shape[1]]
    for layer in model.layers:
        out = layer(x, None)
        x = out[0] if isinstance(out, tuple) else out
    return model.layer_norm(x)


@pytest.fixture(scope="module")
def base() -> WhisperCheckpoint:
    return load_checkpoint(ModelParams(), "encoder")


@pytest.fixture(scope="module")
def base_reference(base: WhisperCheckpoint) -> ReferenceEncoder:
    """transformers' encoder with the weights of whisper-base."""
    config = base.config
    model = tiny_reference(
        d_model=config.width,
        encoder_layers=config.encoder_layers,
        encoder_attention_heads=config.encoder_heads,
        encoder_ffn_dim=config.encoder_ffn,
        decoder_layers=1,
    ).model.encoder
    model.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in base.tensors.items()})
    return model


def tiny_pair(directory: Path, **overrides: object) -> tuple[WhisperEncoder, ReferenceEncoder]:
    save_tiny(directory, **overrides)
    reference = WhisperForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    return WhisperEncoder(load_checkpoint(ModelParams(name=str(directory)), "encoder")), reference.model.encoder


@pytest.mark.parametrize(
    "overrides", [{}, {"num_mel_bins": 128, "encoder_attention_heads": 8, "encoder_layers": 3, "encoder_ffn_dim": 48}]
)
def test_a_full_window_gives_transformers_embeddings(tmp_path: Path, overrides: dict[str, object]) -> None:
    encoder, reference = tiny_pair(tmp_path, **overrides)
    mels = features(2, 3_000, encoder.config.num_mels)
    with torch.inference_mode():
        expected = reference(mels.transpose(1, 2)).last_hidden_state
    assert (encoder(mels) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("num_steps", [2, 40, 300, 1_234])
def test_a_shorter_window_gives_what_transformers_modules_give(tmp_path: Path, num_steps: int) -> None:
    encoder, reference = tiny_pair(tmp_path)
    mels = features(1, num_steps)
    embeddings = encoder(mels)
    assert embeddings.shape == (1, num_steps // 2, encoder.config.width)
    assert (embeddings - reference_embeddings(reference, mels)).abs().max() < 1e-4


def speech_features(speech: Path, window_s: int) -> torch.Tensor:
    window = torch.zeros(1, window_s * 16_000)
    samples = torch.from_numpy(read_pcm(speech)[: (window_s - 2) * 16_000].astype("float32") / 32_768)
    window[0, : len(samples)] = samples
    return LogMel(80)(window)


def test_whisper_base_is_as_near_to_exact_arithmetic_as_transformers(
    speech: Path, base: WhisperCheckpoint, base_reference: ReferenceEncoder
) -> None:
    # Trained weights amplify float32's rounding at a few places to more than 1e-4 in any implementation, so the
    # yardstick is the same computation in float64.
    mels = speech_features(speech, 4)
    exact = reference_embeddings(copy.deepcopy(base_reference).double(), mels.double())
    ours = (WhisperEncoder(base)(mels) - exact).abs().flatten()
    theirs = (reference_embeddings(base_reference, mels) - exact).abs().flatten()
    assert ours.quantile(0.999) < 1e-4
    assert ours.max() < 2 * theirs.max() < 2e-3


def test_whisper_base_hears_a_full_window_as_transformers_does(
    speech: Path, base: WhisperCheckpoint, base_reference: ReferenceEncoder
) -> None:
    mels = speech_features(speech, 30)
    with torch.inference_mode():
        expected = base_reference(mels.transpose(1, 2)).last_hidden_state
    difference = (WhisperEncoder(base)(mels) - expected).abs().flatten()
    assert difference.quantile(0.999) < 1e-4
    assert difference.max() < 5e-3


def test_a_window_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    encoder, _ = tiny_pair(tmp_path)
    mels = features(5, 200)
    together = encoder(mels)
    for index in range(len(mels)):
        assert (encoder(mels[index : index + 1])[0] - together[index]).abs().max() < 1e-5


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    encoder, _ = tiny_pair(tmp_path)
    checkpoint = load_checkpoint(ModelParams(name=str(tmp_path)), "encoder")
    rough = WhisperEncoder(checkpoint, arithmetic="bfloat16")
    mels = features(1, 100)
    embeddings = rough(mels)
    assert embeddings.dtype == torch.bfloat16
    assert 0 < (embeddings.float() - encoder(mels)).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(1, 3, 80), (1, 4, 79), (1, 0, 80), (1, 3_002, 80), (4, 80)])
def test_features_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    encoder, _ = tiny_pair(tmp_path)
    with pytest.raises(ValueError, match=r"expected|takes"):
        encoder(torch.zeros(shape))
