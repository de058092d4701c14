"""The verb ``serve``: its options, where they come from, and what a service is made of."""
