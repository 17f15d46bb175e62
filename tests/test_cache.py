"""Activations on disk: read back, refused when damaged, and written whole despite kills."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading

import pytest
import torch
from safetensors.torch import load, save
from tqdm.auto import tqdm

from lib import runtime
from lib.activations import cache as writer
from lib.activations.buffer import Buffer
from lib.activations.cache import ActivationCache, cached, write_cache
from lib.activations.source import Source
from tests.test_activations import SIZES, Numbered

NAMES = ("acts", "ids", "rows", "positions")
ABOUT = {"models": ["tiny"], "data": "numbers"}


def numbered(**options):
    return Numbered((*SIZES, 0), **options)  # an empty block at the end


def write(folder, source=None, **changed):
    wishes = {"about": ABOUT, "shard_tokens": 25} | changed
    return write_cache(source or numbered(), folder, **wishes)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuse(match, function, *arguments, **keywords):
    with pytest.raises(ValueError, match=match):
        function(*arguments, **keywords)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"


def everything(source):
    blocks = [source.block(i) for i in range(source.n_blocks)]
    return [torch.cat([getattr(block, name) for block in blocks]) for name in NAMES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_tokens", [1, 10, 4096])
def test_blocks_are_what_was_written(tmp_path, dtype, block_tokens):
    source = numbered(dtype=dtype)
    write(tmp_path / "cache", source)
    cache = ActivationCache(tmp_path / "cache", block_tokens=block_tokens)
    assert isinstance(cache, Source)
    assert (cache.site_dims, cache.hook_names) == (source.site_dims, source.hook_names)
    assert len(cache) == sum(SIZES) == cache.manifest["n_tokens"]
    for got, wanted in zip(everything(cache), everything(source), strict=True):
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype
    assert max(len(cache.block(i).ids) for i in range(cache.n_blocks)) <= block_tokens


def test_manifest_says_what_is_there(folder):
    manifest = ActivationCache(folder).manifest
    assert (manifest["about"], manifest["dtype"]) == (ABOUT, "float32")
    assert manifest["source"] == numbered().fingerprint
    assert manifest["hook_names"] == list(Numbered.hook_names)
    sizes = {entry["file"]: entry["n_tokens"] for entry in manifest["shards"]}
    assert list(sizes.values()) == [53, 37, 13]  # whole blocks: 13+0+40, 7+1+0+29, 10+3
    assert set(bytes_of(folder)) == {*sizes, "manifest.json"}


def test_a_block_that_there_is_not_is_refused(folder):
    cache = ActivationCache(folder, block_tokens=10)
    refuse(f"need a block in 0 to {cache.n_blocks - 1}", cache.block, cache.n_blocks)


def test_a_buffer_serves_a_cache(folder):
    buffer = Buffer(ActivationCache(folder, block_tokens=8), batch_size=103, n_tokens=103)
    for _ in range(2):
        assert torch.equal(next(buffer)[:, 0].sort().values, torch.arange(103.0))
    state = buffer.state_dict()
    other = ActivationCache(folder, block_tokens=9)  # other blocks, other order
    buffer = Buffer(other, batch_size=103, n_tokens=103)
    refuse("need a state of source", buffer.load_state_dict, state)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's /proc")
def test_shards_are_mapped_not_read(tmp_path):
    def kilobytes():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Anonymous"))

    wide = Numbered((1000, 1000, 1000), change=lambda i, acts: torch.ones(len(acts), 4096))
    wide.site_dims = (4096, 0)
    write(tmp_path / "cache", wide, shard_tokens=1000)  # 16 MB each
    cache = ActivationCache(tmp_path / "cache")
    cache.block(0)
    before = kilobytes()
    total = sum(cache.block(i).acts.sum() for i in range(cache.n_blocks))
    assert total == 3000 * 4096
    assert kilobytes() - before < 8_000


def test_a_finished_cache_is_left_alone(folder):
    before, source = bytes_of(folder), numbered()
    write(folder, source)
    assert bytes_of(folder) == before
    assert not source.read


def interrupted(i, acts):
    if i == 7:
        raise KeyboardInterrupt
    return acts


def test_resume_goes_on_at_the_next_shard(tmp_path, folder):
    part = tmp_path / "part"
    names = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        write(part, numbered(change=interrupted))
    refuse("writing never ended", ActivationCache, part)
    assert sorted(bytes_of(part)) == names
    for name in (".shard-00002.safetensors.abc", ".manifest.json.abc", ".tmpAbc12"):
        (part / name).write_bytes(b"half")  # as a killed writer leaves it
    shutil.copytree(part, tmp_path / "damaged")
    source = numbered()
    write(part, source)
    assert source.read == [7, 8, 9]
    assert bytes_of(part) == bytes_of(folder)
    (tmp_path / "damaged" / names[1]).unlink()  # is found before work goes on
    source = numbered()
    refuse(f"{names[1]} is missing", write, tmp_path / "damaged", source)
    assert not source.read


def test_a_shard_takes_its_name_only_when_whole(tmp_path, folder, monkeypatch):
    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lib.activations.cache.save_file", save_half)
        write(tmp_path / "part")
    assert list(bytes_of(tmp_path / "part")) == ["manifest.json"]
    write(tmp_path / "part")
    assert bytes_of(tmp_path / "part") == bytes_of(folder)


MANY = tuple(random.Random(0).choices(range(30), k=100))


def write_until_killed(folder, n_lines):
    """Runs in a child, which kills itself at the writer's line number `n_lines`."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leak
    lines = itertools.count(1)

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in (writer.__file__, runtime.__file__):
            return None
        if event == "line" and next(lines) == n_lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    write(folder, Numbered(MANY), shard_tokens=60)


