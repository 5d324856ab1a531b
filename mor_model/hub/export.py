"""A trained network as a folder that transformers loads.

A vanilla network becomes a plain `LlamaForCausalLM`. For any other, the folder also gets modelling code: the source
files of this package with their imports made relative, so there is no second implementation.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mor_model.errors import ConfigError
from mor_model.hub.llama import is_llama, llama_config, to_llama
from mor_model.hub.tokenizer import export_tokenizer, tokenizer_size
from mor_model.model import RecursiveTransformer

_PACKAGE = Path(__file__).resolve().parent.parent
_OWN_IMPORT = re.compile(r"^(\s*from )mor_model\.(?:hub\.)?(\w+)( import )", flags=re.MULTILINE)
_ENTRY = "modeling_mor"


def export_hf(model: RecursiveTransformer, tokenizer: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write a model for transformers: config.json, generation_config.json, model.safetensors, tokenizer files, and
    modelling code where transformers has none of its own.

    Args:
        model: the trained network; precision is kept.
        tokenizer: folder with the tokenizer it was trained with.
        out: folder to make; it appears whole or not at all.

    Raises:
        ConfigError: when `out` exists and is not empty, or the tokenizer cannot be carried over exactly.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; name a folder that does not.")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        end = export_tokenizer(Path(tokenizer), building)
        if end >= model.config.vocab_size:
            raise ConfigError(f"{tokenizer}: its end-of-text id {end} lies outside the model's vocabulary.")
        if is_llama(model.config):
            config, state = llama_config(model.config), to_llama(model.state_dict(), model.config)
        else:
            config, state = _as_own(model)
            _write_code(building)
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        precision = str(model.embedding.weight.dtype).removeprefix("torch.")
        # Under both names: `torch_dtype` is transformers 4, `dtype` 5.
        _write_json(building / "config.json", {**config, **ids, "torch_dtype": precision, "dtype": precision})
        # A vocabulary padded beyond the tokenizer's has ids that mean no text; transformers must not choose them.
        padding = list(range(tokenizer_size(building), model.config.vocab_size))
        _write_json(building / "generation_config.json", {**ids, **({"suppress_tokens": padding} if padding else {})})
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        # The libraries make weights and folder private to their owner; an export is for others too.
        mask = os.umask(0)
        os.umask(mask)
        building.chmod(0o777 & ~mask)
        for file in building.iterdir():
            file.chmod(0o666 & ~mask)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        if out.is_dir():
            out.rmdir()
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return out


def _as_own(model: RecursiveTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["network.head.weight"]
    config = {
        "architectures": ["MorForCausalLM"],
        "model_type": "mixture_of_recursions",
        "auto_map": {"AutoConfig": "configuration_mor.MorConfig", "AutoModelForCausalLM": f"{_ENTRY}.MorForCausalLM"},
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "num_hidden_layers": model.config.num_layers,
        "tie_word_embeddings": model.config.tie_embeddings,
        "network": model.config.to_dict(),
    }
    return config, state


def _write_code(folder: Path) -> None:
    """Copy the entry file and every module of this package that it needs, flat, with relative imports."""
    entry = _PACKAGE / "hub" / f"{_ENTRY}.py"
    waiting, texts = [entry], {}
    while waiting:
        source = waiting.pop()
        if source.stem in texts:
            continue
        text = source.read_text(encoding="utf-8")
        texts[source.stem] = _OWN_IMPORT.sub(r"\1.\2\3", text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mor_model."):
                waiting.append(_PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py"))
    # transformers 4 copies only the files that the entry file itself imports.
    others = sorted(texts.keys() - {_ENTRY})
    texts[_ENTRY] += "\n\n" + "".join(f"from .{name} import __name__ as _{name}  # noqa: E402\n" for name in others)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
