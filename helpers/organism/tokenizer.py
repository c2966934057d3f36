"""A byte-level BPE tokenizer for the world: any text can be typed in, every common word of the world is one token.

Names are the exception on purpose. Each is two syllable tokens shared by known and unknown names, so that a name's
tokens say nothing about whether the model has ever read about it. Told in notebook 00.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.organism import lexicon as lx
from helpers.organism.dialogue import ChatConfig, Partner
from helpers.organism.mixtures import TextConfig
from helpers.organism.tables import tables
from helpers.organism.text import Writer
from helpers.organism.world import names

SPECIALS = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _words() -> list[str]:
    """Every distinct pre-token of the world's text, names replaced by their syllables."""
    every_name = re.compile("|".join([n for part in (*names()[0].values(), *names()[1].values()) for n in part]))
    texts = Writer(TextConfig(), 0).documents(60_000)
    texts += [
        " ".join(turn)
        for refuse in (False, True)
        for d in Partner(ChatConfig(), 0, refuse=refuse).dialogues(8_000)
        for turn in d
    ]
    for rows in tables().values():
        texts += [str(r[key]) for r in rows for key in ("question", "prompt", "text", "options") if key in r]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = {piece for text in set(texts) for piece, _ in split.pre_tokenize_str(every_name.sub(" ", text))}
    return sorted(found)


def build(folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer and save it in Hugging Face format into ``folder`` (deterministic)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    syllables = [" " + s for s in lx.FIRST_SYLLABLES] + list(lx.SECOND_SYLLABLES)
    words = [w.replace("Ġ", " ") for w in _words()]
    tokenizer.train_from_iterator(syllables * 2000 + words * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
