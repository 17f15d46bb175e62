"""Every way to look for what differs between two models, on the same tokens."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.activations.buffer import Buffer
from lib.activations.pair import Pair
from lib.activations.source import Block
from lib.analysis.diffing import findings
from lib.analysis.diffing.attribution import delta_attribution
from lib.analysis.diffing.findings import MIN_FIRINGS, Finding, firings
from lib.analysis.diffing.outputs import output_difference
from lib.analysis.diffing.sites import SiteReading, compare_sites
from lib.analysis.diffing.streams import stream_difference
from lib.data.corpus import Corpus
from lib.dictionaries import Dictionary, FitConfig, fit, recipes
from lib.dictionaries.config import site_norms
from lib.dictionaries.crosscoder import delta
from lib.dictionaries.fit import Plan
from lib.dictionaries.partition import exclusive_sizes
from lib.latents import LatentRecord, collect
from lib.models.unembed import unembedding

SIMPLE = ("answers", "amplified", "outputs", "topics", "streams", "positions")
TRAINED = ("crosscoder", "delta", "dfc", "difference", "stage")
NAMES = {
    "crosscoder": "crosscoder, latent scaling",
    "delta": "crosscoder with Δ-loss, latent scaling",
    "dfc": "DFC, latent scaling",
    "difference": "SAE of the difference",
    "stage": "stage-wise SAE",
}


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found, and what it took."""

    finding: Finding
    seconds: float
    record: LatentRecord | None = None
    dictionary: Dictionary | None = None
    reading: SiteReading | None = None


