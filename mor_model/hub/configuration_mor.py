"""Configuration of an exported network for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# What tools look for by name, and where it stands in the network's own configuration.
_REPEATED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "context_length",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}


class MorConfig(PretrainedConfig):
    """A network's complete configuration under `network`; the other fields repeat what tools look for by name.

    Args:
        network: `mor_model.ModelConfig.to_dict()`. None only where transformers builds an empty one to compare with.
    """

    model_type = "mixture_of_recursions"

    def __init__(self, network: dict[str, Any] | None = None, **others: Any) -> None:
        if network is not None:
            missing = [ours for ours in _REPEATED.values() if not isinstance(network, dict) or ours not in network]
            if missing:
                raise ValueError(f"config.json: its network has no {missing[0]}; export the model again.")
            others |= {name: network[ours] for name, ours in _REPEATED.items()}
        super().__init__(**others)
        self.network = network
