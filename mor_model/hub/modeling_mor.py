"""An exported network as a transformers model: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The network itself is the project's own source, exported beside this file. Here is only the interface to transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mor_model.cache import DecodingCache
from mor_model.config import ModelConfig
from mor_model.generation import advance
from mor_model.hub.configuration_mor import MorConfig
from mor_model.layers import RMSNorm
from mor_model.loss import IGNORED_LABEL, Head
from mor_model.model import RecursiveTransformer


class MorCache:
    """Keys and values of a batch in generation, with the interface that transformers expects of a cache."""

    is_compileable = False

    def __init__(self) -> None:
        self.decoding: DecodingCache | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that have been read, the same for all layers."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row `beam_idx[i]` was."""
        if self.decoding is not None:
            self.decoding.reorder(beam_idx)


@dataclass
class MorOutput(ModelOutput):
    """Attributes:
    loss: mean negative log-likelihood (and weighted auxiliary losses in training); None without labels.
    logits: [B, T, V], or of the last positions only where fewer were asked for.
    past_key_values: the cache, where one is used.
    depths: recursion steps each token took, [B, T]; 0 for padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: MorCache | None = None
    depths: Tensor | None = None


class MorForCausalLM(PreTrainedModel, GenerationMixin):
    """A vanilla, recursive or Mixture-of-Recursions language model.

    Routing is by top-k in training mode, as the network was trained, and causal in evaluation mode.
    """

    config_class = MorConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012 - read by transformers as a list
    _supports_sdpa = True

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        if config.network is None:
            raise ValueError("this MorConfig describes no network; load it from an exported folder.")
        # Read here and not by MorConfig: transformers loads the two files as packages of their own, each with its own
        # copy of every class they share.
        network = ModelConfig.from_dict(config.network)
        # Tied by name, for transformers to tie again after it has replaced the parameters by loaded ones.
        tied = {"network.head.weight": "network.embedding.weight"}
        self._tied_weights_keys = tied if network.tie_embeddings else None  # type: ignore[assignment]
        self.network = RecursiveTransformer(network)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Head)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MorCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> MorOutput:
        """Run the network.

        Args:
            input_ids: [B, T]; with a cache, the columns it has not seen.
            attention_mask: [B, columns], 1 on real tokens; None when all are. Padding may stand on either side.
            past_key_values: cache of earlier columns; is added to. Gradients do not flow through it.
            labels: [B, T] like input_ids (shifted here), -100 where nothing is to be predicted.
            use_cache: begin a cache where none is given and no gradient is wanted.
            logits_to_keep: number of last columns to compute logits for; 0 for all.
            others: `num_items_in_batch` divides the summed loss in place of this batch's labels; the rest is ignored.
        """
        if past_key_values is None and use_cache and labels is None and not torch.is_grad_enabled():
            past_key_values = MorCache()
        valid = None
        if attention_mask is not None and not bool(attention_mask.all()):
            valid = attention_mask[:, -input_ids.shape[1] :].bool()
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        if past_key_values is not None:
            hidden, depths = self._continued(input_ids, valid, past_key_values)
            logits = self.network.head(hidden[:, kept])
            return MorOutput(logits=logits, past_key_values=past_key_values, depths=depths)
        following = None
        if labels is not None:
            following = torch.full_like(labels, IGNORED_LABEL)
            following[:, :-1] = labels[:, 1:]
        output = self.network(
            input_ids,
            following,
            documents_BT=torch.zeros_like(input_ids) if self.network.config.document_masking else None,
            valid_BT=valid,
            routing="topk" if self.training else "causal",
            loss_normalizer=others.get("num_items_in_batch"),
            return_logits=True,
            return_routing=True,
        )
        return MorOutput(loss=output.loss, logits=output.logits_BTV[:, kept], depths=output.routing.depth_BT)

    def _continued(self, input_ids: Tensor, valid: Tensor | None, cache: MorCache) -> tuple[Tensor, Tensor]:
        """(normalised hidden states [B, T, D], depths [B, T]) of columns that the cache has not seen."""
        batch, columns = input_ids.shape
        if cache.decoding is None:
            cache.decoding = DecodingCache(self.network.config, batch, input_ids.device)
        if valid is None:
            valid = torch.ones_like(input_ids, dtype=torch.bool)
        cache.columns += columns
        rows = valid.any(1).nonzero().squeeze(1)
        found, taken = advance(self.network, cache.decoding, rows, input_ids[rows], valid[rows])
        if len(rows) == batch:
            return found, taken
        hidden, depths = found.new_zeros(batch, *found.shape[1:]), taken.new_zeros(batch, columns)
        return hidden.index_copy(0, rows, found), depths.index_copy(0, rows, taken)

    def prepare_inputs_for_generation(  # type: ignore[override]  # its arguments change between releases
        self,
        input_ids: Tensor,
        past_key_values: MorCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What `generate` passes to `forward` at each step: the columns that the cache has not seen."""
        if past_key_values is not None:
            # The mask covers all columns; input_ids may be all of them or, when a prompt is read in chunks, the chunk.
            columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            input_ids = input_ids[:, past_key_values.get_seq_length() - columns :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        """Begin the cache here: transformers' own keeps every token at every layer."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MorCache()
