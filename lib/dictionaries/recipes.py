"""Named ways to train a dictionary: a sparsity rule, loss terms, and how latents are revived.

`l1` and `l0` weights are in the unit of `lib.dictionaries.losses`, for inputs of mean norm sqrt(d).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from lib.dictionaries import losses
from lib.dictionaries.config import DictionaryConfig
from lib.dictionaries.losses import (
    L0,
    L1,
    AuxK,
    Entropy,
    GateL1,
    GateReconstruction,
    GhostGradients,
    Reconstruction,
)
from lib.dictionaries.matryoshka import PrefixReconstruction
from lib.dictionaries.rules import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    Rule,
    TopK,
    rule_to_json,
)


@dataclass(frozen=True, kw_only=True)
class Resample:
    """Dead latents start again on tokens that are reconstructed badly, a few times in training.

    Source: Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling".
    """

    shares: tuple[float, ...] = (0.2, 0.4, 0.6)
    """When, as shares of the training."""
    encoder_scale: float = 0.2
    """Norm of a new encoder row, in mean norms of the living."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train. `replace(recipe, lr=…)` sweeps over lr on one stream."""

    rule: Rule
    terms: tuple[losses.Term, ...]
    resample: Resample | None = None
    lr: float | None = None
    """Instead of `FitConfig.lr`."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"need lr > 0, got {self.lr}")
        for term in self.terms:
            losses.require_rule(term, self.rule)

    def dictionary(self, **shape) -> DictionaryConfig:
        """The config of a dictionary of this rule: `site_dims`, `d_sae`, `hook_names`, …

        Raises:
            ValueError: as `DictionaryConfig`; a term that means nothing for these sites or this
                partition; an L0 to aim at that is above `d_sae`.
        """
        config = DictionaryConfig(rule=self.rule, **shape)
        for term in self.terms:
            losses.check(term, config)
        return config

    def to_json(self) -> dict:
        terms = [losses.term_to_json(term) for term in self.terms]
        resample = asdict(self.resample) if self.resample else None
        rule = rule_to_json(self.rule)
        return {"rule": rule, "terms": terms, "resample": resample, "lr": self.lr}


def standard(l1: float = 1.0) -> Recipe:
    """ReLU and L1. Bricken et al. 2023, Towards Monosemanticity."""
    return Recipe(rule=ReLU(), terms=(Reconstruction(), L1(weight=l1)))


def standard_resample(l1: float = 1.0) -> Recipe:
    """`standard`, dead latents resampled. Bricken et al. 2023."""
    return Recipe(rule=ReLU(), terms=(Reconstruction(), L1(weight=l1)), resample=Resample())


def ghost(l1: float = 1.0) -> Recipe:
    """`standard` with ghost gradients. Jermyn & Templeton 2024."""
    return Recipe(rule=ReLU(), terms=(Reconstruction(), L1(weight=l1), GhostGradients()))


def p_anneal(l1: float = 0.5, p_end: float = 0.2) -> Recipe:
    """ReLU and a penalty Σ z^p, p from 1 down. Karvonen et al. 2024, arXiv:2408.00113."""
    return Recipe(rule=ReLU(), terms=(Reconstruction(), L1(weight=l1, p_end=p_end)))


def entropy(l1: float = 0.5, weight: float = 3.0) -> Recipe:
    """ReLU, a weak L1 and the entropy of the code. Marks et al. 2024, dictionary_learning."""
    return Recipe(rule=ReLU(), terms=(Reconstruction(), L1(weight=l1), Entropy(weight=weight)))


def gated(l1: float = 2.0) -> Recipe:
    """A gate apart from the magnitude. Rajamanoharan et al. 2024, arXiv:2404.16014."""
    return Recipe(rule=Gated(), terms=(Reconstruction(), GateL1(weight=l1), GateReconstruction()))


def gated_anneal(l1: float = 1.0, p_end: float = 0.2) -> Recipe:
    """`gated` with p-annealing on the gates. Karvonen et al. 2024, arXiv:2408.00113."""
    gates = GateL1(weight=l1, p_end=p_end)
    return Recipe(rule=Gated(), terms=(Reconstruction(), gates, GateReconstruction()))


def jumprelu(
    l0: float = 0.3,
    target_l0: float | None = None,
    threshold: float = 1.0,
    bandwidth: float = 0.5,
) -> Recipe:
    """A learned threshold, L0 through a straight-through estimate; `l0` weighs it, or with
    `target_l0` the squared distance to that. Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return Recipe(
        rule=JumpReLU(threshold=threshold, bandwidth=bandwidth),
        terms=(Reconstruction(), L0(weight=l0, target=target_l0)),
    )


