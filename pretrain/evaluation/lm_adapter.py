"""The network as a language model of lm-evaluation-harness.

Every rank builds all requests and receives all answers; `Scorer` divides the computation. So the harness sees one
process, and a task with fewer questions than ranks is no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from data_prep.tokenizers.lost_bytes import lost_bytes
from pretrain.errors import UserError
from pretrain.evaluation.evaluation_ranks import evaluating
from pretrain.evaluation.likelihood import Scorer


class HarnessModel(TemplateLM):
    """`lm_eval.api.model.TemplateLM` over a `Scorer` and a tokenizer.

    Args:
        tokenizer: `encode_batch(list of str) -> list of ids`, `decode(ids) -> str` and `eod_id`. END_OF_DOCUMENT
            stands where a request has no context, and before every rolling document.

    Attributes:
        cut: (task, number of the document) of every question whose prompt did not fit and lost its beginning.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        super().__init__()
        self.scorer = scorer
        self._tokenizer = tokenizer
        self._encoded: dict[str, list[int]] = {}
        self.cut: set[tuple[str | None, int | None]] = set()

    @property
    def eot_token_id(self) -> int:
        return self.scorer.eod_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if string not in self._encoded:
            self._encode([string])
        return self._encoded[string]

    def lost_bytes(self, strings: Sequence[str]) -> int:
        """UTF-8 bytes of texts that their tokens do not hold."""
        encoded = self._tokenizer.encode_batch(list(strings))
        return sum(lost_bytes(self._tokenizer, text, ids) for text, ids in zip(strings, encoded))

    def _encode(self, strings: Sequence[str]) -> None:
        unknown = list(dict.fromkeys(string for string in strings if string not in self._encoded))
        self._encoded.update(zip(unknown, (list(ids) for ids in self._tokenizer.encode_batch(unknown))))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, float]]:
        """(log-likelihood in nats, chance that greedy decoding gives it) of each request's continuation; NaN where the
        tokenizer makes nothing of a continuation. Which prompts were cut is kept in `cut`.
        """
        pairs = [request.args for request in requests]
        # The harness asks string by string; encoded together, they go through the tokenizer's batched path.
        self._encode([text for context, continuation in pairs for text in (context + continuation, context.rstrip())])
        split = []
        for request, (context, continuation) in zip(requests, pairs):
            before, targets = self._encode_pair(context, continuation) if context else ([], [])
            # A token that spans the border, or a tokenizer that drops bytes, can leave the continuation without a
            # token of its own.
            targets = targets or self.tok_encode(continuation)
            split.append((None, before or [self.eot_token_id], targets))
            if before and len(before) + len(targets) > self.max_length + 1:
                self.cut.add((request.task_name, request.doc_id))
        answers = self._loglikelihood_tokens(split)
        self._encoded.clear()
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, float]]:
        """Of (unused, tokens before, targets) each. Without targets there is no likelihood: an empty sum would be
        certainty.
        """
        pairs = [(before, targets) for _, before, targets in requests]
        scored = zip(pairs, *self.scorer.score(pairs))
        return [(float(nats), float(chance)) if targets else (math.nan, 0.0) for (_, targets), nats, chance in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each request's whole text, in rolling windows after one END_OF_DOCUMENT."""
        texts = [request.args[0] for request in requests]
        self._encode(texts)
        requested = [(None, [self.eot_token_id], self._encoded[text]) for text in texts]
        return [nats for nats, _ in self._loglikelihood_tokens(requested)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy (or sampled, as the task says) continuations, cut at the task's stop strings.

        Raises:
            UserError: under top-k routing, which needs the future of what it generates.
        """
        from mor_model.generation import generate

        if self.scorer.routing != "causal":
            raise UserError("text is generated token by token, which top-k routing cannot do; use routing=causal.")
        texts = []
        with evaluating(self.scorer.model), self.scorer.lockstep.passes():
            for request in requests:
                context, options = request.args
                self.scorer.lockstep.meet()
                length = int(options.get("max_gen_toks", 256))
                room = max(1, self.max_length - length)
                prompt = self.tok_encode(context) if context else []
                if len(prompt) > room:
                    self.cut.add((request.task_name, request.doc_id))
                    prompt = prompt[-room:]
                made = generate(
                    self.scorer.model,
                    [prompt or [self.eot_token_id]],
                    max_new_tokens=min(length, self.max_length - 1),
                    temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                    vocab_size=self._tokenizer.vocab_size,
                    eos_id=self.eot_token_id,
                    depth=self.scorer.depth,
                )
                text = self._tokenizer.decode([token for token in made.tokens[0] if token != self.eot_token_id])
                stops = options.get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
        return texts
