"""Same weights, same outputs: our folders, sae-lens, Gemma Scope, dictionary-learning, the hub."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.interop import (
    Card,
    from_dictionary_learning,
    from_hub,
    from_pretrained,
    from_sae_lens,
    push_to_hub,
    to_sae_lens,
)
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK

D, D_SAE = 12, 40
RULES = [ReLU(), Gated(), JumpReLU(threshold=0.6), TopK(k=5), BatchTopK(k=5)]
IDS = [type(rule).__name__ for rule in RULES]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def sae_lens():
    import sae_lens

    return sae_lens


def batch(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake_(module, seed=0):
    """Move every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def shaken(rule, **options) -> Dictionary:
    """Decoder rows have norms of their own: a norm that is lost shows."""
    options = {"site_dims": (D,), "hook_names": (HOOK,), "unit_norm_decoder": False} | options
    dictionary = shake_(Dictionary(DictionaryConfig(d_sae=D_SAE, rule=rule, **options)))
    if isinstance(rule, BatchTopK):
        dictionary.threshold.fill_(1.5)
    return dictionary.eval()


@torch.no_grad()
def assert_same(ours, theirs, x=None, encode=None):
    x = batch(64, ours.d_in) if x is None else x
    acts = (encode or theirs.encode)(x)
    assert 0 < (acts != 0).double().mean() < 1  # a comparison of nothing, or of no sparsity
    torch.testing.assert_close(ours.encode(x), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


# --- our own folders


OPTIONS = {
    "plain": {},
    "unit": {"unit_norm_decoder": True},
    "not_applied": {"apply_b_dec_to_input": False},
    "tied": {"tied": True},
    "sites": {"site_dims": (5, 7), "hook_names": ("a", "b"), "code_norm": "crosscoder"},
    "transcoder": {"out_dims": (4, 5), "apply_b_dec_to_input": False},
    "transcoder_applied": {"out_dims": (D,)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_save_load_changes_nothing(rule, options, tmp_path):
    dictionary = shaken(rule, **options)
    assert dictionary.save(tmp_path / "d") == tmp_path / "d"
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
    loaded = Dictionary.load(tmp_path / "d")
    assert loaded.config == dictionary.config and not loaded.training
    assert loaded.state_dict().keys() == dictionary.state_dict().keys()
    for shape in ((3, 9, D), (1, D), (D,)):
        x = batch(*shape)
        assert loaded(x).shape == (*shape[:-1], dictionary.d_out)
        torch.testing.assert_close(loaded.encode(x), dictionary.encode(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loaded(x), dictionary(x), atol=1e-6, rtol=1e-6)
    x = batch(20, D)
    pairs = loaded.encode_sparse(x)
    torch.testing.assert_close(pairs.dense(), dictionary.encode(x), atol=1e-6, rtol=1e-6)


def test_saving_replaces_the_folder_whole(tmp_path):
    shaken(Gated()).save(tmp_path)
    (tmp_path / "cfg.json").unlink()
    saved = shaken(TopK(k=3)).save(tmp_path)
    assert isinstance(Dictionary.load(saved).config.rule, TopK)


def test_a_row_of_norm_zero_is_no_damage(tmp_path):
    dictionary = shaken(BatchTopK(k=5))
    with torch.no_grad():
        dictionary.W_dec[3] = 0  # its threshold in sae-lens is infinite
    loaded = Dictionary.load(dictionary.save(tmp_path / "d"))
    assert loaded.config == dictionary.config
    assert_same(loaded, dictionary)


@pytest.fixture
def folder(tmp_path):
    return shaken(BatchTopK(k=5)).save(tmp_path / "d")


def rewrite_config(folder, change):
    saved = json.loads((folder / "cfg.json").read_text())
    change(saved)
    (folder / "cfg.json").write_text(json.dumps(saved))


def rewrite_weights(folder, change):
    weights = load_file(folder / "sae_weights.safetensors")
    change(weights)
    save_file(weights, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_and_damaged_files_are_named(folder, name):
    file = folder / name
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 64, b"[1]"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Dictionary.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Dictionary.load(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Dictionary.load(folder / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("b_dec"), "need tensors .*b_dec"),
        (lambda w: w.update(W_dec=w["W_dec"][:, :5].contiguous()), r"need tensors .*\(40, 12\)"),
        (lambda w: w.update(W_skip=torch.ones(D, D)), "W_skip"),
        (lambda w: w.update(b_enc=torch.full((D_SAE,), torch.nan)), "NaN or infinite .*b_enc"),
    ],
)
def test_wrong_tensors_are_refused(folder, change, message):
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        Dictionary.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["metadata"]["latent_bench"].pop("site_dims"), "damaged: KeyError"),
        (lambda c: c["metadata"]["latent_bench"].update(colour=1), "damaged: TypeError"),
        (lambda c: c["metadata"].update(latent_bench=3), "damaged: AttributeError"),
        (lambda c: c.update(metadata={}, architecture="abstopk"), "need architecture .*abstopk"),
        (lambda c: c.update(metadata={}, activation_fn="tanh-relu"), "need activation_fn"),
        (
            lambda c: c.update(metadata={}, normalize_activations="layer_norm"),
            "need normalize_activations .*layer_norm",
        ),
    ],
)
def test_wrong_configs_are_refused(folder, change, message):
    rewrite_config(folder, change)
    with pytest.raises(ValueError, match=message):
        Dictionary.load(folder)


# --- sae-lens


READABLE = [
    "plain",
    "unit",
    "not_applied",
    "tied",
    "sites",
    "transcoder_applied",
]


@pytest.mark.parametrize("options", READABLE)
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_sae_lens_reads_our_folders(rule, options, tmp_path, sae_lens):
    dictionary = shaken(rule, model_name="tiny", **OPTIONS[options])
    sae = sae_lens.SAE.load_from_disk(dictionary.save(tmp_path / "d"))
    assert_same(dictionary, sae)
    assert_same(dictionary, sae, batch(2, 5, D))
    assert sae.cfg.metadata.model_name == "tiny"
    assert sae.cfg.metadata.hook_name == dictionary.config.hook_names[0]
    sae = to_sae_lens(dictionary)
    assert_same(dictionary, sae)
    back = from_sae_lens(sae)
    assert back.config == dictionary.config
    assert_same(back, sae)


@pytest.mark.parametrize("rule", [ReLU(), JumpReLU(threshold=0.6), BatchTopK(k=5)], ids=str)
def test_transcoders_both_ways(rule, sae_lens, tmp_path):
    dictionary = shaken(rule, **OPTIONS["transcoder"])
    sae = sae_lens.SAE.load_from_disk(dictionary.save(tmp_path / "d"))
    assert isinstance(sae, sae_lens.Transcoder) and sae.d_out == 9
    assert_same(dictionary, sae)
    assert_same(from_sae_lens(to_sae_lens(dictionary)), sae)


@pytest.mark.parametrize("rule", [Gated(), TopK(k=5)], ids=str)
def test_transcoders_that_sae_lens_does_not_have(rule, sae_lens):
    dictionary = shaken(rule, **OPTIONS["transcoder"])
    with pytest.raises(ValueError, match="transcoder, got one from 12 to 9"):
        to_sae_lens(dictionary)


def their_sae(sae_lens, name, training=False, **options):
    kind = f"{name}{'Training' if training else ''}SAE"
    config = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=D_SAE, **options)
    config.metadata.hook_name, config.metadata.model_name = HOOK, "tiny"
    sae = shake_(getattr(sae_lens, kind)(config))
    if name == "JumpReLU":
        # below zero ReLU acts first; training keeps them above
        sae.threshold.data = batch(D_SAE).abs() if training else batch(D_SAE)
    return sae.eval()


