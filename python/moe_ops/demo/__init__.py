"""A demo that trains a sparse mixture-of-experts language model in minutes, on any machine.

``moe-ops demo`` or ``python -m moe_ops.demo`` runs it. It trains on the source text of Python's
standard library (or ``--data``), can be killed and resumed bit for bit, draws what the experts do,
and ends by comparing Hugging Face models with and without `moe_ops`.
"""
