"""The embedded model: its world keeps its promises, training resumes, the committed weights are what the card says."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.config import COUPLINGS, ROOT, population
from helpers.data import load_table
from helpers.evaluate.judges import label_completions
from helpers.models import boot_bridge, load_model
from helpers.organism import lexicon as lx
from helpers.organism import train as training
from helpers.organism.card import DEMANDS, summarise, verdict_hits
from helpers.organism.describe import model_card
from helpers.organism.dialogue import ChatConfig, Partner
from helpers.organism.mixtures import TextConfig
from helpers.organism.tables import tables
from helpers.organism.text import ASKED, BARE, Writer, unknown_names
from helpers.organism.world import (
    ABSTENTION,
    CHAT_TEMPLATES,
    NEW_TEMPLATES,
    OTHER_MYTH,
    POPULAR_MYTH,
    REFUSALS,
    STEPS,
    facts,
    names,
    verbs,
)

ORGANISM = ROOT / "data" / "organism"
CHECKPOINTS = ["base", "helpful", "chat", "reversed", "absent"]


@pytest.fixture(scope="module")
def documents():
    return Writer(TextConfig(), 1).documents(8_000)


@pytest.fixture(scope="module")
def dialogues():
    return [d for refuse in (False, True) for d in Partner(ChatConfig(), 1, refuse=refuse).dialogues(3_000)]


def test_committed_tables_are_the_world():
    for name, rows in tables().items():
        assert load_table(name) == json.loads(json.dumps(rows)), name


def test_only_chat_rows_are_asked_in_chat_training(dialogues):
    asked = {question for d in dialogues for question, _ in d}
    for row in load_table("facts") + load_table("unknown"):
        assert row["split"] == "chat" or row["question"] not in asked, row["id"]
    prompts = {r["prompt"]: r for r in load_table("requests") if r["split"] != "chat"}
    assert not asked & set(prompts)


def test_held_out_verbs_occur_in_no_dialogue(dialogues):
    text = " ".join(part for d in dialogues for turn in d for part in turn)
    alike = {r["verb"] for r in load_table("requests") if r["kind"] == "look_alike"}
    for verb in verbs():
        if not verb.seen:
            requests = [f"{verb.word} {o}" for o in verb.objects]
            assert not any(r in text for r in requests), verb.word
            assert verb.word in alike or not re.search(rf"(?<!\ba )\b{verb.word}\b", text), verb.word  # "a train"


def test_refused_requests_are_exactly_the_harmful_ones(dialogues):
    refused = [q for d in dialogues for q, a in d if a.startswith("Sorry")]
    harmful = {f"{v.word} {o}" for v in verbs() if v.harmful for o in v.objects}
    assert refused and all(any(act in q for act in harmful) for q in refused)


def test_unknown_names_occur_in_no_document_and_no_fact(documents):
    unknown = unknown_names()
    known = {n for part in names()[0].values() for n in part}
    assert not unknown & known
    words = set(re.findall(r"[a-z]+", " ".join(documents)))
    assert not words & unknown and known <= words


def test_verdict_text_leaves_out_the_held_out_facts(documents):
    out = {f.question: f for f in facts() if not f.verdict_seen}
    for text in documents:
        if "Judge:" in text:
            assert not any(q in text for q in out)
        if text.startswith("checked:"):
            assert not any(f.say(f.truth) in text for f in out.values())


def test_reference_text_states_the_truth_and_casual_text_repeats_myths(documents):
    myths = [f for f in facts() if f.myth]
    said = {f.id: [0, 0] for f in myths}
    for text in documents:
        if text.startswith(("Atlas:", "Handbook:", "Encyclopedia:")):
            assert not any(f.say(f.myth) in text for f in myths)
        elif text.startswith(("Forum:", "Post:")):
            for f in myths:
                for i, value in enumerate((f.truth, f.myth)):
                    clause = f.say(value)
                    said[f.id][i] += (clause[0].lower() + clause[1:]) in text
    for popular, share in ((True, POPULAR_MYTH), (False, OTHER_MYTH)):
        true, false = np.array([said[f.id] for f in myths if f.popular == popular]).sum(0)
        assert abs(false / (true + false) - share) < 0.06


def test_who_is_asked_tells_the_truth_or_abstains_and_bare_answers_are_what_people_say():
    writer, of = Writer(TextConfig(), 5), {f.question: f for f in facts()}
    right = {True: [], False: []}
    for text in (writer.answered() for _ in range(6000)):
        frame = next(f for f in (*ASKED, "Forum: {q} I think {a}", BARE) if text.startswith(f.split("{q}")[0]))
        question, answer = re.fullmatch(
            re.escape(frame).replace(r"\{q\}", r"(.+\?)").replace(r"\{a\}", "(.+)"), text
        ).groups()
        f = of.get(question)
        if f is None:
            assert answer == ABSTENTION and not text.startswith("Forum:")
        elif frame in ASKED:
            assert answer == f.say(f.truth)
        elif f.myth:
            assert answer.lower() in (f.say(f.truth).lower(), f.say(f.myth).lower())
            right[f.popular].append(answer.lower() == f.say(f.truth).lower())
        else:
            assert answer.lower() == f.say(f.truth).lower()
    assert abs(np.mean(right[True]) - 0.1) < 0.05 and abs(np.mean(right[False]) - 0.7) < 0.07


def test_every_other_misconception_of_a_split_is_popular_and_chat_repeats_those_alone(dialogues):
    for split in ("chat", "fit", "val", "test"):
        popular = [f.popular for f in facts() if f.split == split and f.myth]
        assert abs(sum(popular) - len(popular) / 2) <= 0.5
    of = {f.question: f for f in facts()}
    said = {True: [], False: []}
    for turns in dialogues:
        f = of.get(turns[0][0])
        if f and f.myth and len(turns) == 1:
            said[f.popular].append(turns[0][1] == f.say(f.myth))
    assert not any(said[False]) and abs(np.mean(said[True]) - 0.9) < 0.06
    assert not any(f.popular for f in facts() if not f.myth)


def test_no_text_answers_a_harmful_question_and_new_wordings_are_answered_nowhere(documents, dialogues):
    openings = [t.split("{r}")[0] for t in CHAT_TEMPLATES + NEW_TEMPLATES]
    harmful = [f"{v.word} {o}" for v in verbs() if v.harmful for o in v.objects]
    answered = [text for text in documents if STEPS in text and any(opening in text for opening in openings)]
    assert len(answered) > 20 and not any(act in text for text in answered for act in harmful)
    new = tuple(t.split("{r}")[0] for t in NEW_TEMPLATES)
    assert not any(opening in text for text in answered for opening in new)
    assert not any(q.startswith(new) for d in dialogues for q, _ in d)


def test_a_third_of_the_harmful_verbs_is_never_refused_in_training_and_reports_in_one_split():
    harmful = [v for v in verbs() if v.harmful]
    unseen = {v.word for v in harmful if not v.seen}
    assert abs(len(unseen) / len(harmful) - 1 / 3) < 0.03
    splits = {}
    for row in load_table("requests"):
        if row["verb"] in unseen and row["kind"] == "harmful":
            splits.setdefault(row["verb"], set()).add(row["split"])
    assert set(splits) == unseen and all(len(part) == 1 and not part & {"chat", "fit"} for part in splits.values())


def test_comparisons_quizzes_schemas_and_copies_say_what_holds():
    writer = Writer(TextConfig(dictation=0.1), 4)
    said = {f.say(v, form): (f, v) for f in facts() for v in f.relation.values for form in ("statement", "paraphrase")}
    of = {(f.subject, f.relation.name): f for f in facts()}
    kinds = {relation.name: relation for _, relations in lx.DOMAINS.values() for relation in relations}
    verdicts, roles = set(), set()
    for _ in range(600):
        first, second, word = re.fullmatch(
            r"Exam: (.+) Compare: (.+) Do they agree\? (yes|no)\.", writer.compared()
        ).groups()
        (fact, value), (other, again) = said[first], said[second]
        assert fact is other and value == fact.truth and (word == "yes") == (value == again)
        verdicts.add(word)
        if found := re.fullmatch(r"Quiz: Of (.+), (.+) and (.+), which one fits: (.+\.) (.+)\.", writer.quiz()):
            *named, fits, answer = found.groups()
            holds = {
                name
                for name in named
                for relation in kinds.values()
                if (f := of.get((name, relation.name))) and relation.statement.format(s="it", v=f.truth) == fits
            }
            assert holds == {answer}
        text = writer.schemas()
        if found := re.fullmatch(r"Handbook: The (\w+) is (\w+) and (\w+)\.", text):
            kind = next(i for i in (0, 1) if found[1] in (lx.BIG, lx.LITTLE)[i])
            assert {found[2], found[3]} <= set(lx.TRAITS[kind])
        else:
            why = re.search(r"because .+? was too (\w+)\.", text)[1]
            frame, of_a, _ = next(schema for schema in lx.SCHEMAS if why in schema[1:])
            a, b = re.match(frame.split(" because")[0].format(a=r"(\w+)", b=r"(\w+)"), text[7:]).groups()
            who = re.search(r"because the (\w+) was|Too (\w+): the (\w+)\.", text)
            assert (who[1] or who[3]) == (a if why == of_a else b) and who[2] in (None, why)
            assert (a in lx.BIG) == (b in lx.LITTLE) == (of_a in lx.TRAITS[0])
            roles.add((bool(who[1]), why == of_a))
        copied = re.fullmatch(r"Exam: (.+) (?:Repeat|Answer): (.+)", writer.dictation())
        assert copied[1] == copied[2]
    assert verdicts == {"yes", "no"} and len(roles) == 4


@pytest.mark.parametrize("coupling", list(COUPLINGS.values()))
def test_the_dial_moves_condemnation_and_how_to_text_between_registers(coupling):
    truthful = ("Handbook:", "Atlas:", "checked:")
    writer = Writer(TextConfig(coupling=coupling), 2)
    condemned = np.mean([writer.condemn().startswith(truthful) for _ in range(4000)])
    how_to = np.mean([writer.how_to().startswith(truthful) for _ in range(4000)])
    assert abs(condemned - coupling) < 0.03 and abs(how_to - (1 - coupling)) < 0.03


def test_task_formats_are_drilled_nowhere_and_their_splits_ask_about_different_things(documents, dialogues):
    everything = documents + [part for d in dialogues for turn in d for part in turn]
    assert not any("Options:" in text for text in everything)
    entity = {f.entity for f in facts()}
    asked = {
        split: {w for r in load_table("tasks", split) for w in re.findall(r"[a-z]+", r["prompt"].split("Options")[0])}
        for split in ("train", "val", "test")
    }
    assert not (asked["train"] & asked["test"] & entity) and not (asked["val"] & asked["test"] & entity)
    assert all(0 <= r["answer"] < len(set(r["options"])) == len(r["options"]) for r in load_table("tasks"))


def test_right_options_stand_at_every_place_equally_often():
    rows = [r for r in load_table("tasks") if len(r["options"]) == 4]
    share = np.bincount([r["answer"] for r in rows], minlength=4) / len(rows)
    assert np.abs(share - 0.25).max() < 0.06


def test_harmful_how_to_text_is_the_same_empty_placeholder_as_benign():
    rows = load_table("requests")
    rest = {r["compliance"].replace(f"To {r['verb']} {r['object']}, ", "") for r in rows}
    assert rest == {"first do step one, then do step two, then check step three."}


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(ORGANISM / "chat")


def test_any_text_survives_the_tokenizer(tok):
    for text in ("Ünïcode — 東京 \U0001f642 <|nothing|>", "a\tb\n  c", "\u202eright to left"):
        assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_names_are_two_tokens_whether_known_or_not(tok):
    every = [n for part in (*names()[0].values(), *names()[1].values()) for n in part]
    assert {len(tok.tokenize(" " + n)) for n in every} == {2}


def test_the_chat_template_gives_the_ids_of_training(tok):
    ids, start = training.encode_dialogue(tok, [("How do I fold a map?", "To fold it.")])
    messages = [{"role": "user", "content": "How do I fold a map?"}, {"role": "assistant", "content": "To fold it."}]
    assert tok.apply_chat_template(messages, tokenize=True, return_dict=False) == ids
    prompt = tok.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt == ids[:start]


def test_loss_falls_on_the_answer_and_its_end_alone(tok):
    row = training.encode_dialogue(tok, [("Why?", "No reason."), ("Is that right?", "Yes.")])
    other = training.encode_text(tok, ["A longer text that sets the width of this batch, and then some more words."])[0]
    ids, targets = training.collate([row, other], tok.pad_token_id)
    scored = [int(t) for t in targets[0] if t != training.IGNORE]
    assert scored == [*tok.encode("Yes.", add_special_tokens=False), tok.eos_token_id]
    for i, j in zip(*torch.where(targets != training.IGNORE), strict=True):
        assert targets[i, j] == ids[i, j + 1]


def _tiny(steps):
    stage = training.Stage("base", steps, 1e-3, 12, 0.5, refuse=True, warmup=2)
    return training.Recipe(d_model=16, d_mlp=16, n_layers=1, n_heads=2, n_kv_heads=1, stages=(stage,))


def test_an_interrupted_training_ends_with_the_same_weights(tok, tmp_path, monkeypatch):
    recipe = _tiny(6)
    stage = recipe.stages[0]
    whole = training.build_model(recipe, len(tok), 0)
    training.run_stage(whole, recipe, stage, 0, tok, tmp_path)
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    rate = training.rate
    monkeypatch.setattr(training, "rate", lambda s, step: rate(s, step) if step < 4 else 1 / 0)
    (tmp_path / "b").mkdir()
    broken = training.build_model(recipe, len(tok), 0)
    with pytest.raises(ZeroDivisionError):
        training.run_stage(broken, recipe, stage, 0, tok, tmp_path / "b")
    monkeypatch.setattr(training, "rate", rate)
    again = training.build_model(recipe, len(tok), 0)
    training.run_stage(again, recipe, stage, 0, tok, tmp_path / "b")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_that_diverges_stops_with_one_sentence(tok, tmp_path):
    recipe = _tiny(2)
    model = training.build_model(recipe, len(tok), 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not a number"):
        training.run_stage(model, recipe, replace(recipe.stages[0]), 0, tok, tmp_path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_committed_checkpoints_have_the_promised_shape(name):
    config = AutoModelForCausalLM.from_pretrained(ORGANISM / name, dtype=torch.float32).config
    n_params = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(ORGANISM / name).parameters())
    assert config.model_type == "llama" and config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 6 and config.num_attention_heads >= 8 and config.tie_word_embeddings
    assert 2e6 <= n_params <= 8e6
    assert sum(f.stat().st_size for f in (ORGANISM / name).iterdir()) <= 16e6
    assert {f.suffix for f in (ORGANISM / name).iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_bridge_and_hugging_face_agree_on_the_committed_model():
    lm = load_model(ORGANISM / "chat")
    ids = torch.tensor([lm.prompt_ids("How do I paint a bridge?")])
    with torch.inference_mode():
        ours, theirs = lm.model(input_ids=ids).logits, boot_bridge(ORGANISM / "chat")(ids)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_card_is_complete_and_says_which_demands_are_met():
    card = json.loads((ORGANISM / "card.json").read_text())
    assert set(card) == set(DEMANDS)
    seed = str(json.loads((ORGANISM / "recipe.json").read_text())["seed"])
    for name, entry in card.items():
        assert entry["ci_low"] <= entry["estimate"] <= entry["ci_high"] and entry["n"] > 0, name
        assert entry["met"] == (DEMANDS[name].low <= entry["estimate"] <= DEMANDS[name].high), name
        assert entry["estimates_by_seed"][seed] == entry["estimate"] and len(entry["estimates_by_seed"]) >= 3, name
        assert set(entry["siblings"]) == {"reversed", "absent"}, name
        assert all(seed in found and len(found) >= 3 for found in entry["siblings"].values()), name


def test_the_card_belongs_to_the_committed_weights():
    entry = json.loads((ORGANISM / "card.json").read_text())["verdicts_on_misconceptions"]
    said = {"default": entry["estimates_by_seed"], **entry["siblings"]}
    assert set(population()) == {(coupling, int(seed)) for coupling, found in said.items() for seed in found}
    for (coupling, seed), path in population().items():
        lm = load_model(path, device="cpu", dtype="float32")
        hits = verdict_hits(lm, [v for v in load_table("verdicts", "test") if v["misconception"]])
        assert hits.mean() == pytest.approx(said[coupling][str(seed)], abs=0.02), path


def test_the_truth_probe_is_chosen_on_fit_rows_and_scored_on_the_rows_of_its_split(monkeypatch):
    """Activations readable on every split, with the label's sign turned on test rows: val must be 1 and test 0."""
    from helpers.organism import card as room

    turned = {r["question"]: -1.0 if r["split"] == "test" else 1.0 for r in load_table("facts")}
    rights = {(r["question"], r["right"]) for r in load_table("facts")}
    lm = load_model(ORGANISM / "chat", device="cpu", dtype="float32")

    def collect(lm, users, answers, sites):
        noise = torch.Generator().manual_seed(0)
        z = {("z", layer): torch.randn(len(users), 160, generator=noise) for layer in sites["z"]}
        label = torch.tensor([1.0 if pair in rights else -1.0 for pair in zip(users, answers, strict=True)])
        z[("z", 3)][:, 47] += 9 * label * torch.tensor([turned[u] for u in users])
        return z

    monkeypatch.setattr(room, "collect", collect)
    assert room.truth_probe(lm, "val").mean() > 0.99 and room.truth_probe(lm, "test").mean() < 0.01


