"""From a model, an SAE and prompts to a browser state: run the texts, encode them, describe every latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.browser.build import build_state
from helpers.browser.directions import Directions
from helpers.browser.stack import names_of, open_stack, run, token_texts, warnings_of
from helpers.browser.state import BrowserState, Contrast
from helpers.models import LoadedModel


def gather(
    model: LoadedModel | str | Path,
    sae: Any,
    prompts: Sequence[Any] | Mapping[str, Sequence[Any]],
    *,
    contrasts: Mapping[str, tuple[str, str]] | None = None,
    site: str | None = None,
    layer: int | None = None,
    n_moved: int = 6,
    batch_size: int = 32,
    title: str = "Feature browser",
    **options: Any,
) -> BrowserState:
    """The browser state of `sae` on `prompts`: a list, or {group: list}, of user texts or (user text, answer) pairs.

    `model` is a LoadedModel or a path; `sae` a sae-lens SAE, the folder one was saved in, or {layer: SAE} or
    {(site, layer): SAE} to see several places at once. Two groups are compared with each other; with more, name the
    `contrasts` {name: (positive group, negative group)}. A contrast looks at the answer where there is one, else at the
    whole prompt. `site` and `layer` come from the SAE's own metadata unless given. `options` go to `build_state`.
    Raises ValueError when the SAE does not fit the model or a group is empty. Story: notebook 05.
    """
    lm, stack = open_stack(model, sae, site, layer)
    rows, groups = _rows(prompts)
    parts = [_ids(lm, row) for row in rows]
    ids = [head + answer for head, answer in parts]
    acts, scores, fits = run(lm, stack, ids, [len(head) if answer else 0 for head, answer in parts], batch_size)
    text_of = token_texts(lm.tokenizer, sorted({token for row in ids for token in row}))
    where = ", ".join(dict.fromkeys(f"{reader.site} of layer {reader.layer}" for reader in stack))
    explained = ", ".join(f"{max(0, 100 * (1 - fit.unexplained)):.0f} %" for fit in fits)
    about = {"model": Path(lm.name).name, "site": where, "latents": acts.shape[1], "tokens": len(acts)}
    return build_state(
        [[text_of[token] for token in row] for row in ids],
        groups,
        acts,
        contrasts=_contrasts(contrasts, list(dict.fromkeys(groups))),
        scores=scores,
        score_note="largest activation in the answer (in the prompt, where none was given)",
        promoted=Directions(lm, stack, n_moved=n_moved),
        names=names_of(stack),
        title=title,
        meta={**about, "variance explained": explained, **options.pop("meta", {})},
        warnings=warnings_of(fits),
        **options,
    )


def _rows(prompts: Any) -> tuple[list[Any], list[str]]:
    if isinstance(prompts, str) or not isinstance(prompts, Mapping | Sequence):
        raise ValueError("Prompts must be a list of texts, or a dictionary of such lists, one per group.")
    named = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    for name, texts in named.items():
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(
                f"The prompt group {name!r} is empty or a single text; give a list with at least one prompt."
            )
    if not named:
        raise ValueError("There are no prompts to browse; give at least one.")
    return [row for texts in named.values() for row in texts], [str(n) for n, texts in named.items() for _ in texts]


def _ids(lm: LoadedModel, row: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of its answer (empty without one)."""
    if isinstance(row, str):
        return lm.prompt_ids(row), []
    if not (isinstance(row, Sequence) and len(row) == 2 and all(isinstance(part, str) for part in row)):
        raise ValueError(f"A prompt is a text or a (text, answer) pair of texts, not {row!r:.80}.")
    return lm.prompt_ids(row[0]), lm.answer_ids(row[1])


def _contrasts(named: Mapping[str, tuple[str, str]] | None, groups: list[str]) -> list[Contrast]:
    if named is None:
        return [Contrast(groups[0], groups[0], groups[1])] if len(groups) == 2 else []
    return [Contrast(name, *pair) for name, pair in named.items()]
