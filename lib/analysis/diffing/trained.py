"""The ways to look for what differs between two models that train a dictionary."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lib.activations.buffer import Buffer
from lib.activations.pair import Pair
from lib.analysis.diffing import findings
from lib.analysis.diffing.attribution import delta_attribution
from lib.analysis.diffing.findings import MIN_FIRINGS, Found, firings, require_known
from lib.analysis.diffing.sites import compare_sites
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.config import site_norms
from lib.dictionaries.crosscoder import delta
from lib.dictionaries.fit import Plan
from lib.dictionaries.partition import exclusive_sizes
from lib.latents import collect

TRAINED = ("crosscoder", "delta", "dfc", "difference", "stage")
NAMES = {
    "crosscoder": "crosscoder, latent scaling",
    "delta": "crosscoder with Δ-loss, latent scaling",
    "dfc": "DFC, latent scaling",
    "difference": "SAE of the difference",
    "stage": "stage-wise SAE",
}


def plans(
    methods: Iterable[str],
    pair: Pair,
    *,
    d_sae: int,
    k: int,
    k_difference: int = 4,
    exclusive: float = 0.05,
    code_norm: str = "crosscoder",
    recipe: str = "batchtopk",
) -> dict[str, Plan]:
    """Configs and recipes of those of `TRAINED`; `stage` stands for the SAE of a that it begins at.

    Args:
        k: latents per token, of recipes that are told.
        k_difference: latents per token of the SAE of the difference, which holds less.
        exclusive: share of the latents that a DFC keeps for each model.

    Raises:
        ValueError: an unknown method or recipe, or a share that leaves no shared latents.
    """
    both = {"hook_names": pair.hook_names[:2], "site_dims": pair.site_dims[:2], "d_sae": d_sae}
    both["code_norm"] = code_norm
    one = {"d_sae": d_sae, "site_dims": pair.site_dims[:1]}
    require_known(methods := list(methods), TRAINED)
    if recipe not in recipes.NAMED:
        raise ValueError(f"need recipe in {', '.join(recipes.NAMED)}; got {recipe!r}")
    make = recipes.NAMED[recipe]
    usual = make(k=k) if make in recipes.BY_K else make()
    made, narrow = {}, recipes.batchtopk(k=k_difference)
    for name in methods:
        if name == "crosscoder":
            made[name] = (usual.dictionary(**both), usual)
        elif name == "delta":
            made[name] = (delta(k=k).dictionary(**both), delta(k=k))
        elif name == "dfc":
            sizes = exclusive_sizes(d_sae, 2, exclusive)
            made[name] = (usual.dictionary(**both, exclusive=sizes), usual)
        elif name == "difference":
            if pair.identical or not pair.equal_width:
                raise ValueError(
                    "need two models that differ, of one width, for an SAE of their difference"
                )
            config = narrow.dictionary(**one, hook_names=(Pair.DIFFERENCE,))
            made[name] = (config, narrow)
        else:
            made[name] = (usual.dictionary(**one, hook_names=(Pair.A,)), usual)
    return made


def trained(
    made: Mapping[str, Plan],
    train: Pair,
    held: Pair,
    corpus: Corpus,
    config: FitConfig,
    *,
    batch_size: int = 1024,
    models: tuple[PreTrainedModel, PreTrainedModel, str] | None = None,
    skip_special: bool = False,
    batch_rows: int = 64,
    device: str | torch.device = "cpu",
    **options,
) -> dict[str, Found]:
    """Train all dictionaries on one stream, then rank their latents on the held-out corpus.

    Args:
        made: of `plans`.
        held: the activations of `corpus`.
        models: a, b and the hook name, for Δ-attribution on the crosscoder's latents.
        skip_special: whether the pairs left special tokens out.
        batch_rows: rows of `corpus` whose predictions are held at a time.
        options: folder, resume, tracking, progress: as of `fit`.

    Returns:
        Findings, with the seconds that each would take alone: with the stream's.
    """
    if not made:
        return {}
    began = time.perf_counter()
    stream = Buffer(train, batch_size=batch_size, seed=config.seed)
    fitted = fit(made, stream, config, sites=train.sites, device=device, **options)
    passes = time.perf_counter() - began - sum(it.seconds for it in fitted.values())
    found = {}
    for name, it in fitted.items():
        began = time.perf_counter()
        found[name] = (
            _stage(it.dictionary, made[name], train, held, corpus, config, batch_size, device)
            if name == "stage"
            else ranked(name, it.dictionary, held, corpus)
        )
        seconds = passes + it.seconds + time.perf_counter() - began
        found[name] = replace(found[name], seconds=seconds)
        if name == "crosscoder" and models is not None:
            began = time.perf_counter()
            found["attribution"] = _attributed(
                found[name], corpus, *models, skip_special, batch_rows
            )
            took = seconds + time.perf_counter() - began
            found["attribution"] = replace(found["attribution"], seconds=took)
    return found


def ranked(name: str, d: Dictionary, held: Pair, corpus: Corpus) -> Found:
    """What a trained dictionary says: a crosscoder's by latent scaling, else by energy."""
    both = len(d.config.site_dims) == 2  # whatever a public crosscoder calls its sites
    columns = held.columns(held.hook_names[:2] if both else d.config.hook_names)
    blocks = [
        replace(block, acts=torch.cat([block.acts[:, c] for c in columns], 1))
        for block in held.blocks()
    ]
    record = collect(d.encode_sparse, blocks, corpus)
    alive = firings(record) >= MIN_FIRINGS
    if not both:
        norms = d.decoder_rows.detach().norm(dim=1).cpu()
        energy = torch.zeros(d.d_sae).index_add_(0, record.indices.long(), record.values.square())
        energy = torch.where(alive, energy * norms.square() / len(record), 0.0)
        move = findings.difference_move(d)
        finding = findings.of_latents(
            NAMES.get(name, name), record, corpus, energy, _first(energy), move, size=norms
        )
        return Found(finding, 0.0, record, d)
    if held.equal_width:
        reading = compare_sites(d, (block.acts for block in blocks))
        order, lacking = 1 - reading.error[1], reading.lacks()[1]
    else:  # a direction of one means nothing at the other: norms alone
        norms = site_norms(d.config, d.decoder_rows.detach()).cpu()
        reading, order = None, norms[1] / norms.sum(0).clamp(min=1e-12)
        lacking = order > 0.9
    order = torch.where(alive, order, -torch.inf)
    lacking = (lacking & alive).nonzero()[:, 0]
    lacking = lacking[order[lacking].argsort(descending=True)]
    finding = findings.of_latents(
        NAMES.get(name, name),
        record,
        corpus,
        order,
        lacking,
        findings.crosscoder_move(d) if held.equal_width else None,
        size=_apart(d) if held.equal_width else None,
        decides=True,
    )
    return Found(finding, 0.0, record, d, reading)


