"""Reviewing: people label prompts on a page, and the guard learns from their labels."""
