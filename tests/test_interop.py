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

from lib.dictionaries import Dictionary, DictionaryConfig, format, interop
from lib.dictionaries.interop import Card, from_pretrained, from_sae_lens, to_sae_lens
from lib.dictionaries.rules import BatchTopK, Gated, JumpReLU, ReLU, TopK
from tests.small_fits import same

D, D_SAE = 12, 40
RULES = [ReLU(), Gated(), JumpReLU(threshold=0.6), TopK(k=5), BatchTopK(k=5)]
IDS = [type(rule).__name__ for rule in RULES]
HOOK = "blocks.1.hook_resid_post"
CONFIG, WEIGHTS = FILES = ["cfg.json", "sae_weights.safetensors"]


@pytest.fixture(scope="module")
def sae_lens():
    import sae_lens

    return sae_lens


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def shake_(module):
    """Move every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(0)
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
def assert_same(ours, theirs, *shape):
    x = batch(*(shape or (64, ours.d_in)))
    acts = theirs.encode(x)
    assert 0 < (acts != 0).double().mean() < 1  # a comparison of nothing, or of no sparsity
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close((ours.encode(x), ours(x)), (acts, theirs(x)), **close)


OPTIONS = {
    "plain": {},
    "unit": {"unit_norm_decoder": True},
    "not_applied": {"apply_b_dec_to_input": False},
    "tied": {"tied": True},
    "sites": {"site_dims": (5, 7), "hook_names": ("a", "b"), "code_norm": "crosscoder"},
    "transcoder": {"out_dims": (4, 5), "apply_b_dec_to_input": False},
    "transcoder_applied": {"out_dims": (D,)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_save_load_changes_nothing(rule, options, tmp_path):
    dictionary, folder = shaken(rule, **OPTIONS[options]), tmp_path / "d"
    assert dictionary.save(folder) == folder and sorted(os.listdir(folder)) == FILES
    loaded = Dictionary.load(folder)
    assert loaded.config == dictionary.config and not loaded.training
    assert loaded.state_dict().keys() == dictionary.state_dict().keys()
    for shape in ((3, 9, D), (1, D), (D,)):
        x = batch(*shape)
        right = dictionary.encode(x), dictionary(x), dictionary.encode(x).view(-1, D_SAE)
        found = loaded.encode(x), loaded(x), loaded.encode_sparse(x.view(-1, D)).dense()
        assert found[1].shape == (*shape[:-1], dictionary.d_out)
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-6)


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


@pytest.mark.parametrize("name", FILES)
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


def rewrite(folder, change):
    config, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, weights)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, w: w.pop("b_dec"), "need tensors .*b_dec"),
        (lambda _, w: w.update(W_dec=w["W_dec"][:, :5].clone()), r"need tensors .*\(40, 12\)"),
        (lambda _, w: w.update(W_skip=torch.ones(D, D)), "W_skip"),
        (lambda _, w: w.update(b_enc=torch.full((D_SAE,), torch.nan)), "NaN or infinite .*b_enc"),
        (lambda c, _: c["metadata"]["latent_bench"].pop("site_dims"), "damaged: KeyError"),
        (lambda c, _: c["metadata"]["latent_bench"].update(colour=1), "damaged: TypeError"),
        (lambda c, _: c["metadata"].update(latent_bench=3), "damaged: AttributeError"),
        (lambda c, _: c.update(metadata={}, architecture="abstopk"), "need architecture .*abstopk"),
        (lambda c, _: c.update(metadata={}, activation_fn="tanh-relu"), "need activation_fn"),
        (
            lambda c, _: c.update(metadata={}, normalize_activations="layer_norm"),
            "need normalize_activations .*layer_norm",
        ),
    ],
)
def test_wrong_tensors_and_configs_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        Dictionary.load(folder)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_sae_lens_reads_our_folders(rule, options, tmp_path, sae_lens):
    dictionary = shaken(rule, model_name="tiny", **OPTIONS[options])
    between_widths = options == "transcoder"
    if between_widths and isinstance(rule, Gated | TopK):
        with pytest.raises(ValueError, match="transcoder, got one from 12 to 9"):
            to_sae_lens(dictionary)
        return
    read = sae_lens.SAE.load_from_disk(dictionary.save(tmp_path / "d"))
    for sae in (read, to_sae_lens(dictionary)):
        assert isinstance(sae, sae_lens.Transcoder) == between_widths
        assert sae.cfg.metadata.model_name == "tiny"
        assert sae.cfg.metadata.hook_name == dictionary.config.hook_names[0]
        back = from_sae_lens(sae)
        assert back.config == dictionary.config
        for ours in (dictionary, back):
            assert_same(ours, sae)
            assert_same(ours, sae, 2, 5, D)


def their_sae(sae_lens, name, training=False, **options):
    kind = f"{name}{'Training' if training else ''}SAE"
    config = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=D_SAE, **options)
    config.metadata.hook_name, config.metadata.model_name = HOOK, "tiny"
    sae = shake_(getattr(sae_lens, kind)(config))
    if name == "JumpReLU":
        # below zero ReLU acts first; training keeps them above
        sae.threshold.data = batch(D_SAE).abs() if training else batch(D_SAE)
    if name == "BatchTopK":
        sae.topk_threshold.fill_(1.5)
    return sae.eval()


PLAIN, RESCALED = ({"rescale_acts_by_decoder_norm": rescaled} for rescaled in (False, True))
SAES = [
    ("Standard", {}, ReLU()),
    ("Standard", {"apply_b_dec_to_input": False}, ReLU()),
    ("Gated", {}, Gated()),
    ("JumpReLU", {}, JumpReLU()),
    ("TopK", {"k": 5, **PLAIN}, TopK(k=5)),
    ("TopK", {"k": 5, **RESCALED}, TopK(k=5)),
    ("BatchTopK", {"k": 5.5, **PLAIN}, JumpReLU()),  # in training only
    ("BatchTopK", {"k": 5.5, **RESCALED}, JumpReLU()),
]
CASES = [(*case, True) for case in SAES] + [(*case, False) for case in SAES[:-2]]


@pytest.mark.parametrize(("name", "options", "rule", "training"), CASES)
def test_their_saes(name, options, rule, training, sae_lens, tmp_path):
    theirs = their_sae(sae_lens, name, training, **options)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    save = theirs.save_inference_model if training else theirs.save_model
    save(tmp_path)
    sae = sae_lens.SAE.load_from_disk(tmp_path) if training else theirs
    for ours in (from_sae_lens(theirs), Dictionary.load(tmp_path), from_pretrained(tmp_path)):
        config = ours.config
        assert (config.rule, config.model_name, config.hook_names) == (rule, "tiny", (HOOK,))
        assert_same(ours, sae)
        assert_same(ours, to_sae_lens(ours))
        if name != "BatchTopK":
            torch.testing.assert_close(ours(batch(9, D)), theirs(batch(9, D)))
    same(dict(theirs.state_dict()), before)  # read, not changed


def test_what_sae_lens_changed_counts_not_what_was_saved(tmp_path):
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
    their_sae(sae_lens, "TopK", k=5).save_model(tmp_path)
    old = {"d_in": D, "d_sae": D_SAE, "dtype": "float32", "hook_name": HOOK, "model_name": "tiny"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    old |= {"normalize_activations": False, "apply_b_dec_to_input": True}
    (tmp_path / CONFIG).write_text(json.dumps(old | {"finetuning_scaling_factor": False}))
    rewrite(tmp_path, lambda _, w: w.update(scaling_factor=torch.ones(D)))
    loaded = Dictionary.load(tmp_path)
    assert loaded.config.rule == TopK(k=5) and loaded.config.hook_names == (HOOK,)
    assert_same(loaded, sae_lens.SAE.load_from_disk(tmp_path))
    rewrite(tmp_path, lambda _, w: w.update(scaling_factor=torch.full((D,), 2.0)))
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
    assert from_sae_lens(sae).config.hook_names == head.config.hook_names


def test_saes_that_a_dictionary_cannot_be(sae_lens, tmp_path):
    kinds = "layer_norm", "constant_norm_rescale"
    normalized = [("Standard", {"normalize_activations": kind}) for kind in kinds]
    for name, options in (("AbsTopK", {"k": 5}), *normalized):
        with pytest.raises(ValueError, match=f"{name}SAE: need"):
            from_sae_lens(their_sae(sae_lens, name, **options))
    their_sae(sae_lens, "BatchTopK", training=True, k=5).save_model(tmp_path)  # no export
    with pytest.raises(ValueError, match="need architecture .*batchtopk"):
        Dictionary.load(tmp_path)


def test_hub_ids_go_through_sae_lens(sae_lens, monkeypatch):
    sae, asked = their_sae(sae_lens, "JumpReLU"), []
    with monkeypatch.context() as patch:
        patch.setattr(sae_lens.SAE, "from_pretrained", lambda *ids: asked.append(ids) or sae)
        assert_same(from_pretrained("gemma-scope-2b-pt-res", "layer_1/width_16k"), sae)
    assert asked == [("gemma-scope-2b-pt-res", "layer_1/width_16k")]
    # its list of releases takes seconds to read
    monkeypatch.setattr("sae_lens.saes.sae.get_pretrained_saes_directory", dict)
    with pytest.raises(ValueError, match="no-such-release"):
        from_pretrained("no-such-release", "x")


def gemma_scope(**changes):
    dictionary = shaken(JumpReLU(threshold=0.6), apply_b_dec_to_input=False)
    tensors = format.sae_lens_tensors(dictionary.config, dictionary.state_dict())
    return dictionary, {name: value.numpy() for name, value in tensors.items()} | changes


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
    whole = file.read_bytes()
    for damaged in (whole, b"", whole[: len(whole) // 2], pickle.dumps(Trap(trap))):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="plain arrays"):
            from_pretrained(tmp_path)
    assert not trap.exists()
    np.savez(file, **gemma_scope(threshold=np.ones(3, dtype=np.float32))[1])
    with pytest.raises(ValueError, match="need tensors"):
        from_pretrained(tmp_path)


class DictionaryLearning:
    """Its forward passes, written down anew from their definitions."""

    def __init__(self, name, state):
        self.name, self.state = name, state
        biases = ("bias", "b_dec", "decoder_bias", "decoder.bias")
        self.b_dec = next(state[bias] for bias in biases if bias in state)
        matrices = (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight"))
        self.W_enc, self.W_dec = (state[a] if a in state else state[b].T for a, b in matrices)

    def encode(self, x):
        s = self.state
        shift = 0 if self.name in ("AutoEncoderNew", "JumpReluAutoEncoder") else self.b_dec
        pre = (x - shift) @ self.W_enc
        if self.name == "GatedAutoEncoder":
            gate = (pre + s["gate_bias"] > 0).float()
            return gate * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
        acts = (pre + s.get("b_enc", s.get("encoder.bias"))).relu()
        if self.name == "AutoEncoderTopK":
            top = acts.topk(5, dim=-1)
            return torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        return acts * (acts > s["threshold"]) if "threshold" in s else acts

    def __call__(self, x):
        return self.encode(x) @ self.W_dec + self.b_dec


LINEAR = {"encoder.weight": (D_SAE, D), "decoder.weight": (D, D_SAE)}
MATRICES = {"W_enc": (D, D_SAE), "W_dec": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,)}
TOPK = LINEAR | {"encoder.bias": (D_SAE,), "b_dec": (D,), "k": (), "threshold": ()}
MATRYOSHKA = MATRICES | {"k": (), "threshold": (), "group_sizes": ()}
GATED = LINEAR | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (D_SAE,))
THEIRS = {  # class: rule, shapes of its state, module
    "AutoEncoder": (ReLU(), LINEAR | {"encoder.bias": (D_SAE,), "bias": (D,)}),
    "AutoEncoderNew": (ReLU(), LINEAR | {"encoder.bias": (D_SAE,), "decoder.bias": (D,)}),
    "AutoEncoderTopK": (TopK(k=5), TOPK, "trainers.top_k"),
    "BatchTopKSAE": (BatchTopK(k=5), TOPK, "trainers.batch_top_k"),
    "MatryoshkaBatchTopKSAE": (BatchTopK(k=5), MATRYOSHKA, "trainers.matryoshka_batch_top_k"),
    "GatedAutoEncoder": (Gated(), GATED | {"decoder_bias": (D,)}),
    "JumpReluAutoEncoder": (JumpReLU(), MATRICES | {"threshold": (D_SAE,)}),
}


def their_state(name):
    generator, shapes = torch.Generator().manual_seed(3), THEIRS[name][1]
    state = {key: 0.4 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    fixed = {"k": torch.tensor(5, dtype=torch.int), "group_sizes": torch.tensor([10, D_SAE - 10])}
    if shapes.get("threshold") == ():
        fixed["threshold"] = torch.tensor(1.2)
    return {key: fixed.get(key, value) for key, value in state.items()}


def their_folder(folder, name, state, **trainer):
    folder.mkdir(exist_ok=True)
    trainer = {"dict_class": name, "lm_name": "tiny", "layer": 1, **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_dictionary_learning(name, itself, tmp_path):
    state, (rule, _, *place) = their_state(name), THEIRS[name]
    if name == "GatedAutoEncoder":
        state["gate_bias"] -= 1  # else most gates are open
    theirs = DictionaryLearning(name, state)
    if itself:
        module = pytest.importorskip(".".join(["dictionary_learning", *(place or ["dictionary"])]))
        options = {key: state[key].tolist() for key in ("k", "group_sizes") if key in state}
        theirs = getattr(module, name)(D, D_SAE, **options)
        theirs.load_state_dict(state)
        state = theirs.state_dict()
    folder = their_folder(tmp_path, name, state, k=5, submodule_name="resid_post_layer_1")
    ours = interop.from_dictionary_learning(folder)
    assert ours.config.rule == rule and not ours.training
    assert (ours.config.model_name, ours.config.hook_names) == ("tiny", (HOOK,))
    assert_same(ours, theirs)
    assert_same(Dictionary.load(ours.save(tmp_path / "ours")), ours)


def test_dictionary_learning_threshold_never_estimated(tmp_path):
    state = their_state("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    ours = interop.from_dictionary_learning(their_folder(tmp_path, "BatchTopKSAE", state))
    assert ours.threshold == 0  # -1 would start the moving average wrong
    assert_same(ours, DictionaryLearning("BatchTopKSAE", state))


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_and_damaged_checkpoints_execute_nothing(zipped, tmp_path):
    trap, folder = tmp_path / "sprung", their_folder(tmp_path / "d", "AutoEncoder", {})
    state, file = their_state("AutoEncoder") | {"bias": Trap(trap)}, folder / "ae.pt"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for bad in (whole, pickle.dumps(Trap(trap), protocol=2), b"", whole[: len(whole) // 2]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="plain tensors; nothing in it was run"):
            interop.from_dictionary_learning(folder)
    assert not trap.exists()
    torch.load(their_folder(tmp_path / "e", "AutoEncoder", state) / "ae.pt", weights_only=False)
    assert trap.exists()  # the trap works


def test_bad_dictionary_learning_folders(tmp_path):
    name, state = "BatchTopKSAE", their_state("BatchTopKSAE")
    cases = [("CrossCoder", state, "need dict_class .*CrossCoder"), (name, [1, 2], "got list")]
    for key, message in (
        ("threshold", "need a scalar threshold"),
        ("encoder.bias", "need tensors"),
        ("encoder.weight", "need two weight matrices"),
        ("k", "need k >= 1"),
    ):
        cases.append((name, {other: state[other] for other in state if other != key}, message))
    for *given, message in cases:
        with pytest.raises(ValueError, match=message):
            interop.from_dictionary_learning(their_folder(tmp_path, *given))
    for text in ("{", "[]", '{"trainer": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"need trainer\.dict_class"):
            interop.from_dictionary_learning(tmp_path)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ae\.pt"):
        interop.from_dictionary_learning(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The two calls that move files, on a local folder: owner/name/path."""
    import huggingface_hub

    root, snapshot = tmp_path / "hub", tmp_path / "snapshot"

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        shutil.copytree(folder_path, root / repo_id / (path_in_repo or "."), dirs_exist_ok=True)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        for name in allow_patterns:
            if (root / repo_id / name).is_file():
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / repo_id / name, snapshot / name)
        return str(snapshot)

    for function in (create_repo, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.mark.parametrize("subfolder", ["", "layer_1/k_5"])
def test_hub_there_and_back(hub, subfolder):
    dictionary = shaken(BatchTopK(k=5))
    interop.push_to_hub(dictionary, "me/sae", Card(title="A dictionary"), subfolder=subfolder)
    assert sorted(os.listdir(hub / "me/sae" / subfolder)) == ["README.md", *FILES]
    loaded = interop.from_hub("me/sae", subfolder)
    assert loaded.config == dictionary.config
    assert_same(loaded, dictionary)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        interop.from_hub("me/sae", "other")


def test_card():
    nasty = 'a | b\n# <script>alert("x")</script> [c](http://d) `e` ---'
    dictionary = shaken(TopK(k=5), hook_names=(nasty,), model_name="/home/someone/model")
    facts = {"license": "mit", "base_model": "google/gemma-2-2b"}
    dataset, metrics = "Skylion007/openwebtext", {"fvu": 0.045, nasty: 3.0}
    card = Card(title=nasty, metrics=metrics, dataset=dataset, notes=f"One.\n\n{nasty}", **facts)
    text = card.text(dictionary, "me/sae", "layer_1")
    _, header, body = text.split("---\n", 2)
    tags = ["latent-bench", "sparse-autoencoder"]
    expected = {"library_name": "saelens", "tags": tags, "datasets": [dataset], **facts}
    assert yaml.safe_load(header) == expected
    assert "<" not in body and "/home/someone" not in text and "| fvu | 0.045 |" in body
    assert 'from_hub("me/sae", "layer_1")' in body and "\nOne.\n\n" in body
    lines = body.splitlines()
    assert sum(line.startswith("#") for line in lines) == 1  # only its own heading
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3}
    assert "\\[c\\]" in body and "\\`e\\`" in body


