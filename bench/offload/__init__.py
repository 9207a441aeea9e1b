"""Decoding with experts on disk: what each policy of the cache makes of the same tokens.

The model is a small one of the zoo, trained for a minute on bytes, or one that --model names. Its
experts are then made wider with zeros, which changes nothing that it computes: routes are those of
a trained model, and experts have a size that takes time to load.
"""
