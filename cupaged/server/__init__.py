"""The HTTP face: OpenAI's API over the async engine."""
