"""Efficiency claims of the zoo's papers at the published sizes: ``python -m bench.studies
efficiency``.

Each claim compares arms with the paper's baseline, built from the same layers. Parameters, FLOPs
and saved activations are counted on the meta device; time and peak memory are measured on the CPU.
"""
