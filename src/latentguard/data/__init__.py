"""The built-in prompts, and what their surface form gives away."""
