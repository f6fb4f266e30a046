"""Conversations to tokens: the ids of the whole text, whichever tokenizer and template."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from finetuning import UserError
from finetuning.data import Conversation, Turn
from finetuning.sequences import Truncation, encode, encode_prompt, render
from smollm2 import default_cache_dir
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

SPACE = "\u2581"
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
SPECIAL = [UNKNOWN, BEGIN, END]
# Answers are of the letters Q and Z, which nothing else here has: so a token tells its turn.
ANSWER = re.compile("[QZqz]")
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "  Hi there,\nwho are you? "),
    Turn("assistant", "QZ ZQ\n\nQ  ZZ", True),
    Turn("user", "And now?"),
    Turn("assistant", "ZZQ", False),
    Turn("user", "Once more \u00e9\U0001f642"),
    Turn("assistant", "Q QQ Z.", True),
)
ONE = (Turn("user", "Who?"), Turn("assistant", "QZ.", True))
CORPUS = [
    "[INST] Be brief. [/INST] QZ ZQ </s>",
    "<|user|>\nHi there, who are you?\n<|assistant|>\nQZ ZQ\n\nQ  ZZ",
    "### Human: And now?\n### Assistant: Q QQ Z. ZZQ.\n\nuser\nassistant\n",
    "USER: Once more ASSISTANT: QZ",
    "<think>\n\n</think>",
] * 3


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        **options,
    )


def _with_begin(tokenizer: Tokenizer, *, end: bool = False) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if end else f"{BEGIN} $A", special_tokens=ids
    )
    return tokenizer


def byte_level(*, trim_offsets: bool, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Tokens still lie within words where nothing splits these: none was learnt across two.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return _fast(tokenizer)


def sentencepiece(
    scheme: str, *, end: bool = False, unigram: bool = False
) -> PreTrainedTokenizerFast:
    """As of Llama 2 and Mistral (`legacy`: a space before every text, `first`), Gemma, T5."""
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    # Its pieces lie within words, as they do where they were learnt with the original library.
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    lines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    replace = normalizers.Replace(" ", SPACE)
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif scheme == "gemma":
        tokenizer.normalizer = replace
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme=scheme, split=unigram
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(_with_begin(tokenizer, end=end))


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT: it changes letters, drops white space, and adds a token at either end."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(_with_begin(tokenizer, end=True))


class SlowTokenizer(PreTrainedTokenizer):
    """In Python, so it does not tell places: runs of one kind of character, white space joined."""

    def __init__(self, **options: Any) -> None:
        self.words = [*SPECIAL]
        super().__init__(bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return re.findall(r"[A-Za-z]{1,2}\.?\n*|\s|.", text)

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self.words:
            self.words.append(token)
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: byte_level(trim_offsets=False),
    "byte-level trimmed": lambda: byte_level(trim_offsets=True),
    "byte-level unsplit": lambda: byte_level(trim_offsets=True, use_regex=False),
    "SentencePiece legacy": lambda: sentencepiece("legacy"),
    "SentencePiece first": lambda: sentencepiece("first"),
    "SentencePiece always": lambda: sentencepiece("always"),
    "SentencePiece never": lambda: sentencepiece("never"),
    "SentencePiece end": lambda: sentencepiece("legacy", end=True),
    "Gemma": lambda: sentencepiece("gemma"),
    "unigram": lambda: sentencepiece("always", unigram=True),
    "WordPiece": word_piece,
    "slow": SlowTokenizer,
}

_INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}SPACE{{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content CHANGE }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES: dict[str, str | None] = {
    "plain": None,
    "inst": _INST.replace("SPACE", " "),
    "inst without space": _INST.replace("SPACE", ""),
    "ChatML": _CHATML.replace("CHANGE", ""),
    "stripping": _CHATML.replace("CHANGE", "| trim"),
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "vicuna": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: "
    "{{ m.content }}{{ eos_token }}{% else %}USER: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "dated": "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "marked": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}",
    "rewriting": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and "
    "loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def _whole(turns: tuple[Turn, ...], tokenizer: Any, *, ask: bool = False) -> list[int]:
    """What transformers makes of the conversation."""
    if tokenizer.chat_template is None:
        text = "".join(segment for segment, _ in render(turns, tokenizer, ask=ask))
        return list(tokenizer(text).input_ids)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=ask
    )
    return list(ids)


@pytest.mark.parametrize("turns", [TURNS, ONE, TURNS[1:3]], ids=["three", "one", "spaced"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_whole_text(
    template: str, turns: tuple[Turn, ...], any_tokenizer: Any
) -> None:
    any_tokenizer.chat_template = TEMPLATES[template]
    example = encode(Conversation(turns, "data:1"), any_tokenizer, 10**6, 10**6, Truncation())
    whole = _whole(turns, any_tokenizer)
    assert list(example.input_ids) == whole[: len(example)]
    assert example.is_target[-1]  # only what follows the last target is left out

    answers = [turn for turn in turns if turn.role == "assistant"]
    texts = [any_tokenizer.decode([token]) for token in example.input_ids]
    of_answer = [i for i, text in enumerate(texts) if ANSWER.search(text)]
    # Letters of the answer that is context are no targets, all others are.
    letters = [len(ANSWER.findall(turn.text)) for turn in answers]
    for turn, count in zip(answers, letters, strict=True):
        taken = 0
        while taken < count:
            taken += len(ANSWER.findall(texts[of_answer[0]]))
            assert example.is_target[of_answer.pop(0)] == turn.is_target
    assert not of_answer
    targets = "".join(t for t, target in zip(texts, example.is_target, strict=True) if target)
    assert targets.count(END) == sum(turn.is_target for turn in turns)
    # Nothing of the prompts is a target, but for what a template writes before the last answer.
    rest = re.sub(r"[\s.#]|" + SPACE, "", ANSWER.sub("", targets.replace(END, "")))
    assert rest in ("", "<think></think>" if template == "rewriting" else "")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_what_transformers_asks(template: str, any_tokenizer: Any) -> None:
    any_tokenizer.chat_template = TEMPLATES[template]
    prompt = encode_prompt(TURNS[:2], any_tokenizer)[0].tolist()
    whole = _whole(TURNS[:2], any_tokenizer, ask=True)
    assert prompt == whole[: len(prompt)]
    added = whole[len(prompt) :]  # by tokenizers that end every text
    assert added in ([], [any_tokenizer.eos_token_id])


def _letters(tokenizer: Any, ids: tuple[int, ...], is_target: tuple[bool, ...]) -> str:
    return tokenizer.decode([i for i, target in zip(ids, is_target, strict=True) if target])


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_across_a_boundary_is_a_target(trim_offsets: bool) -> None:
    """Whether it begins in the prompt or ends in what follows the answer."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"abQZ:;.", "Ġ", ":Q", "Z;", "Ċ"])}
    bpe = Tokenizer(models.BPE(vocabulary, [(":", "Q"), ("Z", ";")], unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    template = (
        "{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }}:{{ m.content }}"
        "{% if not loop.last %};{% endif %}{% endfor %}{% if add_generation_prompt %};b:{% endif %}"
    )
    tokenizer = _fast(bpe, chat_template=template)
    turns = (
        *(Turn("user", "a"), Turn("assistant", "QZ", True)),
        *(Turn("user", "b"), Turn("assistant", " Q ", True)),
    )
    example = encode(Conversation(turns, "data:1"), tokenizer, 99, 99, Truncation())
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert tokens == ["a", ":", "a", ";", "b", ":Q", "Z;", "a", ":", "b", ";", "b", ":"] + [
        *("Ġ", "Q", "Ġ")
    ]
    assert [t for t, target in zip(tokens, example.is_target, strict=True) if target] == [
        *(":Q", "Z;", "Ġ", "Q", "Ġ")
    ]


def test_a_slow_tokenizer_keeps_to_the_rule() -> None:
    tokenizer = SlowTokenizer(
        chat_template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    turns = (
        *(Turn("user", "one"), Turn("assistant", "QZ", True)),
        *(Turn("user", "two"), Turn("assistant", "ZZ.", True)),
    )
    example = encode(Conversation(turns, "data:1"), tokenizer, 99, 99, Truncation())
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert "".join(tokens) == "u:one\n\na:QZ\n\nu:two\n\na:ZZ.\n\n"
    targets = [t for t, target in zip(tokens, example.is_target, strict=True) if target]
    assert targets == ["QZ\n\n", "ZZ.\n\n"]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "inst"])
def test_the_assistant_may_speak_first(template: str, any_tokenizer: Any) -> None:
    any_tokenizer.chat_template = TEMPLATES[template]
    turns = (Turn("assistant", "QZQ", True), Turn("user", "Hi"), Turn("assistant", "ZQ", True))
    example = encode(Conversation(turns, "data:1"), any_tokenizer, 10**6, 10**6, Truncation())
    assert list(example.input_ids) == _whole(turns, any_tokenizer)[: len(example)]
    said = _letters(any_tokenizer, example.input_ids, example.is_target)
    assert "".join(ANSWER.findall(said)).upper() == "QZQZQ"


@pytest.mark.parametrize("limits", [(1, 1), (1, 2), (3, 1), (50, 3)])
@pytest.mark.parametrize("first", [0, 1])
def test_truncation_leaves_a_target_to_predict(
    limits: tuple[int, int], first: int, any_tokenizer: Any
) -> None:
    for template in TEMPLATES.values():
        any_tokenizer.chat_template = template
        turns = (Turn("user", "Hi"), Turn("assistant", "QZQ", True))[first:]
        turns += (Turn("user", "Hi there"), Turn("assistant", "ZQ", True))
        truncation = Truncation()
        example = encode(Conversation(turns, "data:1"), any_tokenizer, *limits, truncation)
        assert any(example.is_target[1:])
        assert len(example) <= sum(limits)
        whole = encode(Conversation(turns, "data:1"), any_tokenizer, 999, 999, Truncation())
        lost = truncation.source_tokens + truncation.target_tokens
        assert len(whole) - lost == len(example)


def test_an_answer_of_one_token_and_nothing_before_it_is_refused() -> None:
    bpe = Tokenizer(models.WordLevel({UNKNOWN: 0, "Q": 1}, unk_token=UNKNOWN))
    tokenizer = _fast(bpe, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    conversation = Conversation((Turn("assistant", "Q", True),), "data:7")
    with pytest.raises(UserError, match="data:7: its answer has no token that others lead into"):
        encode(conversation, tokenizer, 9, 9, Truncation())


def test_a_template_that_marks_other_generations_is_refused() -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(UserError, match="marks 2 generations in a conversation of 1 answers"):
        encode(Conversation(ONE, "data:1"), tokenizer, 9, 9, Truncation())


def test_another_prompt_than_the_answers_is_refused() -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    with pytest.raises(UserError, match="asks for an answer otherwise than it writes one"):
        encode(Conversation(ONE, "data:1"), tokenizer, 9, 9, Truncation())


def test_a_prompt_that_the_template_refuses_is_an_error() -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match=r"the prompt: the chat template refuses .* never"):
        encode_prompt(ONE[:1], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        '{% set form = "%d %b %Y" %}{{ strftime_now(form) }}',
        "{{ 'two\nlines'[:0] }}{{ strftime_now('%d %b %Y') }}",
        "{%- if not date is defined %}{% if strftime_now is defined %}"
        "{%- set date = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date }}",
        "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
    ],
)
def test_a_date_can_be_given(template: str) -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = template + TEMPLATES["zephyr"]  # type: ignore[operator]
    day = datetime(2024, 7, 26)
    texts = {
        "".join(text for text, _ in render(ONE, tokenizer, now=now))
        for now in (day, day.replace(hour=5), datetime(2024, 7, 27))
    }
    assert sorted(text[:11] for text in texts) == ["26 Jul 2024", "27 Jul 2024"]
    assert render(ONE, tokenizer)[0][0][:11] == datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'no end }}",
        "{% for %}",
        "{{ 1 // 0 }}",
        "{{ messages.nothing.at.all }}",
        "{{ [][1] + 1 }}",
    ],
)
@pytest.mark.parametrize("dated", ["", "{{ strftime_now('%d') }}"])
def test_a_template_that_fails_is_a_mistake_of_the_model(template: str, dated: str) -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = dated + template + (TEMPLATES["zephyr"] or "")
    conversation = Conversation(ONE, "data.jsonl:3")
    with pytest.raises(UserError, match=r"data\.jsonl:3: the chat template"):
        encode(conversation, tokenizer, 64, 64, Truncation(), now=datetime(2024, 7, 26))


