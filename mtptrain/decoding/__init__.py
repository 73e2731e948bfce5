"""Plain and speculative decoding of batches of prompts."""
