"""SPALF from a stream of activations: calibrate, phase 1, phase 2, checkpoints.

"Spectrally-preconditioned augmented Lagrangian on stratified feature manifolds" (2026): minimise
E‖z‖₀ subject to faithfulness, drift, orthogonality and, in phase 2, the KL of the patched model, by
an augmented Lagrangian.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib import training
from lib.dictionaries.dictionary import Dictionary
from lib.spalf.config import SpalfConfig
from lib.spalf.control import TOLERANCE
from lib.spalf.descent import KLMeasure
from lib.spalf.stratified import Anchors
from lib.spalf.trainer import SpalfTrainer
from lib.training import checkpoint, distributed

NAME = "dictionary"
"""Of the only trainer, and of the folder that it leaves."""


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
        about = checkpoint.metadata(Path(folder))
        if about is None:
            raise FileNotFoundError(f"need a checkpoint of SPALF in {folder}, got none")
        dictionary, made = Dictionary.load(Path(folder) / NAME), about["identity"][NAME]
        facts, config = about["facts"][NAME], SpalfConfig(**made["config"])
        return cls(
            dictionary,
            about["history"][NAME],
            **facts,
            anchor_ids=made["anchor_ids"],
            config=config,
        )


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
            ends or does not vary while calibrating or training, a batch of another width, several
            processes; and as `lib.training.fit`.
        FloatingPointError: activations, the loss or its gradient are not finite; given a folder,
            the batch is saved there. The last checkpoint stays.
        OSError: the folder cannot be written.
    """
    distributed.require_one_process("SPALF")
    device = torch.device(device)
    names = {"hook_names": (hook_name,) if hook_name else (), "model_name": model_name}
    trainer = SpalfTrainer(config, d_in, anchors, patched_kl, device, **names)
    if folder is not None and not resume and (Path(folder) / NAME).exists():
        checkpoint.remove(Path(folder) / NAME)
    history, _ = training.fit(
        {NAME: trainer},
        stream,
        folder=folder,
        resume=resume,
        checkpoint_every=config.checkpoint_every,
        device=device,
        progress=progress,
        on_log=lambda entries: on_log(entries[NAME], trainer.phase_2_at) if on_log else None,
    )
    dictionary, phase_2_at = trainer.finished(), trainer.phase_2_at
    found = SpalfFit(
        dictionary, history[NAME], phase_2_at, trainer.reached, trainer.anchor_ids, config
    )
    if folder is not None:
        dictionary.save(Path(folder) / NAME)
    for problem in _problems(trainer):
        warnings.warn(problem, stacklevel=2)
    return found


def _problems(trainer: SpalfTrainer) -> Iterator[str]:
    """What a user should know about how the run ended."""
    config, control = trainer.config, trainer.control
    if not trainer.reached:
        r2 = trainer.smoothed_r2
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
            yield (
                f"constraint {name!r} is violated at the end, by {math.expm1(v):.0%} of its bound"
            )
