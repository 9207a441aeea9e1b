"""Tests that every language model of the zoo must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_ops.zoo.lm.model import CausalLM


def sharpen(model: CausalLM, std: float = 0.3) -> CausalLM:
    """Large random weights, so that routing and attention are far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.0 if "embed" in name else std))
            else:
                parameter.add_(noise * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
    return model


def tokens_of(model: CausalLM, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


def check_cache(model: CausalLM, pieces: tuple[int, ...] = (5, 1, 1, 4, 1)) -> None:
    """Steps with a cache, of one token and of several, give the logits of the whole."""
    model.eval()
    tokens = tokens_of(model, 2, sum(pieces))
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache()
        parts = [model(part, cache=cache) for part in tokens.split(pieces, dim=1)]
    tolerance = 1e-9 if whole.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=tolerance, atol=tolerance)


def check_generate(model: CausalLM) -> None:
    """Greedy generation is the argmax of full forwards; draws follow seed, top_k and top_p."""
    prompt = tokens_of(model, 3, 4)
    model.train()
    ours = model.generate(prompt, 5)
    assert model.training and ours.shape == (3, 9) and torch.equal(ours[:, :4], prompt)
    model.eval()
    expected = prompt
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours, expected)

    def draw(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 5, temperature=5.0, generator=generator, **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(3, top_k=1), expected)
    assert torch.equal(draw(3, top_p=1e-9), expected)
    stop = int(expected[0, 5])
    stopped = model.generate(prompt[:1], 5, stop_token=stop)
    assert stopped.shape[1] <= 6 and int(stopped[0, -1]) == stop


def check_gradients_flow(model: CausalLM) -> None:
    """Every parameter gets a gradient that is finite and not zero."""
    model.train()
    model.zero_grad()
    model.loss(tokens_of(model, 4, 33)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def check_compiles(model: CausalLM) -> None:
    model.eval()
    tokens = tokens_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))

    def loss(tokens: Tensor) -> Tensor:
        return model.loss(tokens).loss

    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled_loss(tokens), list(model.parameters()))
    theirs = torch.autograd.grad(loss(tokens), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def check_round_trip(model: CausalLM, folder: Path, *, a_key: str) -> None:
    """Saved in one file and in shards, read back with the same logits; `a_key` is in the file."""
    tokens, device = tokens_of(model), torch.get_default_device()
    model.eval()
    model.save_pretrained(folder / "one")
    assert a_key in load_file(folder / "one" / "model.safetensors")
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder / "many", max_shard_bytes=size // 3)
    assert len(list((folder / "many").glob("model-*.safetensors"))) >= 3
    for name in ("one", "many"):
        again = type(model).from_pretrained(folder / name, device=device)
        assert again.config == model.config and not again.training
        assert again.load_report.missing == [] and again.load_report.unexpected == []
        assert again.load_report.loaded == len(model.entries())
        assert {e.name for e in model.entries()} == set(model.state_dict())
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
        assert torch.equal(again(tokens), model(tokens))
    half = type(model).from_pretrained(folder / "one", dtype=torch.bfloat16, device=device)
    assert half.embed_tokens.weight.dtype == torch.bfloat16
    assert half(tokens).dtype == torch.bfloat16


def change_file(folder: Path, change: Any) -> None:
    """Applies `change` to the dict of tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def published_tensors(model: CausalLM, gradients: bool = False) -> dict[str, Tensor]:
    """The model's tensors, or their gradients, under the published keys."""
    found = {}
    state: dict[str, Tensor] = dict(model.state_dict())
    if gradients:
        state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for entry in model.entries():
        if entry.name in state:
            found |= zip(entry.keys, entry.split(state[entry.name]), strict=True)
    return found


def compare_with_hf(model: CausalLM, hf: torch.nn.Module, folder: Path) -> None:
    """Logits, gradients and checkpoints in both directions equal those of a transformers model.

    transformers computes norms and angles in fp32 whatever the type of the model, so that fp64
    models agree to the precision of fp32 and not further.
    """
    hf.save_pretrained(folder / "theirs")
    ours = type(model).from_pretrained(
        folder / "theirs", dtype=torch.float64, device=torch.get_default_device()
    )
    assert ours.load_report.missing == [] and ours.load_report.unexpected == []
    hf = hf.double().eval()
    hf.set_experts_implementation("eager")
    tokens = tokens_of(ours, 3, 17)
    a, b = ours(tokens), hf(input_ids=tokens).logits
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.detach().std()))

    grad = torch.randn_like(a)
    a.backward(grad)
    b.backward(grad)
    with torch.no_grad():
        for parameter in hf.parameters():
            # Their own writer gives the gradients their published names and layouts.
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    hf.save_pretrained(folder / "gradients")
    theirs = {}
    for path in (folder / "gradients").glob("*.safetensors"):
        theirs |= load_file(path)
    mine = published_tensors(ours, gradients=True)
    assert len(mine) > 10
    for key, value in mine.items():
        scale = float(theirs[key].abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            value.cpu(),
            theirs[key],
            rtol=1e-4,
            atol=1e-4 * scale,
            msg=lambda m, key=key: f"{key}: {m}",
        )

    ours.save_pretrained(folder / "ours")
    back = type(hf).from_pretrained(folder / "ours", dtype=torch.float64).eval()
    back.set_experts_implementation("eager")
    # Its frequencies are fp32, those of a model that was made and then cast are fp64.
    again = back(input_ids=tokens).logits
    torch.testing.assert_close(again, b, rtol=2e-5, atol=2e-5 * float(b.detach().std()))
