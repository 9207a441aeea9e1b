"""Experts, losses and the network against their equations, and a scene that is known."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.gntmove.scenes import (
    FAR,
    all_pixels,
    at,
    draw_cameras,
    draw_scenes,
    photograph,
    trace,
)
from bench.studies.gntmove.training import ARMS, Settings, draw_batch, render
from bench.studies.images import psnr
from torch import nn

from moe_ops import zoo
from moe_ops.zoo.gntmove import GNTMove, ViewExperts, ViewRouter, Views
from moe_ops.zoo.gntmove.cameras import project, rays
from moe_ops.zoo.gntmove.layers import consistency_loss, neighbors
from moe_ops.zoo.gntmove.model import encode

T, H, I, E, K = 9, 8, 10, 4, 2
SMALL = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "features": 3, "num_freqs": 1,
         "num_points": 3}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator(2)))
    return module.double()


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(linear, x):
    return linear.weight @ x + linear.bias


def cosines(router, x):
    z = router.stem.weight @ x
    return torch.stack([z @ w / (z.norm() * w.norm()) for w in router.weight])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("permanent", [False, True])
def test_experts_equal_a_plain_transcription(training, permanent):
    made = randomized(ViewExperts(H, I, E, K, permanent=permanent)).train(training)
    x = torch.randn(T, H, dtype=torch.float64, generator=generator(), requires_grad=True)
    torch.manual_seed(4)
    y, routed = made(x)
    torch.manual_seed(4)
    noise = torch.randn(T, E, dtype=torch.float64) if training else torch.zeros(T, E)
    router, bank, rows, clean, noisy = made.moe.router, made.moe.experts, [], [], []
    for t, token in enumerate(x):
        inverse_temperature = router.temperature.exp()
        clean.append(cosines(router, token) * inverse_temperature)
        noisy.append((cosines(router, token) + noise[t] / E) * inverse_temperature)
        shares = noisy[-1].softmax(0)
        best = sorted(range(E), key=lambda e: -shares[e].item())[:K]
        assert routed.routing.topk_ids[t].tolist() == best
        out = 0
        for e in best:
            inner = gelu(bank.w_gate_up[e] @ token + bank.b_gate_up[e])
            out = out + shares[e] * (bank.w_down[e] @ inner + bank.b_down[e])
        if permanent:
            network = made.moe.shared_experts
            out = (out + affine(network.down, affine(network.up, token).relu())) / 2
        rows.append(out)
    wanted = torch.stack(rows)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(routed.logits, torch.stack(clean))
    torch.testing.assert_close(routed.routing.router_logits, torch.stack(noisy))
    parameters = [x, *made.parameters()]
    ours = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_balance_equals_a_plain_transcription():
    made = randomized(ViewExperts(H, I, E, K)).train()
    x = torch.randn(T, H, dtype=torch.float64, generator=generator())
    torch.manual_seed(4)
    _, routed = made(x)
    noisy, clean, router = routed.routing.router_logits, routed.logits, made.moe.router
    importance, load = torch.zeros(E).double(), torch.zeros(E).double()
    for t in range(T):
        shares = noisy[t].softmax(0)
        order = sorted(range(E), key=lambda e: -noisy[t, e].item())
        for e in range(E):
            if e in order[:K]:
                importance[e] += shares[e]
            # What it must exceed: the K-th best of the others.
            threshold = noisy[t, [other for other in order if other != e][K - 1]]
            deviation = router.temperature[e].exp() / E
            load[e] += torch.special.ndtr((clean[t, e] - threshold) / deviation)
    wanted = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    torch.testing.assert_close(routed.balance, wanted)
    assert made.eval()(x)[1].balance == 0


def test_router_starts_with_finite_gradients_and_refuses_surgery():
    """The authors' R is 0 at the start, where a cosine has no gradient."""
    made = ViewExperts(H, I, E, K)
    router = made.moe.router
    assert router.stem.weight.abs().max() > 0 and router.stem.weight.shape == (E // 2, H)
    y, routed = made(torch.randn(T, H))
    (y.square().sum() + routed.balance).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.norm() < 1e3, name
    assert router.draws_random_numbers and not ViewRouter(H, E, K, noise=0.0).draws_random_numbers
    weights = made.eval()(torch.randn(T, H))[1].routing.topk_weights
    assert bool((weights.sum(-1) < 1).all())
    with pytest.raises(NotImplementedError, match="no rule for it"):
        router.select([0, 1])
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        ViewRouter(H, E, K, noise=-1.0)


def test_consistency_equals_a_plain_transcription():
    points = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator())
    logits = torch.randn(4, 5, E, dtype=torch.float64, generator=generator(1))
    pairs = torch.tensor([[0, 1], [2, 3], [1, 3]])
    total = 0
    for a, b in pairs.tolist():
        distance, divergence = [], []
        for p in range(5):
            away = (points[b] - points[a, p]).norm(dim=-1)
            q = int(away.argmin())
            distance.append(away[q])
            first, second = logits[a, p].softmax(0), logits[b, q].softmax(0)
            divergence.append(
                0.5 * (first * (first / second).log()).sum()
                + 0.5 * (second * (second / first).log()).sum()
            )
        weight = (-torch.stack(distance)).softmax(0)
        total = total + (weight * torch.stack(divergence)).sum() / 3
    near = neighbors(points, pairs)
    torch.testing.assert_close(consistency_loss(logits, pairs, near), total)
    same = logits[:1, :1].expand(4, 5, E)
    assert consistency_loss(same, pairs, near) == pytest.approx(0, abs=1e-12)
    none = torch.empty(0, 2, dtype=torch.long)
    assert consistency_loss(logits, none, neighbors(points, none)) == 0


