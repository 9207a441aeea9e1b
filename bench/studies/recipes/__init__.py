"""Ways of training that work on any model, ours or not: each a module of its own.

`gradient_noise`, `counter_current`, `guidance`, `look`, `ranking_curriculum`, `boosting`,
`forward_gnn`, `talking_models`, `light_reasoner`, `prox` (data) and `long_tail` (a test bench).
docs/zoo/recipes.md has their equations, an example of each, and what was measured.
"""
