"""Sound: samples to chunks, chunks to utterances, utterances to embeddings."""
