"""Teaching a tiny Phi-4-multimodal: its closed world, and what is made of it. Only the training needs transformers."""
