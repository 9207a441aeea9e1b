"""Recording and replay of the experts that transformers' models select."""
