"""Sparse autoencoders on z: training, honest quality numbers, and which latents carry refusal or hallucination."""