INFERENCE = {
    "standard": ("Standard", {}, ReLU()),
    "not_applied": ("Standard", {"apply_b_dec_to_input": False}, ReLU()),
    "gated": ("Gated", {}, Gated()),
    "jumprelu": ("JumpReLU", {}, JumpReLU()),
    "topk": ("TopK", {"k": 5}, TopK(k=5)),
    "topk_rescaled": ("TopK", {"k": 5, "rescale_acts_by_decoder_norm": True}, TopK(k=5)),
}


@pytest.mark.parametrize("case", INFERENCE)
def test_their_saes(case, sae_lens, tmp_path):
    name, options, rule = INFERENCE[case]
    sae = their_sae(sae_lens, name, **options)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.save_model(tmp_path)
    for ours in (from_sae_lens(sae), Dictionary.load(tmp_path), from_pretrained(tmp_path)):
        assert ours.config.rule == rule and ours.config.model_name == "tiny"
        assert ours.config.hook_names == (HOOK,)
        assert_same(ours, sae)
        assert_same(ours, to_sae_lens(ours))
    for key, value in sae.state_dict().items():
        assert torch.equal(value, before[key])  # read, not changed


TRAINING = {
    "standard": ("Standard", {}, ReLU()),
    "gated": ("Gated", {}, Gated()),
    "jumprelu": ("JumpReLU", {}, JumpReLU()),
    "topk": ("TopK", {"k": 5, "rescale_acts_by_decoder_norm": False}, TopK(k=5)),
    "topk_rescaled": ("TopK", {"k": 5}, TopK(k=5)),
    "batchtopk": ("BatchTopK", {"k": 5.5, "rescale_acts_by_decoder_norm": False}, JumpReLU()),
    "batchtopk_rescaled": ("BatchTopK", {"k": 5.5}, JumpReLU()),
}


