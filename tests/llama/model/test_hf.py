"""Hugging Face checkpoints: golden logits, old and new configurations, errors by name."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from examples.llama.model.config import RopeScaling
from examples.llama.model.hf import load_params, read_config
from examples.llama.model.llama import abstract, apply, structure

GOLDEN = Path(__file__).parents[2] / "golden"
UNTIED = GOLDEN / "hf_llama_untied"
TIED = GOLDEN / "hf_llama31_tied"
FOLDERS = pytest.mark.parametrize("folder", [UNTIED, TIED], ids=lambda folder: folder.name)


def read_tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_config(folder, source=UNTIED, remove=(), **changes):
    fields = json.loads((source / "config.json").read_text())
    fields.update(changes)
    for name in remove:
        del fields[name]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def write_tensors(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@FOLDERS
@pytest.mark.parametrize("scan", [True, False])
def test_golden_logits(folder, scan):
    config = read_config(folder)
    params = load_params(folder, config, scan)
    golden = np.load(folder / "logits.npz")
    graphdef = structure(config, scan_layers=scan)
    logits = jax.jit(lambda tokens: apply(graphdef, params)(tokens))(
        jnp.asarray(golden["input_ids"], jnp.int32)
    )
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    # Tighter than asked, on the scale of the logits: a wrong detail moves them by 1e-2 and more.
    assert np.max(np.abs(logits - golden["logits"])) < 1e-5 * np.max(np.abs(golden["logits"]))


@FOLDERS
def test_golden_greedy_continuation(folder):
    config = read_config(folder)
    params = load_params(folder, config)
    graphdef = structure(config)
    golden = np.load(folder / "logits.npz")
    expected = golden["greedy"]
    prompt = 8
    np.testing.assert_array_equal(expected[0, :prompt], golden["input_ids"][0, :prompt])

    @jax.jit
    def predictions(tokens):
        return jnp.argmax(apply(graphdef, params)(tokens), axis=-1)

    # The model is causal: what stands after the last known token does not matter.
    tokens = np.zeros_like(expected, np.int32)
    tokens[:, :prompt] = expected[:, :prompt]
    for position in range(prompt, expected.shape[1]):
        tokens[:, position] = predictions(tokens)[:, position - 1]
    np.testing.assert_array_equal(tokens, expected)


def test_golden_configurations():
    untied, tied = read_config(UNTIED), read_config(TIED)
    assert (untied.num_layers, untied.num_heads, untied.num_kv_heads) == (2, 4, 2)
    assert (untied.head_dim, untied.tie_embeddings, untied.rope_scaling) == (12, False, None)
    assert (tied.tie_embeddings, tied.rope_theta, tied.max_seq_len) == (True, 500_000.0, 256)
    assert tied.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_old_rotary_fields(tmp_path, key):
    scaling = {
        key: "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    write_config(
        tmp_path, TIED, remove=["rope_parameters"], rope_theta=500000.0, rope_scaling=scaling
    )
    assert read_config(tmp_path) == read_config(TIED)


def test_old_fields_without_scaling(tmp_path):
    write_config(tmp_path, remove=["rope_parameters"], rope_theta=777.0, rope_scaling=None)
    assert read_config(tmp_path) == dataclasses.replace(read_config(UNTIED), rope_theta=777.0)


def test_defaults_of_absent_fields(tmp_path):
    absent = ["rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings"]
    config = read_config(write_config(tmp_path, remove=absent))
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (12, 4, False)
    assert config.rope_theta == 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'.*only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"intermediate_size": None}, "field 'intermediate_size' is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rotary field 'low_freq_factor' is missing",
        ),
        ({"num_attention_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
    ],
)
def test_unreadable_configurations(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_config(tmp_path, **changes))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        load_params(tmp_path, read_config(UNTIED))


def test_scanned_and_unscanned_hold_the_same(tmp_path):
    config = read_config(UNTIED)
    scanned, unscanned = (load_params(UNTIED, config, scan) for scan in (True, False))
    for params, scan in ((scanned, True), (unscanned, False)):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert shapes == abstract(config, scan_layers=scan)
    kernel = read_tensors(UNTIED)["model.layers.1.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(unscanned["layers"][1]["mlp"]["down_proj"]["kernel"], kernel)
    np.testing.assert_array_equal(scanned["layers"]["mlp"]["down_proj"]["kernel"][1], kernel)


def test_several_files(tmp_path):
    tensors = read_tensors(UNTIED)
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.numpy.save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = read_config(UNTIED)
    assert_equal_trees(load_params(tmp_path, config), load_params(UNTIED, config))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-00003\.safetensors in"):
        load_params(tmp_path, config)


def test_bfloat16_tensors_become_float32(tmp_path):
    tensors = {name: jnp.asarray(x, jnp.bfloat16) for name, x in read_tensors(UNTIED).items()}
    safetensors.flax.save_file(tensors, tmp_path / "model.safetensors")
    params = load_params(tmp_path, read_config(UNTIED))
    scale = params["embed_tokens"]["embedding"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, tensors["model.embed_tokens.weight"].astype(jnp.float32))


def test_missing_tensor(tmp_path):
    tensors = read_tensors(UNTIED)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        load_params(write_tensors(tmp_path, tensors), read_config(UNTIED))


def test_unexpected_tensor(tmp_path):
    tensors = read_tensors(UNTIED)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    with pytest.raises(ValueError, match=r"unexpected tensor 'model\.layers\.0\..*q_proj\.bias'"):
        load_params(write_tensors(tmp_path, tensors), read_config(UNTIED))


def test_layers_beyond_the_configuration_are_unexpected():
    config = dataclasses.replace(read_config(UNTIED), num_layers=1)
    with pytest.raises(ValueError, match=r"unexpected tensor 'model\.layers\.1\."):
        load_params(UNTIED, config)


@pytest.mark.parametrize("scan", [True, False])
def test_wrong_shape(tmp_path, scan):
    tensors = read_tensors(UNTIED)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((95, 48), np.float32)
    write_tensors(tmp_path, tensors)
    message = r"'model\.layers\.0\.mlp\.up_proj\.weight' has shape \(95, 48\).*wants \(96, 48\)"
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, read_config(UNTIED), scan)


def test_tied_checkpoint_may_repeat_its_head(tmp_path):
    config = read_config(TIED)
    tensors = read_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_tensors(tmp_path, tensors)
    assert_equal_trees(load_params(tmp_path, config), load_params(TIED, config))
    tensors["lm_head.weight"][3, 4] += 1.0
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from the embedding"):
        load_params(tmp_path, config)


def test_rotary_constants_of_old_checkpoints_are_ignored(tmp_path):
    config = read_config(UNTIED)
    tensors = read_tensors(UNTIED)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    write_tensors(tmp_path, tensors)
    assert_equal_trees(load_params(tmp_path, config), load_params(UNTIED, config))
