"""A small finished run folder with a data set's held-out text, a trained-once tokenizer and a real network."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import yaml
import zstandard

from data_prep.tokenizers.loading import load_tokenizer
from mor_model.config import ExpertChoiceConfig, ModelConfig
from mor_model.model import RecursiveTransformer
from mor_model.weights import save_weights
from pretrain.cli.main import main
from pretrain.records.run_folder import RunFolder
from tests.pretrain.evaluation.test_own_suite import prose

END = "<|endoftext|>"


def write_held_out(folder: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "source": "prose"}) + "\n" for text in texts)
    file = folder / "held_out" / "test.jsonl.zst"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    return folder


def train_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for seed in range(20) for line in prose(seed).splitlines() if line),
        model_writer=stream,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # nothing of the text is lost
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        control_symbols=[END],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


NETWORK = {
    "hidden_size": 32,
    "num_layers": 5,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "context_length": 64,
    "sharing": "middle_cycle",
    "recursions": 3,
    "router": ExpertChoiceConfig(),
    "init_std": 0.2,
}


def make_run(folder: Path, texts: list[str], **changes) -> RunFolder:
    """A run folder as training leaves it, as far as evaluation reads it."""
    run = RunFolder(folder)
    data = write_held_out(folder.parent / "data", texts)
    train_tokenizer(run.tokenizer)
    config = ModelConfig(**{"vocab_size": load_tokenizer(run.tokenizer).vocab_size, **NETWORK, **changes})
    model = RecursiveTransformer(config)
    model.initialize(0)
    save_weights(run.weights, model.state_dict(), config)
    run.recipe_file.write_text(yaml.safe_dump({"name": "tiny", "data": {"path": str(data)}}))
    return run


def mor(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["mor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    code = ended.value.code
    return int(code or 0), said.out, said.err
