"""Paired benchmark of two builds, which finds regressions of one against the other."""
