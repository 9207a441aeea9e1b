"""The paired benchmark of two builds: what one of them does slower than the other."""
