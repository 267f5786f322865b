"""Published families from files: config.json gives the fields, safetensors the weights, and the logits are those of
`transformers` on tiny random models (see families.py)."""

import jax
import pytest

from checkpoint.huggingface import SafetensorsFolder
from checkpoint.pretrained import open_pretrained
from checkpoint.stream import load_tensors
from model.families.huggingface import parse_config
from model.families.names import huggingface_names
from model.transformer import Definition
from tests.parity.families import (
    FAMILIES,
    FIXTURES,
    WHOLE_FAMILIES,
    assert_logits,
    config_of,
    load,
    logits,
    one_device,
    write_folder,
)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", WHOLE_FAMILIES)
def test_logits_equal_transformers(name, scan, tmp_path):
    fixture = load(name)
    model = open_pretrained(write_folder(tmp_path, fixture))
    assert model.kind == "huggingface"
    assert model.config == FAMILIES[name]
    definition = Definition(model.config, scan=scan)
    params, biases = model.load(definition, one_device(definition))
    assert_logits(logits(definition, params, biases, fixture["tokens"]), fixture["logits"])


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_attention_of_gpt_oss(scan, tmp_path):
    fixture = load("gpt_oss_attention")
    definition = Definition(FAMILIES["gpt_oss_attention"], scan=scan)
    source = SafetensorsFolder(write_folder(tmp_path, fixture))
    params, biases = load_tensors(source, huggingface_names(definition.config), definition, one_device(definition))
    assert_logits(logits(definition, params, biases, fixture["tokens"]), fixture["logits"])


def test_the_rest_of_gpt_oss_is_refused():
    with pytest.raises(ValueError, match=r"model_type='gpt_oss' is not supported; supported: llama, qwen2"):
        parse_config(config_of(load("gpt_oss_attention")))


def test_every_fixture_has_a_family():
    assert sorted(file.name for file in FIXTURES.iterdir()) == sorted(f"{name}.npz" for name in FAMILIES)


def test_leaves_have_the_dtype_of_the_definition(tmp_path):
    model = open_pretrained(write_folder(tmp_path, load("glm4_moe")))
    definition = Definition(model.config, scan=True, param_dtype="bfloat16")
    got = model.load(definition, one_device(definition))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), definition.abstract
    )
