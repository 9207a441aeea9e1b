"""Studies of the recipes on digits: small networks, seconds per run."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.studies.recipes import (
    boosting,
    counter_current,
    gradient_noise,
    guidance,
    long_tail,
    look,
)

from ..study import Hypothesis
from .setup import BATCH, Rows, accuracy, ahead, batches, digits, mlp, steps_of, study

# ---------------------------------------------------------------------------------- gradient noise

ETAS = (0.01, 0.3)
NOISE_RATES = (0.3, 0.1, 0.03)


def noise(seed: int) -> Rows:
    """Each arm has the best of three rates, by training accuracy."""
    data = digits(seed)
    rows: Rows = {}
    for eta in (0.0, *ETAS):
        found = []
        for rate in NOISE_RATES:
            torch.manual_seed(seed)
            model = mlp([64, *[50] * 20, 10])
            for linear in model[::2]:
                nn.init.normal_(linear.weight, std=0.1)
                nn.init.zeros_(linear.bias)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            draw = torch.Generator().manual_seed(seed + 1)
            add = gradient_noise.GradientNoise(model.parameters(), eta=eta, generator=draw)
            for x, y in batches(data.x, data.y, steps_of(2000), seed):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                add.add()
                optimizer.step()
            fitted = accuracy(model, data.x, data.y)
            found.append((fitted, accuracy(model, data.test_x, data.test_y)))
        best = max(found)
        arm = f"noise {eta:g}" if eta else "no noise"
        rows[arm] = {
            "test accuracy": best[1], "training accuracy": best[0], "trained": float(best[0] > 0.9),
        }  # fmt: skip
    return rows


NOISE = study(
    "noise", "gradient noise", 60, 1.5, noise,
    [
        Hypothesis(
            "20 layers that start too small reach a higher test accuracy with noise of 0.3",
            ahead("noise 0.3", "no noise"), "accuracy", below=False, key="noise",
        ),
        Hypothesis(
            "and with noise of 0.01", ahead("noise 0.01", "no noise"), "accuracy", below=False,
        ),
    ],
    {
        "Model": "20 hidden layers of 50 with ReLU, weights N(0, 0.01), biases 0",
        "Data": "digits, 1,197 for training and 600 for the test",
        "Training": f"SGD, 2000 steps of {BATCH}, gradient norm at most 10 before the noise; the "
        f"best of the rates {', '.join(map(str, NOISE_RATES))} by training accuracy",
    },
)  # fmt: skip

# --------------------------------------------------------------------------------- counter-current


def counter(seed: int) -> Rows:
    data = digits(seed)
    rows: Rows = {}
    for arm in ("counter-current", "back-propagation", "last layer alone"):
        torch.manual_seed(seed)
        net = counter_current.CounterCurrent.mlp([64, 128, 128, 128, 128], 10)
        trained = list(net.parameters() if arm[0] != "l" else net.blocks[-1].parameters())
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        for x, y in batches(data.x, data.y, steps_of(2000), seed):
            if arm == "counter-current":
                loss = torch.stack(net.losses(x, y)).sum()
            else:
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        aligned = net.alignment(data.test_x, data.test_y)
        rows[arm] = {
            "test accuracy": accuracy(net, data.test_x, data.test_y),
            "alignment": sum(aligned) / len(aligned),
        }
    return rows


COUNTER = study(
    "counter-current", "counter-current", 60, 0.6, counter,
    [
        Hypothesis(
            "Counter-Current Learning is at most 0.02 behind back-propagation",
            ahead("counter-current", "back-propagation"), "accuracy", -0.02, False, "counter",
        ),
        Hypothesis(
            "and ahead of training the last layer alone",
            ahead("counter-current", "last layer alone"), "accuracy", below=False, key="last",
        ),
        Hypothesis(
            "features are aligned with the class's signal, more than under back-propagation",
            ahead("counter-current", "back-propagation", "alignment"), "cosine", below=False,
        ),
    ],
    {
        "Model": "64-128-128-128-128-10 with ELU, no bias, and the feedback network",
        "Data": "digits", "Training": f"Adam 1e-3, 2000 steps of {BATCH}",
    },
)  # fmt: skip

# ---------------------------------------------------------------------------------------- guidance

DEPTH, WIDTH, GUIDED_FOR = 40, 64, 200
GUIDED_LAYERS = (1, 2, 3)


class Images(nn.Module):
    """Pixels [N, 64] as images [N, 1, 8, 8]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 8, 8)