def _stage(
    of_a: Dictionary,
    plan: Plan,
    train: Pair,
    held: Pair,
    corpus: Corpus,
    config: FitConfig,
    batch_size: int,
    device: str | torch.device,
) -> Found:
    """Stage-wise: a's SAE trained on, for half as many steps, on b; which latents turned?"""
    plan = (replace(of_a.config, hook_names=(Pair.B,)), replace(plan[1], rule=of_a.config.rule))
    stream = Buffer(train, batch_size=batch_size, seed=config.seed)
    half = {"n_steps": max(1, config.n_steps // 2), "lr": config.lr / 2, "checkpoint_every": 0}
    options = {"sites": train.sites, "begin": {"stage": of_a}, "progress": False, "device": device}
    of_b = fit({"stage": plan}, stream, replace(config, **half), **options)["stage"].dictionary
    blocks = (replace(x, acts=x.acts[:, held.columns((Pair.B,))[0]]) for x in held.blocks())
    record = collect(of_b.encode_sparse, blocks, corpus)
    cosine = torch.cosine_similarity(of_a.decoder_rows, of_b.decoder_rows, dim=1).detach().cpu()
    order = torch.where(firings(record) >= MIN_FIRINGS, 1 - cosine, -torch.inf)
    ranking = (record, corpus, order, _first(order), findings.sae_move(of_b))
    size = of_b.decoder_rows.detach().norm(dim=1).cpu()
    finding = findings.of_latents(NAMES["stage"], *ranking, size=size)
    return Found(finding, 0.0, record, of_b)


def _attributed(
    found: Found,
    corpus: Corpus,
    a: PreTrainedModel,
    b: PreTrainedModel,
    hook_name: str,
    skip_special: bool,
    batch_rows: int,
) -> Found:
    d = found.dictionary
    how = {"skip_special": skip_special, "batch_rows": batch_rows}
    order = delta_attribution(d, a, b, hook_name, corpus, **how)
    ranking = (found.record, corpus, order, _first(order), findings.crosscoder_move(d))
    finding = findings.of_latents("Δ-attribution", *ranking, size=_apart(d))
    return replace(found, finding=finding)


def _apart(d: Dictionary) -> Float[Tensor, "d_sae"]:
    a, b = d.decoder_rows.detach().chunk(2, dim=1)
    return (b - a).norm(dim=1).cpu()


def _first(order: Float[Tensor, " n"]) -> Int[Tensor, " k"]:
    return order.topk(min(findings.N, len(order))).indices


def looked_at(
    dictionaries: Mapping[str, Dictionary],
    held: Pair,
    corpus: Corpus,
    models: tuple[PreTrainedModel, PreTrainedModel, str] | None = None,
    *,
    skip_special: bool = False,
    batch_rows: int = 64,
) -> dict[str, Found]:
    """As `trained`, of dictionaries that are there already, but for the stage-wise one.

    Raises:
        ValueError: one of other widths than the pair, or without two sites and not a difference's.
    """
    found = {}
    for name, d in dictionaries.items():
        if name == "stage":
            continue
        alone = d.config.hook_names == (Pair.DIFFERENCE,)
        if not alone and d.config.site_dims != held.site_dims[:2]:
            raise ValueError(
                f"{name}: need a crosscoder of widths {held.site_dims[:2]} or an SAE of the "
                f"difference, got widths {d.config.site_dims}"
            )
        found[name] = ranked(name, d, held, corpus)
    if "crosscoder" in found and models is not None:
        found["attribution"] = _attributed(
            found["crosscoder"], corpus, *models, skip_special, batch_rows
        )
    return found
