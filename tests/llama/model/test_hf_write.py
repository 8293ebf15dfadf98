"""Hugging Face folders written by the example, and read into sharded parameters."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.model.hf import load_params, read_config
from examples.llama.model.hf_write import save_folder
from examples.llama.model.llama import apply, structure, unstack_layers

GOLDEN = Path(__file__).parents[2] / "golden"
UNTIED = GOLDEN / "hf_llama_untied"
TIED = GOLDEN / "hf_llama31_tied"
FOLDERS = pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda folder: folder.name)


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def sharding_of(path):
    """A sharding for every leaf: the layer axis or the rows over two of the devices."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    keys = [key.key for key in path]
    spec = P("x", None, "y") if keys[-1] == "kernel" and keys[0] == "layers" else P()
    if keys[0] == "embed_tokens":
        spec = P("y")
    return NamedSharding(mesh, spec)


@FOLDERS
@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_what_is_written_is_what_was_read(source, limit, tmp_path):
    config = read_config(source)
    written = save_folder(
        tmp_path, config, load_params(source, config), max_file_bytes=limit, base=source
    )
    assert read_config(tmp_path) == config
    # Bit for bit, so that the golden logits of the source are those of the copy, in any reader.
    assert_same_tensors(tensors_of(tmp_path), tensors_of(source))
    again = load_params(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, again, load_params(source, config))
    assert all(path.is_file() for path in written)
    parts = [path for path in written if path.suffix == ".safetensors"]
    if limit == 30_000:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        sizes = {name: array.nbytes for name, array in tensors_of(source).items()}
        assert index["metadata"]["total_size"] == sum(sizes.values())
        assert index["weight_map"].keys() == sizes.keys()
        assert len(parts) == len(set(index["weight_map"].values())) > 2
        for path in parts:
            held = safetensors.numpy.load_file(path)
            assert sum(a.nbytes for a in held.values()) <= limit or len(held) == 1
            assert all(index["weight_map"][name] == path.name for name in held)
    else:
        assert [path.name for path in parts] == ["model.safetensors"]


@FOLDERS
def test_fields_of_the_configuration(source, tmp_path):
    config = read_config(source)
    save_folder(tmp_path, config, load_params(source, config), base=source)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path))
    rope = old.pop("rope_parameters")
    assert new["rope_theta"] == rope.pop("rope_theta")
    assert new["rope_scaling"] == (None if rope["rope_type"] == "default" else rope)
    for name in old.keys() - {"dtype", "transformers_version"}:
        assert new[name] == old[name], name
    assert new["torch_dtype"] == "float32"


def test_what_the_base_says_about_generation_is_kept(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"pad_token_id": 7}')
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    config = read_config(UNTIED)
    save_folder(tmp_path / "out", config, load_params(UNTIED, config), base=base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 7
    copied = (tmp_path / "out" / "generation_config.json").read_text()
    assert copied == (base / "generation_config.json").read_text()


def test_sharded_reading_fills_what_each_device_holds(tmp_path):
    config = read_config(UNTIED)
    plain = load_params(UNTIED, config)
    shardings = jax.tree_util.tree_map_with_path(lambda path, _: sharding_of(path), plain)
    params = load_params(UNTIED, config, shardings=shardings)
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.sharding == shardings["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 96, 24)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    save_folder(tmp_path, config, params)
    assert_same_tensors(tensors_of(tmp_path), tensors_of(UNTIED))


def test_only_the_needed_slices_are_read(monkeypatch):
    """No read is larger than a shard of one layer: nothing is read whole and then cut."""
    from examples.llama.model import hf

    config = read_config(UNTIED)
    read, sizes = hf._Tensors.read, []

    def counted(self, name, index):
        array = read(self, name, index)
        sizes.append((name, array.size))
        return array

    monkeypatch.setattr(hf._Tensors, "read", counted)
    shapes = load_params(UNTIED, config)
    sizes.clear()
    shardings = jax.tree_util.tree_map_with_path(lambda path, _: sharding_of(path), shapes)
    load_params(UNTIED, config, shardings=shardings)
    largest = max(size for name, size in sizes if name.endswith("gate_proj.weight"))
    assert largest == 48 * 96 // 2


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", "f2")])
def test_other_dtypes(dtype, stored, tmp_path):
    config = read_config(TIED)
    params = load_params(TIED, config)
    save_folder(tmp_path, config, params, dtype=dtype)
    assert {array.dtype for array in tensors_of(tmp_path).values()} == {np.dtype(stored)}
    rounded = jax.tree.map(lambda x: x.astype(stored).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, config), rounded)
    halves = load_params(tmp_path, config, dtype=stored)
    assert halves["norm"]["scale"].dtype == np.dtype(stored)


def test_the_unscanned_form_gives_the_same_files(tmp_path):
    config = read_config(UNTIED)
    save_folder(tmp_path, config, unstack_layers(load_params(UNTIED, config)))
    assert_same_tensors(tensors_of(tmp_path), tensors_of(UNTIED))


def test_a_model_is_not_overwritten_unless_asked(tmp_path):
    config = read_config(UNTIED)
    params = load_params(UNTIED, config)
    save_folder(tmp_path, config, params, max_file_bytes=30_000)
    with pytest.raises(FileExistsError, match="holds a model"):
        save_folder(tmp_path, config, params)
    save_folder(tmp_path, config, params, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_tokenizer_files_are_copied(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "other.txt"):
        (source / name).write_text(name)
    config = read_config(UNTIED)
    params = load_params(UNTIED, config)
    save_folder(tmp_path / "out", config, params, tokenizer=source)
    copied = {"tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == copied | {
        "config.json",
        "model.safetensors",
    }
    cached = source / "tokenizer-0123.json"
    cached.write_text("trained here")
    save_folder(tmp_path / "two", config, params, tokenizer=cached)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "trained here"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        save_folder(tmp_path / "three", config, params, tokenizer=tmp_path)
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["layers"]["mlp"].pop("up_proj"), "'layers/mlp/up_proj/kernel' is missing"),
        (lambda p: p.update(bias=np.zeros(3)), "'bias' is unknown"),
        (
            lambda p: p["norm"].update(scale=np.zeros(3)),
            r"'norm/scale' has shape \(3,\), the configuration wants \(48,\)",
        ),
    ],
)
def test_parameters_that_do_not_fit(change, message, tmp_path):
    config = read_config(UNTIED)
    params = load_params(UNTIED, config)
    change(params)
    with pytest.raises(ValueError, match=message):
        save_folder(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


@FOLDERS
def test_transformers_loads_it_and_agrees(source, tmp_path):
    """The live counterpart of the golden data, where PyTorch and transformers are installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = read_config(source)
    params = jax.tree.map(lambda x: x * np.float32(1.25), load_params(source, config))
    save_folder(tmp_path, config, params, max_file_bytes=30_000)
    tokens = np.load(source / "logits.npz")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens.astype(np.int64))).logits.float().numpy()
    ours = apply(structure(config), params)(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
