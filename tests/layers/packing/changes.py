"""All that changes the weights of a bank: `CHANGES` by name, and the functions alone."""

from __future__ import annotations

import torch
from tests.layers.pack_weights.banks import I, make
from torch import nn


def sgd(bank, **kwargs):
    return torch.optim.SGD(bank.parameters(), lr=0.1, momentum=0.9, **kwargs)


def adamw(bank, **kwargs):
    return torch.optim.AdamW(bank.parameters(), lr=0.1, **kwargs)


def step(bank, optimizer, **kwargs):
    """A step with gradients from somewhere else: no call of the bank gives it away."""
    for p in bank.parameters():
        p.grad = torch.randn_like(p)
    optimizer(bank, **kwargs).step()


def load(bank, **kwargs):
    bank.load_state_dict({k: v + 1 for k, v in bank.state_dict().items()}, **kwargs)


def in_place(bank):
    with torch.no_grad():
        bank.w_down.mul_(1.5)


def part(bank):
    with torch.no_grad():
        bank.w_gate_up[1, 3, 7] += 2


def through_a_view(bank):
    with torch.no_grad():
        bank.w_gate_up.view(-1)[5] += 2


def in_inference_mode(bank):
    with torch.inference_mode():
        bank.w_down[2].mul_(-1)


def data(bank):
    bank.w_gate_up.data.mul_(-1)


def data_of_one_expert(bank):
    bank.w_down.data[:, :, : I // 4] = 0


def numpy(bank):
    array = bank.w_down.detach().numpy()
    array *= 2


def assign_data(bank):
    bank.w_down.data = bank.w_down.data * 2


def offload_and_bring_back(bank):
    values, shape = bank.w_down.data.clone() * 2, bank.w_down.shape
    bank.w_down.data = torch.empty(0)
    bank.w_down.data = torch.empty(shape)
    bank.w_down.data.copy_(values)


def replace(bank):
    bank.w_down = nn.Parameter(bank.w_down.detach() * 2)


def replace_by_views(bank):
    with torch.no_grad():
        bank.w_down = nn.Parameter((bank.w_down * 2).transpose(1, 2).contiguous().transpose(1, 2))


def swap(bank):
    torch.utils.swap_tensors(bank.w_down, nn.Parameter(bank.w_down.detach() * 2))


def copied_from_another(bank):
    with torch.no_grad():
        for p, q in zip(bank.parameters(), make().parameters(), strict=True):
            p.copy_(q)


def reset(bank):
    bank.reset_parameters()


CHANGES = {
    "in place": in_place,
    "one element": part,
    "view": through_a_view,
    "inference mode": in_inference_mode,
    ".data": data,
    ".data of a part": data_of_one_expert,
    "numpy": numpy,
    "new .data": assign_data,
    "offload": offload_and_bring_back,
    "new parameter": replace,
    "new strides": replace_by_views,
    "swap_tensors": swap,
    "copy_": copied_from_another,
    "reset": reset,
    "load_state_dict": load,
    "load_state_dict assign": lambda bank: load(bank, assign=True),
    "sgd": lambda bank: step(bank, sgd),
    "sgd foreach": lambda bank: step(bank, sgd, foreach=True),
    "sgd fused": lambda bank: step(bank, sgd, fused=True),
    "adamw": lambda bank: step(bank, adamw),
    "adamw fused": lambda bank: step(bank, adamw, fused=True),
    "double": lambda bank: bank.double(),
    "half": lambda bank: bank.bfloat16(),
}
