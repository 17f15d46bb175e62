"""Latents of a running model: seen, changed, and measured against random directions."""

import copy
import dataclasses
import functools

import pytest
import torch

from lib.activations.harvest import HarvestConfig, Harvester
from lib.adapters.sae_lora.adapter import SaeLora
from lib.adapters.sae_lora.config import SaeLoraConfig
from lib.adapters.sae_lora.source import SaeLoraSource
from lib.analysis.causal import without
from lib.data.corpus import load_corpus
from lib.dictionaries import Dictionary, DictionaryConfig
from lib.dictionaries.rules import ReLU
from lib.latents import LatentRecord, collect
from lib.latents.source import DictionarySource, LatentSource, record_of
from lib.latents.steering import (
    ablate,
    clamp,
    dose_response,
    random_directions,
    scale,
    typical_activations,
)
from lib.models import read, replace, site_dim
from lib.models.sites import sites
from lib.models.unembed import unembedding

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(gemma):
    return gemma[0]


@pytest.fixture(scope="module")
def corpus(gemma):
    return load_corpus("world", gemma[1], n_tokens=700, seq_len=48)


@pytest.fixture(scope="module")
def source(model, shipped_sae):
    return DictionarySource(model, shipped_sae)


@pytest.fixture(scope="module")
def record(source, corpus):
    return record_of(source, corpus, batch_rows=8)


@pytest.fixture(scope="module")
def frequent(record) -> list[int]:
    """Latents that fire often, most often first."""
    return record.firing_rate().argsort(descending=True)[:6].tolist()


@pytest.fixture(scope="module")
def rows(corpus):
    """Three rows of tokens without padding."""
    length = int(corpus.mask[:3].sum(1).min())
    assert length > 8
    return corpus.ids[:3, :length].long()


