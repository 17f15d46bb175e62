"""One loop for every recipe: several dictionaries, one stream of activations."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.dictionaries import parallel
from lib.dictionaries.checkpoints import (
    clear_checkpoints,
    kept,
    load_checkpoint,
    save_checkpoint,
    sweep,
)
from lib.dictionaries.config import DictionaryConfig, config_to_json
from lib.dictionaries.dictionary import Dictionary
from lib.dictionaries.fit_config import FitConfig
from lib.dictionaries.memory import Memory
from lib.dictionaries.recipes import Recipe
from lib.dictionaries.tracking import check_tracking, tracker
from lib.dictionaries.trainee import Trainee
from lib.runtime import require_writable

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
    folder: str | Path | None = None,
    resume: bool = False,
    tracking: str = "none",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Fitted]:
    """Train every dictionary of `plans` on the same batches; a sweep pays for the model once.

    Under `torchrun --nproc-per-node N` N ranks train together: each calls this with a stream of its
    own part of every batch (see `lib.dictionaries.parallel`: `shard`, `Share`), they take the steps
    that one process would take on the whole batches, and all return the same. The first rank alone
    writes, in a folder that all can read, and shows progress.

    Args:
        plans: name → (`recipe.dictionary(...)`, `recipe`).
        stream: batches `[n d_in]` (for a transcoder `[n d_in + d_out]`), at least `n_steps`, such
            as a `Buffer`; a `Prefetch` of it makes batches while a GPU trains.
        sites: hook name → width of the stream's columns, in order. Each dictionary then reads the
            columns of its own `hook_names`; without it each reads all of them.
        folder: for checkpoints, and at the end for the dictionaries, one folder each. Every file
            is complete or absent.
        resume: go on from the newest checkpoint in `folder`, bit for bit on a CPU, if there is
            one; otherwise checkpoints there are removed.
        tracking: `none`, `tensorboard` or `wandb`.

    Raises:
        ValueError: no plan, a bad name, a rule that differs from its recipe's, another width than
            the stream's, a stream that ends early, a resume with another config; ranks whose
            batches differ in size.
        FloatingPointError: activations, a loss or a gradient that are not finite: the step, and
            (given a folder) where the batch was saved. The last checkpoint stays.
        OSError: the folder cannot be written.
        Under `torchrun` an error of one rank is raised on all of them.
    """
    target, batches = _check(plans, config, folder, resume, tracking), iter(stream)
    columns = {name: _columns(name, plan[0], sites) for name, plan in plans.items()}
    with (
        parallel.joined(torch.device(device)) as device,
        tracker(tracking, (target or Path()) / "tracking", _flat(plans)) as log,
    ):
        memory = Memory()
        trainees = {name: Trainee(*plan, config, device, memory) for name, plan in plans.items()}
        identity = _identity(plans, config)
        start, history = _begin(target, trainees, batches, identity, resume)
        quiet = not progress or parallel.rank() > 0
        steps = tqdm(range(start, config.n_steps), desc="fit", disable=quiet, mininterval=1)
        for step in steps:
            read = partial(_next, batches, step, sites)
            everything = parallel.next_together(read, device).to(device, torch.float32)
            _require_finite(everything, step, target)
            logged = (step + 1) % config.log_every == 0 or step + 1 == config.n_steps
            for name, trainee in trainees.items():
                batch = _part(name, trainee, everything, columns[name])
                if step == 0:
                    trainee.start(batch)
                try:
                    out = trainee.step(step, batch)
                except FloatingPointError as error:
                    where = kept(target, parallel.gather_rows(batch))
                    raise FloatingPointError(f"{name}: {error}{where}") from None
                if logged:
                    n_tokens = (step + 1) * len(batch) * parallel.world_size()
                    entry = {"step": step + 1, "tokens": n_tokens}
                    history[name].append(entry | trainee.metrics(out))
                del out  # with the activations of a whole batch
            if logged:
                latest = {name: entries[-1] for name, entries in history.items()}
                steps.set_postfix_str(_postfix(latest), refresh=False)
                log({f"{n}/{k}": v for n, e in latest.items() for k, v in e.items()}, step + 1)
            due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
            if target and (due or step + 1 == config.n_steps):
                save_checkpoint(target, step + 1, trainees, batches, identity, history)

        fitted = {}
        for name in plans:
            trainee = trainees.pop(name)  # one by one, or memory holds every optimiser to the end
            fitted[name] = Fitted(trainee.finished(), history[name], trainee.seconds)
            if target:
                parallel.first(partial(fitted[name].dictionary.save, target / name))
        return fitted


def _check(
    plans: Mapping[str, Plan],
    config: FitConfig,
    folder: str | Path | None,
    resume: bool,
    tracking: str,
) -> Path | None:
    if not plans:
        raise ValueError("need at least one dictionary to fit, got none")
    for name, (dictionary, recipe) in plans.items():
        if not name or Path(name).name != name or name.startswith((".", "checkpoint-")):
            raise ValueError(f"need names that are plain folder names, got {name!r}")
        if dictionary.rule != recipe.rule:
            raise ValueError(
                f"{name}: need the recipe's rule {recipe.rule}, got {dictionary.rule}; "
                "make the config with recipe.dictionary(...)"
            )
        if dictionary.out_dims is not None and config.normalize != "none":
            raise ValueError(f"{name}: need normalize 'none' for a transcoder")
    check_tracking(tracking)
    if folder is None:
        if resume or config.checkpoint_every or tracking != "none":
            raise ValueError("resume, checkpoint_every and tracking need a folder, got none")
        return None
    return Path(folder)


def _begin(
    folder: Path | None,
    trainees: dict[str, Trainee],
    batches: Iterator[Tensor],
    identity: dict,
    resume: bool,
) -> tuple[int, dict[str, list[dict]]]:
    """The number of steps done and the history so far; the folder is ready for more."""
    start, history = 0, {name: [] for name in trainees}
    if not folder:
        return start, history
    parallel.first(lambda: require_writable(folder))
    if resume:
        load = partial(load_checkpoint, folder, trainees, batches, identity)
        start, history = parallel.together(load) or (start, history)
    else:
        parallel.first(lambda: clear_checkpoints(folder))
    parallel.first(lambda: sweep(folder, trainees))
    return start, history


def _columns(
    name: str, config: DictionaryConfig, sites: Mapping[str, int] | None
) -> list[slice] | None:
    """Where in the stream a dictionary's sites stand; None: it reads everything."""
    if sites is None:
        return None
    ends = dict(zip(sites, accumulate(sites.values()), strict=True))
    missing = [hook for hook in config.hook_names if hook not in sites]
    if len(set(config.hook_names)) < len(config.hook_names):
        raise ValueError(f"{name}: need each hook name once, got {config.hook_names}")
    if missing or not config.hook_names:
        raise ValueError(f"{name}: need hook names among {list(sites)}, got {config.hook_names}")
    found = tuple(sites[hook] for hook in config.hook_names)
    if config.out_dims is None and found != config.site_dims:
        raise ValueError(f"{name}: need site_dims {found} of these sites, got {config.site_dims}")
    return [slice(ends[hook] - sites[hook], ends[hook]) for hook in config.hook_names]