@pytest.mark.slow
def test_kill_at_any_line_leaves_nothing_half(tmp_path, forkserver):
    """Writers go on from each other and are killed; one more finishes the cache."""
    write(tmp_path / "whole", Numbered(MANY), shard_tokens=60)
    part, rng, found = tmp_path / "part", random.Random(1), []
    for _ in range(15):
        arguments = (part, rng.randrange(20, 500))
        child = forkserver.Process(target=write_until_killed, args=arguments)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found.append(check_part(part, tmp_path / "whole"))
    n_listed, n_whole = zip(*found, strict=True)
    assert n_listed == tuple(sorted(n_listed))  # each went on where the last was killed
    assert len(set(n_listed)) > 4
    assert n_listed != n_whole  # some kill came before the manifest listed a shard
    source = Numbered(MANY)
    write(part, source, shard_tokens=60)
    assert len(source.read) < len(MANY)
    assert bytes_of(part) == bytes_of(tmp_path / "whole")


def check_part(part, whole):
    """Shards listed and shards found, all of them whole; none is listed that is not there."""
    if not (part / "manifest.json").exists():
        return 0, 0
    manifest = json.loads((part / "manifest.json").read_text())
    listed = {entry["file"] for entry in manifest["shards"]}
    shards = {file.name: file.read_bytes() for file in part.glob("shard-*")}
    assert listed <= set(shards)
    for name, content in shards.items():
        assert content == (whole / name).read_bytes()
    return len(listed), len(shards)


def test_another_makers_folder_is_refused(folder):
    before = bytes_of(folder)
    refuse("differing: source", write, folder, numbered(fingerprint="1" * 64))
    refuse("differing: about", write, folder, about=ABOUT | {"data": "letters"})
    refuse("differing: shard_tokens", write, folder, shard_tokens=26)
    wide = numbered()
    wide.site_dims = (3,)
    refuse("something else made.*differing: site_dims", write, folder, wide)
    assert bytes_of(folder) == before


