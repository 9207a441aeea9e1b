"""The recipes of `bench.studies.recipes`, a study each: does what they promise show at small size?

They are in `digits`, `generated` (queries, a graph) and `language`.
"""

from __future__ import annotations

from ..study import Experiment, Headline
from . import digits, generated, language

EXPERIMENT = Experiment(
    "recipes",
    (*digits.STUDIES, *generated.STUDIES, *language.STUDIES),
    (
        Headline(
            "noise", "gradient noise trains 20 layers that start too small",
            "MNIST: trains where nothing else does", "mechanism",
            shown="to 34 % of the test images from 9; no seed gets to 90 % of the training ones",
        ),
        Headline(
            "counter", "Counter-Current Learning is at most 0.02 behind back-propagation",
            "within a point or two", "quality", shown="0.9 points ahead of it",
        ),
        Headline("last", "and ahead of training the last layer alone", "not compared", "mechanism"),
        Headline(
            "guidance", "an untrained convolutional guide helps a deep plain network",
            "deep network 1.65 to 13.1 (top 5)", "quality",
            not_shown="with He's weights 40 layers train without a guide",
        ),
        Headline("prior", "because of its convolutions", "not compared so", "mechanism"),
        Headline("third", "for the first third is enough", "some hundred steps are enough", "cost"),
        Headline(
            "look", "LOOK keeps more of what is inside of a class", "transfers better", "quality",
            shown="at 2.9 points of the class itself",
        ),
        Headline("few", "by its few neighbours", "k is tuned", "mechanism"),
        Headline("curriculum", "a curriculum raises P@1", "by up to 9 %", "quality"),
        Headline("anti", "and is better than hardest first", "worse than none", "mechanism"),
        Headline(
            "boosting", "a boosted network is at most 0.01 behind Adam's", "as good or better",
            "quality",
        ),
        Headline("cut", "and can be cut", "degrades gracefully", "mechanism"),
        Headline(
            "forward", "ForwardGNN is at most 0.02 behind back-propagation",
            "level or better", "quality",
        ),
        Headline("graph", "and uses the graph", "–", "mechanism"),
        Headline(
            "one way", "edges to the classes alone are better", "both ways are the default",
            "mechanism",
        ),
        Headline(
            "talking", "interaction is better than listening with the same modules",
            "not compared", "quality",
            not_shown="the teacher, of three kinds of text, is behind the student on the one",
        ),
        Headline("alone", "and than no teacher", "ahead of other distillation", "quality"),
        Headline(
            "reasoner", "contrast with weaker routing raises exact match",
            "GSM8K 42.5 to 70.6, another model as amateur", "quality",
            not_shown="likely: it sharpens what the model says, wrong digits too",
        ),
        Headline("tokens", "by the choice of tokens", "ahead of tuning on all", "mechanism"),
        Headline("target", "and by the contrast", "ahead", "mechanism"),
        Headline(
            "prox", "refined text trains better than spoiled text", "2 % on tasks", "quality",
            contradicted="the rules take tables and underlines, 16 % of the bytes of the test",
        ),
        Headline("clean", "and nearly as well as clean text", "not compared", "quality"),
        Headline(
            "prose", "so too on prose, which the rules leave alone", "2 % on tasks", "quality",
            not_shown="likely: seven lines that come again and again are soon learned",
        ),
        Headline("prose clean", "and nearly as well as clean prose", "not compared", "quality"),
        Headline(
            "adjusted", "logit adjustment helps on long-tailed classes", "as published",
            "mechanism",
        ),
        Headline(
            "sum", "different pre-training helps on what pre-training was short of",
            "1.67 points on average", "mechanism",
        ),
        Headline("sum of all", "and over all classes", "1.67 points on average", "quality"),
    ),
)  # fmt: skip
