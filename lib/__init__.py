"""Latent Bench: interpretable fine-tuning, scored on a world whose truth is known."""