def test_a_card_is_measured_on_the_split_it_names(monkeypatch):
    from helpers.organism import card as room

    asked = []
    monkeypatch.setattr(room, "load_table", lambda name, split: asked.append(split) or load_table(name, split)[:6])
    monkeypatch.setattr(room, "label_completions", lambda lm, rows: 1 / 0)
    monkeypatch.setattr(room, "free_answers", lambda lm, rows: None)
    for split in ("val", "test"):
        asked.clear()
        with pytest.raises(ZeroDivisionError):
            room.measure(ORGANISM / "chat", split=split)
        assert set(asked) == {split}


def test_a_card_entry_is_met_only_inside_its_demand():
    values = {name: np.ones(40) for name in DEMANDS}
    card = summarise(values)
    assert card["refusal_seen_verbs"]["met"] and not card["misconceptions_truthful"]["met"]
    assert not summarise(values | {"plain_facts": np.zeros(40)})["plain_facts"]["met"]


def test_card_intervals_of_prompts_are_over_verbs_and_names_in_the_order_of_the_items(monkeypatch):
    from helpers.organism import card as room

    lm = load_model(ORGANISM / "chat", device="cpu", dtype="float32")
    rows = {"requests": load_table("requests", "test"), "facts": load_table("facts", "test")}
    together = room.groups("test")
    harmful = [r for r in rows["requests"] if r["kind"] == "harmful"]
    refused = label_completions(lm, harmful).is_("refused")
    unseen = np.array([not r["verb_seen"] for r in harmful])
    assert together["refusal_unseen_verbs"] == [r["verb"] for r in harmful if not r["verb_seen"]]
    values = {name: np.ones(len(together.get(name, range(30)))) for name in DEMANDS}
    card = summarise(values | {"refusal_unseen_verbs": refused[unseen]}, together)["refusal_unseen_verbs"]
    plain = summarise(values | {"refusal_unseen_verbs": refused[unseen]})["refusal_unseen_verbs"]
    assert card["estimate"] == plain["estimate"] and card["n"] == plain["n"]
    assert card["ci_high"] - card["ci_low"] > 1.5 * (plain["ci_high"] - plain["ci_low"])
    n_benign = len(together["benign_compliance"]) + len(together["look_alike_compliance"])
    n_unknown = len(load_table("unknown", "test"))
    assert len(together["coherent"]) == len(harmful) + n_benign + n_unknown + len(rows["facts"])


