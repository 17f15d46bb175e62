"""The libraries of the training benchmark behind one face: `step(x)` and `reconstruct(x)`.

Each is trained by its own step, with its own classes and defaults for all that `Setup` and `Start`
do not fix. What is changed to make them alike: initial weights, learning rate (constant) and
Adam's betas, k, the number of tokens after which a latent counts as dead.
"""

import contextlib
import importlib.util
import math
import os
import sys
from unittest import mock

import torch
from torch import Tensor

from lib.dictionaries import FitConfig
from lib.dictionaries.recipes import batchtopk, jumprelu, topk
from lib.dictionaries.trainer import DictionaryTrainer
from lib.sparse import reused_buffers, screen
from lib.training import Feed
from tests.bench_measure import WARM_UP, Setup, Start

PACKAGES = ("dictionary_learning", "overcomplete", "sae_lens", "sklearn", "sparsify")
"""What must be importable; scikit-learn is what overcomplete's SAEs import."""


def missing() -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def l0_of(acts: Tensor) -> float:
    return (acts > 0).sum().item() / len(acts)


def autocast(setup: Setup) -> contextlib.AbstractContextManager:
    half = setup.dtype != "float32"
    return torch.autocast(torch.device(setup.device).type, dtype=torch.bfloat16, enabled=half)


class Library:
    """One library's dictionary in training."""

    note = ""
    context = contextlib.nullcontext
    """Within it all steps are taken."""


class Ours(Library):
    """`lib.dictionaries.trainer.DictionaryTrainer`."""

    context = staticmethod(reused_buffers)

    def __init__(self, setup: Setup, start: Start) -> None:
        self.setup, self.done = setup, 0
        sparse = {"target_l0": float(setup.k), "threshold": start.threshold}
        recipe = {
            "topk": topk(setup.k),
            "batchtopk": batchtopk(setup.k),
            # a fifth of the threshold, as the default has it once it is trained
            "jumprelu": jumprelu(l0=10.0, bandwidth=start.threshold / 5, **sparse),
        }[setup.rule]
        norm = "crosscoder" if len(setup.site_dims) > 1 else "decoder"
        config = recipe.dictionary(site_dims=setup.site_dims, d_sae=setup.d_sae, code_norm=norm)
        fit = FitConfig(
            n_steps=WARM_UP + setup.steps, lr=setup.lr, lr_schedule="constant", lr_warmup=0.0,
            normalize="none", dead_after=setup.dead_after, seed=setup.seed, dtype=setup.dtype,
        )  # fmt: skip
        self.trainer = DictionaryTrainer(config, recipe, fit, setup.device)
        self.dictionary = self.trainer.dictionary
        self.dictionary.W_dec.data.copy_(start.rows)
        self.dictionary.W_enc.data.copy_(start.encoder.T)

    def step(self, x: Tensor) -> None:
        if self.done == 0:
            self.trainer.start(Feed([x], x.device))
        self.trainer.step(self.done, x)
        self.done += 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, float]:
        d = self.dictionary
        if self.setup.rule == "batchtopk":  # by the batch, as in training
            pre = d.pre_acts(x).relu()
            kept = (pre * d.code_norms()).flatten().topk(len(x) * self.setup.k).indices
            acts = torch.zeros_like(pre)
            acts.view(-1)[kept] = pre.view(-1)[kept]
        else:
            acts = d.encode(x)
        return d.decode(acts), l0_of(acts)


class OursInFloat32(Ours):
    """As it trains on a CPU whose products in bfloat16 are not faster: without a screen."""

    note = "no product in bfloat16"

    def step(self, x: Tensor) -> None:
        with mock.patch.object(screen, "has_amx", return_value=False):
            super().step(x)


