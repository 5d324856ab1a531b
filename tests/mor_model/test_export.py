"""What is exported loads with transformers alone and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mor_model import ConfigError, ModelConfig, RecursiveTransformer
from mor_model.flops import count_parameters
from mor_model.generation import generate
from mor_model.hub.export import export_hf
from mor_model.hub.tokenizer import export_tokenizer
from tests.mor_model.cases import assert_near, enlarged
from tests.mor_model.run_tokenizers import LETTERS, letters_tokenizer, trained_sentencepiece
from tests.mor_model.test_generation import EXPERT, ROUTED, SHAPE, TOKEN

MODELS: dict[str, dict[str, Any]] = {
    "recursive": {**SHAPE, "sharing": "middle_cycle", "recursions": 3, "tie_embeddings": False},
    "expert": {**ROUTED, "router": EXPERT},
    "expert_shared": {**ROUTED, "router": {**EXPERT, "causal": "aux_router"}, "kv_sharing": "shared"},
    "token_bias": {**ROUTED, "router": {**TOKEN, "balance": "bias"}, "kv_sharing": "hybrid"},
    "documents": {**ROUTED, "router": EXPERT, "document_masking": True},
}


def built(shape: dict[str, Any]) -> RecursiveTransformer:
    model = enlarged(ModelConfig.from_dict(shape))
    for name, buffer in model.named_buffers():
        if name.endswith("balance_steps_R"):
            buffer.copy_(torch.tensor([-40, 10, 30]))
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return letters_tokenizer(tmp_path_factory.mktemp("tokenizer") / "letters")


LOADER = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
try:
    import mor_model
    sys.exit("the project can be imported, so this proves nothing")
except ImportError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = {"class": type(model).__name__, "parameters": model.num_parameters()}
    found["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    with torch.no_grad():
        output = model(ids, labels=ids)
    torch.save(output.logits, folder / "logits.pt")
    found["loss"] = output.loss.item()
    found["depths"] = output.depths.tolist()
    batch = tokenizer(["the cat", "a long text on dogs", "b"], return_tensors="pt", padding=True)
    arguments = dict(max_new_tokens=12, do_sample=False)
    ways = {"greedy": {}, "uncached": {"use_cache": False}, "chunked": {"prefill_chunk_size": 5}}
    if folder.name in ("expert_shared", "token_bias"):
        ways |= {"beams": {"num_beams": 3}, "uncached beams": {"num_beams": 3, "use_cache": False}}
    for name, more in ways.items():
        found[name] = model.generate(**batch, **arguments, **more).tolist()
    found["columns"] = batch["input_ids"].shape[1]
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        found["again"] = bool(torch.equal(again(ids).logits, output.logits))
    model.train()
    model(ids, labels=ids).loss.backward()
    found["without gradient"] = [name for name, value in model.named_parameters() if value.grad is None]
    (folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer) -> dict[str, tuple[RecursiveTransformer, Path]]:
    """Every kind of network, exported, loaded and used by a process that cannot import this project."""
    folder = tmp_path_factory.mktemp("exports")
    models = {}
    for name, shape in MODELS.items():
        models[name] = built(shape), export_hf(built(shape), tokenizer, folder / name)
        ids = torch.randint(1, 28, (2, 30), generator=torch.Generator().manual_seed(3))
        (folder / name / "ids.json").write_text(json.dumps(ids.tolist()))
    # Without `site` the editable installation's hooks are not run; only the installed packages are added.
    command = [sys.executable, "-S", "-c", LOADER, sysconfig.get_paths()["purelib"]]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    ran = subprocess.run(
        [*command, *(str(path) for _, path in models.values())],
        env={**offline, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "UNEXPECTED" not in ran.stderr
    assert "MISSING" not in ran.stderr
    return models


@pytest.mark.parametrize("name", MODELS)
def test_a_network_loads_and_computes_the_same_without_this_project(exported, name):
    model, folder = exported[name]
    found = json.loads((folder / "found.json").read_text())
    assert found["class"] == "MorForCausalLM"
    assert found["parameters"] == count_parameters(model.config).total_stored
    assert found["tied"] == model.config.tie_embeddings
    assert found["without gradient"] == []
    assert found["again"]

    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    documents = torch.zeros_like(ids) if model.config.document_masking else None
    with torch.no_grad():
        expected = model(ids, documents_BT=documents, routing="causal", return_routing=True)
    assert_near(torch.load(folder / "logits.pt"), expected.logits_BTV)
    assert found["depths"] == expected.routing.depth_BT.tolist()
    loss = torch.nn.functional.cross_entropy(expected.logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generate_works_without_this_project(exported, name):
    model, folder = exported[name]
    found = json.loads((folder / "found.json").read_text())
    letters = {letter: 1 + place for place, letter in enumerate(LETTERS + " ")}
    prompts = [[letters[letter] for letter in text] for text in ("the cat", "a long text on dogs", "b")]
    expected = generate(model, prompts, max_new_tokens=12, vocab_size=28, eos_id=0).tokens
    for kind in ("greedy", "uncached", "chunked"):
        rows = [row[found["columns"] :] for row in found[kind]]
        width = len(rows[0])
        assert [row[: len(tokens)] for row, tokens in zip(rows, expected)] == expected
        assert all(set(row[len(tokens) : width]) <= {0} for row, tokens in zip(rows, expected))
    assert ("beams" in found) == (name in ("expert_shared", "token_bias"))
    assert found.get("beams") == found.get("uncached beams")


@pytest.mark.parametrize("tied", [True, False])
def test_a_vanilla_network_exports_as_a_plain_llama(tmp_path, tokenizer, tied):
    model = built({**SHAPE, "tie_embeddings": tied, "head_dim": 12, "rope_theta": 5e4})
    folder = export_hf(model, tokenizer, tmp_path / "llama")
    assert not list(folder.glob("*.py"))
    llama = AutoModelForCausalLM.from_pretrained(folder)
    assert type(llama) is LlamaForCausalLM
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    ids = torch.randint(1, 28, (2, 30), generator=torch.Generator().manual_seed(3))
    assert_near(llama(ids).logits, model(ids).logits_BTV)
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids == [20, 8, 5, 27, 3, 1, 20]
    assert llama.generation_config.eos_token_id == 0
    halved = export_hf(model.bfloat16(), tokenizer, tmp_path / "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(halved, dtype="auto").dtype == torch.bfloat16


def test_ids_beyond_the_tokenizers_are_never_chosen_by_transformers(tmp_path, tokenizer):
    model = built({**SHAPE, "vocab_size": 40, "tie_embeddings": False})
    with torch.no_grad():
        model.head.weight[28:] = 100.0 * model.head.weight[:12]
    llama = AutoModelForCausalLM.from_pretrained(export_hf(model, tokenizer, tmp_path / "llama"))
    prompts = torch.randint(1, 28, (3, 4), generator=torch.Generator().manual_seed(3))
    assert (llama(prompts).logits.argmax(-1) >= 28).any()
    made = llama.generate(prompts, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompts))
    assert made.max() < 28
    expected = generate(model, prompts, max_new_tokens=12, vocab_size=28, eos_id=0).tokens
    assert [row[4 : 4 + len(tokens)] for row, tokens in zip(made.tolist(), expected)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"\xff\xfe", "tokenizer_config.json is not readable JSON"),
        ("tokenizer_config.json", b'{"eos_token": {"content": 7}}', "eos_token must be the name of a token"),
        ("tokenizer.json", b"\xff\xfe", "the tokenizer cannot be read"),
        ("tokenizer.json", b'{"model": null}', "the tokenizer cannot be read"),
        ("tokenizer.model", b"no model", "the tokenizer cannot be read"),
    ],
)
def test_damaged_tokenizer_files_are_named(tmp_path, name, content, message):
    source = letters_tokenizer(tmp_path / "letters")
    if name == "tokenizer.model":
        (source / "tokenizer.json").unlink()
    (source / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=message):
        export_tokenizer(source, tmp_path / "out")


def test_an_export_is_whole_or_absent(tmp_path, tokenizer, monkeypatch):
    model = built({**ROUTED, "router": EXPERT})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_hf(model, tokenizer, tmp_path / "full")

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("mor_model.hub.export.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(model, tokenizer, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def sentencepiece_tokenizer(folder: Path, **options: Any) -> Path:
    lines = [
        "the cat sat on the mat, and the dog sat on the log.\n",
        "  naïve café — 12345 你好  \n",
        "\t\tif x == 1:\n",
    ]
    return trained_sentencepiece(folder, lines * 20, vocab_size=330, **options)


PLAIN = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}


@pytest.mark.parametrize("options", [PLAIN, {**PLAIN, "add_dummy_prefix": True}], ids=["as trained here", "as llama"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_becomes_a_tokenizer_with_the_same_ids(tmp_path, kind, options):
    source = sentencepiece_tokenizer(tmp_path / "sentencepiece", model_type=kind, **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    (tmp_path / "out").mkdir()
    assert export_tokenizer(source, tmp_path / "out") == model.eos_id()
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (fast.eos_token_id, fast.pad_token_id) == (model.eos_id(), model.eos_id())

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from("the catsondg \n\t.,1好é🙂"), max_size=40) | st.text(max_size=20))
    def same(text):
        ids = model.EncodeAsIds(text)
        assert fast(text, add_special_tokens=False).input_ids == ids
        assert fast.decode(ids) == model.DecodeIds(ids)

    same()


def test_a_tokenizer_that_cannot_be_carried_over_exactly_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        export_tokenizer(tmp_path / "empty", tmp_path / "out")
    source = sentencepiece_tokenizer(tmp_path / "suffix", model_type="bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(ConfigError, match=r"no exact tokenizer\.json"):
        export_tokenizer(source, tmp_path / "out")
    nameless = letters_tokenizer(tmp_path / "nameless")
    (nameless / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="names no eos_token"):
        export_tokenizer(nameless, tmp_path / "out")


def test_llama_2s_tokenizer_keeps_its_ids_on_real_text(tmp_path, shared_data):
    import zstandard

    source = tmp_path / "llama2"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((shared_data / "tokenizers/llama2/tokenizer.model").read_bytes())
    (tmp_path / "out").mkdir()
    assert export_tokenizer(source, tmp_path / "out") == 2
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    with zstandard.open(shared_data / "valid/wikipedia.jsonl.zst", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"][:3000] for line, _ in zip(stream, range(60))]
    assert sum(map(len, texts)) > 50_000
    for text in texts:
        assert fast(text, add_special_tokens=False).input_ids == model.EncodeAsIds(text)
