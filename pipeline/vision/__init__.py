"""Vision: frames to keyframes, keyframes to crops, crops to embeddings."""