class Sparsify(Library):
    """`sparsify.SparseCoder` (PyPI: eai-sparsify), TopK with AuxK.

    Its `Trainer` wants a language model, so `step` does what `Trainer.fit` does for one batch of
    activations, in its order, without its learning rate's schedule and its logging. Optimiser and
    weight of AuxK are the race's; its own defaults are signum, which keeps one moment, and none.
    """

    def __init__(self, setup: Setup, start: Start) -> None:
        if not setup.cuda:
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its switch for CPUs, read on import
        from sparsify import SparseCoder, SparseCoderConfig

        if setup.rule != "topk":
            self.note = "TopK on the concatenated sites: it has no BatchTopK"
        config = SparseCoderConfig(num_latents=setup.d_sae, k=setup.k)
        self.setup = setup
        self.coder = SparseCoder(setup.d, config, setup.device, dtype=torch.float32)
        self.coder.encoder.weight.data.copy_(start.encoder)
        self.coder.W_dec.data.copy_(start.rows)
        self.coder.b_dec.data.copy_(start.mean)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=setup.lr)
        self.since = torch.zeros(setup.d_sae, device=setup.device, dtype=torch.long)
        self.fired = torch.zeros(setup.d_sae, device=setup.device, dtype=torch.bool)

    def step(self, x: Tensor) -> None:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        dead = self.since > self.setup.dead_after
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=dead, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())  # its running means
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.since += len(x)
            self.since[self.fired] = 0
            self.fired.zero_()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, float]:
        acts, indices, _ = self.coder.encode(x)
        return self.coder.decode(acts, indices), l0_of(acts)


class SAELens(Library):
    """sae-lens: `SAETrainer.step` on its training SAEs; JumpReLU with its quadratic L0 penalty."""

    def __init__(self, setup: Setup, start: Start) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape = {"d_in": setup.d, "d_sae": setup.d_sae, "device": setup.device}
        # its sparse activations work only without the rescaling; unit rows need none
        unit = {"rescale_acts_by_decoder_norm": False}
        kind, options = {
            "topk": ("TopK", {"k": setup.k, "use_sparse_activations": True, **unit}),
            "batchtopk": ("BatchTopK", {"k": float(setup.k), **unit}),
            "jumprelu": ("JumpReLU", {"jumprelu_init_threshold": start.threshold,
                                      "jumprelu_sparsity_loss_mode": "quadratic",
                                      "target_l0": float(setup.k)}),
        }[setup.rule]  # fmt: skip
        config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(**shape, **options)
        if setup.rule == "topk":
            self.note = "use_sparse_activations, without rescaling by decoder norms"
        self.sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
        self.sae.W_enc.data.copy_(start.encoder.T)
        self.sae.W_dec.data.copy_(start.rows)
        self.sae.b_dec.data.copy_(start.mean)
        training = SAETrainerConfig(
            total_training_samples=setup.batch * 10**6,  # a constant rate: its end never comes
            train_batch_size_samples=setup.batch, lr=setup.lr, lr_end=setup.lr,
            device=setup.device, autocast=setup.dtype == "bfloat16",
            dead_feature_window=max(1, setup.dead_after // setup.batch),
        )  # fmt: skip
        self.trainer = SAETrainer(training, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, float]:
        acts = self.sae.encode(x)
        return self.sae.decode(acts), l0_of(acts.to_dense())


class DictionaryLearning(Library):
    """dictionary-learning: `update` of its trainers."""

    def __init__(self, setup: Setup, start: Start) -> None:
        from dictionary_learning import trainers

        self.setup, self.done = setup, 0
        shared = {
            "steps": 10**6, "activation_dim": setup.d, "dict_size": setup.d_sae, "layer": 0,
            "lm_name": "", "lr": setup.lr, "warmup_steps": 0, "seed": setup.seed,
            "device": setup.device,
        }  # fmt: skip
        if setup.rule == "jumprelu":
            sparsity = {"target_l0": setup.k, "sparsity_warmup_steps": 0}
            self.trainer = trainers.JumpReluTrainer(**shared, **sparsity)
            ae = self.trainer.ae
            ae.threshold.data.fill_(start.threshold)
            encoder, decoder = ae.W_enc.data, ae.W_dec.data.T
            for group in self.trainer.optimizer.param_groups:
                group["betas"] = (0.9, 0.999)  # its own are (0, 0.999)
        else:
            kind = {"topk": trainers.TopKTrainer, "batchtopk": trainers.BatchTopKTrainer}
            self.trainer = kind[setup.rule](**shared, k=setup.k)
            ae = self.trainer.ae
            encoder, decoder = ae.encoder.weight.data.T, ae.decoder.weight.data
        self.trainer.dead_feature_threshold = setup.dead_after
        encoder.copy_(start.encoder.T)
        decoder.copy_(start.rows.T)
        ae.b_dec.data.copy_(start.mean)

    def step(self, x: Tensor) -> None:
        with autocast(self.setup):
            self.trainer.update(self.done, x)
        self.done += 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, float]:
        ae = self.trainer.ae
        by_batch = {"use_threshold": False} if self.setup.rule == "batchtopk" else {}
        acts = ae.encode(x, **by_batch)
        return ae.decode(acts), l0_of(acts)


