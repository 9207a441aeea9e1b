"""Demo that trains a sparse mixture-of-experts language model in minutes, on any machine.

``moe-ops demo`` or ``python -m moe_ops.demo`` runs it on the source text of Python's standard
library (or ``--data``); ``--resume`` continues an interrupted run.
"""
