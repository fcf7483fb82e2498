"""An OpenAI-compatible server: many texts are written in one growing batch."""
