"""Latent Bench: interpretable fine-tuning of language models, scored on a world whose truth is known."""
