"""Decoding with experts on disk: a comparison of cache policies on equal tokens.

The model is a small one of the zoo, trained for a minute on bytes, or one named by --model. Its
experts are then widened with zeros, which does not change its results: routing is that of a trained
model, and experts are large enough to take time to load.
"""