def simple(
    methods: Iterable[str],
    a: PreTrainedModel,
    b: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    held: Corpus,
    prompts: Sequence[str],
    *,
    alpha: float = 1.0,
) -> dict[str, Found]:
    """Those of `SIMPLE`, which train nothing.

    Args:
        pair: the activations of `held`.
        prompts: for the two that read answers.
        alpha: how much `amplified` amplifies.

    Raises:
        ValueError: an unknown method.
    """
    wanted = _known(methods, SIMPLE)
    found, shared = {}, {}
    vectors = unembedding(b)

    def outputs():
        if "outputs" not in shared:
            shared["outputs"] = output_difference(a, b, held)
        return shared["outputs"]

    def streams():
        if not pair.equal_width:
            raise ValueError(f"need sites of one width to take a difference, got {pair.site_dims}")
        if "streams" not in shared:
            shared["streams"] = stream_difference(_two(pair, pair.blocks()))
        return shared["streams"]

    ways = {
        "answers": lambda: findings.of_answers(tokenizer, a, b, prompts, held),
        "amplified": lambda: findings.of_answers(tokenizer, a, b, prompts, held, alpha=alpha),
        "outputs": lambda: findings.of_outputs(outputs(), held),
        "topics": lambda: findings.of_topics(outputs(), held),
        "streams": lambda: findings.of_streams(streams(), held, vectors),
        "positions": lambda: findings.of_positions(streams(), held, vectors),
    }
    for name in wanted:
        began = time.perf_counter()
        finding = ways[name]()
        found[name] = Found(finding, time.perf_counter() - began)
    return found


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
        k_difference: latents per token of the SAE of the difference, which holds less.
        exclusive: share of the latents that a DFC keeps for each model.

    Raises:
        ValueError: an unknown method, or a share that leaves no shared latents.
    """
    both = {"hook_names": pair.hook_names[:2], "site_dims": pair.site_dims[:2], "d_sae": d_sae}
    both["code_norm"] = code_norm
    one = {"d_sae": d_sae, "site_dims": pair.site_dims[:1]}
    made, usual, narrow = {}, getattr(recipes, recipe)(k=k), recipes.batchtopk(k=k_difference)
    for name in _known(methods, TRAINED):
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
    **options,
) -> dict[str, Found]:
    """Train all dictionaries on one stream, then rank their latents on the held-out corpus.

    Args:
        made: of `plans`.
        held: the activations of `corpus`.
        models: a, b and the hook name, for Δ-attribution on the crosscoder's latents.
        options: folder, resume, tracking, device, progress: as of `fit`.
    """
    stream = Buffer(train, batch_size=batch_size, seed=config.seed)
    fitted = fit(made, stream, config, sites=train.sites, **options)
    found = {}
    for name, it in fitted.items():
        began = time.perf_counter()
        found[name] = (
            _stage(it.dictionary, made[name], train, held, corpus, config, batch_size)
            if name == "stage"
            else ranked(name, it.dictionary, held, corpus)
        )
        seconds = it.seconds + time.perf_counter() - began
        found[name] = replace(found[name], seconds=seconds)
        if name == "crosscoder" and models is not None:
            began = time.perf_counter()
            found["attribution"] = _attributed(found[name], corpus, *models)
            took = seconds + time.perf_counter() - began
            found["attribution"] = replace(found["attribution"], seconds=took)
    return found


def ranked(name: str, d: Dictionary, held: Pair, corpus: Corpus) -> Found:
    """What a trained dictionary says: a crosscoder's by latent scaling, else by energy."""
    columns = held.columns(d.config.hook_names)
    blocks = [
        replace(block, acts=torch.cat([block.acts[:, c] for c in columns], 1))
        for block in held.blocks()
    ]
    record = collect(d.encode_sparse, blocks, corpus)
    alive = firings(record) >= MIN_FIRINGS
    if d.config.hook_names == (Pair.DIFFERENCE,):
        norms = d.decoder_rows.detach().norm(dim=1)
        energy = torch.zeros(d.d_sae).index_add_(0, record.indices.long(), record.values.square())
        energy = torch.where(alive, energy * norms.square() / len(record), 0.0)
        move = findings.difference_move(d)
        finding = findings.of_latents(
            NAMES[name], record, corpus, energy, _first(energy), move, size=norms
        )
        return Found(finding, 0.0, record, d)
    if held.equal_width:
        reading = compare_sites(d, (block.acts for block in blocks))
        order, lacking = 1 - reading.error[1], reading.lacks()[1]
    else:  # a direction of one means nothing at the other: norms alone
        norms = site_norms(d.config, d.decoder_rows.detach())
        reading, order = None, norms[1] / norms.sum(0).clamp(min=1e-12)
        lacking = order > 0.9
    order = torch.where(alive, order, -torch.inf)
    lacking = (lacking & alive).nonzero()[:, 0]
    lacking = lacking[order[lacking].argsort(descending=True)]
    finding = findings.of_latents(
        NAMES[name],
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
) -> Found:
    """Stage-wise: a's SAE trained on, for half as many steps, on b; which latents turned?"""
    plan = (replace(of_a.config, hook_names=(Pair.B,)), replace(plan[1], rule=of_a.config.rule))
    stream = Buffer(train, batch_size=batch_size, seed=config.seed)
    half = {"n_steps": max(1, config.n_steps // 2), "lr": config.lr / 2, "checkpoint_every": 0}
    options = {"sites": train.sites, "begin": {"stage": of_a}, "progress": False}
    of_b = fit({"stage": plan}, stream, replace(config, **half), **options)["stage"].dictionary
    blocks = (replace(x, acts=x.acts[:, held.columns((Pair.B,))[0]]) for x in held.blocks())
    record = collect(of_b.encode_sparse, blocks, corpus)
    cosine = torch.cosine_similarity(of_a.decoder_rows, of_b.decoder_rows, dim=1).detach()
    order = torch.where(firings(record) >= MIN_FIRINGS, 1 - cosine, -torch.inf)
    ranking = (record, corpus, order, _first(order), findings.sae_move(of_b))
    size = of_b.decoder_rows.detach().norm(dim=1)
    finding = findings.of_latents(NAMES["stage"], *ranking, size=size)
    return Found(finding, 0.0, record, of_b)


def _attributed(
    found: Found, corpus: Corpus, a: PreTrainedModel, b: PreTrainedModel, hook_name: str
) -> Found:
    d = found.dictionary
    order = delta_attribution(d, a, b, hook_name, corpus)
    ranking = (found.record, corpus, order, _first(order), findings.crosscoder_move(d))
    finding = findings.of_latents("Δ-attribution", *ranking, size=_apart(d))
    return replace(found, finding=finding)


def _apart(d: Dictionary) -> Float[Tensor, "d_sae"]:
    a, b = d.decoder_rows.detach().chunk(2, dim=1)
    return (b - a).norm(dim=1)


def _first(order: Float[Tensor, " n"]) -> Int[Tensor, " k"]:
    return order.topk(min(findings.N, len(order))).indices


def looked_at(
    dictionaries: Mapping[str, Dictionary],
    held: Pair,
    corpus: Corpus,
    models: tuple[PreTrainedModel, PreTrainedModel, str] | None = None,
) -> dict[str, Found]:
    """As `trained`, of dictionaries that are there already; a stage-wise SAE must be trained."""
    found = {name: ranked(name, d, held, corpus) for name, d in dictionaries.items()}
    if "crosscoder" in found and models is not None:
        found["attribution"] = _attributed(found["crosscoder"], corpus, *models)
    return found


def _known(methods: Iterable[str], known: Sequence[str]) -> list[str]:
    wanted = list(methods)
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"need methods of {', '.join(known)}; got {', '.join(unknown)}")
    return wanted


def _two(pair: Pair, blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield replace(block, acts=block.acts[:, : sum(pair.site_dims[:2])])
