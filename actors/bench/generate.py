"""transformers' `WhisperForConditionalGeneration.generate` on given encoder states: the yardstick of `bench decoder`.

The weights are those that this project's decoder loads, the prompt and the suppressed tokens too; the network, the
key/value cache and the loop are transformers' own. The encoder is not run, and its layers are not even built.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ModelError
from pipeline.models.device import choose_device
from pipeline.models.weights import ModelParams
from pipeline.models.whisper.checkpoint import WhisperConfig, load_checkpoint

_TIED = "proj_out.weight"  # the token embedding, not a tensor of its own


class GenerateWhisper:
    """A Whisper decoder in transformers, float32, decoding greedily one request at a time.

    Args:
        model: which checkpoint, on which device.
        eot: the token that ends a text; all tokens above it are suppressed, as in this project's runner.

    Raises:
        ModelError: if transformers is not installed, or the checkpoint cannot be used.
    """

    dtype = "float32"

    def __init__(self, model: ModelParams, eot: int) -> None:
        transformers = _import_transformers()
        checkpoint = load_checkpoint(model, "decoder")
        self._config = checkpoint.config
        self._device = choose_device(model)
        self._eot = eot
        network = transformers.WhisperForConditionalGeneration(_network_config(transformers, self._config, eot))
        tensors = {f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
        missing, unexpected = network.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name != _TIED and not name.startswith("model.encoder.")]
        if missing or unexpected:
            raise ModelError(f"transformers' decoder has other tensors: missing {missing}, unexpected {unexpected}")
        network.tie_weights()
        self._network = network.eval().to(self._device)
        self._network.generation_config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            decoder_start_token_id=network.config.decoder_start_token_id,
            eos_token_id=eot,
            pad_token_id=eot,
            max_length=None,
            return_timestamps=False,
            suppress_tokens=list(self._config.suppress_tokens) or None,
            begin_suppress_tokens=list(self._config.begin_suppress_tokens) or None,
        )

    @property
    def max_tokens(self) -> int:
        """Prompt and text tokens that the model has places for."""
        return self._config.max_target_positions

    @torch.inference_mode()
    def generate(self, embeddings: NDArray[np.float32], prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        """Return the text tokens over `embeddings` float32[positions, width], without end-of-text.

        Fewer than `max_new_tokens` mean that end-of-text was reached.
        """
        context = torch.tensor(embeddings[np.newaxis], device=self._device)
        tokens = self._network.generate(
            encoder_outputs=_encoder_output(context),
            decoder_input_ids=torch.tensor([list(prompt)], device=self._device),
            max_new_tokens=max_new_tokens,
            logits_processor=[self._suppress_specials],
        )
        return tuple(tokens[0].tolist())

    def generate_checked(
        self, embeddings: NDArray[np.float32], prompt: Sequence[int], max_new_tokens: int
    ) -> tuple[int, ...]:
        """Do as `generate` and check what it did: every layer sees exactly our positions, once, and our prompt.

        Raises:
            ModelError: if it pads or cuts the context, computes it again for a later token, changes the prompt or
                feeds a token twice; its time would then be that of another task.
        """
        with self._watched() as (contexts, feeds):
            tokens = self.generate(embeddings, prompt, max_new_tokens)
        num_layers = self._config.decoder_layers
        if contexts != [len(embeddings)] * num_layers:
            raise ModelError(
                f"transformers' decoder took contexts of {sorted(set(contexts))} positions, {len(contexts)} times; "
                f"expected {len(embeddings)}, once in each of {num_layers} layers"
            )
        if feeds[0] != list(prompt) or any(len(feed) != 1 for feed in feeds[1:]):
            raise ModelError("transformers' generate did not feed the prompt once and then one token at a time")
        return tokens

    @contextmanager
    def _watched(self) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Collect the length of every context that is projected to keys, and the tokens of every pass."""
        contexts: list[int] = []
        feeds: list[list[int]] = []

        def take_feed(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            feeds.append(tokens[0].tolist())

        decoder = self._network.model.decoder
        handles = [decoder.register_forward_pre_hook(take_feed, with_kwargs=True)]
        handles += [
            layer.encoder_attn.k_proj.register_forward_pre_hook(
                lambda _module, args: contexts.append(int(args[0].shape[1]))
            )
            for layer in decoder.layers
        ]
        try:
            yield contexts, feeds
        finally:
            for handle in handles:
                handle.remove()

    def _suppress_specials(self, _tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Without timestamps, generate itself lets any special token and timestamp through.
        scores[:, self._eot + 1 :] = -torch.inf
        return scores


def _network_config(transformers: Any, config: WhisperConfig, eot: int) -> Any:
    return transformers.WhisperConfig(
        vocab_size=config.vocab_size,
        num_mel_bins=config.num_mels,
        d_model=config.width,
        encoder_layers=0,
        encoder_attention_heads=config.encoder_heads,
        encoder_ffn_dim=config.encoder_ffn,
        decoder_layers=config.decoder_layers,
        decoder_attention_heads=config.decoder_heads,
        decoder_ffn_dim=config.decoder_ffn,
        max_source_positions=config.max_source_positions,
        max_target_positions=config.max_target_positions,
        decoder_start_token_id=eot + 1,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
        begin_suppress_tokens=None,
    )


def _encoder_output(context: torch.Tensor) -> Any:
    outputs = importlib.import_module("transformers.modeling_outputs")
    return outputs.BaseModelOutput(last_hidden_state=context)


def _import_transformers() -> Any:
    """Return the package; looked up by name, so that the type checker does not read all of it."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as exc:
        raise ModelError(
            "`surtitle bench decoder` compares with transformers, which is not installed: "
            "pip install -e '.[bench]' in the checkout brings it"
        ) from exc
    # generate warns of what it passes to itself, at every call.
    transformers.logging.set_verbosity_error()
    return transformers