def _next(batches: Iterator[Tensor], step: int, sites: Mapping[str, int] | None) -> Tensor:
    batch = next(batches, None)
    if batch is None:
        raise ValueError(f"the stream ended at step {step}; need a batch for every step")
    if batch.ndim != 2 or not len(batch):
        raise ValueError(f"need batches [n d], n >= 1, got {tuple(batch.shape)} at step {step}")
    if sites is not None and batch.shape[1] != sum(sites.values()):
        raise ValueError(f"need batches of width {sum(sites.values())}, got {batch.shape[1]}")
    return batch


def _require_finite(batch: Tensor, step: int, folder: Path | None) -> None:
    if parallel.mean(batch.isfinite().all().float()) == 1:
        return
    batch = parallel.gather_rows(batch)
    bad = int((~batch.isfinite()).any(1).sum())
    raise FloatingPointError(
        f"{bad} of {len(batch)} activations at step {step} are NaN or infinite{kept(folder, batch)}"
    )


def _part(name: str, trainee: Trainee, batch: Tensor, columns: list[slice] | None) -> Tensor:
    if columns is not None:
        parts = [batch[:, column] for column in columns]
        batch = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
    config = trainee.dictionary.config
    width = config.d_in + (config.d_out if config.out_dims is not None else 0)
    if batch.shape[1] != width:
        raise ValueError(f"{name}: need activations of width {width}, got {batch.shape[1]}")
    return batch


def _identity(plans: Mapping[str, Plan], config: FitConfig) -> dict:
    """All that the weights depend on besides the stream, which checks itself."""
    optimisation = asdict(config)
    for harmless in ("log_every", "checkpoint_every"):
        del optimisation[harmless]
    described = {
        name: {"dictionary": config_to_json(dictionary), "recipe": recipe.to_json()}
        for name, (dictionary, recipe) in plans.items()
    }
    together = {"ranks": parallel.world_size()} if parallel.world_size() > 1 else {}
    return {"fit": optimisation, "plans": described} | together


def _flat(plans: Mapping[str, Plan]) -> dict:
    return {f"{name}.d_sae": dictionary.d_sae for name, (dictionary, _) in plans.items()}


def _postfix(latest: dict[str, dict]) -> str:
    shown = [
        f"{name} fvu {m['fvu']:.3f} l0 {m['l0']:.1f} dead {m['dead']:.0%}"
        for name, m in list(latest.items())[:3]
    ]
    return ", ".join(shown) + (f", and {len(latest) - 3} more" if len(latest) > 3 else "")
