"""transformers' `Phi4MultimodalForCausalLM.generate` on a native checkpoint: the yardstick of `bench phi4`.

The whole model in one piece, float32, greedy, one request after the other. The speech adapter is added into its
weights: PEFT, which would compute it beside them at every step, is no dependency, and generate is the faster for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ModelError
from pipeline.models.phi4.audio_features import AudioFeatures
from pipeline.models.phi4.checkpoint import load_adapter, load_config
from pipeline.models.phi4.conformer import num_tokens

_FULL_SCALE = 32_768.0


@dataclass(frozen=True, slots=True)
class _Feed:
    """What one pass of the network was given: text and placeholders, and how long a sound beside them."""

    num_inputs: int
    num_steps: int | None


class GeneratePhi4:
    """The whole model with the speech adapter, on the CPU.

    Args:
        directory: a checkpoint in the native layout.
        suppressed: tokens that are never picked.

    Raises:
        ModelError: if transformers is not installed, or the checkpoint cannot be used.
    """

    def __init__(self, directory: Path, suppressed: Sequence[int]) -> None:
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as exc:
            raise ModelError(
                "`surtitle bench phi4 --scaled` compares with transformers, which is not installed: "
                "pip install -e '.[bench]' in the checkout brings it"
            ) from exc
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._config = load_config(directory)
        self._features = AudioFeatures(self._config.audio.num_mels)
        kind = transformers.Phi4MultimodalForCausalLM
        self._network: Any = kind.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self._add_speech_adapter(directory)
        self._options = {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "eos_token_id": list(self._config.end_tokens),
            "pad_token_id": self._config.end_tokens[0],
            "suppress_tokens": list(suppressed) or None,
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, without those of adapters."""
        return sum(tensor.numel() for tensor in self._network.parameters())

    def generate(self, samples: NDArray[np.int16], prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        """Return the text tokens about `samples` int16[n], without the token that ends them.

        `prompt` has a placeholder for each token of sound. Features are computed here too.
        """
        found = self._generate(samples, prompt, max_new_tokens).tolist()
        return tuple(token for token in found[0][len(prompt) :] if token not in self._config.end_tokens)

    def generate_checked(
        self, samples: NDArray[np.int16], prompt: Sequence[int], max_new_tokens: int
    ) -> tuple[int, ...]:
        """Do as `generate` and check that it fed the prompt once with its sound, and then a token at a time.

        Raises:
            ModelError: if it did not: its time would be that of another task.
        """
        with self._watched() as feeds:
            tokens = self.generate(samples, prompt, max_new_tokens)
        sizes = [feed.num_inputs for feed in feeds]
        if sizes[0] != len(prompt) or any(size != 1 for size in sizes[1:]) or feeds[0].num_steps is None:
            raise ModelError(
                f"transformers' generate fed {sizes} tokens, expected {len(prompt)} and then one at a time"
            )
        if len(feeds) not in (len(tokens), len(tokens) + 1):
            raise ModelError(f"transformers' generate ran {len(feeds)} passes for {len(tokens)} tokens")
        return tokens

    def margin(self, samples: NDArray[np.int16], prompt: Sequence[int], index: int) -> float:
        """Return by how much the best logit of new token `index` is above the second."""
        found = self._generate(samples, prompt, index + 1, output_logits=True, return_dict_in_generate=True)
        if len(found.logits) <= index:
            return float("inf")  # it had ended before
        logits = found.logits[index][0].clone()
        logits[self._options["suppress_tokens"] or []] = -torch.inf
        best = logits.topk(2).values
        return float(best[0] - best[1])

    @torch.inference_mode()
    def _generate(self, samples: NDArray[np.int16], prompt: Sequence[int], max_new_tokens: int, **more: Any) -> Any:
        features = self._features(torch.tensor(samples).float() / _FULL_SCALE)
        ids = torch.tensor([list(prompt)])
        return self._network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            audio_input_features=features[None],
            audio_embed_sizes=torch.tensor([num_tokens(len(features))]),
            max_new_tokens=max_new_tokens,
            **self._options,
            **more,
        )

    @contextmanager
    def _watched(self) -> Iterator[list[_Feed]]:
        feeds: list[_Feed] = []

        def take_feed(_module: object, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sound = kwargs.get("audio_input_features")
            feeds.append(_Feed(int(kwargs["input_ids"].shape[1]), None if sound is None else int(sound.shape[1])))

        handle = self._network.register_forward_pre_hook(take_feed, with_kwargs=True)
        try:
            yield feeds
        finally:
            handle.remove()

    def _add_speech_adapter(self, directory: Path) -> None:
        adapter = load_adapter(directory, "speech")
        num_left = len(adapter.tensors) // 2
        for name, weight in self._network.model.named_parameters():
            down, up = (adapter.tensors.get(name.replace(".weight", f".lora_{side}.weight")) for side in "AB")
            if down is not None and up is not None:
                weight.data += (adapter.scale * (up.double() @ down.double())).float()
                num_left -= 1
        if num_left:
            raise ModelError(f"transformers' network has no place for {num_left} projections of the speech adapter")