class Overcomplete(Library):
    """overcomplete: its `train_sae`, one batch a call, silent; it has no `b_dec`.

    The loss is the user's there; this is what its notebooks use: the mean squared error, and a
    pull on latents that no token of the batch used; under JumpReLU, where more than k are
    active, a push on the thresholds.
    """

    def __init__(self, setup: Setup, start: Start) -> None:
        if "overcomplete" not in sys.modules:  # its __init__ would import torchvision and more
            spec = importlib.util.find_spec("overcomplete")
            sys.modules["overcomplete"] = importlib.util.module_from_spec(spec)
        from overcomplete import sae
        from overcomplete.sae import train

        self.setup, self.train_sae = setup, train.train_sae
        make, options = {
            "topk": (sae.TopKSAE, {"top_k": setup.k}),
            "batchtopk": (sae.BatchTopKSAE, {"top_k": setup.batch * setup.k}),
            "jumprelu": (sae.JumpSAE, {}),
        }[setup.rule]
        self.sae = make(setup.d, setup.d_sae, device=setup.device, **options).train()
        linear = self.sae.encoder.final_block[0]
        linear.weight.data.copy_(start.encoder)
        linear.bias.data.copy_(-start.encoder @ start.mean)
        self.sae.dictionary._weights.data.copy_(start.rows)
        if setup.rule == "jumprelu":
            self.sae.thresholds.data.fill_(math.log(start.threshold))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=setup.lr)

    def loss(self, x, x_hat, pre_codes, codes, dictionary) -> Tensor:
        error = (x - x_hat).square().mean()
        if self.setup.rule == "jumprelu":
            crowded = (codes > 0).float().mean().detach() > self.setup.k / self.setup.d_sae
            return error - self.sae.thresholds.sum() if crowded else error
        silent = ((codes > 0).sum(0) == 0).float().detach()
        return error - 1e-3 * (pre_codes * silent).mean()

    def step(self, x: Tensor) -> None:
        with autocast(self.setup):
            self.train_sae(
                self.sae, [x], self.loss, self.optimizer,
                nb_epochs=1, monitoring=0, device=self.setup.device,
            )  # fmt: skip

    def reconstruct(self, x: Tensor) -> tuple[Tensor, float]:
        _, acts, x_hat = self.sae(x)
        return x_hat, l0_of(acts)


LIBRARIES: dict[str, type[Library]] = {
    "lib": Ours,
    "lib, float32": OursInFloat32,
    "sparsify": Sparsify,
    "sae-lens": SAELens,
    "dictionary-learning": DictionaryLearning,
    "overcomplete": Overcomplete,
}


def racing(setup: Setup) -> list[str]:
    """Who has something to run: sparsify knows TopK only, and stands in on concatenated sites."""
    idle = set() if setup.rule == "topk" or len(setup.site_dims) > 1 else {"sparsify"}
    if setup.cuda or not screen.has_amx():  # it would be lib again
        idle.add("lib, float32")
    return [name for name in LIBRARIES if name not in idle]
