"""Whisper in torch: front end, encoder, decoder, tokenizer, word times."""
