"""Operations on trained experts as plain functions: select, append, split, merge.

Each returns a new module with its own parameters, which keep dtype, device and requires_grad, and
leaves the old one alone. The methods of `Router`, `Experts`, `MoE` and `AttentionExperts` call them
and document them. A module is asked for its `config()` and for a blank one of its kind.
"""
