"""A fitted guard as a service: OpenAI's moderation and chat endpoints, and a page to look at."""