def topk(k: int = 32, k_start: int | None = None) -> Recipe:
    """The k largest of each token, dead latents through AuxK. Gao et al. 2024, arXiv:2406.04093."""
    return Recipe(rule=TopK(k=k, k_start=k_start), terms=(Reconstruction(), AuxK()))


def batchtopk(k: int = 32, k_start: int | None = None) -> Recipe:
    """k a token on average over a batch. Bussmann et al. 2024, arXiv:2412.06410."""
    return Recipe(rule=BatchTopK(k=k, k_start=k_start), terms=(Reconstruction(), AuxK()))


def matryoshka(k: int = 32) -> Recipe:
    """`batchtopk` whose prefixes reconstruct too. Bussmann et al. 2025, arXiv:2503.17547."""
    return Recipe(rule=BatchTopK(k=k), terms=(PrefixReconstruction(), AuxK()))


def jumprelu_target(k: int = 32) -> Recipe:
    """`jumprelu` that aims at `k` latents per token instead of weighing them."""
    return jumprelu(l0=10.0, target_l0=float(k))


BY_K: tuple[Callable[..., Recipe], ...] = (topk, batchtopk, matryoshka, jumprelu_target)
"""Sparsity is set by a number of latents."""
BY_L1: tuple[Callable[..., Recipe], ...] = (
    standard, standard_resample, ghost, p_anneal, entropy, gated, gated_anneal,
)  # fmt: skip
"""Sparsity is set by the weight of L1."""
NAMED = {recipe.__name__: recipe for recipe in (*BY_L1, jumprelu, *BY_K)}


def grid(
    names: Sequence[str],
    *,
    d_sae: int | Sequence[int],
    k: int | Sequence[int] = (),
    l1: float | Sequence[float] = (),
    l0: float | Sequence[float] = (),
    **shape,
) -> dict[str, tuple[DictionaryConfig, Recipe]]:
    """Every recipe at every width and at every setting of its own knob, for `fit`.

    Args:
        names: keys of `NAMED`.
        k, l1, l0: one or several settings for `BY_K`, `BY_L1` and `jumprelu`; without any, the
            recipe's own.
        shape: `site_dims`, `hook_names`, … of every dictionary.

    Returns:
        Plans by name: the recipe's, and the width and the knob where there are several.

    Raises:
        ValueError: no recipe of that name (near ones are listed), or no width.
    """
    d_sae, k, l1, l0 = (
        (value,) if isinstance(value, int | float) else tuple(value) for value in (d_sae, k, l1, l0)
    )
    if not d_sae:
        raise ValueError("need at least one d_sae, got none")
    plans = {}
    for name in names:
        if name not in NAMED:
            near = difflib.get_close_matches(name, NAMED, n=3, cutoff=0.3) or list(NAMED)
            raise ValueError(f"no recipe {name!r}; near ones: {', '.join(near)}")
        make = NAMED[name]
        knob, values = next(
            (knob, values)
            for knob, values, makes in (("k", k, BY_K), ("l1", l1, BY_L1), ("l0", l0, (jumprelu,)))
            if make in makes
        )
        for width in d_sae:
            for options in [{knob: value} for value in values] or [{}]:
                full = name + (f" d_sae={width}" if len(d_sae) > 1 else "")
                full += f" {knob}={options[knob]}" if len(values) > 1 else ""
                recipe = make(**options)
                plans[full] = (recipe.dictionary(d_sae=width, **shape), recipe)
    return plans
