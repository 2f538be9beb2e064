"""Maps of a model whose weights are redrawn, layer by layer from the head down (Adebayo et al. 2018).

A map that shows what a model has learnt changes with the weights, and no longer finds the object at the end.
"""

import torch
from scipy.stats import rankdata

NOTE = "* finds the object with redrawn weights, too: it shows the image, not what the model has learnt"


def layers_from_the_head(state):
    """{layer: its keys in a state dict}, the last layer first; blocks.3 is a layer."""
    layers = {}
    for key in reversed(state):
        first, *rest = key.split(".")
        layers.setdefault(".".join([first, *rest[:1]]) if rest and rest[0].isdigit() else first, []).append(key)
    return layers


def maps_while_redrawn(model, fresh, explainers, images, classes):
    """{name: maps (B, h, w) of each stage}: one more layer has the weights of the state dict `fresh` at each stage.

    explainers are as evaluate takes them. Afterwards the model has its own weights again.
    """
    own = {key: value.clone() for key, value in model.state_dict().items()}
    mixed, found = dict(own), {name: [] for name in explainers}
    try:
        for keys in layers_from_the_head(own).values():
            mixed |= {key: fresh[key] for key in keys}
            model.load_state_dict(mixed)
            for name, explain in explainers.items():
                found[name].append(explain(images, classes))
    finally:
        model.load_state_dict(own)
    return found


def rank_correlation(maps, others):
    """(B,): Spearman's correlation over the cells of maps (B, h, w); 0 if all cells of one are equal."""
    ranks = [torch.from_numpy(rankdata(one.flatten(1).cpu().numpy(), axis=1)) for one in (maps, others)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)


def learnt_nothing(table):
    """The methods that point at the object more often than the centre does (by two standard errors), although the
    weights are redrawn: they show the image, and not what the model has learnt."""
    chance = table.get("centred gaussian", {}).get("pointing", (1, 0))[0]
    found = {name: row["pointing_redrawn"] for name, row in table.items() if "pointing_redrawn" in row}
    return [name for name, (mean, error) in found.items() if mean - 2 * error > chance]
