"""The feature browser's data: what is shown is what the model and the SAE computed, in bounded size, as inert text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from helpers.browser.build import build_state
from helpers.browser.export import export_html, fallback_html, html_page, script_json, static_table
from helpers.browser.state import DEAD, TOKEN_LIMIT, BrowserState, Contrast
from helpers.stats import auroc, auroc_intervals
from tests.browser.worlds import HOSTILE, hostile_state, planted_state


def random_state(n_rows=20, n_tokens=9, d=7, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    tokens = [[f" t{i}.{j}" for j in range(n_tokens + i % 3)] for i in range(n_rows)]
    groups = ["a" if i % 2 else "b" for i in range(n_rows)]
    acts = torch.relu(torch.randn(sum(map(len, tokens)), d, generator=generator) - 0.5)
    return tokens, groups, acts, build_state(tokens, groups, acts, contrasts=[Contrast("a", "a", "b")], **options)


# ---- separation


@pytest.mark.parametrize("round_to", [1, 3], ids=["many ties", "few ties"])
def test_auroc_of_every_column_equals_sklearn(round_to):
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(0.4, 1, (17, 5)).round(round_to), rng.normal(0, 1, (23, 5)).round(round_to)
    estimate, low, high = auroc_intervals(pos, neg)
    truth = np.r_[np.ones(17), np.zeros(23)]
    for j in range(5):
        assert estimate[j] == pytest.approx(roc_auc_score(truth, np.r_[pos[:, j], neg[:, j]]))
    assert (low <= estimate).all() and (estimate <= high).all()


def test_the_interval_of_every_column_is_the_one_of_the_base_statistics():
    rng = np.random.default_rng(1)
    pos, neg = rng.normal(0.7, 1, (21, 6)).round(1), rng.normal(0, 1, (34, 6)).round(1)
    pos[:, 0], neg[:, 0], pos[:, 1], neg[:, 1] = 1, 0, 0, 1  # perfect separation, both ways
    estimate, low, high = auroc_intervals(pos, neg)
    for j in range(6):
        wanted = auroc(pos[:, j], neg[:, j])
        assert [estimate[j], low[j], high[j]] == pytest.approx([wanted.estimate, wanted.low, wanted.high], abs=1e-6)
    assert low[0] < 0.95 and high[1] > 0.05


def test_separating_an_empty_group_is_one_sentence():
    with pytest.raises(ValueError, match="Both classes need rows"):
        auroc_intervals(np.zeros((0, 2)), np.zeros((3, 2)))


# ---- pages and columns


def test_examples_are_the_rows_that_a_plain_loop_finds_with_their_values_in_place():
    tokens, groups, acts, state = random_state(n_examples=3, window=6)
    starts = np.cumsum([0, *map(len, tokens)])
    for latent in range(acts.shape[1]):
        wanted = []
        for name in ("a", "b"):
            own = [i for i, g in enumerate(groups) if g == name]
            own.sort(key=lambda i: -float(acts[starts[i] : starts[i + 1], latent].max()))
            wanted += own[:3]
        wanted.sort(key=lambda i: -float(acts[starts[i] : starts[i + 1], latent].max()))
        found = []
        for doc, start, stop, peak, sparse in state.pages[latent]["examples"]:
            texts = [state.vocab[t] for t in state.docs[doc]["tokens"]]
            row = tokens.index(texts)
            found.append(row)
            values = acts[starts[row] : starts[row + 1], latent]
            assert start <= peak < stop and stop - start == 6
            assert peak == int(values.argmax())
            inside = {p: float(values[p]) for p in range(start, stop) if values[p] != 0}
            shown = dict(zip(sparse[::2], sparse[1::2], strict=True))
            assert shown == pytest.approx(inside, rel=0.01)
            assert state.groups[state.docs[doc]["group"]]["name"] == groups[row]
        assert found == wanted


def test_columns_are_what_a_plain_loop_computes():
    tokens, groups, acts, state = random_state()
    starts = np.cumsum([0, *map(len, tokens)])
    peaks = np.array([acts[s:e].max(dim=0).values.numpy() for s, e in zip(starts, starts[1:], strict=False)])
    is_a = np.array([g == "a" for g in groups])
    for j in range(acts.shape[1]):
        assert state.latents["density"][j] == pytest.approx(float((acts[:, j] != 0).float().mean()), rel=0.01)
        assert state.latents["max"][j] == pytest.approx(float(acts[:, j].max()), rel=0.01)
        assert state.latents["auroc"][0][j] == pytest.approx(roc_auc_score(is_a, peaks[:, j]), rel=0.01)
        for g, group in enumerate(state.groups):
            own = peaks[is_a == (group["name"] == "a"), j]
            assert state.latents["fires"][g][j] == pytest.approx((own != 0).mean(), rel=0.01)
            assert state.latents["mean_peak"][g][j] == pytest.approx(own.mean(), rel=0.01)


def test_planted_latents_get_the_kind_they_were_planted_as():
    state = planted_state()
    assert state.latents["kind"][:5] == [0b01, 0b10, 0b11, DEAD, 0]
    assert not state.pages[3]["examples"]


def test_labels_given_from_outside_decide_the_kind_but_never_revive_the_dead():
    tokens, groups, acts, _ = random_state()
    acts[:, 0] = 0
    labels = {"a": [True] * 7}
    state = build_state(tokens, groups, acts, contrasts=[Contrast("a", "a", "b")], labels=labels)
    assert state.latents["kind"] == [DEAD] + [1] * 6


def test_scores_given_from_outside_replace_the_peaks_in_the_auroc():
    tokens, groups, acts, _ = random_state()
    scores = torch.tensor([[1.0 if g == "a" else 0.0] for g in groups]).expand(-1, 7)
    state = build_state(tokens, groups, acts, contrasts=[Contrast("a", "a", "b")], scores=scores)
    assert state.latents["auroc"][0] == [1.0] * 7


def test_negative_activations_count_by_size_and_keep_their_sign():
    state = planted_state()
    assert state.latents["max"][4] == -1.0
    assert any(v < 0 for v in state.pages[4]["examples"][0][4][1::2])


# ---- size and form


def test_a_state_survives_json():
    state = planted_state()
    assert BrowserState.from_json(state.to_json()) == state


def test_text_that_is_no_state_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="not a browser state"):
        BrowserState.from_json('{"title": 1}')


@pytest.mark.parametrize("limit", [40_000, 15_000])
def test_a_shortened_state_fits_and_keeps_the_most_telling_latents(limit):
    state = planted_state(n_latents=120)
    short = state.shortened(limit)
    assert len(short.to_json()) <= limit and short.n_total == 120
    assert {0, 1, 2} <= set(short.latents["id"])
    for place, number in enumerate(short.latents["id"]):
        mine, theirs = short.pages[place], state.pages[number]
        for (doc, *rest), (old, *old_rest) in zip(mine["examples"], theirs["examples"], strict=False):
            assert rest == old_rest
            shown = [short.vocab[t] for t in short.docs[doc]["tokens"]]
            assert shown == [state.vocab[t] for t in state.docs[old]["tokens"]]
        moved = [[state.vocab[t], v] for t, v in theirs["promoted"]]
        assert [[short.vocab[t], v] for t, v in mine["promoted"]] == moved
    assert all(len(c) == len(short.pages) for c in (short.latents["kind"], *short.latents["auroc"]))


def test_a_limit_below_the_smallest_state_is_one_sentence():
    with pytest.raises(ValueError, match="does not fit into 100 bytes"):
        planted_state().shortened(100)


def test_a_ten_thousand_character_token_is_cut_and_says_so():
    state = hostile_state()
    longest = max(state.vocab, key=len)
    assert len(longest) < TOKEN_LIMIT + 40 and "10,000 characters" in longest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, g, a: ([], [], a), "no prompts"),
        (lambda t, g, a: (t, g[:-1], a), "one name per row"),
        (lambda t, g, a: ([*t[:-1], []], g, a), "without tokens"),
        (lambda t, g, a: (t, g, a[:-1]), "one row per token"),
        (lambda t, g, a: (t, g, a * float("nan")), "NaN"),
        (lambda t, g, a: (t, ["b"] * len(g), a), "needs prompts of the group 'a'"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_in_one_sentence(change, sentence):
    tokens, groups, acts, _ = random_state()
    tokens, groups, acts = change(tokens, groups, acts)
    with pytest.raises(ValueError, match=sentence):
        build_state(tokens, groups, acts, contrasts=[Contrast("a", "a", "b")])


# ---- text stays text


class Tags(HTMLParser):
    """The elements a browser would make of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_hostile_text_adds_no_element_to_the_exported_page():
    tags = [tag for tag, _ in Tags(html_page(hostile_state())).found]
    assert tags.count("script") == 3 and "img" not in tags and "svg" not in tags


