"""Sources of media: decoding processes, normalisation to 16 kHz PCM."""
