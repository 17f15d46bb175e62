"""Every architecture in tiny: hook names, reads, edits, clean-up, and loading."""

import gc
import json
import shutil
import weakref

import pytest
import torch
import transformers
from nnsight import LanguageModel
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from lib.models import add, hook_layer, load_model, module_at, read, replace, site_dim
from lib.models.sites import sites

N_LAYERS, D, N_HEADS = 3, 16, 2
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": 24, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS, "max_position_embeddings": 64, "pad_token_id": 0, **SPECIAL,
}  # fmt: skip
GROUPED = DECODER | {"num_key_value_heads": 1}
WIDE = GROUPED | {"head_dim": 12}
GPT2 = {"vocab_size": 24, "n_embd": D, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 64}
LLAMA_LIKE, NEOX = ("self_attn", "o_proj"), ("attention", "dense")
ARCHITECTURES = {  # config class, arguments, attention and output projection below a layer
    "gemma2": ("Gemma2", WIDE, LLAMA_LIKE),
    "gemma3_text": ("Gemma3", WIDE, LLAMA_LIKE),
    "llama": ("Llama", GROUPED, LLAMA_LIKE),
    "mistral": ("Mistral", GROUPED, LLAMA_LIKE),
    "qwen2": ("Qwen2", GROUPED, LLAMA_LIKE),
    "qwen3": ("Qwen3", WIDE, LLAMA_LIKE),
    "gpt_neox": ("GPTNeoX", DECODER, NEOX),
    "gpt_neox_sequential": ("GPTNeoX", DECODER | {"use_parallel_residual": False}, NEOX),
    "gpt2": ("GPT2", GPT2 | SPECIAL, ("attn", "c_proj")),
}
IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 10, 11, 12, 13, 14]])


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms too, so that before and after a norm differ
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def build(name):
    prefix, arguments, _ = ARCHITECTURES[name]
    config_class = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_class)(**arguments)
    head = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    return randomise(getattr(transformers, head)(config))