def norm(layer, x):
    centered = x - x.mean()
    return centered / (centered.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def small_network(network, x):
    return affine(network[2], affine(network[0], x).relu())


def feed_forward(network, x):
    return affine(network.down, affine(network.up, x).relu())


def test_network_equals_a_plain_transcription():
    """Ray by ray, point by point, view by view; what views show is given."""
    model = randomized(zoo.create_model("gntmove", **SMALL)).eval()
    batch = draw_batch(generator(), scenes=1, views=3, count=2, size=8)
    views = Views(batch.views.images.double(), batch.views.cameras)
    cameras = views.cameras._replace(
        position=views.cameras.position.double(), rotation=views.cameras.rotation.double(),
        focal=views.cameras.focal.double(),
    )  # fmt: skip
    views = Views(views.images, cameras)
    target = batch.target._replace(
        position=batch.target.position.double(), rotation=batch.target.rotation.double(),
        focal=batch.target.focal.double(),
    )  # fmt: skip
    pixels = batch.pixels.double()
    out = model(views, target, pixels)
    origins, directions = rays(target, pixels)
    depths = model.draw_depths(1, 2)
    points = origins[..., None, :] + depths[..., None] * directions[..., None, :]
    torch.testing.assert_close(out.points, points[0])
    found, differences, seen = model.look(views, model.image_features(views.images), target, points)
    seen[0, 1] = False  # Looked at by nobody.
    colors = []
    for r in range(2):
        shown = [[small_network(model.enter, view) for view in point] for point in found[r]]
        x = [torch.stack(of_point).amax(0) for of_point in shown]
        for number in range(2):
            block = model.view_blocks[number]
            for p in range(3):
                attention, q = block.attention, norm(block.attention_norm, x[p])
                scores, values = [], []
                for v in range(3):
                    k = attention.k.weight @ shown[p][v]
                    place = small_network(attention.place, differences[r, p, v])
                    score = small_network(attention.score, k - attention.q.weight @ q + place)
                    scores.append(score if seen[r, p, v] else torch.full_like(score, -1e9))
                    values.append(attention.v.weight @ k + place)
                weights = torch.stack(scores).softmax(0)
                mixed = (weights * torch.stack(values)).sum(0)
                x[p] = x[p] + affine(attention.out, mixed)
                h = norm(block.ffn_norm, x[p])
                if number == 0:
                    x[p] = x[p] + feed_forward(block.ffn, h)
                else:
                    x[p] = x[p] + block.ffn(h[None])[0][0]
            if number == 0:
                for p in range(3):
                    place = [encode(points[0, r, p], 1), encode(directions[0, r], 1)]
                    x[p] = small_network(model.places[0], torch.cat([x[p], *place]))
            block = model.ray_blocks[number]
            h = torch.stack([norm(block.attention_norm, point) for point in x])
            q, k, v = (block.attention.qkv.weight @ h.T).T.chunk(3, -1)
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = (q[:, head] @ k[:, head].T / math.sqrt(4)).softmax(-1)
                heads.append(weights @ v[:, head])
            joined = torch.cat(heads, -1)
            for p in range(3):
                x[p] = x[p] + affine(block.attention.out, joined[p])
                x[p] = x[p] + feed_forward(block.ffn, norm(block.ffn_norm, x[p]))
        colors.append(affine(model.color, torch.stack([norm(model.norm, p) for p in x]).mean(0)))
    ours, _ = model._blocks(found, differences, seen, points, directions)
    torch.testing.assert_close(model.color(model.norm(ours).mean(-2)), torch.stack(colors))


def passing_colors():
    """A model whose weights pass the color on that the source views show: everything behind the
    first map adds 0, and a large constant among the features keeps the last norm's scale."""
    size, large = 8, 100.0
    model = GNTMove(zoo.get("gntmove").make_config(**{**SMALL, "num_points": 2}))
    copies, back = torch.zeros(size, size), torch.zeros(size, size)
    for color in range(3):
        copies[color, color], back[2 * color, color], back[2 * color + 1, color] = 1.0, 1.0, -1.0
    constant = torch.tensor([0.0] * 6 + [large, -large])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        first, _, second = model.enter
        first.weight[:3, :3] = torch.eye(3)
        second.weight.copy_(back)
        second.bias.copy_(constant)
        first, _, second = model.places[0]
        for color in range(3):
            first.weight[color, 2 * color] = 1.0
        second.weight.copy_(back)
        second.bias.copy_(constant)
        for color in range(3):
            model.color.weight[color, 2 * color] = large / 2
        # Cosines of zeros are no numbers to route by.
        for module in model.modules():
            if isinstance(module, ViewRouter):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.stem.weight)
    return model