@pytest.mark.parametrize("case", TRAINING)
def test_their_saes_in_training(case, sae_lens, tmp_path):
    name, options, rule = TRAINING[case]
    training = their_sae(sae_lens, name, training=True, **options)
    if name == "BatchTopK":
        training.topk_threshold.fill_(1.5)
    before = {key: value.clone() for key, value in training.state_dict().items()}
    training.save_inference_model(tmp_path)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    for ours in (from_sae_lens(training), Dictionary.load(tmp_path)):
        assert ours.config.rule == rule and ours.config.hook_names == (HOOK,)
        assert_same(ours, sae)
        if name != "BatchTopK":
            torch.testing.assert_close(ours(batch(9, D)), training(batch(9, D)))
    for key, value in training.state_dict().items():
        assert torch.equal(value, before[key])


def test_batchtopk_of_sae_lens_is_refused_before_export(sae_lens, tmp_path):
    their_sae(sae_lens, "BatchTopK", training=True, k=5).save_model(tmp_path)
    with pytest.raises(ValueError, match="need architecture .*batchtopk"):
        Dictionary.load(tmp_path)


def test_what_sae_lens_changed_counts_not_what_was_saved(sae_lens, tmp_path):
    dictionary = shaken(BatchTopK(k=5), tied=True)
    sae = to_sae_lens(dictionary)
    sae.save_model(tmp_path)
    assert Dictionary.load(tmp_path).config == dictionary.config
    sae.fold_W_dec_norm()
    sae.save_model(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert_same(loaded, sae)
    assert isinstance(loaded.config.rule, JumpReLU) and loaded.config.unit_norm_decoder
    sae = to_sae_lens(shaken(TopK(k=5)))
    sae.cfg.k = 2
    sae.save_model(tmp_path)
    assert Dictionary.load(tmp_path).config.rule == TopK(k=2)


def test_folders_from_before_sae_lens_6(sae_lens, tmp_path):
    sae = their_sae(sae_lens, "TopK", k=5)
    sae.save_model(tmp_path)
    old = {
        "d_in": D,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_name": HOOK,
        "model_name": "tiny",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    rewrite_weights(tmp_path, lambda w: w.update(scaling_factor=torch.ones(D)))
    loaded = Dictionary.load(tmp_path)
    assert loaded.config.rule == TopK(k=5) and loaded.config.hook_names == (HOOK,)
    assert_same(loaded, sae_lens.SAE.load_from_disk(tmp_path))
    rewrite_weights(tmp_path, lambda w: w.update(scaling_factor=torch.full((D,), 2.0)))
    with pytest.raises(ValueError, match="scaling_factor"):
        Dictionary.load(tmp_path)


def test_heads_in_sae_lens(sae_lens, tmp_path):
    whole = shaken(ReLU(), hook_names=("blocks.1.attn.hook_z",))
    sae = sae_lens.SAE.load_from_disk(whole.save(tmp_path / "whole"))
    x = batch(6, D)
    torch.testing.assert_close(sae(x.view(6, 3, 4)).view(6, D), whole(x))
    assert_same(from_sae_lens(sae), whole)
    head = shaken(ReLU(), hook_names=("blocks.1.attn.hook_z.2",))
    sae = sae_lens.SAE.load_from_disk(head.save(tmp_path / "head"))
    assert_same(head, sae)
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_head_index) == ("blocks.1.attn.hook_z", 2)
    del metadata.latent_bench
    assert from_sae_lens(sae).config.hook_names == ("blocks.1.attn.hook_z.2",)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AbsTopK", {"k": 5}),
        ("Standard", {"normalize_activations": "layer_norm"}),
        ("Standard", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_saes_that_a_dictionary_cannot_be(name, options, sae_lens):
    with pytest.raises(ValueError, match=f"{name}SAE: need"):
        from_sae_lens(their_sae(sae_lens, name, **options))


def test_hub_ids_go_through_sae_lens(sae_lens, monkeypatch):
    sae, asked = their_sae(sae_lens, "JumpReLU"), []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *ids: asked.append(ids) or sae)
    assert_same(from_pretrained("gemma-scope-2b-pt-res", "layer_1/width_16k"), sae)
    assert asked == [("gemma-scope-2b-pt-res", "layer_1/width_16k")]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no-such-release"):
        from_pretrained("no-such-release", "x")


# --- Gemma Scope


def gemma_scope(**changes):
    dictionary = shaken(JumpReLU(threshold=0.6), apply_b_dec_to_input=False)
    arrays = {
        "W_enc": dictionary.W_enc,
        "W_dec": dictionary.W_dec,
        "b_enc": dictionary.b_enc,
        "b_dec": dictionary.b_dec,
        "threshold": dictionary.log_threshold.exp(),
    }
    return dictionary, {name: value.detach().numpy() for name, value in arrays.items()} | changes


def test_gemma_scope_folders(tmp_path):
    dictionary, arrays = gemma_scope()
    (tmp_path / "layer_1/width_40").mkdir(parents=True)
    np.savez(tmp_path / "layer_1/width_40/params.npz", **arrays)
    loaded = from_pretrained(tmp_path, "layer_1/width_40")
    assert loaded.config.apply_b_dec_to_input is False
    assert_same(loaded, dictionary)
    x = batch(8, D).double().numpy()  # and their formula, in numpy
    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    acts = (pre > arrays["threshold"]) * np.maximum(pre, 0)
    x_hat = torch.from_numpy(acts @ arrays["W_dec"] + arrays["b_dec"]).float()
    torch.testing.assert_close(loaded(torch.from_numpy(x)).detach(), x_hat, atol=1e-5, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        from_pretrained(tmp_path, "layer_1")


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_gemma_scope_files_that_are_refused(tmp_path):
    file, trap = tmp_path / "params.npz", tmp_path / "sprung"
    np.savez(file, **gemma_scope(b_enc=np.array([Trap(trap)], dtype=object))[1])
    with pytest.raises(ValueError, match="plain arrays"):
        from_pretrained(tmp_path)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], pickle.dumps(Trap(trap))):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="plain arrays"):
            from_pretrained(tmp_path)
    assert not trap.exists()
    np.savez(file, **gemma_scope(threshold=np.ones(3, dtype=np.float32))[1])
    with pytest.raises(ValueError, match="need tensors"):
        from_pretrained(tmp_path)


