"""Graphs of the Mowst experiment: one whose neighbors mislead, and films of MovieLens 100k."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from bench.studies import movielens as files
from bench.studies.mowst.graphs import Graph

# Genres merged to seven classes. A film of several has the class that comes first here, so that
# the particular goes before drama and comedy, which most films are as well.
CLASSES = (
    ("Children's", "Animation", "Musical", "Fantasy"),
    ("Horror", "Sci-Fi"),
    ("Crime", "Thriller", "Mystery", "Film-Noir"),
    ("Action", "Adventure", "War", "Western"),
    ("Romance",),
    ("Comedy",),
    ("Drama",),
)
PEOPLE = ("actor", "directed_by", "written_by", "produced_by", "cinematography")
MIN_RATINGS, TITLE_FEATURES = 5, 32


def split(num_nodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """40 % of the nodes train, 20 % validate, 40 % test."""
    draw = torch.rand(num_nodes, generator=torch.Generator().manual_seed(seed))
    return draw < 0.4, (draw >= 0.4) & (draw < 0.6), draw >= 0.6


def both_ways(pairs: Tensor) -> Tensor:
    """[2, edges], each edge in both directions and once."""
    return torch.cat([pairs, pairs.flip(0)], dim=1).unique(dim=1)


def homophily(graph: Graph) -> float:
    """Share of the edges that join two nodes of one class."""
    source, target = graph.edge_index
    return float((graph.y[source] == graph.y[target]).double().mean())


def misleading(
    num_nodes: int,
    num_classes: int = 4,
    num_features: int = 16,
    *,
    degree: int = 8,
    signal: float = 2.5,
    weak_signal: float = 0.7,
    share: float = 0.85,
    generator: torch.Generator | None = None,
) -> tuple[Graph, Tensor]:
    """Half the nodes are told by features and misled by their neighbors, half told by neighbors.

    Each node reads `degree` others, over edges into it alone, so that it can be told nothing of its
    own class by who reads it. `share` of a structure node's are of its class, of a feature node's
    of the next one; the rest are any. A graph network is sure of both and wrong about the latter.

    Returns:
        the graph, and [N] bool, True for feature nodes.
    """
    y = torch.randint(num_classes, (num_nodes,), generator=generator)
    featured = torch.arange(num_nodes) < num_nodes // 2
    centers = torch.randn(num_classes, num_features, generator=generator)
    centers = torch.nn.functional.normalize(centers, dim=1)
    scale = torch.where(featured, signal, weak_signal)[:, None]
    x = scale * centers[y] + torch.randn(num_nodes, num_features, generator=generator)

    target = torch.arange(num_nodes).repeat_interleave(degree)
    wanted = (y + featured.long())[target] % num_classes
    draw = torch.rand(len(target), generator=generator)
    source = torch.randint(num_nodes, (len(target),), generator=generator)
    told = torch.rand(len(target), generator=generator) < share
    for c in range(num_classes):
        pool = (y == c).nonzero()[:, 0]
        mine = told & (wanted == c)
        source[mine] = pool[(draw[mine] * len(pool)).long()]
    pairs = torch.stack([source, target])[:, source != target].unique(dim=1)
    part = torch.rand(num_nodes, generator=generator)
    return Graph(x, pairs, y, part < 0.4, (part >= 0.4) & (part < 0.6), part >= 0.6), featured


def films(seed: int) -> Graph | None:
    """Films of MovieLens 100k, linked where they share cast or crew; the class is a merged genre.

    Films with at least five ratings, a genre of `CLASSES` and an entry in the knowledge graph. Its
    triples of genre are not read. Features: who rated the film (shares of occupations and of women,
    mean age), its ratings (mean, deviation, log of their number), its year, and the words of its
    title, hashed. The files are read where the installed package recbole has them: GroupLens' terms
    do not allow passing them on. None where it is not installed.
    """
    folder = files.folder()
    if folder is None:
        return None
    x, edge_index, y = _films(folder)
    return Graph(x, edge_index, y, *split(len(y), seed))


@functools.cache
def _films(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    ratings = defaultdict(list)
    for user, film, stars, _ in files.read(folder / "ml-100k.inter"):
        ratings[film].append((user, float(stars)))
    people = {row[0]: row for row in files.read(folder / "ml-100k.user")}
    entities = dict(files.read(folder / "ml-100k.link"))
    y, chosen = [], []
    for row in files.read(folder / "ml-100k.item"):
        genres = set(row[3].split())
        found = [i for i, group in enumerate(CLASSES) if genres & set(group)]
        if found and len(ratings[row[0]]) >= MIN_RATINGS and row[0] in entities:
            chosen.append(row)
            y.append(found[0])
    number = {entities[row[0]]: i for i, row in enumerate(chosen)}

    jobs = {job: i for i, job in enumerate(sorted({row[3] for row in people.values()}))}
    x = torch.zeros(len(chosen), len(jobs) + 6 + TITLE_FEATURES)
    for i, (film, title, year, _) in enumerate(chosen):
        given = ratings[film]
        share = 1 / len(given)
        total = [0.0] * x.shape[1]
        stars = torch.tensor([s for _, s in given])
        who = [people[user] for user, _ in given]
        for _, age, gender, job, _ in who:
            total[jobs[job]] += share
            total[-1] += share * (gender == "F")
            total[-2] += share * float(age)
        total[-3], total[-4] = float(stars.mean()), float(stars.std(correction=0))
        total[-5] = math.log(len(given))
        total[-6] = float(year) if year.strip().isdigit() else 1990.0
        for word in title.lower().split():
            total[len(jobs) + zlib.crc32(word.encode()) % TITLE_FEATURES] += 1
        x[i] = torch.tensor(total)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)

    shared = defaultdict(set)
    for head, relation, tail in files.read(folder / "ml-100k.kg"):
        if relation.startswith("film.film.") and relation.rpartition(".")[2] in PEOPLE:
            if head in number:
                shared[tail].add(number[head])
    pairs = {p for group in shared.values() for p in itertools.combinations(sorted(group), 2)}
    return x, both_ways(torch.tensor(sorted(pairs)).T), torch.tensor(y)