def with_vision():
    """The multimodal Gemma 3, which nests its layers one level deeper."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    text = WIDE | {"model_type": "gemma3_text"}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    return randomise(transformers.Gemma3ForConditionalGeneration(config))


def opt():
    config = transformers.OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, ffn_dim=8)
    config.num_attention_heads = 1
    return transformers.OPTForCausalLM(config)


def word_tokenizer(**special):
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(20)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def built():
    made = {name: build(name) for name in ARCHITECTURES}
    for model in made.values():  # transformers installs its own capture hooks once, for good
        model(IDS, output_hidden_states=True)
    return made


@pytest.fixture
def model(built, name):
    return built[name]


@pytest.fixture
def gemma(built):
    return built["gemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, built):
    root = tmp_path_factory.mktemp("models")
    for name, model in built.items():
        model.save_pretrained(root / name)
        word_tokenizer(pad_token="<pad>").save_pretrained(root / name)
    return root


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(autouse=True)
def no_hook_stays(built):
    before = {name: n_hooks(model) for name, model in built.items()}
    yield
    assert before == {name: n_hooks(model) for name, model in built.items()}


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def read_all(model, ids=IDS, **kwargs):
    with torch.no_grad(), read(model, sites(model)) as acts:
        model(ids, **kwargs)
    return acts


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sites_in_order_with_dims(model, name):
    names = sites(model)
    assert len(names) == N_LAYERS * (5 if name == "gpt_neox" else 6)
    acts = read_all(model)
    assert list(acts) == names  # filled in the order in which the forward pass reaches them
    for hook_name, x in acts.items():
        assert x[0, 0].numel() == site_dim(model, hook_name)
        assert x.shape[:2] == IDS.shape
        assert x.ndim == (4 if hook_name.endswith("hook_z") else 3)
    assert acts["blocks.0.attn.hook_z"].shape[2] == N_HEADS
    assert hook_layer("blocks.12.attn.hook_z") == 12


def test_residual_stream_is_hidden_states(model, name):
    acts = read_all(model)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    final_norm = {"gpt2": "transformer.ln_f"}.get(name, "model.norm")
    final_norm = "gpt_neox.final_layer_norm" if "neox" in name else final_norm
    for layer in range(N_LAYERS):
        assert torch.equal(acts[f"blocks.{layer}.hook_resid_pre"], hidden[layer])
        post = acts[f"blocks.{layer}.hook_resid_post"]
        if layer == N_LAYERS - 1:  # transformers shows the last one normed
            post = model.get_submodule(final_norm)(post)
        torch.testing.assert_close(post, hidden[layer + 1])


def test_sublayers_add_up(model, name):
    acts = read_all(model)
    for layer in range(N_LAYERS):
        at = {key.split(".", 2)[2]: x for key, x in acts.items() if hook_layer(key) == layer}
        pre, post = at["hook_resid_pre"], at["hook_resid_post"]
        attn_out, mlp_out = at["hook_attn_out"], at["hook_mlp_out"]
        assert min(attn_out.abs().mean(), mlp_out.abs().mean()) > 1e-2
        torch.testing.assert_close(pre + attn_out + mlp_out, post)
        if name != "gpt_neox":  # it runs attention and MLP in parallel
            torch.testing.assert_close(pre + attn_out, at["hook_resid_mid"])


def test_z_times_output_projection_is_attention(model, name):
    attention, projection = ARCHITECTURES[name][2]
    attention = module_at(model, "blocks.1.hook_resid_pre").get_submodule(attention)
    seen = []
    handle = attention.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    z = read_all(model)["blocks.1.attn.hook_z"]
    handle.remove()
    torch.testing.assert_close(attention.get_submodule(projection)(z.flatten(2)), seen[0])
    assert module_at(model, "blocks.1.attn.hook_z") is attention.get_submodule(projection)


def test_multimodal_gemma3_nests_its_layers():
    model = with_vision()
    assert len(read_all(model)) == 6 * N_LAYERS
    assert site_dim(model, "blocks.0.attn.hook_z") == 24
    with add(model, "blocks.1.hook_resid_mid", noise(D)):
        edited = logits(model)
    assert not torch.allclose(edited, logits(model))


def test_only_another_value_changes_the_logits(model):
    clean, acts = logits(model), read_all(model)
    for hook_name in sites(model):
        with replace(model, hook_name, lambda x, value=acts[hook_name]: value.clone()):
            assert torch.equal(logits(model), clean), hook_name
        with add(model, hook_name, noise(site_dim(model, hook_name))):
            assert (logits(model) - clean).abs().max() > 1e-3, hook_name
    assert torch.equal(logits(model), clean)


def test_edits_along_the_residual_stream_agree(model, name):
    """One vector, added at one site or the next, is one edit where nothing lies between."""
    v = noise(D)
    pairs = [("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre")]
    pairs += [("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")]
    next_site = "hook_mlp_out" if name == "gpt_neox" else "hook_resid_mid"
    pairs += [("blocks.1.hook_attn_out", f"blocks.1.{next_site}")]
    for here, there in pairs:
        with add(model, here, v):
            a = logits(model)
        with add(model, there, v):
            torch.testing.assert_close(logits(model), a, msg=f"{here} {there}")


def test_resid_mid_carries_the_whole_edit_past_the_mlp(gemma):
    new = noise(2, 6, D)
    with (
        torch.no_grad(),
        read(gemma, ["blocks.1.hook_resid_post"]) as post,  # entered before the edit, on purpose
        replace(gemma, "blocks.1.hook_resid_mid", lambda x: new),
        read(gemma, ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]) as acts,
    ):
        gemma(IDS)
    assert torch.equal(acts["blocks.1.hook_resid_mid"], new)
    expected = new + acts["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(post["blocks.1.hook_resid_post"], expected)


def test_edit_of_z_reaches_one_head_only(model):
    name = "blocks.1.attn.hook_z"
    v = torch.zeros(N_HEADS, site_dim(model, name) // N_HEADS)
    v[1] = 1.0
    z = read_all(model)[name]
    with add(model, name, v.flatten()):
        edited = read_all(model)[name]
    assert torch.equal(edited[:, :, 0], z[:, :, 0])
    torch.testing.assert_close(edited[:, :, 1], z[:, :, 1] + 1)


@pytest.mark.parametrize("site", ["hook_resid_mid", "hook_resid_post", "attn.hook_z"])
def test_contexts_act_in_order_of_entry(gemma, site):
    hook_name = f"blocks.1.{site}"
    v = torch.ones(site_dim(gemma, hook_name))
    with (
        torch.no_grad(),
        read(gemma, [hook_name]) as before,
        add(gemma, hook_name, v),
        replace(gemma, hook_name, lambda x: 2 * x),
        read(gemma, [hook_name]) as after,
    ):
        gemma(IDS)
    torch.testing.assert_close(after[hook_name], 2 * (before[hook_name] + 1))


def test_add_takes_positions_and_sequences(gemma):
    name = "blocks.0.hook_resid_post"
    x = read_all(gemma)[name]
    for v in (noise(D), noise(6, D), noise(2, 6, D), noise(2, 1, D).double()):
        with add(gemma, name, v):
            torch.testing.assert_close(read_all(gemma)[name], x + v.float())
    with add(gemma, name, noise(3, 6, D)), pytest.raises(RuntimeError):
        gemma(IDS)


def test_replace_keeps_dtype_and_checks_shape(gemma):
    name = "blocks.1.hook_mlp_out"
    with replace(gemma, name, lambda x: x.double() * 2):
        assert logits(gemma).dtype == torch.float32
    with (
        replace(gemma, name, lambda x: x[:, :1]),
        pytest.raises(ValueError, match=r"need shape \(2, 6, 16\) at blocks.1.hook_mlp_out"),
    ):
        gemma(IDS)


def test_gradients_match_finite_differences(name):
    """d loss / d v through every kind of edit, and through a read's graph.

    Coarse steps: RMSNorm computes in float32 whatever the model's dtype.
    """
    double = build(name).double()
    for hook_name in sites(double)[: len(sites(double)) // N_LAYERS]:
        v = noise(site_dim(double, hook_name)).double().requires_grad_()
        direction, loss = noise(*v.shape).double(), lambda: double(IDS).logits.square().mean()
        with add(double, hook_name, v):
            (gradient,) = torch.autograd.grad(loss(), v)
        values = []
        for sign in (1, -1):
            with torch.no_grad(), add(double, hook_name, v + sign * 1e-3 * direction):
                values.append(loss())
        slope = (values[0] - values[1]) / 2e-3
        torch.testing.assert_close(gradient @ direction, slope, rtol=1e-2, atol=1e-5)
        with read(double, [hook_name]) as acts:
            value = loss()
        (by_read,) = torch.autograd.grad(value, acts[hook_name])
        assert by_read.shape == acts[hook_name].shape
        assert by_read.abs().max() > 0


def test_stop_runs_no_later_layer(model):
    full = read_all(model)
    calls, handles = [], []
    for i in range(N_LAYERS):
        layer = module_at(model, f"blocks.{i}.hook_resid_pre")
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: calls.append(i)))
    for hook_name in sites(model):
        calls.clear()
        names = {hook_name, "blocks.0.hook_resid_pre"}
        with torch.no_grad(), read(model, names, stop=True) as acts:
            model(IDS)
            pytest.fail("the model ran to its end")
        assert set(acts) == names
        assert calls == list(range(hook_layer(hook_name) + 1))
        assert torch.equal(acts[hook_name], full[hook_name])
    for handle in handles:
        handle.remove()


def test_stop_reaches_the_read_that_asked(gemma):
    early, late = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
    for outer, inner in ((early, late), (late, early)):
        goes_on = False
        with torch.no_grad(), read(gemma, [outer], stop=True) as outer_acts:
            with read(gemma, [inner], stop=True) as inner_acts:
                gemma(IDS)
            goes_on = True
        assert goes_on == (inner == early)
        assert not (outer_acts if goes_on else inner_acts)


def test_stop_leaves_no_cycle_that_holds_the_pass(gemma):
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), read(gemma, ["blocks.1.hook_resid_post"], stop=True) as acts:
            gemma(IDS)
        held = weakref.ref(acts.pop("blocks.1.hook_resid_post"))
        assert held() is None
    finally:
        gc.enable()


def test_hooks_go_when_the_forward_pass_raises(gemma):
    before = n_hooks(gemma)

    def fail(x):
        assert n_hooks(gemma) > before
        raise KeyError("on purpose")

    with (
        pytest.raises(KeyError),
        read(gemma, sites(gemma)),
        add(gemma, "blocks.0.hook_resid_mid", noise(D)),
        replace(gemma, "blocks.1.attn.hook_z", fail),
    ):
        gemma(IDS)


def test_a_failed_pass_leaves_no_edit_behind(gemma):
    """A pass that dies between resid_mid and resid_post must not shift the next one."""
    clean, broken = logits(gemma), [True]

    def fail_once(x):
        if broken.pop():
            raise KeyError("on purpose")
        return x

    with (
        replace(gemma, "blocks.0.hook_resid_mid", lambda x: x + broken[0] if broken else x),
        replace(gemma, "blocks.0.hook_mlp_out", lambda x: fail_once(x) if broken else x),
    ):
        with pytest.raises(KeyError):
            logits(gemma)
        assert torch.equal(logits(gemma), clean)


def test_padding_leaves_real_tokens_alone(model):
    padded = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 10, 11, 12, 13, 14]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    short = read_all(model, padded[:1, :4])
    for hook_name, x in read_all(model, padded, attention_mask=mask).items():
        torch.testing.assert_close(x[:1, :4], short[hook_name], atol=1e-5, rtol=1e-5)


def test_cache_and_generate(model):
    hook_name = "blocks.1.hook_resid_post"
    full = read_all(model)[hook_name]
    with torch.no_grad(), read(model, [hook_name]) as acts:
        past = model(IDS[:, :5], use_cache=True).past_key_values
        model(IDS[:, 5:], past_key_values=past, use_cache=True)
    torch.testing.assert_close(acts[hook_name], full[:, 5:], atol=1e-5, rtol=1e-5)
    kwargs = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with add(model, hook_name, 10 * noise(D)):
        cached = model.generate(IDS, **kwargs)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **kwargs))


def test_peft_model_has_the_same_sites():
    plain = build("llama")
    names, clean = sites(plain), read_all(plain)
    config = LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(plain, config).eval()
    before = n_hooks(model)
    assert sites(model) == names
    acts = read_all(model)
    assert torch.equal(acts["blocks.0.attn.hook_z"], clean["blocks.0.attn.hook_z"])
    at = {key[9:]: x for key, x in acts.items() if key.startswith("blocks.0.")}
    assert not torch.allclose(at["hook_attn_out"], clean["blocks.0.hook_attn_out"])
    torch.testing.assert_close(
        at["hook_resid_pre"] + at["hook_attn_out"] + at["hook_mlp_out"], at["hook_resid_post"]
    )
    with add(model, "blocks.1.attn.hook_z", noise(D)):
        assert not torch.allclose(logits(model), logits(build("llama")))
    assert n_hooks(model) == before


@pytest.mark.filterwarnings("ignore")
def test_peers_agree(model, name, folders):
    wrapped = LanguageModel(model, tokenizer=word_tokenizer(pad_token="<pad>"))
    with torch.no_grad(), wrapped.trace(IDS):
        traced = wrapped.output.logits.save()
    assert torch.equal(traced, logits(model))
    if name == "gpt_neox_sequential":  # TransformerLens has no such block
        return
    bridge = TransformerBridge.boot_transformers(str(folders / name), device="cpu")
    with torch.no_grad():
        bridge_logits, cache = bridge.run_with_cache(IDS)
    torch.testing.assert_close(logits(model), bridge_logits, atol=2e-5, rtol=1e-5)
    for hook_name, x in read_all(model).items():
        torch.testing.assert_close(x, cache[hook_name], atol=2e-5, rtol=1e-5, msg=hook_name)


def test_load_gives_the_saved_model(folders, built, name):
    model, tokenizer = load_model(folders / name, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(built[name]))
    assert tokenizer.pad_token == "<pad>"
    if name != "qwen2":  # transformers takes Qwen2Tokenizer there, whatever the folder declares
        assert tokenizer("w1 w3").input_ids == [5, 7]


def test_load_below_the_projects_root(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_BENCH_ROOT", str(folders.parent))
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(f"{folders.name}/llama", dtype="bfloat16", device_map={"": "cpu"})
    assert model.dtype == torch.bfloat16


def test_load_pads_with_eos_where_pad_is_missing(folders, tmp_path):
    shutil.copytree(folders / "gpt2", tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert load_model(tmp_path / "gpt2", device="cpu")[1].pad_token == "<eos>"


def test_load_refuses_weights_that_are_not_there(built, tmp_path):
    """A headless model loads with an unembedding that is made up."""
    built["gpt_neox"].gpt_neox.save_pretrained(tmp_path)
    word_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="need all weights in .*got none for (embed_out|lm_head)"):
        load_model(tmp_path, device="cpu")


def test_load_errors(folders, tmp_path):
    def refuse(error, match, name, **kwargs):
        with pytest.raises(error, match=match):
            load_model(name, **({"device": "cpu"} | kwargs))

    for missing in (tmp_path / "no", str(tmp_path / "no"), "./no", "data/models/no", "~/no/such"):
        refuse(FileNotFoundError, "need a model folder or a hub id.*no.*is not a folder", missing)
    refuse(OSError, "'no-such/hub-id': it is neither a folder.*nor a hub id", "no-such/hub-id")
    refuse(FileNotFoundError, r"need config.json in model folder .*got \[\]", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(FileNotFoundError, "need config.json.*PEFT adapter", tmp_path)

    bare = tmp_path / "bare"
    shutil.copytree(folders / "gemma2", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    refuse(FileNotFoundError, "need a tokenizer in model folder .*tokenizer.json", bare)
    (bare / "config.json").write_text("{")
    (bare / "tokenizer.json").write_text("{}")
    refuse(OSError, "cannot load .*bare", bare)
    (bare / "config.json").write_text(json.dumps({"model_type": "no_such"}))
    refuse(ValueError, "no_such", bare)

    llama = folders / "llama"
    refuse(ValueError, "need dtype in", llama, dtype="float99")
    refuse(ValueError, "got both", llama, device_map="auto")
    if not torch.cuda.is_available():
        refuse(RuntimeError, "4bit needs a CUDA GPU", llama, load_in_4bit=True)


def test_4bit_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load_model("any/model", device="cpu", load_in_4bit=True)


def test_what_does_not_fit_is_refused(gemma, built):
    z, beyond = "blocks.0.attn.hook_z", f"blocks.{N_LAYERS}.hook_resid_post"
    for match, verb, *arguments in (
        (r"near ones: .*blocks.2.hook_resid_post", module_at, gemma, "blocks.2.resid_post"),
        (r"near ones: .*blocks.1.attn.hook_z", site_dim, gemma, "blocks.1.hook_z"),
        (f"no hook name '{beyond}'", replace, gemma, beyond, torch.zeros_like),
        (r"need a vector \[\.\.\., 24\].*\(2, 12\)", add, gemma, z, noise(2, 12)),
        ("near ones", read, built["gpt_neox"], ["blocks.0.hook_resid_mid"]),
        ("no hook name", read, gemma, ["blocks.0.hook_resid_pre", "blocks.9.x"]),
        ("at least one", read, gemma, []),
        (r"need blocks\.N\.SITE", hook_layer, "hook_embed"),
        ("need a transformers model", sites, torch.nn.Linear(2, 2)),
        (r"need an architecture in .*gpt_neox.*got 'opt'", sites, opt()),
    ):
        with pytest.raises(ValueError, match=match), verb(*arguments):
            pass
