"""One rank of `test_ranks.py`: a ZeRO-3 engine around a network, evaluated in memory; rank 0 writes the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__

from data_prep.tokenizers.loading import load_tokenizer
from mor_model.weights import load_model
from pretrain.evaluation.evaluate import evaluate_model
from pretrain.evaluation.held_out import held_out_files, read_documents
from pretrain.evaluation.settings import Settings
from pretrain.records.run_folder import RunFolder

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = sys.argv[1], Path(sys.argv[2])
    __compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, and nothing has to be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    run = RunFolder(folder)
    engine, *_ = deepspeed.initialize(
        model=load_model(run.weights),
        optimizer=torch.optim.SGD,
        config={
            "train_batch_size": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.module.train()
    documents = read_documents(held_out_files(run), 10**7)[0]
    results = evaluate_model(
        engine.module,
        load_tokenizer(run.tokenizer),
        ["perplexity", "own", "routing"],
        settings=Settings(limit=5),
        documents=documents,
    )
    assert engine.module.training
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results))
    torch.distributed.barrier()
