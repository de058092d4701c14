"""Text: what obfuscated writing says."""
