"""SPALF from a stream of activations: calibrate, phase 1, phase 2, checkpoints.

"Spectrally-preconditioned augmented Lagrangian on stratified feature manifolds" (2026): minimise
E‖z‖₀ subject to faithfulness, drift, orthogonality and, in phase 2, the KL of the patched model, by
an augmented Lagrangian.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.activations.buffer import Buffer
from lib.activations.prefetch import Prefetch
from lib.dictionaries.dictionary import Dictionary
from lib.runtime import require_writable
from lib.spalf.checkpoints import load_checkpoint, newest_metadata, save_checkpoint
from lib.spalf.config import SpalfConfig
from lib.spalf.control import TOLERANCE
from lib.spalf.stratified import Anchors
from lib.spalf.trainer import KLMeasure, Trainer
from lib.training.checkpoint import clear_checkpoints, kept, remove, sweep

BAND = 0.01  # of r2 round its target
DISTINCT = 8  # tokens a dimension at least that a repeating source must hold


@dataclass
class SpalfFit:
    """A dictionary that SPALF trained."""

    dictionary: Dictionary
    """On raw activations, in eval mode. Its first `len(anchor_ids)` latents are the anchored."""
    history: list[dict]
    """Every `SpalfConfig.log_every` steps: `step`, `tokens`, `lr` (Adam's, as applied), `phase`,
    `l0`, `r2`, `kl` (None in phase 1) and `dead` of the last step, and by constraint `violations`,
    `multipliers`, `penalties`."""
    phase_2_at: int | None
    """The first step of phase 2; None if it was never entered."""
    reached: bool
    """Whether r2, averaged over the last ten steps or so, met its target to within 0.01."""
    anchor_ids: list[int]
    """Token of each anchored latent."""
    config: SpalfConfig

    @classmethod
    def load(cls, folder: str | Path) -> "SpalfFit":
        """What `train_spalf` left in `folder`.

        Raises:
            FileNotFoundError: no checkpoint there, or the dictionary is missing: not finished.
            ValueError: a file is damaged.
        """
        about = newest_metadata(Path(folder))
        dictionary = Dictionary.load(Path(folder) / "dictionary")
        names = ("history", "phase_2_at", "reached", "anchor_ids")
        config = SpalfConfig(**about["identity"]["config"])
        return cls(dictionary, *(about[name] for name in names), config)


def train_spalf(
    config: SpalfConfig,
    stream: Iterable[Tensor],
    *,
    d_in: int,
    anchors: Anchors | None = None,
    patched_kl: KLMeasure | None = None,
    hook_name: str = "",
    model_name: str = "",
    folder: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_log: Callable[[list[dict], int | None], None] | None = None,
) -> SpalfFit:
    """Find the sparsest dictionary that explains `r2_target` of the variance.

    Batches are read first to calibrate (covariance, thresholds, bounds), then one a step. In phase
    1 the error falls until the target is reached, then l0 slides down along it, in the second half
    of the run at half the learning rate. Once violations and l0 are still, between 0.7 and 0.8 of
    the run, phase 2 begins: it holds the KL of the patched model below nine tenths of its value at
    entry. The learning rate falls to 0 over the last fifth.

    Args:
        stream: batches `[n d_in]` of raw activations; `n_steps` after those of the calibration.
        anchors: token directions that the first latents write (`lib.models.unembed`); they pay
            near the output.
        patched_kl: `lib.models.patched.PatchedKL`; without it there is no phase 2.
        folder: for checkpoints, and at the end `dictionary`, in sae-lens's layout.
        resume: go on from the newest checkpoint in `folder`, bit for bit on a CPU, if there is
            one; otherwise checkpoints there are removed. `patched_kl` must measure the same.
        on_log: called every `log_every` steps with the history and `phase_2_at`, to draw them.

    Warns:
        UserWarning: the target was not met to within 0.01, phase 2 was never entered, or another
            constraint is violated at the end; the message says which and by how much.

    Raises:
        ValueError: `d_sae` not above the number of anchors, anchors of another width, a stream that
            ends or does not vary while calibrating or training, a batch of another width, a resume
            with another config.
        FloatingPointError: activations, the loss or its gradient are not finite; given a folder,
            the batch is saved there. The last checkpoint stays.
        OSError: the folder cannot be written.
    """
    target = _writable(config, folder, resume)
    device = torch.device(device)
    names = {"hook_names": (hook_name,) if hook_name else (), "model_name": model_name}
    trainer = Trainer(config, d_in, anchors, patched_kl, device, **names)
    identity = _identity(config, d_in, anchors, trainer.kl is not None)
    batches = iter(stream)
    about = load_checkpoint(target, trainer, batches, identity) if target and resume else None
    if target:
        sweep(target, ["dictionary"])
        if not resume:
            clear_checkpoints(target)
            if (target / "dictionary").exists():
                remove(target / "dictionary")
    if about is None:
        drawn = trainer.calibrate(_checked(batches, d_in, "calibration", target), device)
        _require_distinct(batches, d_in)
        about = {"step": 0, "drawn": drawn, "history": []}
    history = about["history"]
    steps = tqdm(range(about["step"], config.n_steps), desc="spalf", disable=not progress)
    feed = _checked(batches, d_in, "training", target, about["step"])
    for step in steps:
        x = next(feed, None)
        if x is None:
            raise ValueError(f"the stream ended at step {step}; need a batch for every step")
        x = x.to(device, torch.float32)
        try:
            seen = trainer.step(step, x)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}{kept(target, x)}") from None
        if (step + 1) % config.log_every == 0 or step + 1 == config.n_steps:
            history.append(_entry(trainer, step, len(x), seen))
            steps.set_postfix_str(_postfix(history[-1]), refresh=False)
            if on_log:
                on_log(history, trainer.phase_2_at)
        due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
        if target and (due or step + 1 == config.n_steps):
            about = {
                "step": step + 1,
                "drawn": about["drawn"],
                "history": history,
                "phase_2_at": trainer.phase_2_at,
                "reached": _reached(trainer),
                "anchor_ids": identity["anchor_ids"],
                "identity": identity,
            }
            save_checkpoint(target, trainer, batches, about)

    fit = SpalfFit(
        trainer.finished(),
        history,
        trainer.phase_2_at,
        _reached(trainer),
        identity["anchor_ids"],
        config,
    )
    if target:
        fit.dictionary.save(target / "dictionary")
    for problem in _problems(trainer):
        warnings.warn(problem, stacklevel=2)
    return fit


def _writable(config: SpalfConfig, folder: str | Path | None, resume: bool) -> Path | None:
    if folder is None:
        if resume or config.checkpoint_every:
            raise ValueError("resume and checkpoint_every need a folder, got none")
        return None
    return require_writable(Path(folder))


def _checked(
    batches: Iterable[Tensor], d_in: int, stage: str, folder: Path | None, start: int = 0
) -> Iterator[Tensor]:
    """The batches, each of the right width and finite; `start` is the first one's number."""
    for i, batch in enumerate(batches, start):
        if batch.ndim != 2 or batch.shape[1] != d_in or not len(batch):
            raise ValueError(
                f"need batches [n {d_in}], n >= 1, got {tuple(batch.shape)} at batch {i} of {stage}"
            )
        if not batch.isfinite().all():
            bad = int((~batch.isfinite()).any(1).sum())
            raise FloatingPointError(
                f"{bad} of {len(batch)} activations at batch {i} of {stage} are NaN or infinite"
                f"{kept(folder, batch)}"
            )
        yield batch


def _identity(config: SpalfConfig, d_in: int, anchors: Anchors | None, kl: bool) -> dict:
    """All that the weights depend on besides the stream, which checks itself."""
    described = asdict(config)
    del described["checkpoint_every"]
    ids = [] if anchors is None else anchors.ids.tolist()
    return {"config": described, "d_in": d_in, "anchor_ids": ids, "patched_kl": kl}


def _smoothed_r2(trainer: Trainer) -> float:
    """From the fast average of log(1 + g), which is log(mse / bound)."""
    ratio = trainer.control.fast[0].exp().item()
    return 1 - ratio * (1 - trainer.config.r2_target)


def _reached(trainer: Trainer) -> bool:
    return abs(_smoothed_r2(trainer) - trainer.config.r2_target) <= BAND


def _problems(trainer: Trainer) -> Iterator[str]:
    """What a user should know about how the run ended."""
    config, control = trainer.config, trainer.control
    if not _reached(trainer):
        r2 = _smoothed_r2(trainer)
        short = r2 < config.r2_target
        cure = "more steps, more latents or a lower target" if short else "more steps or a lower lr"
        yield (
            f"r2_target {config.r2_target} was not {'reached' if short else 'held'}: training "
            f"ended at r2 {r2:.3f}; it needs {cure}"
        )
    if config.phase_2 and trainer.kl is not None and trainer.phase_2_at is None:
        yield "phase 2 was never entered: violations or l0 were not still before the last fifth"
    for name, v in zip(control.names[1:], control.slow[1:].tolist(), strict=True):
        if v > TOLERANCE:
            yield f"constraint {name!r} is violated at the end, by {math.expm1(v):.0%} of its bound"


def _require_distinct(batches: Iterable[Tensor], d_in: int) -> None:
    """A buffer starts its source again when it ends, so it never runs short of tokens itself."""
    buffer = batches.buffer if isinstance(batches, Prefetch) else batches
    if not isinstance(buffer, Buffer) or not buffer.epoch:
        return
    n, needed = buffer.n_served // buffer.epoch, DISTINCT * d_in
    if n < needed:
        raise ValueError(f"too few tokens to calibrate: need {needed} different ones, got {n}")


def _entry(trainer: Trainer, step: int, n: int, seen: dict[str, float]) -> dict:
    control = trainer.control
    kl = trainer.latest.get("kl")
    return {
        "step": step + 1,
        "tokens": (step + 1) * n,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "phase": 1 if trainer.phase_2_at is None or step < trainer.phase_2_at else 2,
        **seen,
        "kl": None if kl is None else (1 + kl) * trainer.numbers["kl_bound"],
        "dead": (trainer.since_fired > trainer.dead_after(n)).float().mean().item(),
        "violations": {name: trainer.latest[name] for name in control.names},
        "multipliers": dict(zip(control.names, control.multipliers.tolist(), strict=True)),
        "penalties": dict(zip(control.names, control.penalties.tolist(), strict=True)),
    }


def _postfix(entry: dict) -> str:
    """The bar: constraints by their first letter."""
    each = (
        f"{name[0]} {g:+.2f} λ {entry['multipliers'][name]:.1f} ρ {entry['penalties'][name]:.1f}"
        for name, g in entry["violations"].items()
    )
    return f"l0 {entry['l0']:.1f} r2 {entry['r2']:.3f} | " + " | ".join(each)
