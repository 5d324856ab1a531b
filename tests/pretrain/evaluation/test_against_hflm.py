"""Our numbers against those of the harness's own Hugging Face model, on exported weights and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.tokenizers.loading import load_tokenizer
from mor_model.config import ExpertChoiceConfig, ModelConfig
from mor_model.hub.export import export_hf
from mor_model.model import RecursiveTransformer
from pretrain.evaluation.harness import run_tasks
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.lm_adapter import HarnessModel
from pretrain.evaluation.suites import benchmarks
from pretrain.evaluation.task_files import plan_tasks
from tests.pretrain.evaluation.runs import NETWORK

SHAPE = NETWORK | {"vocab_size": 600, "num_heads": 4, "num_kv_heads": 2, "context_length": 160, "init_std": 0.3}
CONFIGS = {
    "vanilla": ModelConfig(**SHAPE | {"num_layers": 2, "sharing": "none", "recursions": 1, "router": None}),
    "mor": ModelConfig(**SHAPE | {"router": ExpertChoiceConfig(alpha=1.0)}),
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    text = [Path(__file__).read_text(encoding="utf-8")] * 2
    tokenizer.train_from_iterator(text, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return file


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def both(request, tokenizer_file, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    network = RecursiveTransformer(CONFIGS[request.param]).eval()
    network.initialize(3)
    folder = tmp_path_factory.mktemp("hub")
    exported = export_hf(network, tokenizer_file.parent, folder / request.param)
    with pytest.MonkeyPatch.context() as patch:
        # Not a cache in the home folder, which others use at the same time and which may hold an older export.
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        theirs = HFLM(
            pretrained=str(exported), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4,
            max_length=160,
        )  # fmt: skip
    # What run_tasks asks for besides the harness's interface.
    theirs.lost_bytes, theirs.cut = lambda texts: 0, set()
    tokenizer = load_tokenizer(tokenizer_file)
    return HarnessModel(Scorer(network, tokenizer.eod_id), tokenizer), theirs


@pytest.mark.parametrize("suite", ["wikitext", "lambada", "hellaswag", "arc_easy", "winogrande", "boolq", "blimp"])
def test_every_figure_agrees(both, shared_data, suite):
    ours, theirs = both
    plan = plan_tasks(benchmarks()[suite], shared_data / "eval", hub=False, limit=3)
    assert not plan.skipped
    plan.local = dict(list(plan.local.items())[:5])  # of BLiMP's 67
    found = run_tasks(ours, plan, limit=3)
    expected = run_tasks(theirs, plan, limit=3)
    for name in expected:
        assert found[name]["metrics"] == pytest.approx(expected[name]["metrics"], rel=1e-4)
        assert found[name]["n"] == expected[name]["n"] == 3
