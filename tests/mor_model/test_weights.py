"""A saved model comes back as it was, and a damaged one is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mor_model.config import ExpertChoiceConfig, TokenChoiceConfig
from mor_model.errors import ConfigError
from mor_model.weights import check_start, load_model, save_weights, start_from
from tests.mor_model.cases import random_batch, small_config, small_model

CONFIGS = {
    "vanilla-untied": small_config(sharing="none", recursions=1, num_layers=2, tie_embeddings=False),
    "expert": small_config(router=ExpertChoiceConfig(capacities=(1.0, 0.5, 0.2))),
    "token-bias": small_config(router=TokenChoiceConfig(balance="bias")),
}


@pytest.fixture
def saved(tmp_path):
    config = CONFIGS["expert"]
    save_weights(tmp_path / "model", small_model(config).state_dict(), config)
    return tmp_path / "model"


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    config = CONFIGS[name]
    model, batch = small_model(config), random_batch(config)
    if name == "token-bias":
        model.update_balance(torch.tensor([5.0, 1.0, 0.0]))
    save_weights(tmp_path, model.state_dict(), config)
    loaded, started = load_model(tmp_path), small_model(config, seed=4)
    assert loaded.config == config and not loaded.training
    check_start(tmp_path, config)
    start_from(started, tmp_path)
    for network in (loaded, started):
        assert all(torch.equal(network.state_dict()[key], value) for key, value in model.state_dict().items())
        assert (network.head.weight is network.embedding.weight) == config.tie_embeddings
    assert torch.equal(loaded(batch.ids).logits_BTV, model(batch.ids).logits_BTV)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_tied_weights_are_stored_once_and_train_tied(saved):
    assert "head.weight" not in load_file(saved / "model.safetensors")
    model = load_model(saved)
    model(**random_batch(model.config).arguments()).loss.backward()
    assert model.head.weight.grad is model.embedding.weight.grad is not None


def test_precision_is_kept_or_chosen(saved):
    assert load_model(saved).embedding.weight.dtype == torch.float32
    assert load_model(saved, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    config = CONFIGS["expert"]
    save_weights(saved, small_model(config, dtype=torch.bfloat16).state_dict(), config)
    assert load_model(saved).embedding.weight.dtype == torch.bfloat16


def test_a_failed_write_leaves_the_old_model(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr("mor_model.weights.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_weights(saved, small_model(CONFIGS["expert"], seed=1).state_dict(), CONFIGS["expert"])
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


USES = pytest.mark.parametrize("use", [load_model, lambda folder: check_start(folder, CONFIGS["expert"])])


@USES
def test_missing_and_truncated_files(saved, use):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        use(saved)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        use(saved)
    (saved / "model.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.json is missing"):
        use(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 23}, r"embedding\.weight has shape \(19, 8\) where the network has \(23, 8\)"),
        ({"router": None}, "unknown 'router"),
        ({"tie_embeddings": False}, "missing 'head"),
        ({"vocab_sice": 19}, "did you mean 'vocab_size'"),
    ],
)
def test_a_configuration_of_another_model(saved, change, message):
    values = {**json.loads((saved / "model.json").read_text()), **change}
    (saved / "model.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_model(saved)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", '{"a": NaN}'])
def test_a_configuration_that_is_no_json_object(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, r"model\.rope_theta: is 500000\.0, but the weights in .* 10000\.0"),
        ({"router": None}, "unknown 'router"),
        ({"router": ExpertChoiceConfig(capacities=(1.0, 0.5, 0.2), network="mlp")}, "missing 'router"),
    ],
)
def test_weights_of_another_network_are_no_start(saved, change, message):
    with pytest.raises(ConfigError, match=message):
        check_start(saved, replace(CONFIGS["expert"], **change))


def test_what_changes_no_weights_meaning_may_differ(saved):
    router = ExpertChoiceConfig(capacities=(1.0, 0.7, 0.4), z_loss=0.1)
    check_start(saved, replace(CONFIGS["expert"], context_length=CONFIGS["expert"].context_length * 2, router=router))
    check_start(saved, replace(CONFIGS["expert"], head_dim=CONFIGS["expert"].head_width))


@USES
@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**62], [0, 2**63], [2**64]])
def test_tensors_larger_than_their_file_are_refused_before_they_are_made(saved, shape, use):
    file = saved / "model.safetensors"
    stored = load_file(file)
    del stored["embedding.weight"]
    content = save(stored)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["embedding.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read|embedding\.weight has shape"):
        use(saved)


@USES
def test_weights_that_are_no_fractions_are_refused(saved, use):
    stored = load_file(saved / "model.safetensors")
    save_file({**stored, "final_norm.weight": stored["final_norm.weight"].long()}, saved / "model.safetensors")
    with pytest.raises(ConfigError, match=r"final_norm\.weight holds I64"):
        use(saved)
