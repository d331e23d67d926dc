"""Phi-4-multimodal, its parts as stages of their own."""