def rendered_by_oracle(size):
    """Truth, what the renderer makes of sources of `size` pixels with points at the true depths,
    and what it makes with the depths in another order; pixels that a source does not see are the
    true ones."""
    scenes = draw_scenes(2, generator(5), material=2)
    target = draw_cameras(2, 3, 48, generator(6), spread=0.15)[0]
    sources = draw_cameras(2, 3, size, generator(6), spread=0.15)[1]
    truth = photograph(scenes, at(target, (slice(None), None)))[:, 0]
    origins, directions = rays(target, all_pixels(48, 48).expand(2, -1, 2))
    depth = trace(scenes, origins, directions).depth
    points = origins + depth[..., None] * directions
    visible = depth < FAR
    for view in range(3):
        camera = at(sources, (slice(None), view))
        where, inside = project(camera, points)
        away = (points - camera.position[:, None]).norm(dim=-1)
        there = trace(scenes, *rays(camera, where)).depth
        visible = visible & inside & ((there - away).abs() < 0.02)
    assert float(visible.float().mean()) > 0.5
    views = Views(photograph(scenes, sources), sources)
    depths = depth.clamp(max=50.0)[..., None].expand(-1, -1, 2)
    model = passing_colors()
    made, mixed = (render(model, views, target, depths=d) for d in (depths, depths.flip(1)))
    mask = visible.view(2, 1, 48, 48)
    return truth, torch.where(mask, made, truth), torch.where(mask, mixed, truth)


def test_renders_a_known_scene():
    """With points at the true depths and weights that pass colors on, the renderer gives the image
    that the ray tracer makes, up to the pixels of its sources: cameras, projections, sampling and
    the order of pixels are right."""
    truth, coarse, mixed = rendered_by_oracle(48)
    fine = rendered_by_oracle(144)[1]
    # Edges are a pixel of the sources wide: their share falls to a third, 4.8 dB.
    assert bool((psnr(fine, truth) > psnr(coarse, truth) + 3).all())
    assert bool((psnr(fine, truth) > 30).all())
    assert float((fine - truth).abs().median()) < 1e-3
    assert bool((psnr(mixed, truth) < psnr(coarse, truth) - 5).all())


def test_losses_and_arms():
    batch = draw_batch(generator(), scenes=1, views=2, count=4, size=8)
    torch.manual_seed(0)
    model = zoo.create_model("gntmove", **SMALL, balance_weight=0.5, consistency_weight=2.0)
    found = model.loss(*batch, generator=generator())
    wanted = found.color + 0.5 * found.balance + 2 * found.consistency
    torch.testing.assert_close(found.loss, wanted)
    assert found.balance > 0 and found.consistency > 0
    dense = zoo.create_model("gntmove", **SMALL, ffn="dense").loss(*batch)
    assert dense.balance == dense.consistency == 0 and dense.loss == dense.color
    # The wide arm's networks have as many parameters as a point uses of the experts'.
    config = Settings().config("move")
    assert ARMS["wide"]["dense_ratio"] == (config.top_k + 1) * config.mlp_ratio
    with pytest.raises(ValueError, match="num_heads must divide hidden_size = 9, got 2"):
        zoo.create_model("gntmove", **{**SMALL, "hidden_size": 9})
    with torch.device("meta"):
        published = zoo.create_model("gntmove", preset="gnt")
    assert sum(isinstance(m, ViewExperts) for m in published.modules()) == 4


def test_depths():
    model = zoo.create_model("gntmove", **SMALL, near=1.0, far=4.0).eval()
    assert model.draw_depths(1, 1).flatten().tolist() == [1.5, 2.5, 3.5]
    drawn = model.train().draw_depths(2, 5, generator())
    parts = (drawn - 1).floor()
    assert torch.equal(parts, torch.arange(3.0).expand(2, 5, 3))
    assert torch.equal(drawn, model.draw_depths(2, 5, generator()))
