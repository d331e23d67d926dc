"""Crops that were encoded before, by what they show: what does not change in a picture is not encoded again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray


class CropCache:
    """The features of the last crops that were asked for. Used by one thread.

    Args:
        max_crops: features kept, the least recently asked for go first; 0: none.
    """

    def __init__(self, max_crops: int) -> None:
        self._max_crops = max_crops
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """Return the features of the crop with that digest; None if they are not kept. Nobody may write to them."""
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: NDArray[np.float32]) -> None:
        """Keep `features` float32[...], an array of its own (a view would keep what it is a view of)."""
        if not self._max_crops:
            return
        self._features[digest] = features
        self._features.move_to_end(digest)
        if len(self._features) > self._max_crops:
            self._features.popitem(last=False)
