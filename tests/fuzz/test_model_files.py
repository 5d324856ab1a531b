"""Models, Llama checkpoints, DeepSpeed checkpoints, a part of them changed: refused in a sentence or used as given."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mor_model import ModelConfig, RecursiveTransformer, load_model, save_weights
from mor_model.config import ExpertChoiceConfig
from mor_model.hub.importing import import_hf
from mor_model.hub.llama import llama_config, to_llama
from pretrain.checkpoints.checkpoint_manifest import Manifest, read_manifest
from pretrain.checkpoints.restricted_loading import load_restricted
from pretrain.checkpoints.store import find_damage
from tests.fuzz.support import counts, drive, from_file, lost, mutate_bytes, mutate_json, mutate_value
from tests.pretrain.payloads import fake_checkpoint, forge

SMALL = {"vocab_size": 7, "hidden_size": 8, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed model's folder."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig.from_dict(
        {**SMALL, "sharing": "cycle", "recursions": 3, "router": {"capacities": [1.0, 0.5, 0.5]}}
    )
    assert isinstance(config.router, ExpertChoiceConfig)
    save_weights(folder, RecursiveTransformer(config).state_dict(), config)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint in two parts."""
    folder = tmp_path_factory.mktemp("llama")
    config = ModelConfig.from_dict(SMALL)
    state = {
        name: tensor.clone() for name, tensor in to_llama(RecursiveTransformer(config).state_dict(), config).items()
    }
    (folder / "config.json").write_text(json.dumps(llama_config(config)))
    names = sorted(state)
    places = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def copied(original: Path, folder: Path) -> Path:
    """A copy of a folder, of which one file can be written anew."""
    return Path(shutil.copytree(original, folder / "copy"))


@counts
def test_a_models_configuration(count: int, model: Path, tmp_path: Path) -> None:
    file = copied(model, tmp_path) / "model.json"
    original = json.loads(file.read_text())

    def changed(content: bytes, config: ModelConfig) -> str | None:
        return lost(json.loads(content), config.to_dict())

    use = from_file(file, lambda file: load_model(file.parent).config)
    drive(count, lambda source: mutate_json(original, source), use, changed=changed, used=0.02, refused=0.25)


def pack(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@counts
def test_a_models_weights(count: int, model: Path, tmp_path: Path) -> None:
    """What is used is what NumPy reads at the places that the header names."""
    file = copied(model, tmp_path) / "model.safetensors"
    original = file.read_bytes()
    header, data = unpack(original)

    def make(source: random.Random) -> bytes:
        return pack(mutate_value(header, source), data) if source.random() < 0.6 else mutate_bytes(original, source)

    def changed(content: bytes, used: dict[str, torch.Tensor]) -> str | None:
        header, data = unpack(content)
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] == "F32":
                begin, end = entry["data_offsets"]
                expected = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
                if not np.array_equal(used[name].numpy(), expected, equal_nan=True):
                    return name
        return None

    use = from_file(file, lambda file: load_model(file.parent).state_dict())
    drive(count, make, use, changed=changed, refused=0.5)


@counts
def test_a_llamas_configuration(count: int, llama: Path, tmp_path: Path) -> None:
    file = copied(llama, tmp_path) / "config.json"
    original = json.loads(file.read_text())

    def changed(content: bytes, used: ModelConfig) -> str | None:
        given, found = json.loads(content), llama_config(used)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return lost({name: given[name] for name in sizes}, found)

    use = from_file(file, lambda file: import_hf(file.parent)[0])
    drive(count, lambda source: mutate_json(original, source), use, changed=changed, used=0.02, refused=0.25)


@counts
def test_an_index_of_weights(count: int, llama: Path, tmp_path: Path) -> None:
    """Whatever it says, no file outside its folder is opened: there the whole checkpoint lies under other names."""
    folder = copied(llama, tmp_path)
    for part in folder.glob("*.safetensors"):
        shutil.copy(part, tmp_path)
    file = folder / "model.safetensors.index.json"
    original = json.loads(file.read_text())

    def make(source: random.Random) -> bytes:
        if source.random() < 0.3:
            place = source.choice(["../part-0.safetensors", str(tmp_path / "part-0.safetensors"), "./../part-0"])
            return json.dumps({"weight_map": {**original["weight_map"], "lm_head.weight": place}}).encode()
        return mutate_json(original, source)

    def changed(content: bytes, used: object) -> str | None:
        named = set(json.loads(content)["weight_map"].values())
        return None if named == {"part-0.safetensors", "part-1.safetensors"} else f"opened {named}"

    use = from_file(file, lambda file: import_hf(file.parent))
    drive(count, make, use, changed=changed, refused=0.25)


@counts
def test_a_checkpoints_description(count: int, tmp_path: Path) -> None:
    """As a file that was damaged or edited: it is found, or says what it said before."""
    checkpoint = fake_checkpoint(tmp_path, 4, skipped=((1, 2),), recent_losses=(1.5, 2.5), best_validation=(1.0, 3))
    original = json.loads((checkpoint / "checkpoint.json").read_text())

    def changed(content: bytes, damage: str | None) -> str | None:
        return None if damage is not None or json.loads(content) == original else "accepted"

    use = from_file(checkpoint / "checkpoint.json", lambda file: find_damage(file.parent))
    drive(count, lambda source: mutate_json(original, source), use, changed=changed)


@counts
def test_a_checkpoints_description_by_somebody_who_knows_its_checksum(count: int, tmp_path: Path) -> None:
    checkpoint = fake_checkpoint(tmp_path, 4, skipped=((1, 2),), recent_losses=(1.5, 2.5), best_validation=(1.0, 3))
    original = json.loads((checkpoint / "checkpoint.json").read_text())
    del original["checksum"]

    def make(source: random.Random) -> dict[str, Any]:
        changed = mutate_value(original, source)
        return changed if isinstance(changed, dict) else {**original, "x": changed}

    def use(content: dict[str, Any]) -> Manifest:
        forge(checkpoint, content)
        return read_manifest(checkpoint)

    def changed(content: dict[str, Any], used: Manifest) -> str | None:
        return lost(content, {**used.model_dump(), "state": used.state.to_dict()})

    drive(count, make, use, changed=changed, used=0.02, refused=0.25)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@counts
@pytest.mark.parametrize("inner", [False, True])
def test_a_file_of_a_checkpoint(count: int, tmp_path: Path, inner: bool) -> None:
    """Changed anywhere, or in the pickle that it holds."""
    file = tmp_path / "a.pt"
    torch.save({"step": torch.tensor(4.0), "groups": [{"lr": 0.1, "params": [0, 1]}], "shape": torch.Size([2])}, file)
    original = file.read_bytes()

    def make(source: random.Random) -> bytes:
        if not inner:
            return mutate_bytes(original, source)
        content = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(original)) as archive, zipfile.ZipFile(content, "w") as copy:
            for name in archive.namelist():
                data = archive.read(name)
                copy.writestr(name, mutate_bytes(data, source) if name.endswith("data.pkl") else data)
        return content.getvalue()

    use = from_file(file, lambda file: load_restricted(file, map_location="cpu"))
    drive(count, make, use, refused=0.25)