def run(model, tokens, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation at the site as later layers see it, and the logits."""
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    with torch.no_grad(), read(model, [SITE]) as acts:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return acts[SITE], logits


def fires(shipped_sae, x, latent) -> torch.Tensor:
    with torch.no_grad():
        return shipped_sae.encode(x)[..., latent]


def test_latents_are_those_of_the_real_tokens(source, shipped_sae, corpus):
    rows = corpus.rows(0, 4)
    assert not rows.mask.all()
    found = source.latents(rows.ids.long(), rows.mask)
    one_by_one = []
    for ids, mask in zip(rows.ids, rows.mask, strict=True):
        x, _ = run(source.model, ids[mask].long()[None])
        one_by_one.append(shipped_sae.encode_sparse(x[0]).dense())
    torch.testing.assert_close(found.dense(), torch.cat(one_by_one), atol=1e-3, rtol=1e-3)
    assert isinstance(source, LatentSource)
    assert source.n_latents == found.n_latents == shipped_sae.d_sae
    assert torch.equal(source.write_directions, shipped_sae.W_dec)
    assert not source.write_directions.requires_grad and not found.values.requires_grad


@pytest.mark.parametrize("skip_special", [True, False])
def test_a_record_is_what_harvesting_collects(source, shipped_sae, corpus, skip_special):
    config = HarvestConfig(hook_names=(SITE,), batch_rows=7, skip_special=skip_special)
    harvester = Harvester([source.model], corpus, config)
    blocks = (harvester.block(i) for i in range(harvester.n_blocks))
    expected = collect(shipped_sae.encode_sparse, blocks, corpus)
    found = record_of(source, corpus, batch_rows=7, skip_special=skip_special)
    for field in dataclasses.fields(LatentRecord):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_edits_change_what_the_latents_add_and_nothing_else(source, shipped_sae, rows, frequent):
    latent, *others = chosen = frequent[:3]
    x, clean = run(source.model, rows)
    z = fires(shipped_sae, x, chosen)
    silent = z[..., 0] == 0
    assert silent.any() and not silent.all()
    with source.edited({latent: ablate()}):
        y, logits = run(source.model, rows)
    torch.testing.assert_close(y, x - z[..., :1] * shipped_sae.W_dec[latent])
    assert torch.equal(y[silent], x[silent]) and not torch.equal(logits, clean)
    with source.edited({latent: ablate(), others[0]: scale(3.0), others[1]: clamp(9.0)}):
        y, _ = run(source.model, rows)
    new = z * torch.tensor([0.0, 3.0, 0.0]) + torch.tensor([0.0, 0.0, 9.0])
    torch.testing.assert_close(y, x + (new - z) @ shipped_sae.W_dec[chosen])
    after, again = run(source.model, rows)
    assert torch.equal(after, x) and torch.equal(again, clean)  # nothing stays behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_keep_the_models_precision(model, shipped_sae, rows, frequent, dtype):
    """Those that change nothing change no bit; the others are computed in float32."""
    model, latent = copy.deepcopy(model).to(dtype), frequent[0]
    source = DictionarySource(model, shipped_sae)
    x, clean = run(model, rows)
    for edits in ({}, dict.fromkeys(frequent, scale(1.0)), {latent: lambda values: values}):
        with source.edited(edits):
            y, logits = run(model, rows)
        assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
        assert torch.equal(logits, clean)
        with replace(model, SITE, lambda x: torch.full_like(x, -0.0)), source.edited(edits):
            y, _ = run(model, rows)
        assert torch.signbit(y).all()  # nor a zero's sign
    z = fires(shipped_sae, x.float(), latent)[..., None]
    with source.edited({latent: scale(2.0)}):
        y, logits = run(model, rows)
    assert y.dtype == logits.dtype == dtype and not torch.equal(x, y)
    torch.testing.assert_close(y, (x.float() + z * shipped_sae.W_dec[latent]).to(dtype))


def test_an_edit_sees_every_token_in_the_order_of_rows(source, shipped_sae, rows, frequent):
    latent, seen = frequent[0], []
    with source.edited({latent: lambda values: seen.append(values) or values}):
        x, _ = run(source.model, rows)
    assert torch.equal(seen[0], fires(shipped_sae, x, latent).flatten())
    with source.edited({latent: ablate()}):
        expected, _ = run(source.model, rows)
    with source.edited({latent: lambda values: values.zero_()}):  # an edit in place counts
        assert torch.equal(run(source.model, rows)[0], expected)


def test_padding_does_no_harm(source, corpus, frequent):
    rows = corpus.rows(0, 4)
    assert not rows.mask.all()
    edits = {frequent[0]: clamp(8.0), frequent[1]: ablate()}
    with source.edited(edits):
        _, logits = run(source.model, rows.ids.long(), rows.mask)
        for i, mask in enumerate(rows.mask):
            _, alone = run(source.model, rows.ids[i][mask].long()[None])
            torch.testing.assert_close(logits[i][mask], alone[0], atol=1e-3, rtol=1e-3)


def generate(model, tokens, use_cache):
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits)


def cached(source, tokens, edits) -> tuple[torch.Tensor, torch.Tensor]:
    """What is generated under edits, the same with a cache and without, and not as unedited."""
    with source.edited(edits):
        found, uncached = (generate(source.model, tokens, use) for use in (True, False))
    assert torch.equal(found[0], uncached[0])
    torch.testing.assert_close(found[1], uncached[1], atol=1e-3, rtol=1e-3)
    with source.edited({}):
        unedited = generate(source.model, tokens, True)[1]
    assert not torch.allclose(found[1], unedited, atol=0.01)
    return found


def test_generation_with_a_cache_equals_generation_without(source, rows, frequent, record):
    unit = typical_activations(record)
    edits = {j: clamp(2 * float(unit[j])) for j in frequent[:3]}
    sequences, found = cached(source, rows[:, :8], edits)
    with source.edited(edits):
        _, logits = run(source.model, sequences[:, :-1])
    torch.testing.assert_close(found[-1], logits[:, -1], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module", params=["add", "replace"])
def adapter(request, shipped_sae, frequent) -> SaeLora:
    """Two ranks that read the latents which fire most, and write five."""
    config = SaeLoraConfig(rank=2, mode=request.param, keep_error=False, seed=1)
    adapter = SaeLora(shipped_sae, config)
    read, write = torch.zeros(2, shipped_sae.d_sae, dtype=torch.bool)
    read[frequent], write[100:105] = True, True
    with torch.no_grad():
        adapter.scale.copy_(torch.tensor([5.0, -3.0]))
        adapter.lora_A *= read
        adapter.lora_B *= write[:, None]
    return adapter


def adapted(model, adapter, tokens):
    with adapter.attached(model):
        return run(model, tokens)


def test_what_an_adapter_reads_and_writes(model, adapter, shipped_sae, corpus, frequent):
    rows = corpus.rows(0, 4)
    tokens = rows.ids.long()
    z = DictionarySource(model, shipped_sae).latents(tokens, rows.mask)
    reads, writes = (SaeLoraSource(model, adapter, side) for side in ("read", "write"))
    found = reads.latents(tokens, rows.mask).dense()
    support = torch.zeros(shipped_sae.d_sae)
    support[frequent] = 1
    assert torch.equal(found, z.dense() * support) and found.any()
    with torch.no_grad():
        change = ((z.dense() @ adapter.read_weights) * adapter.scale) @ adapter.write_weights
    found = writes.latents(tokens, rows.mask).dense()
    torch.testing.assert_close(found, change)
    assert (found < 0).any() and (found > 0).any()
    assert found.any(0).nonzero()[:, 0].tolist() == list(range(100, 105))
    for source in (reads, writes):
        assert isinstance(source, LatentSource)
        assert (source.hook_name, source.n_latents) == (SITE, shipped_sae.d_sae)
        assert not source.write_directions.requires_grad
    assert torch.equal(writes.write_directions, shipped_sae.W_dec)
    with torch.no_grad():
        matrix = (adapter.read_weights * adapter.scale) @ adapter.write_weights
        torch.testing.assert_close(reads.write_directions, matrix @ shipped_sae.W_dec)
    assert not reads.write_directions[support == 0].any()
    with pytest.raises(ValueError, match=r"need a side in \('read', 'write'\), got 'both'"):
        SaeLoraSource(model, adapter, "both")


@pytest.mark.parametrize("side", ["read", "write"])
def test_ablating_a_side_is_the_adapter_without_those_weights(model, adapter, rows, frequent, side):
    source = SaeLoraSource(model, adapter, side)
    whole, plain = adapted(model, adapter, rows)[0], run(model, rows)[0]
    for latents in (frequent[:1], frequent[:3]) if side == "read" else ([101], [100, 104]):
        with source.edited(dict.fromkeys(latents, ablate())):
            x, logits = run(model, rows)
        expected, expected_logits = adapted(model, without(adapter, side, latents), rows)
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-3)
        assert (x - whole).abs().max() > 0.05
    assert torch.equal(run(model, rows)[0], plain)


def test_read_and_written_values_can_be_set(model, adapter, shipped_sae, rows, frequent):
    plain, _ = run(model, rows)
    whole, _ = adapted(model, adapter, rows)
    with torch.no_grad():
        z = shipped_sae.encode(plain)
        raised = z.clone()
        raised[..., frequent[0]] = 4.0
        matrix = (adapter.read_weights * adapter.scale) @ adapter.write_weights
        change = (raised - z) @ matrix @ shipped_sae.W_dec
        before = (z @ matrix)[..., 7, None]
    with SaeLoraSource(model, adapter, "read").edited({frequent[0]: clamp(4.0)}):
        x, _ = run(model, rows)
    torch.testing.assert_close(x, whole + change, atol=1e-4, rtol=1e-4)
    assert not before.any()  # latent 7 is not written: clamping it steers all the same
    with SaeLoraSource(model, adapter, "write").edited({7: clamp(-3.0)}):
        x, _ = run(model, rows)
    torch.testing.assert_close(x, whole - 3.0 * shipped_sae.W_dec[7], atol=1e-4, rtol=1e-4)


def test_without_a_change_it_is_the_adapter_to_the_last_bit(model, adapter, rows, frequent):
    expected, logits = adapted(model, adapter, rows)
    assert not torch.equal(expected, run(model, rows)[0])
    cases = [("read", {}), ("write", {}), ("read", dict.fromkeys(frequent, scale(1.0)))]
    cases += [("write", dict.fromkeys(range(98, 105), scale(1.0))), ("read", {7: clamp(5.0)})]
    for side, edits in cases:
        with SaeLoraSource(model, adapter, side).edited(edits):
            found = run(model, rows)
        assert torch.equal(found[0], expected) and torch.equal(found[1], logits), (side, edits)


@pytest.mark.parametrize("side", ["read", "write"])
def test_an_adapted_model_generates_with_a_cache(model, adapter, rows, frequent, side):
    latent = frequent[0] if side == "read" else 102
    cached(SaeLoraSource(model, adapter, side), rows[:, :8], {latent: clamp(-6.0)})


def logit(model, rows, token: int = 7) -> float:
    return float(run(model, rows)[1][:, -1, token].mean())


def test_doses_of_an_adapter_start_from_the_adapter(model, adapter, rows, frequent):
    source, units = SaeLoraSource(model, adapter, "read"), torch.ones(adapter.d_sae)
    measure = functools.partial(logit, model, rows)
    with adapter.attached(model):
        expected = measure()
    found = dose_response(source, measure, frequent[:2], [0.0, 1.0], units=units, n_random=2)
    assert found.baseline == found.control[0][0] == found.control[1][0] == expected != measure()
    with pytest.raises(ValueError, match=r"need latents that write something, got \[7\]"):
        dose_response(source, measure, [7], [1.0], units=units, n_random=1)


def test_other_dictionaries_and_sites_are_refused(model, shipped_sae):
    d = site_dim(model, SITE)

    def made(**changes) -> Dictionary:
        options = {"site_dims": (d,), "d_sae": 4, "rule": ReLU(), "hook_names": (SITE,)}
        return Dictionary(DictionaryConfig(**(options | changes)))

    two = made(site_dims=(d, d), hook_names=(SITE, "blocks.0.hook_resid_post"))
    transcoder = made(out_dims=(d,), apply_b_dec_to_input=False)
    nameless, narrow = made(hook_names=()), made(site_dims=(d - 1,))
    for wrong, hook_name, message in (
        (two, "", "need a dictionary of one site, got one of 2"),
        (transcoder, "", r"got a transcoder with out_dims \(128,\)"),
        (narrow, "", f"need a dictionary of width {d} at {SITE}, got {d - 1}"),
        (shipped_sae, "blocks.0.hook_resid_post", f"own hook name '{SITE}', got 'blocks.0"),
        (nameless, "", "need a hook_name: the dictionary does not name its own"),
        (nameless, "blocks.9.hook_resid_post", "no hook name 'blocks.9.hook_resid_post'"),
        (nameless, "blocks.1.attn.hook_z", "residual stream, got 'blocks.1.attn.hook_z'"),
    ):
        with pytest.raises(ValueError, match=message):
            DictionarySource(model, wrong, hook_name)
    assert DictionarySource(model, nameless, SITE).hook_name == SITE
    assert DictionarySource(model, shipped_sae, SITE).hook_name == SITE


def test_a_model_in_training_mode_is_refused(model, shipped_sae, corpus, rows):
    model = copy.deepcopy(model)
    source = DictionarySource(model, shipped_sae)
    model.train()
    for refuse in (
        lambda: DictionarySource(model, shipped_sae),
        lambda: source.latents(rows, rows >= 0),
        lambda: source.edited({0: ablate()}).__enter__(),
        lambda: record_of(source, corpus),
    ):
        with pytest.raises(ValueError, match="need a model in eval mode"):
            refuse()


def test_impossible_edits_are_refused(source, rows):
    for latent in (-1, 1024):
        with (
            pytest.raises(ValueError, match=rf"need latents in 0 to 1023, got \[{latent}\]"),
            source.edited({latent: ablate()}),
        ):
            pass
    for latent in (0, 5):
        with (
            source.edited({latent: lambda values: values[:-1]}),
            pytest.raises(ValueError, match=rf"latent {latent}: need {rows.numel()} values"),
        ):
            run(source.model, rows)
    for edit in (scale, clamp):
        with pytest.raises(ValueError, match="need a finite (factor|value), got nan"):
            edit(float("nan"))


def test_impossible_records_are_refused(source, corpus):
    high = dataclasses.replace(corpus, ids=corpus.ids + 10_000)
    special = dataclasses.replace(corpus, special=corpus.mask)
    for given, batch_rows, message in (
        (corpus, 0, "need batch_rows >= 1, got 0"),
        (high, 64, "token ids, but the corpus holds id 1"),
        (special, 64, "need at least one token to record, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            record_of(source, given, batch_rows=batch_rows)


def test_typical_activation_is_the_mean_size_where_it_fires(record):
    signs = torch.ones(len(record.values))
    signs[::2] = -1
    signed = dataclasses.replace(record, values=record.values * signs)
    dense = record.acts.dense().double()
    counts = (dense != 0).sum(0)
    assert (counts == 0).any() and (counts > 1).any()
    expected = torch.where(counts > 0, dense.sum(0) / counts.clamp(min=1), 0.0).float()
    for given in (record, signed):
        torch.testing.assert_close(typical_activations(given), expected)


def test_doses_are_edits_in_the_unit_given(source, record, rows, frequent):
    chosen, units = frequent[:2], typical_activations(record)

    measure = functools.partial(logit, source.model, rows)

    def edited(edits) -> float:
        with source.edited(edits):
            return measure()

    options = {"units": units, "n_random": 1}
    found = dose_response(source, measure, chosen, [-1.0, 0.0, 2.0], **options)
    expected = [
        edited({j: clamp(dose * float(units[j])) for j in chosen}) for dose in (-1.0, 0.0, 2.0)
    ]
    assert list(found.values) == expected
    assert found.values[1] == edited(dict.fromkeys(chosen, ablate()))
    assert found.baseline == found.control[0][1] == measure()
    assert len({*found.values, found.baseline}) == 4
    found = dose_response(source, measure, chosen, [0.0, 1.0], kind="scale", **options)
    assert found.values == (edited(dict.fromkeys(chosen, ablate())), measure())
    assert found.control[0][1] == found.baseline != found.control[0][0]


def test_the_control_moves_the_activation_as_far(source, record, rows, frequent):
    units, seen = typical_activations(record), []
    plain, _ = run(source.model, rows)

    def measure() -> float:
        seen.append(run(source.model, rows)[0] - plain)
        return 0.0

    doses, chosen = [-1.0, 0.5, 3.0], frequent[:2]
    for kind, still in (("clamp", 0.0), ("scale", 1.0)):
        seen.clear()
        options = {"units": units, "kind": kind, "n_random": 2, "seed": 3}
        dose_response(source, measure, chosen, doses, **options)
        change = sum(units[j] * source.write_directions[j] for j in chosen)
        moved = [x for x in seen if (x - x[0, 0]).abs().max() < 1e-4 and x.abs().max() > 1e-3]
        assert len(moved) == 2 * len(doses)  # each direction at each dose, alike at every token
        norms = torch.stack([x.norm(dim=-1).mean() for x in moved]).view(2, len(doses))
        sizes = (torch.tensor(doses) - still).abs() * change.norm()
        torch.testing.assert_close(norms, sizes.expand(2, -1), atol=1e-4, rtol=1e-4)
        first, second = moved[0][0, 0], moved[len(doses)][0, 0]
        assert torch.cosine_similarity(first, second, dim=0).abs() < 0.5
        same = torch.cosine_similarity(first, moved[2][0, 0], dim=0)
        assert same == pytest.approx(-1, abs=1e-3)


def test_random_directions():
    found = random_directions(500, 32, norm=2.5, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.full((500,), 2.5))
    assert found.mean(0).norm() < 0.5
    assert torch.equal(found, random_directions(500, 32, norm=2.5, seed=0))
    assert not torch.equal(found, random_directions(500, 32, norm=2.5, seed=1))
    assert torch.equal(found[:3], random_directions(3, 32, norm=2.5, seed=0))
    with pytest.raises(ValueError, match="need n >= 1 random directions, got 0"):
        random_directions(0, 4, norm=1.0, seed=0)
    with pytest.raises(ValueError, match="need a norm above 0 and finite, got 0.0"):
        random_directions(1, 4, norm=0.0, seed=0)


def test_a_planted_direction_raises_its_token_and_random_ones_do_not(model, rows):
    site = [name for name in sites(model) if name.endswith("hook_resid_post")][-1]
    token, d = 40, site_dim(model, site)
    torch.manual_seed(0)
    planted = Dictionary(DictionaryConfig(site_dims=(d,), d_sae=6, rule=ReLU()))
    row = unembedding(model)[token]
    with torch.no_grad():
        planted.W_dec[2] = row / row.norm()
    source = DictionarySource(model, planted.eval(), site)

    units = torch.full((6,), 10.0)
    doses = [-2.0, -1.0, 0.0, 1.0, 2.0, 4.0]
    measured = [source, functools.partial(logit, model, rows[:, :8], token), [2]]
    found = dose_response(*measured, doses, units=units, n_random=4)
    assert all(a < b for a, b in zip(found.values, found.values[1:], strict=False))
    rise = found.values[-1] - found.values[2]
    spread = found.control_high[-1] - found.baseline
    assert rise > 3 * spread, (rise, spread)
    table = torch.tensor(found.control, dtype=torch.float64)
    assert table.shape == (4, 6)
    assert found.control_mean == pytest.approx(table.mean(0).tolist())
    assert found.control_low == tuple(table.amin(0).tolist())
    assert found.control_high == tuple(table.amax(0).tolist())
    again = dose_response(*measured, [4.0], units=units, n_random=4)
    assert (again.values, again.control_mean) == (found.values[-1:], found.control_mean[-1:])


def test_impossible_doses_are_refused(source, record):
    units = typical_activations(record)
    alive, dead = int(units.argmax()), int(units.argmin())
    assert units[dead] == 0
    for latents, doses, options, message in (
        ([], [1.0], {}, r"need at least one latent, each once, got \[\]"),
        ([alive, alive], [1.0], {}, "need at least one latent, each once"),
        ([1024], [1.0], {}, r"need latents in 0 to 1023, got \[1024\]"),
        ([alive, dead], [1.0], {}, r"unit above 0 \(those that fire\), got units \[.*, 0.0\]"),
        ([alive], [], {}, "need at least one dose, got none"),
        ([alive], [1.0, float("inf")], {}, "need a finite dose, got inf"),
        ([alive], [1.0], {"units": units[:-1]}, "need a unit for each of 1024 latents, got 1023"),
        ([alive], [1.0], {"kind": "add"}, r"need a kind in \('clamp', 'scale'\), got 'add'"),
        ([alive], [1.0], {"n_random": 0}, "need n >= 1 random directions, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dose_response(source, lambda: 0.0, latents, doses, **({"units": units} | options))
