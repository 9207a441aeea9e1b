"""T2MIR: in-context reinforcement learning with token-wise and task-wise experts.

Example:
    model = T2MIR(T2MIRConfig(variant="ad", state_size=2, action_size=2))
    output = model(states, actions, rewards)      # output.actions [B, S, A]

Source: Wu et al. 2025 (arXiv 2506.05426); Laskin et al. 2022 (AD, arXiv 2210.14215); Lee et al.
2023 (DPT, arXiv 2306.14892).
"""

from .model import T2MIR, ExpertLayer, T2MIRConfig, action_loss

__all__ = ["T2MIR", "ExpertLayer", "T2MIRConfig", "action_loss"]