def convolutions(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        Images(),
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def guide(seed: int) -> Rows:
    data = digits(seed)
    rows: Rows = {}
    trained_guide = convolutions(seed + 7)
    optimizer = torch.optim.Adam(trained_guide.parameters(), lr=1e-3)
    for x, y in batches(data.x, data.y, steps_of(600), seed):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(trained_guide(x), y).backward()
        optimizer.step()
    shallow = mlp([64, 64, 64, 10])
    of_three = [str(i) for i in GUIDED_LAYERS]
    total = steps_of(600)
    guides: dict[str, tuple[nn.Module, list[str], int]] = {
        "alone": (shallow, [], 0),
        "untrained convolutions": (convolutions(seed + 7), of_three, total),
        "for the first third": (convolutions(seed + 7), of_three, steps_of(GUIDED_FOR)),
        "trained convolutions": (trained_guide, of_three, total),
        "untrained shallow network": (shallow, ["1", "3"], total),
    }
    for arm, (teacher, names, until) in guides.items():
        torch.manual_seed(seed)
        model = mlp([64, *[WIDTH] * DEPTH, 10])
        for linear in model[::2]:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        for step, (x, y) in enumerate(batches(data.x, data.y, total, seed)):
            if step >= until:
                loss = F.cross_entropy(model(x), y)
            else:
                places = guidance.matching_layers(DEPTH, len(names))
                layers = [str(2 * place + 1) for place in places]
                output, away = guidance.guided(model, teacher, x, layers, names)
                loss = F.cross_entropy(output, y) + away
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        rows[arm] = {
            "test accuracy": accuracy(model, data.test_x, data.test_y),
            "training accuracy": accuracy(model, data.x, data.y),
        }
    return rows


GUIDANCE = study(
    "guidance", "guidance", 60, 1.0, guide,
    [
        Hypothesis(
            "a deep plain network is better with an untrained convolutional guide than alone",
            ahead("untrained convolutions", "alone"), "accuracy", below=False, key="guidance",
        ),
        Hypothesis(
            "and than with a guide that has no convolutions",
            ahead("untrained convolutions", "untrained shallow network"), "accuracy", below=False,
            key="prior",
        ),
        Hypothesis(
            "guidance for the first third is at most 0.01 behind guidance to the end",
            ahead("for the first third", "untrained convolutions"), "accuracy", -0.01, False,
            "third",
        ),
        Hypothesis(
            "a trained guide is better than an untrained one",
            ahead("trained convolutions", "untrained convolutions"), "accuracy", below=False,
        ),
    ],
    {
        "Model": f"{DEPTH} hidden layers of {WIDTH} with ReLU and He's weights, without residuals; "
        "guides of three convolutions, or of two hidden layers",
        "Data": "digits",
        "Training": f"Adam 3e-4, 600 steps of {BATCH}, weight 1 of the sum of 1 - CKA",
    },
)  # fmt: skip

# -------------------------------------------------------------------------------------------- LOOK


def nearest(z: Tensor, y: Tensor, test_z: Tensor, test_y: Tensor, k: int = 5) -> float:
    """Accuracy of k nearest neighbors by cosine."""
    near = (F.normalize(test_z, dim=1) @ F.normalize(z, dim=1).T).topk(min(k, len(z)), 1).indices
    votes = F.one_hot(y[near], int(y.max()) + 1).sum(1)
    return float((votes.argmax(1) == test_y).double().mean())


def look_rows(seed: int) -> Rows:
    """Pre-training on the parity of digits; what its features know of the ten."""
    data = digits(seed)
    parity = data.y % 2
    rows: Rows = {}
    for arm in ("cross-entropy", "LOOK, 10 neighbours", "LOOK, all of the memory"):
        torch.manual_seed(seed)
        trunk = mlp([64, 128, 128, 32])
        head = nn.Linear(32, 2)
        slow, memory = copy.deepcopy(trunk), look.Memory(1024, 32)
        optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=1e-3)
        for x, y in batches(data.x, parity, steps_of(1500), seed):
            z = trunk(x)
            if arm == "cross-entropy":
                loss = F.cross_entropy(head(z), y)
            else:
                # The head is fitted to features as they are, for the accuracy upstream.
                loss = F.cross_entropy(head(z.detach()), y)
                if len(memory.y):
                    k = 10 if "10" in arm else len(memory.y)
                    loss = loss + look.look_loss(z, y, memory.z, memory.y, k)
                look.follow(slow, trunk)
                with torch.no_grad():
                    memory.push(slow(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            z, test_z = trunk(data.x), trunk(data.test_x)
            up = float((head(test_z).argmax(1) == data.test_y % 2).double().mean())
        rows[arm] = {
            "digits, neighbours": nearest(z, data.y, test_z, data.test_y), "parity": up,
        }  # fmt: skip
    return rows


LOOK = study(
    "look", "LOOK", 60, 0.6, look_rows,
    [
        Hypothesis(
            "features of parity know more of the digit when pre-trained by LOOK",
            ahead("LOOK, 10 neighbours", "cross-entropy", "digits, neighbours"), "accuracy",
            below=False, key="look",
        ),
        Hypothesis(
            "few neighbours keep more of it than all of the memory",
            ahead("LOOK, 10 neighbours", "LOOK, all of the memory", "digits, neighbours"),
            "accuracy", below=False, key="few",
        ),
        Hypothesis(
            "parity itself is at most 0.01 worse",
            ahead("LOOK, 10 neighbours", "cross-entropy", "parity"), "accuracy", -0.01, False,
        ),
    ],
    {
        "Model": "64-128-128-32 with ReLU; memory of 1,024 by a momentum encoder (0.01), "
        "temperature 0.1",
        "Data": "digits: odd and even before, ten classes by 5 neighbours after",
        "Training": f"Adam 1e-3, 1500 steps of {BATCH}",
    },
)  # fmt: skip

# ---------------------------------------------------------------------------------------- boosting

UNITS, UNITS_A_STAGE = 60, 3


def boosted(seed: int) -> Rows:
    data = digits(seed)
    rows: Rows = {}
    net = boosting.BoostedNetwork("softmax", 64, 10, units=UNITS_A_STAGE)
    torch.manual_seed(seed)
    stages = steps_of(UNITS // UNITS_A_STAGE)
    net.fit(data.x, data.y, stages, iterations=steps_of(60), seed=seed)
    for name, part in (("boosted", stages), ("boosted, first half", max(1, stages // 2))):
        rows[name] = {"test accuracy": accuracy(net.merged(part), data.test_x, data.test_y)}
    for name, units in (("Adam", UNITS), ("Adam, half the units", UNITS // 2)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, units), nn.Tanh(), nn.Linear(units, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in batches(data.x, data.y, steps_of(3000), seed):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        rows[name] = {"test accuracy": accuracy(model, data.test_x, data.test_y)}
        if units == UNITS:
            with torch.no_grad():
                model[2].weight[:, UNITS // 2 :] = 0
            cut = accuracy(model, data.test_x, data.test_y)
            rows["Adam, last half taken away"] = {"test accuracy": cut}
    return rows


BOOSTING = study(
    "boosting", "boosted networks", 60, 1.0, boosted,
    [
        Hypothesis(
            "a boosted network is at most 0.01 behind Adam's of its size",
            ahead("boosted", "Adam"), "accuracy", -0.01, False, "boosting",
        ),
        Hypothesis(
            "its first half is ahead of a network whose last half of units is taken away",
            ahead("boosted, first half", "Adam, last half taken away"), "accuracy", below=False,
            key="cut",
        ),
    ],
    {
        "Model": f"one hidden layer of {UNITS} tanh units; boosted by {UNITS_A_STAGE} at a time, "
        "L-BFGS of 60 iterations on half of the examples",
        "Data": "digits", "Training of the others": f"Adam 1e-3, 3000 steps of {BATCH}",
    },
)  # fmt: skip

# --------------------------------------------------------------------------------------- long tail

TAILED = 3


def tail(seed: int) -> Rows:
    data = digits(seed)
    half = len(data.x) // 2
    base = long_tail.long_tailed_counts(10, 55, 50)
    turned = [base[-3 * i :] + base[: -3 * i] if i else base[::-1] for i in range(TAILED)]
    found = long_tail.run_bench(
        lambda: mlp([64, 64, 10]),
        (data.x[:half], data.y[:half]),
        (data.x[half:], data.y[half:]),
        (data.test_x, data.test_y),
        pretrained_on=turned,
        counts=long_tail.long_tailed_counts(10, 40, 40),
        pretrain_steps=steps_of(400),
        steps=steps_of(300),
        seed=seed,
    )
    return {arm: {**row} for arm, row in found.items()}


def of_sum(column: str, key: str, statement: str) -> Hypothesis:
    a, b = "sum, different pre-training", "sum, one pre-training"
    return Hypothesis(statement, ahead(a, b, column), "accuracy", below=False, key=key)


TAIL = study(
    "long-tail", "long tail", 60, 0.5, tail,
    [
        Hypothesis(
            "logit adjustment raises the mean over classes",
            ahead("adjusted", "fine-tuned alone", "all"), "accuracy", below=False, key="adjusted",
        ),
        of_sum(
            "missing upstream", "sum",
            "models of different pre-training add up to more than those of one, on classes that "
            "pre-training was short of",
        ),
        of_sum("all", "sum of all", "and over all classes"),
    ],
    {
        "Data": f"digits, half for pre-training: {TAILED} sets of 55 to 1 examples a class with "
        "different rare classes; half for fine-tuning: 40 to 1",
        "Model": "64-64-10 with ReLU",
        "Training": "Adam 1e-3, 400 steps before and 300 after; sums of three models each",
    },
)  # fmt: skip

STUDIES = (NOISE, COUNTER, GUIDANCE, LOOK, BOOSTING, TAIL)