def test_damaged_shards_are_named(folder):
    shard = folder / "shard-00001.safetensors"
    original = shard.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    for broken, match in (
        (original[:-1], "shard-00001.*damaged: .* bytes, need"),
        (b"\xff" * 8 + original[8:], "shard-00001.*damaged"),
    ):
        shard.write_bytes(broken)
        for use in (ActivationCache, write):
            refuse(match, use, folder)
    for place in (header + 5, header + 300, len(original) - 1):
        shard.write_bytes(flipped(original, place))
        cache = ActivationCache(folder)
        assert torch.isfinite(cache.block(0).acts).all()  # the first shard is sound
        refuse("shard-00001.safetensors is damaged: its checksum", cache.block, 1)
        refuse("damaged shards .*: shard-00001.safetensors; delete", cache.verify)
    shard.unlink()
    for use in (ActivationCache, write):
        refuse("shard-00001.safetensors is missing", use, folder)
    shard.write_bytes(original)
    ActivationCache(folder).verify()


def flipped(content, place, bit=0):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return changed


def test_every_flipped_bit_of_a_shard_is_found(folder):
    shard = folder / "shard-00002.safetensors"
    original = shard.read_bytes()
    for place in range(0, len(original), 7):
        shard.write_bytes(flipped(original, place, place % 8))
        refuse("shard-00002.safetensors", lambda: ActivationCache(folder).block(2))


def test_foreign_and_empty_shards_are_named(tmp_path, folder):
    write(tmp_path / "other", Numbered(fingerprint="1" * 64))
    name = "shard-00002.safetensors"
    original = (folder / name).read_bytes()
    shutil.copy(tmp_path / "other" / name, folder / name)
    for use in (ActivationCache, write):
        refuse(f"{name} is foreign", use, folder)
    (folder / name).write_bytes((folder / "shard-00001.safetensors").read_bytes())
    refuse(name, ActivationCache, folder)  # its own, in the wrong place
    (folder / name).write_bytes(original)
    tensors = {key: x[:0] for key, x in load(original).items()}
    manifest = json.loads((folder / "manifest.json").read_text())
    empty = save(tensors, {"fingerprint": manifest["fingerprint"]})
    (folder / name).write_bytes(empty)
    manifest["shards"][2] |= {"n_tokens": 0, "bytes": len(empty)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuse(f"{name} is empty", ActivationCache, folder)


def test_damaged_manifests_are_refused(folder):
    text = (folder / "manifest.json").read_text()
    for broken, match in (
        (text[:100], "manifest.json is damaged"),
        ("[]", "need a manifest of format 1"),
        (text.replace('"format": 1', '"format": 2'), "need a manifest of format 1"),
    ):
        (folder / "manifest.json").write_text(broken)
        for use in (ActivationCache, write):
            refuse(match, use, folder)


def test_sources_that_cannot_be_cached(tmp_path):
    refuse("tokens, got blocks that are all empty", write, tmp_path / "a", Numbered((0, 0)))
    write(tmp_path / "a", Numbered(fingerprint="1" * 64))  # nothing was left there
    refuse("tokens, got blocks that are all empty", write, tmp_path / "b", Numbered(()))
    refuse("need shard_tokens >= 1", write, tmp_path / "c", shard_tokens=0)
    refuse("need block_tokens >= 1", ActivationCache, tmp_path / "a", block_tokens=0)
    assert not (tmp_path / "c").exists()
    broken = numbered(change=lambda i, acts: acts / (i != 6))
    refuse("block 6: need finite", write, tmp_path / "d", broken)
    assert sorted(bytes_of(tmp_path / "d")) == ["manifest.json", "shard-00000.safetensors"]


def test_folders_that_hold_no_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    refuse(r"need an empty folder or a cache.*thesis\.tex", write, tmp_path)
    source = numbered()
    with pytest.raises(OSError, match="cannot write in .*thesis"):
        write(tmp_path / "thesis.tex" / "cache", source)
    assert not source.read  # an error before work
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileNotFoundError, match="need a cache with manifest.json"):
        ActivationCache(tmp_path)


def test_cached_writes_once_and_then_stands_in_for_the_source(tmp_path):
    source = numbered()
    first = cached(source, tmp_path / "c", about=ABOUT)
    assert len(first) == sum(SIZES) and source.read
    later = Numbered(fingerprint="another")
    again = cached(later, tmp_path / "c", about={})
    assert not later.read and again.fingerprint == first.fingerprint
    later.hook_names = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    refuse("need a cache of sites", cached, later, tmp_path / "c", about={})
