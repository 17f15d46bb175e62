"""Train dictionaries: several recipes on one stream of activations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lib import training
from lib.dictionaries import format
from lib.dictionaries.config import DictionaryConfig, FitConfig
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.recipes import Recipe
from lib.dictionaries.trainer import DictionaryTrainer
from lib.training import distributed

Plan = tuple[DictionaryConfig, Recipe]


@dataclass
class Fitted:
    """One dictionary, trained."""

    dictionary: Dictionary
    """On raw activations, in eval mode."""
    history: list[dict]
    """`step`, `tokens`, `fvu`, `l0`, `dead` of one batch every `FitConfig.log_every` steps."""
    seconds: float
    """Spent on this dictionary alone, without the stream."""


def fit(
    plans: Mapping[str, Plan],
    stream: Iterable[Tensor],
    config: FitConfig,
    *,
    sites: Mapping[str, int] | None = None,
    begin: Mapping[str, Dictionary] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    tracking: str = "none",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Fitted]:
    """Train every dictionary of `plans` on the same batches; a sweep pays for the model once.

    Under `torchrun --nproc-per-node N` N ranks train together: each calls this with a stream of its
    own part of every batch (see `lib.training.distributed`: `shard`, `Share`), they take the steps
    that one process would take on the whole batches, and all return the same. The first rank alone
    writes, in a folder that all can read, and shows progress.

    Args:
        plans: name → (`recipe.dictionary(...)`, `recipe`).
        stream: batches `[n d_in]` (for a transcoder `[n d_in + d_out]`), at least `n_steps`, such
            as a `Buffer`; a `Prefetch` of it makes batches while a GPU trains.
        sites: hook name → width of the stream's columns, in order. Each dictionary then reads the
            columns of its own `hook_names`; without it each reads all of them.
        begin: name → dictionary on raw activations whose training goes on; the others begin anew.
        folder: for checkpoints, and at the end for the dictionaries, one folder each.
        resume, tracking, progress: as in `lib.training.fit`.

    Raises:
        ValueError: no plan, a rule that differs from its recipe's, another width than the
            stream's; ranks whose batches differ in size; and as `lib.training.fit`.
        FloatingPointError, OSError: as `lib.training.fit`.
    """
    training.loop.require_names(plans)
    if strange := set(begin or {}) - set(plans):
        raise ValueError(f"need plans to begin with dictionaries, got none for {sorted(strange)}")
    device, trainers = distributed.join(torch.device(device)), {}
    for name, plan in plans.items():
        try:
            if folder is not None:
                format.require_saveable(plan[0])
            trainers[name] = DictionaryTrainer(
                *plan, config, device, sites, (begin or {}).get(name)
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    history, seconds = training.fit(
        trainers,
        stream,
        folder=folder,
        resume=resume,
        checkpoint_every=config.checkpoint_every,
        tracking=tracking,
        device=device,
        progress=progress,
    )
    fitted = {}
    for name in plans:
        dictionary = trainers.pop(name).finished()  # or memory holds every optimiser to the end
        fitted[name] = Fitted(dictionary, history[name], seconds[name])
        if folder is not None:
            distributed.first(partial(dictionary.save, Path(folder) / name))
    return fitted
