"""What the page asks a running model: the latents of a prompt typed by the reader, and answers with latents scaled.

Every request carries an id that its answer repeats, so that the page can drop answers that come too late. Errors come
back as one sentence: a wrong prompt never ends the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.browser.stack import Stack, reader_of, run, token_texts
from helpers.browser.state import TEXT_LIMIT, TOKEN_LIMIT, BrowserState, clip, short
from helpers.evaluate.judges import judge
from helpers.generation import Completion, generate
from helpers.models import LoadedModel
from helpers.sae.ablation import ablate

FACTORS = (-4.0, 8.0)  # what a latent may be multiplied by
ANSWER_LIMIT = 4000  # characters of an answer that are sent
N_SHOWN = 64  # latents of a prompt that are listed

Judge = Callable[[str, Completion], str]


def by_rule(prompt: str, completion: Completion) -> str:
    """The label of `helpers.evaluate.judges.judge`: refused, complied, abstained or incoherent."""
    return judge(completion)


class Live:
    """A model and its SAEs for the page's questions; `judge` labels an answer to a prompt. Story: notebook 05."""

    def __init__(
        self, lm: LoadedModel, stack: Stack, *, judge: Judge = by_rule, max_new_tokens: int = 48
    ) -> None:
        self.lm, self.stack, self.judge, self.max_new_tokens = lm, stack, judge, max_new_tokens
        self._acts: tuple[str, list[str], Tensor] | None = None
        self._plain: dict[str, Completion] = {}

    def prompt(self, text: str, latent: int | None = None) -> dict[str, Any]:
        """Tokens of the prompt, activations of `latent` at each, and the latents that fire most, with their peaks.

        {"tokens": [text], "values": [number], "latents": [[latent, peak, position], ...]}; values are all zero without
        a latent. ValueError for an empty prompt or one beyond the context.
        """
        tokens, acts = self._activations(text)
        if latent is not None and not 0 <= latent < acts.shape[1]:
            raise ValueError(f"There are latents 0 to {acts.shape[1] - 1}, but latent {latent} was asked for.")
        values = acts[:, latent] if latent is not None else torch.zeros(len(tokens))
        peak, where = acts.abs().max(dim=0)
        order = [i for i in peak.argsort(descending=True, stable=True)[:N_SHOWN].tolist() if peak[i] > 0]
        return {
            "tokens": tokens,
            "values": [short(v) for v in values.tolist()],
            "latents": [[i, short(acts[where[i], i]), int(where[i])] for i in order],
        }

    def steer(self, text: str, latents: Sequence[int], factor: float) -> dict[str, Any]:
        """The greedy answer as it is and with each of `latents` multiplied by `factor` at every token, both labelled.

        Each latent is scaled where its SAE reads; an SAE further up encodes what the edits below it left. 0 takes the
        latents out, 1 changes nothing, 2 doubles them. {"plain": {"text", "label"}, "steered": {"text",
        "label"}, "fired": how many of the latents are active on the prompt}. ValueError for no latents, a factor beyond
        `FACTORS`, a latent that does not exist, or a prompt beyond the context.
        """
        low, high = FACTORS
        if not low <= factor <= high:
            raise ValueError(f"The factor is {factor:g}; choose one from {low:g} to {high:g}.")
        chosen = self._by_site(latents)
        acts = self._activations(text)[1]
        if text not in self._plain:
            self._plain = {text: generate(self.lm, [text], max_new_tokens=self.max_new_tokens)[0]}
        with ExitStack() as edits:
            for site, of_layer in chosen.items():
                saes = {reader.layer: reader for reader in self.stack if reader.site == site}
                edits.enter_context(ablate(self.lm, saes, of_layer, site=site, strength=1 - factor))
            steered = generate(self.lm, [text], max_new_tokens=self.max_new_tokens)[0]
        said = {"plain": self._plain[text], "steered": steered}
        answers = {
            name: {"text": clip(one.text, ANSWER_LIMIT), "label": self.judge(text, one)} for name, one in said.items()
        }
        return answers | {"fired": int((acts[:, list(latents)] != 0).any(dim=0).sum())}

    def _activations(self, text: str) -> tuple[list[str], Float[Tensor, "n d"]]:
        if self._acts is None or self._acts[0] != text:
            ids = self.lm.prompt_ids(text)
            acts = run(self.lm, self.stack, [ids], [0])[0]
            of = token_texts(self.lm.tokenizer, set(ids))
            self._acts = text, [clip(of[i], TOKEN_LIMIT) for i in ids], acts
        return self._acts[1:]

    def _by_site(self, latents: Sequence[int]) -> dict[str, dict[int, list[int]]]:
        """{site: {layer: numbers within that SAE}}."""
        if not latents:
            raise ValueError("There is no latent to steer; choose one in the list, or a preset.")
        chosen: dict[str, dict[int, list[int]]] = {}
        for latent in latents:
            reader, first = reader_of(self.stack, latent)
            chosen.setdefault(reader.site, {}).setdefault(reader.layer, []).append(latent - first)
        return chosen


def answer(request: Mapping[str, Any], state: BrowserState, live: Live | None) -> dict[str, Any]:
    """The reply to one message of the page: {"id", "kind"} and the result's entries, or {"id", "kind", "error"}.

    Kinds: "page" {latent, known}, "search" {text}, "prompt" {text, latent}, "steer" {text, latents, factor}. It never
    raises.
    """
    about = {"id": request.get("id"), "kind": request.get("kind")}
    try:
        return about | _result(request, state, live)
    except Exception as error:  # whatever went wrong is the reader's to read, and the widget lives on
        return about | {"error": sentence(error)}


def sentence(error: BaseException) -> str:
    """An error as one line of text; the type is named where the message was not written for readers."""
    text = " ".join(str(error).split()) or "no message was given"
    named = "" if isinstance(error, ValueError | FileNotFoundError) else f"{type(error).__name__}: "
    return clip(named + text, TEXT_LIMIT)


def _result(request: Mapping[str, Any], state: BrowserState, live: Live | None) -> dict[str, Any]:
    kind = request.get("kind")
    if kind == "page":
        known = int(request["known"])  # texts the page has; making this page may add some
        page = state.page(int(request["latent"]))
        return {"latent": int(request["latent"]), "page": page, "vocab_from": known, "vocab": state.vocab[known:]}
    if kind == "search":
        return {"found": state.search(str(request["text"])) if state.search else []}
    if kind not in ("prompt", "steer"):
        raise ValueError(f"The page asked for {kind!r}; this kernel knows page, search, prompt and steer.")
    if live is None:
        raise ValueError("This browser was opened without a model; open it with browse(model, sae, prompts).")
    if kind == "prompt":
        return live.prompt(str(request["text"]), request.get("latent"))
    return live.steer(str(request["text"]), [int(i) for i in request["latents"]], float(request["factor"]))
