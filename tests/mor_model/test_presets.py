"""Presets: the paper's sizes, and what each variant turns on."""

from __future__ import annotations

import pytest

from mor_model.config import ExpertChoiceConfig
from mor_model.errors import ConfigError
from mor_model.flops import count_parameters
from mor_model.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("name", "non_embedding", "embedding"),
    [("135m", 106e6, 28e6), ("360m", 315e6, 47e6), ("730m", 654e6, 75e6), ("1.7b", 1.61e9, 101e6)],
)
def test_vanilla_sizes_agree_with_the_paper(name, non_embedding, embedding):
    count = count_parameters(preset(name))
    # The paper prints three digits; its count leaves the (tied) embedding out.
    assert count.non_embedding_stored == pytest.approx(non_embedding, rel=0.005)
    assert count.embedding == pytest.approx(embedding, rel=0.02)
    assert count.head == 0
    assert count.total_stored == count.non_embedding_stored + count.embedding


@pytest.mark.parametrize("variant", ["recursive", "mor"])
@pytest.mark.parametrize(("recursions", "non_embedding"), [(2, 167e6), (3, 118e6), (4, 98e6)])
def test_shared_sizes_of_360m_agree_with_the_paper(variant, recursions, non_embedding):
    count = count_parameters(preset("360m", variant, recursions))
    assert count.non_embedding_stored == pytest.approx(non_embedding, rel=0.005)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recursions", [2, 3, 4])
def test_every_preset_has_every_variant(name, recursions):
    vanilla = preset(name)
    recursive = preset(name, "recursive", recursions)
    routed = preset(name, "mor", recursions)
    assert (vanilla.sharing, vanilla.recursions, vanilla.router) == ("none", 1, None)
    assert (recursive.sharing, recursive.recursions, recursive.router) == ("middle_cycle", recursions, None)
    assert routed.router == ExpertChoiceConfig()
    assert routed.num_layers == recursive.num_layers
    assert 0 <= recursive.num_layers - vanilla.num_layers < recursions
    if (name, recursions) == ("135m", 3):
        assert routed.num_layers == 32  # as in the paper


def test_overrides_replace_fields_of_the_preset():
    config = preset("tiny", "mor", 2, vocab_size=100, kv_sharing="shared")
    assert (config.vocab_size, config.kv_sharing) == (100, "shared")


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no '36m'; choose one of tiny, 135m"):
        preset("36m")
    with pytest.raises(ConfigError, match=r"model\.variant: 'moe' is not one of"):
        preset("tiny", "moe")  # type: ignore[arg-type]
    for recursions in (10**30, 0, "3", None, 2.0):
        with pytest.raises(ConfigError, match=r"model\.recursions: must be"):
            preset("tiny", "mor", recursions)  # type: ignore[arg-type]