def test_hostile_text_adds_no_element_to_the_plain_list():
    tags = {tag for tag, _ in Tags(static_table(hostile_state())).found}
    assert tags <= {"table", "tr", "th", "td", "b"}


def test_the_frame_of_the_notebook_fallback_holds_the_exact_page():
    state = hostile_state()
    frame = next(attrs for tag, attrs in Tags(fallback_html(state)).found if tag == "iframe")
    assert frame["srcdoc"] == html_page(state.shortened(300_000))
    assert frame["sandbox"] == "allow-scripts"


def test_json_inside_a_script_element_reads_back_unchanged():
    text = json.dumps(HOSTILE)
    inside = script_json(text)
    assert not re.search("[<>&]", inside) and json.loads(inside) == HOSTILE


def test_the_exported_page_names_nothing_on_a_network():
    page = html_page(planted_state()).replace("http://www.w3.org/2000/svg", "")  # a name in XML, never asked for
    assert not re.search(r"https?:|//cdn|\bimport\s*\(|fetch\(|XMLHttpRequest|WebSocket", page)
    assert "default-src 'none'" in page


def test_an_export_is_at_most_as_large_as_allowed_and_says_what_is_missing(tmp_path):
    path = export_html(planted_state(n_latents=300), tmp_path / "a b" / "browser.html", max_bytes=120_000)
    assert path.stat().st_size <= 120_000
    assert '"n_total":300' in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["browser.html"]


def test_an_export_needs_an_html_name(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.html"):
        export_html(planted_state(), tmp_path / "browser.pdf")