def test_a_format_made_up_by_the_template_is_refused() -> None:
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = "{{ strftime_now('%' + 'd') }}" + (TEMPLATES["zephyr"] or "")
    with pytest.raises(ValueError, match="its format is not written in the template"):
        render(ONE, tokenizer, now=datetime(2024, 7, 26))


def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(any_tokenizer: Any) -> None:
    any_tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    turns = (Turn("user", f"a <tool> b {END} c"), Turn("assistant", "QZ <tool> Z", True))
    for template in ("ChatML", "vicuna", "plain"):
        any_tokenizer.chat_template = TEMPLATES[template]
        example = encode(Conversation(turns, "data:1"), any_tokenizer, 10**6, 10**6, Truncation())
        assert list(example.input_ids) == _whole(turns, any_tokenizer)[: len(example)]


def test_smollm2_is_trained_on_its_own_rendering() -> None:
    path: Path = default_cache_dir() / "smollm2-135m-instruct"
    if not path.is_dir():
        pytest.skip("SmolLM2 is not in the cache")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    for turns in (TURNS, TURNS[1:], ONE):
        example = encode(Conversation(turns, "data:1"), tokenizer, 10**6, 10**6, Truncation())
        assert list(example.input_ids) == _whole(turns, tokenizer)[: len(example)]
        said = _letters(tokenizer, example.input_ids, example.is_target)
        expected = [turn.text + "<|im_end|>" for turn in turns if turn.is_target]
        assert said == "".join(expected)
