"""Constrained text is valid whatever the logits say; hostile grammars are refused, soon and with a reason."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from everybit.errors import ModelError, RequestError, ShapeError, SourceError
from everybit.server.grammar import Constraint, Grammar, Grammars

MERGES = [('"', ":"), ("{", '"'), ("e", "n"), ("Ġ", '"'), (":", "Ġ"), ("t", "r"), (",", "Ġ"), ("}", "Ċ"), ('"', "}")]


def toy(*added: AddedToken) -> Tokenizer:
    """Every byte, a few merges over JSON's borders, "</s>" and what is added."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*bytes_, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    for token in added:
        tokenizer.add_tokens([token])
    return tokenizer


def sample(constraint: Constraint, vocabulary: int, seed: int, most: int = 2000) -> list[int]:
    """The likeliest allowed tokens of random logits. Letters grow rarer, so that texts end."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while not constraint.complete and len(tokens) < most:
        logits = rng.normal(size=vocabulary).astype(np.float32) * 3
        constraint.limit(logits)
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        constraint.accept(token)
        tokens.append(token)
    assert constraint.complete, "no end"
    return tokens


class Toy:
    def __init__(self, eos: bool = True, rows: int = 8) -> None:
        self.tokenizer = toy()
        self.eos = self.tokenizer.token_to_id("</s>")
        self.vocabulary = self.tokenizer.get_vocab_size() + rows
        self.grammars = Grammars(self.tokenizer.to_str(), self.vocabulary, [self.eos, 3] if eos else [])

    def allowed(self, constraint: Constraint) -> set[int]:
        logits = np.zeros(self.vocabulary, np.float32)
        constraint.limit(logits)
        assert set(np.unique(logits)) <= {0.0, -np.inf}
        return set(np.flatnonzero(logits == 0).tolist())

    def follow(self, grammar: Grammar, text: str) -> Constraint:
        constraint = grammar.start()
        for token in self.tokenizer.encode(text).ids:
            assert token in self.allowed(constraint), (text, self.tokenizer.id_to_token(token))
            constraint.accept(token)
        return constraint

    def refuses(self, grammar: Grammar, text: str) -> bool:
        constraint = grammar.start()
        for token in self.tokenizer.encode(text).ids:
            if token not in self.allowed(constraint):
                return True
            constraint.accept(token)
        return self.eos not in self.allowed(constraint)


@pytest.fixture(scope="module")
def model() -> Iterator[Toy]:
    made = Toy()
    yield made
    made.grammars.close()


def _person(value: Any) -> bool:
    return (
        list(value) == ["name", "age"]
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 5
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
    )


def _tree(value: Any) -> bool:
    return set(value) <= {"value", "children"} and all(_tree(child) for child in value.get("children", []))


SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "person": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 5},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        _person,
    ),
    "enum": ({"enum": ["red", "green", 7, None, {"a": [1]}]}, lambda v: v in ["red", "green", 7, None, {"a": [1]}]),
    "number": ({"type": "number", "minimum": -1, "exclusiveMaximum": 2.5}, lambda v: -1 <= v < 2.5),
    "array": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        lambda v: 2 <= len(v) <= 4 and all(type(item) is bool for item in v),
    ),
    "nested": (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "string", "pattern": "^[a-c]{1,3}$"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                    },
                    "required": ["value"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        },
        _tree,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("eos", [True, False])
def test_random_logits_give_valid_json(name: str, eos: bool) -> None:
    if name == "number" and not eos:
        return  # its digits end nowhere
    toy = Toy(eos)
    schema, valid = SCHEMAS[name]
    grammar = toy.grammars.json_schema(schema)
    texts = set()
    for seed in range(20):
        tokens = sample(grammar.start(), toy.vocabulary, seed)
        text = toy.tokenizer.decode([token for token in tokens if token not in toy.grammars.eos_ids])
        assert valid(json.loads(text)), text
        texts.add(text)
    assert len(texts) > 3
    toy.grammars.close()


def test_json_object_takes_objects_only(model: Toy) -> None:
    grammar = model.grammars.json_object()
    for text in ('{"a": [1, {"b": null}], "é\\n": "x"}', "{}", '{\n  "a": 1\n}'):
        constraint = model.follow(grammar, text)
        assert constraint.complete
        assert model.allowed(constraint) == {model.eos, 3}  # all that the model stops at, and nothing else
    for text in ("[1]", "3", '"a"', '{"a": }', '{"a": 1', "{'a': 1}", ' {"a": 1}', '{"a":' + " " * 50 + "1}"):
        assert model.refuses(grammar, text), text


def test_an_end_is_allowed_where_the_text_may_end(model: Toy) -> None:
    constraint = model.follow(model.grammars.regex("ab+c?"), "abb")
    assert not constraint.complete
    assert {model.eos, 3} < model.allowed(constraint)
    constraint.accept(model.eos)
    assert constraint.complete
    assert model.allowed(constraint) == {model.eos, 3}
    assert model.eos not in model.allowed(model.follow(model.grammars.regex("ab+"), "a"))


def test_a_text_token_that_ends_the_model_is_no_text(model: Toy) -> None:
    """Token 3 is a byte that stops this model: the grammar must not let it come inside of a text."""
    letter = model.tokenizer.id_to_token(3)
    grammar = model.grammars.regex(f"x{re.escape(letter)}*y")
    assert 3 not in model.allowed(model.follow(grammar, "x"))


def test_without_eos_tokens_nothing_follows() -> None:
    toy = Toy(eos=False)
    constraint = toy.follow(toy.grammars.regex("ab"), "ab")
    assert constraint.complete
    assert toy.allowed(constraint) == set()
    assert toy.allowed(toy.grammars.regex("a*").start()) == toy.allowed(toy.grammars.regex("a+").start())
    toy.grammars.close()


def test_rows_that_no_token_has_are_never_allowed(model: Toy) -> None:
    known = model.tokenizer.get_vocab_size()
    for grammar in (model.grammars.regex("(?s:.*)"), model.grammars.json_object()):
        assert max(model.allowed(grammar.start())) < known
    short = Grammars(model.tokenizer.to_str(), known - 5, [])  # and a model may have fewer
    logits = np.zeros(known - 5, np.float32)
    short.regex("(?s:.*)").start().limit(logits)
    assert (logits == 0).sum() > 100
    short.close()


def test_lark(model: Toy) -> None:
    grammar = model.grammars.lark('start: "say " WORD ("," WORD)*\nWORD: /[a-z]+/')
    assert not model.refuses(grammar, "say a,bc,d")
    assert model.refuses(grammar, "say a,")
    named = model.grammars.lark('start: "a" </s> "b"')  # a grammar may name a special token, also one that ends
    constraint = model.follow(named, "a")
    assert model.allowed(constraint) == {model.eos}


def test_constraints_of_one_grammar_are_apart(model: Toy) -> None:
    grammar = model.grammars.regex("abc|xyz")
    one, other = grammar.start(), grammar.start()
    one.accept(model.tokenizer.token_to_id("a"))
    other.accept(model.tokenizer.token_to_id("x"))
    assert model.allowed(one) == {model.tokenizer.token_to_id("b")}
    assert model.allowed(other) == {model.tokenizer.token_to_id("y")}
    assert model.allowed(model.grammars.regex("abc|xyz").start()) == {
        model.tokenizer.token_to_id(letter) for letter in "ax"
    }


def test_a_token_that_does_not_fit_ends_the_sequence(model: Toy) -> None:
    constraint = model.grammars.regex("abc").start()
    with pytest.raises(ModelError, match="cannot follow by the grammar"):
        constraint.accept(model.tokenizer.token_to_id("z"))
    with pytest.raises(ModelError, match="too complex"):
        constraint.limit(np.zeros(model.vocabulary, np.float32))
    assert not constraint.complete


def test_a_grammar_that_grows_too_complex_is_an_error(model: Toy) -> None:
    constraint = model.grammars.regex("((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}").start()

    def go_on() -> None:
        for _ in range(50):
            constraint.limit(np.zeros(model.vocabulary, np.float32))
            constraint.accept(model.tokenizer.token_to_id("a"))

    with pytest.raises(ModelError, match=r"too complex|cannot follow"):
        go_on()


def test_wrong_logits(model: Toy) -> None:
    constraint = model.grammars.json_object().start()
    for logits in (np.zeros(model.vocabulary), np.zeros(5, np.float32), np.zeros((1, model.vocabulary), np.float32)):
        with pytest.raises(ShapeError, match="expected f32"):
            constraint.limit(logits)  # type: ignore[arg-type]


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _patterns(count: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.{{1,20}}{i}"} for i in range(count)]


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "deep": ("json_schema", _deep(300), "nested deeper than 64"),
    "large": ("json_schema", {"enum": [f"value {i}" for i in range(9000)]}, "bytes, expected at most 65536"),
    "no object": ("json_schema", [1], "expected an object"),
    "not a number": ("json_schema", {"minimum": float("nan")}, "is no JSON"),
    "unknown keyword": ("json_schema", {"unevaluatedProperties": False}, "unevaluatedProperties"),
    "remote": ("json_schema", {"$ref": "http://127.0.0.1:9/x.json"}, "cannot be compiled"),
    "itself": ("json_schema", {"$ref": "#"}, "cannot be compiled"),
    "itself and more": ("json_schema", {"allOf": [{"$ref": "#"}, {"type": "object"}]}, "circular"),
    "type": ("json_schema", {"type": "strin"}, "Invalid type"),
    "pattern": ("json_schema", {"type": "string", "pattern": "(("}, "unclosed group"),
    "contradiction": ("json_schema", {"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    "conjunction": ("json_schema", {"allOf": _patterns(40)}, "takes more than"),
    "disjoint": (
        "json_schema",
        {"patternProperties": {f"^a{i}x.*b.*c$": {} for i in range(1000)}, "type": "object"},
        "takes more than",
    ),
    "multiples": (
        "json_schema",
        {"anyOf": [{"type": "integer", "multipleOf": 999983 - i, "minimum": 0} for i in range(16)]},
        "takes more than",
    ),
    "half a pair": ("json_schema", {"const": "\ud800"}, "cannot"),
    "regex": ("regex", "a(", "unclosed"),
    "look-around": ("regex", "(?=a)b", "look-around"),
    "deep regex": ("regex", "(" * 5000 + "a" + ")" * 5000, "invalid regex"),
    "long regex": ("regex", "a" * 20_000, "20000 bytes"),
    "empty regex": ("regex", "", "not empty"),
    "no regex": ("regex", 7, "expected a text"),
    "half a pair in a regex": ("regex", "\ud800", "Unicode"),
    "no rule": ("lark", "start: foo", "unknown name"),
    "no token": ("lark", "start: <|nope|>", "unknown special token"),
    "import": ("lark", "%import os.system\nstart: system", "cannot be compiled"),
    "deep lark": ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    "stack": ("lark", "start: X0\n" + "".join(f"X{i}: X{i + 1}\n" for i in range(900)) + "X900: /a/", "takes more"),
    "and": ("lark", "start: X\nX: " + " & ".join(f"/.*{i}.{{1,20}}x.*/" for i in range(600)), "takes more|cannot be"),
    "schema in lark": ("lark", f"start: %json {json.dumps({'allOf': _patterns(30)})}", "takes more than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_soon(model: Toy, name: str) -> None:
    kind, text, problem = HOSTILE[name]
    model.grammars.json_schema({"const": name})  # the process that tries grammars may have to start again before
    begin = time.process_time()
    with pytest.raises(RequestError, match=problem) as caught:
        getattr(model.grammars, kind)(text)
    assert time.process_time() - begin < 0.25  # ours; the other process has a limit of its own
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.parameter == {"json_schema": "response_format", "regex": "regex", "lark": "grammar"}[kind]
    assert not model.refuses(model.grammars.regex("ab*"), "abb")  # and the next one is served


def test_grammars_that_only_look_hostile_are_served(model: Toy) -> None:
    model.grammars.regex("(a{1,1000}){1,1000}")
    model.grammars.json_schema({"enum": [f"value {i}" for i in range(3000)]})
    model.grammars.json_schema(_deep(30))
    model.grammars.json_schema({"type": "string", "maxLength": 10**9})


def test_the_guard_comes_back_when_it_is_ended(model: Toy) -> None:
    model.grammars.regex("first")
    model.grammars._guard._running[0].kill()
    assert not model.refuses(model.grammars.regex("second"), "second")
    model.grammars.close()
    assert not model.refuses(model.grammars.regex("third"), "third")


def test_the_guard_ends_with_its_owner() -> None:
    toy = Toy()
    process = toy.grammars._guard._running[0]
    assert process.poll() is None
    del toy
    gc.collect()
    assert process.poll() is not None


def test_the_cache_is_bounded(model: Toy) -> None:
    for i in range(80):
        model.grammars.regex(f"cached{i}")
    assert len(model.grammars._cache) == 64


def test_many_threads(model: Toy) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                schema = {"type": "array", "items": {"enum": [number, i]}, "minItems": 1, "maxItems": 3}
                tokens = sample(model.grammars.json_schema(schema).start(), model.vocabulary, i)
                tokens = [token for token in tokens if token not in model.grammars.eos_ids]
                assert set(json.loads(model.tokenizer.decode(tokens))) <= {number, i}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_tokenizer_without_bytes_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(SourceError, match="ByteLevel or ByteFallback"):
        Grammars(tokenizer.to_str(), 2)
    with pytest.raises(SourceError, match="cannot be used for constrained decoding"):
        Grammars("{", 2)


@pytest.mark.parametrize("name", ["models/stories260k", "tokenizers/gpt2-50257", "tokenizers/minimind-6400"])
def test_real_tokenizers(shared_data: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(str(shared_data / name / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    grammars = Grammars(tokenizer.to_str(), vocabulary, [2])
    schema, valid = SCHEMAS["person"]
    for seed in range(5):
        tokens = sample(grammars.json_schema(schema).start(), vocabulary, seed)
        assert valid(json.loads(tokenizer.decode([token for token in tokens if token != 2])))
    grammars.close()
