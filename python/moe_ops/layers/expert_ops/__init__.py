"""Operations on trained experts as plain functions: select, append, split, merge.

Each returns a new module with its own parameters, which keep dtype, device and requires_grad, and
leaves the old module unchanged. The methods of `Router`, `Experts`, `MoE` and `AttentionExperts`
call and document them. The functions use a module's `config()` and `blank()`.
"""