@pytest.mark.parametrize(
    "bad",
    [
        {"title": " "},
        {"base_model": "/home/someone/model"},
        {"dataset": "a b"},
        {"license": "x\ny: z"},
        {"metrics": {"fvu": float("nan")}},
    ],
)
def test_cards_that_are_refused(bad):
    with pytest.raises(ValueError, match=f"need (a |finite )?{next(iter(bad))}"):
        Card(**{"title": "t"} | bad)


@pytest.mark.parametrize(
    ("repo_id", "subfolder"), [("me/sae/more", ""), ("", ""), ("a b", ""), ("me/sae", "../x")]
)
def test_places_that_cannot_be(hub, repo_id, subfolder):
    with pytest.raises(ValueError, match="need (repo_id|subfolder)"):
        interop.push_to_hub(shaken(ReLU()), repo_id, Card(title="t"), subfolder=subfolder)
    with pytest.raises(ValueError, match="need (repo_id|subfolder)"):
        interop.from_hub(repo_id, subfolder)
    assert not hub.exists()


NORMS = {
    1: ("crosscoder", lambda sites: sites.sum(0)),
    2: ("decoder", lambda sites: sites.norm(dim=0)),
    3: ("mixed", lambda sites: sites.norm(dim=0) + 0.1 * sites.sum(0)),
    4: ("none", torch.ones_like),
    5: ("decoupled", lambda sites: sites),
}


