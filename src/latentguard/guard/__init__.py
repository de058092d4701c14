"""Latent Guard: what it holds, how it decides, how it is calibrated and saved."""
