"""Llama checkpoints come in as they are, or as the first weights of a recursive network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mor_model import ConfigError, ExpertChoiceConfig, ModelConfig, RecursiveTransformer, load_model, save_weights
from mor_model.hub.importing import import_hf, layer_sources
from tests.mor_model.run_tokenizers import letters_tokenizer

SHAPE = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    """A Llama checkpoint as transformers writes it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 3e4}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def rebuilt(config: ModelConfig, state: dict[str, torch.Tensor], folder: Path) -> RecursiveTransformer:
    save_weights(folder, state, config)
    return load_model(folder)


def test_a_vanilla_import_computes_what_the_checkpoint_does(llama, tmp_path):
    reference, folder = llama
    config, state = import_hf(folder)
    assert (config.rope_theta, config.context_length, config.sharing) == (3e4, 64, "none")
    model = rebuilt(config, state, tmp_path)
    ids = torch.randint(71, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits_BTV, reference(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_in_parts_is_read_whole(llama, tmp_path):
    reference, folder = llama
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = import_hf(folder)[1], import_hf(tmp_path)[1]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("sharing", "recursions", "initialization", "sources"),
    [
        ("middle_cycle", 3, "average", [[0], [1, 3, 5], [2, 4, 6], [7]]),
        ("middle_cycle", 3, "stepwise", [[0], [1], [6], [7]]),
        ("middle_cycle", 2, "stepwise", [[0], [1], [4], [6], [7]]),
        ("middle_sequence", 3, "average", [[0], [1, 2, 3], [4, 5, 6], [7]]),
        ("cycle", 2, "average", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("cycle", 2, "stepwise", [[0], [2], [5], [7]]),
        ("sequence", 4, "average", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("sequence", 4, "stepwise", [[0], [7]]),
        ("cycle", 8, "stepwise", [[0]]),
    ],
)
def test_shared_layers_start_from_the_layers_they_stand_for(
    llama, tmp_path, sharing, recursions, initialization, sources
):
    _, folder = llama
    config, state = import_hf(folder, sharing=sharing, recursions=recursions, initialization=initialization)
    assert layer_sources(config, initialization) == sources
    vanilla = import_hf(folder)[1]
    for stored, originals in enumerate(sources):
        for name in ("attention.qkv.weight", "attention_norm.weight", "feed_forward.down.weight"):
            expected = sum(vanilla[f"layers.{layer}.{name}"] for layer in originals) / len(originals)
            torch.testing.assert_close(state[f"layers.{stored}.{name}"], expected)
    for name in ("embedding.weight", "final_norm.weight", "head.weight"):
        assert torch.equal(state[name], vanilla[name])
    model = rebuilt(config, state, tmp_path)
    loss = model(torch.arange(30)[None], torch.arange(1, 31)[None]).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_a_router_begins_anew_and_the_same_for_the_same_seed(llama, tmp_path):
    _, folder = llama
    options = {"sharing": "middle_cycle", "recursions": 3, "router": ExpertChoiceConfig()}
    config, state = import_hf(folder, **options, seed=4)
    again, other = import_hf(folder, **options, seed=4)[1], import_hf(folder, **options, seed=5)[1]
    routers = [name for name in state if name.startswith("router.")]
    assert len(routers) == 3
    assert all(torch.equal(state[name], again[name]) for name in routers)
    assert not any(torch.equal(state[name], other[name]) for name in routers)
    model = rebuilt(config, state, tmp_path)
    assert model(torch.arange(30)[None], routing="causal").logits_BTV.isfinite().all()


def changed(folder: Path, copy: Path, **changes) -> Path:
    copy.mkdir()
    values = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **changes}))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only checkpoints of the Llama"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary positions are scaled"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions are scaled"),
        ({"intermediate_size": 57}, r"mlp\.down_proj\.weight has shape \(32, 56\)"),
        ({"num_hidden_layers": 9}, r"tensor model\.layers\.8\.\S+ is missing"),
        ({"num_hidden_layers": 7}, r"tensor 'model\.layers\.7\.\S+ has no place"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_hidden_layers": 10**30}, r"config\.json: model\.num_layers: must be at most 1,024"),
        ({"rope_parameters": ["default"]}, "rotary positions are"),
        ({"rope_theta": "large", "rope_parameters": None}, r"rope_theta: must be a positive number, not 'large'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(llama, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        import_hf(changed(llama[1], tmp_path / "changed", **changes))


def test_a_damaged_checkpoint_is_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing; name a folder"):
        import_hf(tmp_path)
    damaged = changed(llama[1], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        import_hf(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        import_hf(damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        import_hf(damaged)
    with pytest.raises(ConfigError, match="nearest valid depths are 6 and 10"):
        import_hf(llama[1], sharing="middle_cycle", recursions=4)
    with pytest.raises(ConfigError, match="'lower' is not 'stepwise' or 'average'"):
        import_hf(llama[1], sharing="cycle", recursions=2, initialization="lower")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", "a/../model.safetensors", "a\0", 3, "a" * 256]
)
def test_an_index_names_files_of_its_own_folder(llama, tmp_path, name):
    checkpoint = changed(llama[1], tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ConfigError, match=r"index\.json: .* is not the name of a file"):
        import_hf(checkpoint)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ConfigError, match=r"index\.json: its weight_map names no files"):
        import_hf(checkpoint)


def test_the_commands_lead_out_and_back(llama, tmp_path, mor):
    run = tmp_path / "run"
    imported = mor("import", "hf", llama[1], "--out", run)
    assert imported.returncode == 0 and "8 layers" in imported.stdout + imported.stderr
    assert mor("import", "hf", llama[1], "--out", run).returncode == 2

    (run / "recipe.yaml").write_text("name: imported\n")
    letters_tokenizer(run / "tokenizer")
    exported = mor("export", run, "--to", "hf", "--out", tmp_path / "out")
    said = exported.stdout + exported.stderr
    assert (exported.returncode, "AutoModelForCausalLM.from_pretrained" in said) == (0, True)
    assert "trust_remote_code" not in said
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama[1] / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert mor("export", run, "--to", "gguf", "--out", tmp_path / "other").returncode == 2

    recursive = tmp_path / "recursive"
    options = ("--out", recursive, "--variant", "mor", "--initialization", "average")
    assert mor("import", "hf", tmp_path / "out", *options).returncode == 0
    assert load_model(recursive / "weights").config.router == ExpertChoiceConfig()
    assert (recursive / "tokenizer" / "tokenizer.json").is_file()
    assert mor("import", "hf", llama[1], "--out", tmp_path / "x", "--variant", "moe").returncode == 2