@pytest.mark.parametrize("layout", ["ae.pt", "model.safetensors"])
@pytest.mark.parametrize("number", [0, *NORMS])
def test_public_crosscoders(number, layout, tmp_path):
    """Against their arithmetic in float64; 0: a `CrossCoder`, which has no threshold."""
    name, norm = NORMS[number or 1]
    generator = torch.Generator().manual_seed(number)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    state = {"encoder.weight": draw(2, 6, 20), "encoder.bias": draw(20)}
    state |= {"decoder.weight": draw(2, 20, 6), "decoder.bias": draw(2, 6)}
    state["code_normalization_id"] = torch.tensor(number or 1)
    bound = torch.tensor([9.0, 7.0] if number == 5 else 8.0)
    if number:
        state |= {"k": torch.tensor(5, dtype=torch.int), "threshold": bound}
    (save_file if layout == "model.safetensors" else torch.save)(state, tmp_path / layout)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"lm_name": "a-b"}}))
    ours = interop.from_crosscoder(tmp_path)
    assert (ours.config.code_norm, ours.config.model_name) == (name, "a-b")

    x, W = draw(50, 2, 6).double(), {key: value.double() for key, value in state.items()}
    pre = (torch.einsum("bla,lad->bd", x, W["encoder.weight"]) + W["encoder.bias"]).relu()
    scores = pre[:, None] * norm(W["decoder.weight"].norm(dim=2)).reshape(-1, 20)[-2:]
    kept = scores > bound.reshape(-1, 1) if number else scores > 0
    acts = pre[:, None] * kept
    acts = acts if acts.shape[1] == 2 else acts.repeat(1, 2, 1)
    right = torch.einsum("bld,lda->bla", acts, W["decoder.weight"]) + W["decoder.bias"]
    found = ours(x.float().flatten(1)).double()
    torch.testing.assert_close(found, right.flatten(1), atol=1e-5, rtol=1e-5)
    found_acts = ours.encode(x.float().flatten(1)).double()
    torch.testing.assert_close(found_acts, acts.amax(1), atol=1e-5, rtol=1e-5)
    again = Dictionary.load(ours.save(tmp_path / "again"))
    torch.testing.assert_close(again(x.float().flatten(1)).double(), found, atol=1e-5, rtol=1e-5)


def test_crosscoders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="ae.pt"):
        interop.from_crosscoder(tmp_path)
    state = {"encoder.weight": torch.ones(2, 6, 20), "encoder.bias": torch.ones(20)}
    state |= {"decoder.weight": torch.ones(2, 20, 6), "decoder.bias": torch.ones(2, 6)}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="names no code norm"):
        interop.from_crosscoder(tmp_path)
    assert interop.from_crosscoder(tmp_path, code_norm="crosscoder").d_sae == 20
    for extra in ({"activation_normalizer.mean": torch.ones(6)}, {"decoder.bias": torch.ones(6)}):
        torch.save(state | extra, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match="need a crosscoder's"):
            interop.from_crosscoder(tmp_path, code_norm="crosscoder")
    for extra, message in (
        ({"threshold": torch.ones(2), "k": torch.tensor(3)}, "need k and a threshold"),
        ({"threshold": torch.ones(())}, "need k and a threshold"),
        ({"encoder.bias": torch.full((20,), torch.nan)}, "NaN"),
    ):
        torch.save(state | extra, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=message):
            interop.from_crosscoder(tmp_path, code_norm="crosscoder")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        interop.from_crosscoder(tmp_path, code_norm="crosscoder")