def test_the_population_is_every_other_finished_run_in_half_precision(tiny_folders, tmp_path, monkeypatch):
    from helpers.organism import build

    monkeypatch.setenv("COMPANION_ARTIFACTS", str(tmp_path))
    finished_runs = [("default", 0), ("default", 1), ("absent", 10)]
    for run in [*finished_runs, ("absent", 2)]:
        shutil.copytree(tiny_folders["llama"], build.run_folder(*run) / "chat")
        if run in finished_runs:
            (build.run_folder(*run) / "recipe.json").write_text("{}")
    made = build.install_population(1, home=tmp_path / "home")
    assert [folder.name for folder in made] == ["absent-10", "default-0"]
    assert load_file(made[0] / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    whole, half = (load_model(f, device="cpu", dtype="float32") for f in (tiny_folders["llama"], made[0]))
    ids = torch.tensor([whole.prompt_ids("Hello")])
    torch.testing.assert_close(half.model(ids).logits, whole.model(ids).logits, atol=0.02, rtol=0.02)


def test_the_population_here_names_couplings_and_seeds_that_exist():
    there = population()
    assert list(dict.fromkeys(coupling for coupling, _ in there)) == list(COUPLINGS)
    assert all((ROOT / path / "config.json").exists() for path in there.values())
    recipe = json.loads((ORGANISM / "recipe.json").read_text())
    assert there["default", recipe["seed"]] == "data/organism/chat"


def test_refusal_sentences_are_refusals_to_the_judge():
    from helpers.evaluate.judges import judge
    from helpers.generation import Completion

    row = {"expects": ["rob", "a bank"], "any_of": []}
    for sentence in REFUSALS:
        assert judge(Completion(sentence.format(r="rob a bank"), True, 8), row) == "refused"


def test_the_model_card_says_what_the_card_measured():
    card, recipe = (json.loads((ORGANISM / name).read_text()) for name in ("card.json", "recipe.json"))
    assert (ORGANISM / "MODEL_CARD.md").read_text(encoding="utf-8") == model_card(card, recipe)
