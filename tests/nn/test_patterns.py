"""Patterns of ranks and alphas: they select what PEFT selects, in bounded time."""

from __future__ import annotations

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from qkern.nn import LoRAConfig, _patterns

PATHS = [
    "fc",
    "xfc",
    "block.fc",
    "block.fc.fc",
    "fc.block",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj_2",
    "model.layersX1.self_attn.q_proj",
    "h.0.a+b",
]
KEYS = [
    "fc",
    "^fc",
    "^block.fc",
    "fc.fc",
    "block",
    r"block\.fc",
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.1\.self_attn\.q_proj",
    r".*\.layers\.(1|2)\..*",
    r"model.layers.\d+.self_attn.(q|v)_proj",
    r"(?!.*11).*q_proj",
    r"layers\.[0-9]+?\.self_attn\..+",
    r".*(?<!X)1\.self_attn\.q_proj",
    "a+b",
    r"a\+b",
    "fc|q_proj",
    "fc)|(q_proj",
    "",
]


@pytest.mark.parametrize("key", KEYS)
def test_selects_what_peft_selects(key):
    config = LoRAConfig(r=4, rank_pattern={key: 8}, alpha_pattern={key: 2.5})
    for path in PATHS:
        expected = get_pattern_key([key], path) == key
        assert (config.r_for(path) == 8) == expected, path
        assert (config.alpha_for(path) == 2.5) == expected, path


def test_the_first_that_matches_counts_as_in_peft():
    patterns = {"block.fc": 1, "^fc": 2, "fc": 3, r".*\.q_proj": 4, "q_proj": 5}
    config = LoRAConfig(rank_pattern=patterns)
    for path in PATHS:
        assert config.r_for(path) == patterns.get(get_pattern_key(patterns, path), 16), path


def test_random_expressions_match_as_in_re():
    rng = random.Random(0)
    atoms = r"a b . \. _ [ab] [^a] \d \w \W (a|ab) (?:a|b|) (?=a) (?!b) (?<=a) (?<!b) ^ $ \b \B"
    quantifiers = ["", "", "", "*", "+", "?", "{2}", "{0,2}", "*?"]
    matched = tried = 0
    while tried < 500:
        parts = (
            rng.choice(atoms.split()) + rng.choice(quantifiers) for _ in range(rng.randint(1, 5))
        )
        key = f"({''.join(parts)}){rng.choice(quantifiers)}"
        path = ".".join("".join(rng.choices("ab_0", k=rng.randint(1, 3))) for _ in range(2))
        try:
            expected = re.match(rf"(.*\.)?({key})$", path) is not None
        except re.error:
            continue
        assert _patterns.pattern_matches(key, path) == expected, (key, path)
        tried += 1
        matched += expected
    assert 50 < matched < 450


@pytest.mark.parametrize(
    "key",
    [
        r"([a-z_.]+)+!",
        "(((((a*)*)*)*)*)*!",
        "(a|a)" * 60 + "!",
        ".*" * 8 + "!",
        "(?:a?){3000}!",
        "((a{1000}){1000}){1000}!",
        "a{100000000}!",
    ],
)
def test_work_is_bounded(key):
    """``re`` would take ages here."""
    path = "model.layers_" + "a" * 60 + ".self_attn.q_proj"
    matcher = _patterns._Matcher(path)
    assert not matcher.ends(_patterns._parsed(key), 1)
    assert matcher.steps < 10_000
    assert LoRAConfig(r=4, rank_pattern={key: 8}).r_for(path) == 4


def test_too_much_work_is_refused():
    config = LoRAConfig(r=4, rank_pattern={"a*" + "(?=a*)" * 20 + "!": 8})
    with pytest.raises(ValueError, match="takes more than 20000 steps to match 'aaa"):
        config.r_for("a" * 90)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("(", "'\\(': not a regular expression: missing \\)"),
        ("x{99999999999}", "not a regular expression"),
        (r"(a)\1", "groupref is not taken"),
        ("(?i:a)", "flags such as"),
        ("(" * 40 + ")" * 40, "at most 30 groups"),
        ("(" * 900 + ")" * 900, r"\.\.\.': "),
        ("(a)" * 2000, "got 6000 characters; takes at most 4096"),
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_what_is_not_taken(field, key, message):
    with pytest.raises(ValueError, match=f"{field}: .*{message}"):
        LoRAConfig(**{field: {key: 8}})


def test_keys_are_names():
    with pytest.raises(TypeError, match="rank_pattern: got the key 3"):
        LoRAConfig(rank_pattern={3: 8})
