"""The standard prompt suite: a guard beside published figures of others."""