# --- dictionary-learning


class DictionaryLearning(torch.nn.Module):
    """Its forward passes, written down anew from their definitions."""

    def __init__(self, name, state, k):
        super().__init__()
        self.name, self.state, self.k = name, state, k

    def encode(self, x):
        s = self.state
        if self.name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
            shift = s["b_dec"] if self.name == "MatryoshkaBatchTopKSAE" else 0
            pre = (x - shift) @ s["W_enc"] + s["b_enc"]
            return (pre * (pre > s["threshold"])).relu()
        if self.name == "GatedAutoEncoder":
            pre = (x - s["decoder_bias"]) @ s["encoder.weight"].T
            gate = (pre + s["gate_bias"] > 0).float()
            return gate * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
        bias = 0 if self.name == "AutoEncoderNew" else s.get("bias", s.get("b_dec"))
        acts = ((x - bias) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        if self.name == "BatchTopKSAE":
            return acts * (acts > s["threshold"])
        if self.name == "AutoEncoderTopK":
            top = acts.topk(self.k, dim=-1)
            return torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        return acts

    def forward(self, x):
        s, acts = self.state, self.encode(x)
        W_dec = s["W_dec"] if "W_dec" in s else s["decoder.weight"].T
        names = ("bias", "b_dec", "decoder_bias", "decoder.bias")
        return acts @ W_dec + next(s[name] for name in names if name in s)


LINEAR = {"encoder.weight": (D_SAE, D), "decoder.weight": (D, D_SAE)}
MATRICES = {"W_enc": (D, D_SAE), "W_dec": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,)}
TOPK = LINEAR | {"encoder.bias": (D_SAE,), "b_dec": (D,), "k": (), "threshold": ()}
MATRYOSHKA = MATRICES | {"k": (), "threshold": (), "group_sizes": ()}
GATED = LINEAR | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (D_SAE,))
THEIRS = {  # class: rule, shapes of its state
    "AutoEncoder": (ReLU(), LINEAR | {"encoder.bias": (D_SAE,), "bias": (D,)}),
    "AutoEncoderNew": (ReLU(), LINEAR | {"encoder.bias": (D_SAE,), "decoder.bias": (D,)}),
    "AutoEncoderTopK": (TopK(k=5), TOPK),
    "BatchTopKSAE": (BatchTopK(k=5), TOPK),
    "MatryoshkaBatchTopKSAE": (BatchTopK(k=5), MATRYOSHKA),
    "GatedAutoEncoder": (Gated(), GATED | {"decoder_bias": (D,)}),
    "JumpReluAutoEncoder": (JumpReLU(), MATRICES | {"threshold": (D_SAE,)}),
}


def their_state(name):
    generator = torch.Generator().manual_seed(3)
    shapes = THEIRS[name][1]
    state = {key: 0.4 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    fixed = {
        "k": torch.tensor(5, dtype=torch.int),
        "group_sizes": torch.tensor([10, D_SAE - 10]),
        "threshold": torch.tensor(1.2) if shapes.get("threshold") == () else None,
    }
    return state | {key: fixed[key] for key in shapes if fixed.get(key) is not None}


def their_folder(folder, name, state, **trainer):
    folder.mkdir(exist_ok=True)
    trainer = {"dict_class": name, "lm_name": "tiny", "layer": 1, **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", THEIRS)
def test_dictionary_learning(name, tmp_path):
    state = their_state(name)
    if name == "GatedAutoEncoder":
        state["gate_bias"] -= 1  # else most gates are open
    folder = their_folder(tmp_path, name, state, k=5, submodule_name="resid_post_layer_1")
    ours = from_dictionary_learning(folder)
    assert ours.config.rule == THEIRS[name][0] and not ours.training
    assert (ours.config.model_name, ours.config.hook_names) == ("tiny", (HOOK,))
    assert_same(ours, DictionaryLearning(name, state, k=5))
    assert_same(Dictionary.load(ours.save(tmp_path / "ours")), ours)


@pytest.mark.parametrize("name", THEIRS)
def test_dictionary_learning_itself(name, tmp_path):
    package = pytest.importorskip("dictionary_learning")
    trainers = pytest.importorskip("dictionary_learning.trainers.matryoshka_batch_top_k")
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    classes = {
        "AutoEncoderNew": package.dictionary.AutoEncoderNew,
        "AutoEncoderTopK": AutoEncoderTopK,
        "BatchTopKSAE": BatchTopKSAE,
        "MatryoshkaBatchTopKSAE": trainers.MatryoshkaBatchTopKSAE,
    }
    arguments = {"k": 5} if isinstance(THEIRS[name][0], TopK | BatchTopK) else {}
    if name == "MatryoshkaBatchTopKSAE":
        arguments["group_sizes"] = [10, D_SAE - 10]
    theirs = (classes.get(name) or getattr(package.dictionary, name))(D, D_SAE, **arguments)
    theirs.load_state_dict(their_state(name))
    ours = from_dictionary_learning(their_folder(tmp_path, name, theirs.state_dict()))
    assert_same(ours, theirs)


def test_dictionary_learning_threshold_never_estimated(tmp_path):
    state = their_state("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    ours = from_dictionary_learning(their_folder(tmp_path, "BatchTopKSAE", state))
    assert ours.threshold == 0  # -1 would start the moving average wrong
    assert_same(ours, DictionaryLearning("BatchTopKSAE", state, k=5))


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_checkpoints_execute_nothing(zipped, tmp_path):
    trap = tmp_path / "sprung"
    folder = their_folder(tmp_path / "d", "AutoEncoder", {})
    state = their_state("AutoEncoder") | {"bias": Trap(trap)}
    torch.save(state, folder / "ae.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="nothing in it was run"):
        from_dictionary_learning(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Trap(trap), protocol=2))
    with pytest.raises(ValueError, match="nothing in it was run"):
        from_dictionary_learning(folder)
    assert not trap.exists()
    torch.load(their_folder(tmp_path / "e", "AutoEncoder", state) / "ae.pt", weights_only=False)
    assert trap.exists()  # the trap works


def test_bad_dictionary_learning_folders(tmp_path):
    state = their_state("BatchTopKSAE")
    folder = their_folder(tmp_path, "BatchTopKSAE", state)
    whole = (folder / "ae.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        (folder / "ae.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="plain tensors"):
            from_dictionary_learning(folder)
    torch.save([1, 2], folder / "ae.pt")
    with pytest.raises(ValueError, match="need a dict of tensors, got list"):
        from_dictionary_learning(folder)
    for key, message in (
        ("threshold", "need a scalar threshold"),
        ("encoder.bias", "need tensors"),
        ("encoder.weight", "need two weight matrices"),
        ("k", "need k >= 1"),
    ):
        fewer = {name: value for name, value in state.items() if name != key}
        with pytest.raises(ValueError, match=message):
            from_dictionary_learning(their_folder(tmp_path, "BatchTopKSAE", fewer))
    with pytest.raises(ValueError, match="need dict_class .*CrossCoder"):
        from_dictionary_learning(their_folder(tmp_path, "CrossCoder", state))
    for text in ("{", "[]", '{"trainer": {}}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"need trainer\.dict_class"):
            from_dictionary_learning(folder)
    (folder / "ae.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ae\.pt"):
        from_dictionary_learning(folder)


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The two calls that move files, on a local folder: owner/name/path."""
    import huggingface_hub

    root = tmp_path / "hub"

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        shutil.copytree(folder_path, root / repo_id / (path_in_repo or "."), dirs_exist_ok=True)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        for name in allow_patterns:
            if (root / repo_id / name).is_file():
                (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / repo_id / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.mark.parametrize("subfolder", ["", "layer_1/k_5"])
def test_hub_there_and_back(hub, subfolder):
    dictionary = shaken(BatchTopK(k=5))
    push_to_hub(dictionary, "me/sae", Card(title="A dictionary"), subfolder=subfolder)
    assert sorted(p.name for p in (hub / "me/sae" / subfolder).iterdir()) == [
        "README.md",
        "cfg.json",
        "sae_weights.safetensors",
    ]
    loaded = from_hub("me/sae", subfolder)
    assert loaded.config == dictionary.config
    assert_same(loaded, dictionary)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        from_hub("me/sae", "other")


def test_card():
    nasty = 'a | b\n# <script>alert("x")</script> [c](http://d) `e` ---'
    dictionary = shaken(TopK(k=5), hook_names=(nasty,), model_name="/home/someone/model")
    card = Card(
        title=nasty,
        metrics={"fvu": 0.045, nasty: 3.0},
        base_model="google/gemma-2-2b",
        dataset="Skylion007/openwebtext",
        license="mit",
        notes=f"One.\n\n{nasty}",
    )
    text = card.text(dictionary, "me/sae", "layer_1")
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "saelens",
        "tags": ["latent-bench", "sparse-autoencoder"],
        "license": "mit",
        "base_model": "google/gemma-2-2b",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert "<" not in body and "/home/someone" not in text and "| fvu | 0.045 |" in body
    assert 'from_hub("me/sae", "layer_1")' in body and "\nOne.\n\n" in body
    lines = body.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == []  # only its own heading
    for line in lines:
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 3
    assert "\\[c\\]" in body and "\\`e\\`" in body


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"title": " "}, "need a title"),
        ({"title": "t", "base_model": "/home/someone/model"}, "need base_model"),
        ({"title": "t", "dataset": "a b"}, "need dataset"),
        ({"title": "t", "license": "x\ny: z"}, "need license"),
        ({"title": "t", "metrics": {"fvu": float("nan")}}, "need finite metrics"),
    ],
)
def test_cards_that_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        Card(**facts)


@pytest.mark.parametrize("place", [("me/sae/more",), ("",), ("a b",), ("me/sae", "../x")])
def test_places_that_cannot_be(hub, place):
    for call in (
        lambda: push_to_hub(
            shaken(ReLU()), place[0], Card(title="t"), subfolder="".join(place[1:])
        ),
        lambda: from_hub(*place),
    ):
        with pytest.raises(ValueError, match="need (repo_id|subfolder)"):
            call()
    assert not hub.exists()
