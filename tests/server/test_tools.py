"""Calls that a grammar lets through are found again by the parser, however the text is cut; bad tools are refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from everybit.errors import RequestError
from everybit.server.grammar import Grammar, Grammars
from everybit.server.template import ChatTemplate
from everybit.server.tools import (
    CallArguments,
    CallStart,
    Delta,
    Text,
    Tool,
    ToolFormat,
    choose,
    parse_tools,
    plain_arguments,
)
from tests.server.test_grammar import toy

TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "mistral": "{% if tools %}[TOOL_CALLS]{% endif %}",
    "llama": "{% if tools %}" + '{"name": function name, "parameters": dictionary of arguments}' + "{% endif %}",
}
TAGS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"]}
COLOUR = {
    "type": "object",
    "$defs": {"colour": {"enum": ["red", "blue"]}},
    "properties": {"c": {"$ref": "#/$defs/colour"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["c", "n"],
}


def function(name: Any, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


REQUEST = [
    function("get", CITY | {"additionalProperties": False}),
    function("get_all", COLOUR | {"additionalProperties": False}, strict=True, description="All of it"),
]
TOOLS = parse_tools(REQUEST)


class Toy:
    def __init__(self, kind: str, how: str) -> None:
        tags = [] if how == "text" else [AddedToken(tag, special=how == "special") for tag in (*TAGS, "<think>")]
        self.tokenizer: Tokenizer = toy(*tags)
        self.eos = self.tokenizer.token_to_id("</s>")
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.grammars = Grammars(self.tokenizer.to_str(), self.vocabulary, [self.eos])
        self.format = ToolFormat.detect(TEMPLATES[kind], self.tokenizer.to_str())

    def grammar(self, mode: Any, parallel: bool = True, tools: Sequence[Tool] = TOOLS) -> Grammar:
        return self.grammars.tools(self.format.grammar(tools, mode, parallel))

    def takes(self, grammar: Grammar, text: str) -> bool:
        constraint = grammar.start()
        for token in [*self.tokenizer.encode(text).ids, self.eos]:
            logits = np.zeros(self.vocabulary, np.float32)
            constraint.limit(logits)
            if logits[token] != 0:
                return False
            constraint.accept(token)
        return True

    def shown(self, tokens: Sequence[int]) -> str:
        """As the server decodes: special tokens left out, but for the tags."""
        pieces, run = [], []
        for token in tokens:
            if token in self.format.tags:
                pieces += [self.tokenizer.decode(run), self.format.tags[token]]
                run = []
            else:
                run.append(token)
        return "".join([*pieces, self.tokenizer.decode(run)])


@pytest.fixture(scope="module", params=[(kind, how) for kind in TEMPLATES for how in ("text", "added", "special")])
def model(request: pytest.FixtureRequest) -> Iterator[Toy]:
    made = Toy(*request.param)
    yield made
    made.grammars.close()


def parse(format: ToolFormat, pieces: Sequence[str], tools: Sequence[Tool] = TOOLS) -> list[Delta]:
    """All deltas, neighbours of one kind joined."""
    parser = format.parser(tools, random.Random(0))
    found: list[Delta] = []
    for delta in [*(one for piece in pieces for one in parser.feed(piece)), *parser.finish()]:
        last = found[-1] if found else None
        if isinstance(delta, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            assert delta.index == last.index
            found[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            found.append(delta)
    return found


def calls(deltas: Sequence[Delta]) -> list[tuple[str, str]]:
    names = [one for one in deltas if isinstance(one, CallStart)]
    assert [one.index for one in names] == list(range(len(names)))
    texts = {one.index: one.text for one in deltas if isinstance(one, CallArguments)}
    return [(one.name, texts.get(one.index, "")) for one in names]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(one.text for one in deltas if isinstance(one, Text))


def fake(kind: str) -> ToolFormat:
    return ToolFormat.detect(TEMPLATES[kind], toy().to_str())


FORMATS = {kind: fake(kind) for kind in TEMPLATES}


@pytest.mark.parametrize("mode", ["required", "auto"])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_the_grammar_allows_the_parser_finds(model: Toy, mode: str, parallel: bool) -> None:
    grammar = model.grammar(mode, parallel)
    counts = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        constraint, tokens = grammar.start(), list[int]()
        while not constraint.complete and len(tokens) < 400:
            logits = rng.normal(size=model.vocabulary).astype(np.float32) * 2
            logits[model.eos] += 3 if len(tokens) > 10 else -5
            logits[list(model.format.named.values())] += 3
            constraint.limit(logits)
            token = int(logits.argmax())
            assert np.isfinite(logits[token])
            constraint.accept(token)
            tokens.append(token)
        deltas = parse(model.format, model.shown(tokens))
        found = calls(deltas)
        counts.append(len(found))
        if not constraint.complete:
            found = found[:-1]
        for name, arguments in found:
            assert set(json.loads(arguments)) == {"get": {"city"}, "get_all": {"c", "n"}}[name]
        if mode == "required" and constraint.complete:
            assert not text_of(deltas)
            assert found
    assert parallel or max(counts) <= 1
    if mode == "required":
        assert min(counts) >= 1


def message(format: ToolFormat, *written: str, spaced: bool = True) -> str:
    bodies = [one.replace('"arguments"', f'"{format.key}"') for one in written]
    if format.kind == "hermes":
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    return "[TOOL_CALLS][" + ", ".join(bodies) + "]" if format.kind == "mistral" else "; ".join(bodies)


ONE = '{"name": "get", "arguments": {"city": "a</t\\"}"}}'
TWO = '{"name": "get_all", "arguments": {"c": "red", "n": 7}}'


def test_texts_that_each_mode_takes(model: Toy) -> None:
    one, two = message(model.format, ONE), message(model.format, ONE, TWO)
    auto, required = model.grammar("auto"), model.grammar("required")
    single, single_auto = model.grammar("required", parallel=False), model.grammar("auto", parallel=False)
    named = model.grammar("required", tools=TOOLS[1:])
    assert model.takes(named, message(model.format, TWO))
    assert not model.takes(named, one)
    for grammar in (auto, required):
        assert model.takes(grammar, one)
        assert model.takes(grammar, two)
    for grammar in (single, single_auto):
        assert model.takes(grammar, one)
        assert not model.takes(grammar, two)
    for text in ("", "Just text.", "a < b <tool > c [TOOL"):
        assert model.takes(auto, text), text
        assert not model.takes(required, text)
    if "<think>" in model.tokenizer.get_vocab():
        assert model.takes(auto, "<think>hm<think>text")
    for bad in (
        ONE.replace("city", "town"),
        ONE.replace('"a', "3"),
        TWO.replace("red", "green"),
        ONE.replace("get", "no"),
        ONE[:-1],
    ):
        assert not model.takes(auto, message(model.format, bad)), bad
        assert not model.takes(required, message(model.format, bad)), bad
    if model.format.kind != "llama":
        assert model.takes(auto, "Let me see.\n" + two)
        assert not model.takes(required, "Let me see.\n" + two)
        assert not model.takes(auto, f"Well {model.format.opening} nothing")


def test_tags_are_the_tokens_to_show(model: Toy) -> None:
    added = {model.tokenizer.token_to_id(tag): tag for tag in TAGS if model.tokenizer.token_to_id(tag) is not None}
    mine = {model.format.opening, model.format.closing}
    assert model.format.tags == {token: tag for token, tag in added.items() if tag in mine}
    text = message(model.format, ONE)
    assert model.shown(model.tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_parse(kind: str) -> None:
    format = FORMATS[kind]
    deltas = parse(format, [message(format, ONE, TWO)])
    assert calls(deltas) == [("get", '{"city": "a</t\\"}"}'), ("get_all", '{"c": "red", "n": 7}')]
    assert not text_of(deltas)
    ids = [one.id for one in deltas if isinstance(one, CallStart)]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", one) for one in ids)
    assert deltas == parse(format, [message(format, ONE, TWO)])  # of one seed
    begin = "Let me see.\n" if kind != "llama" else "\n "
    deltas = parse(format, [begin + message(format, ONE)])
    assert calls(deltas) == [("get", '{"city": "a</t\\"}"}')]
    assert text_of(deltas) == (begin if kind != "llama" else "")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_arguments_stream_as_they_come(kind: str) -> None:
    format = FORMATS[kind]
    parser = format.parser(TOOLS, random.Random(0))
    text = message(format, TWO)
    place = text.index('"n"')
    found = parser.feed(text[:place])
    assert [type(one) for one in found] == [CallStart, CallArguments]
    assert found[1] == CallArguments(0, '{"c": "red", ')
    assert parser.feed(text[place : place + 2]) == [CallArguments(0, '"n')]


def test_text_streams_but_for_a_beginning_tag() -> None:
    parser = FORMATS["hermes"].parser(TOOLS, random.Random(0))
    assert parser.feed("abc <tool") == [Text("abc ")]
    assert parser.feed("_") == []
    assert parser.feed("box> <") == [Text("<tool_box> ")]
    assert parser.finish() == [Text("<")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hermes", "a <tool_call> is a tag"),
        ("hermes", "<tool_call>\n{"),
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "get", "arguments": "text"}\n</tool_call>'),
        ("hermes", "</tool_call> <tool_call"),
        ("hermes", "<tool_call>" + " " * 2000),
        ("hermes", "<tool_call>" + " " * 2000 + ONE),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", '[TOOL_CALLS][{"name": 3}]'),
        ("llama", '{"answer": 42}'),
        ("llama", '{"name": "Bob", "parameters": {}}'),
        ("llama", 'Like {"name": "get", "parameters": {}}'),
        ("llama", "<|python"),
        ("llama", "\n\n plain"),
        ("llama", "<|python_tag|>print(1)"),
    ],
)
def test_no_call_is_text(kind: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert parse(FORMATS[kind], pieces) == [Text(text)]


@pytest.mark.parametrize(
    ("kind", "text", "found", "rest"),
    [
        ("hermes", f"<tool_call>{ONE}", [ONE], ""),  # cut before its end
        ("hermes", f"<tool_call>{ONE}</tool_c", [ONE], ""),
        ("hermes", f"<tool_call>{ONE}</tool_call> done.", [ONE], " done."),
        ("hermes", f'<tool_call>{ONE[:-1]}, "id": "}}"}}</tool_call>\n\n<tool_call>{TWO}', [ONE, TWO], ""),
        ("hermes", f"<tool_call> <tool_call>{ONE}</tool_call>", [ONE], "<tool_call> "),
        ("mistral", f"[TOOL_CALLS] [{ONE},{TWO}]", [ONE, TWO], ""),
        ("mistral", f"[TOOL_CALLS][{ONE}, no", [ONE], ", no"),
        ("llama", f"<|python_tag|>{ONE};{TWO}", [ONE, TWO], ""),
        ("llama", f"{ONE} and more", [ONE], " and more"),
    ],
)
def test_odd_calls(kind: str, text: str, found: list[str], rest: str) -> None:
    expected = [(json.loads(one)["name"], one[one.index("{", 1) : -1]) for one in found]
    for pieces in ([text], list(text)):
        deltas = parse(FORMATS[kind], pieces)
        assert calls(deltas) == expected
        assert text_of(deltas) == rest


PARTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", ONE, TWO, ONE[:-1], TWO[:20], "[", "]", ", "]
PARTS += ["; ", "\n", " ", "text", "<", "{", "}", '"', "\\", '{"name": "get"', ', "parameters": {"a": [1, "]"]}}']


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.sampled_from(PARTS), max_size=12), st.data())
def test_cuts_do_not_matter(kind: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(FORMATS[kind], [text])
    assert parse(FORMATS[kind], pieces) == whole
    assert parse(FORMATS[kind], list(text)) == whole
    assert not any(isinstance(one, Text | CallArguments) and not one.text for one in whole)
    if not calls(whole):
        assert text_of(whole) == text


def test_detect() -> None:
    tokenizer = toy().to_str()
    with pytest.raises(RequestError, match="does not mention any") as caught:
        ToolFormat.detect("{{ messages }}", tokenizer)
    assert caught.value.parameter == "tools"
    assert ToolFormat.detect("{{ tools }} of a kind nobody knows", tokenizer).kind == "hermes"
    llama = (
        """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name }' }} tools"""
    )
    assert ToolFormat.detect(llama, tokenizer).kind == "llama"
    assert ToolFormat.detect(llama.replace('"', '\\"'), tokenizer).kind == "llama"


def test_detect_of_a_real_template(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "minimind-6400"
    template = ChatTemplate.open(folder)
    assert template is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    format = ToolFormat.detect(template.source, tokenizer.to_str())
    assert format.kind == "hermes"
    assert format.tags == {21: "<tool_call>", 22: "</tool_call>"}
    grammars = Grammars(tokenizer.to_str(), tokenizer.get_vocab_size(), [2])
    constraint = grammars.tools(format.grammar(TOOLS, "auto")).start()
    past = [{"id": "x", "type": "function", "function": {"name": "get", "arguments": '{"city": "Rome"}'}}]
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": past}]
    prompt = template.render(plain_arguments(chat), REQUEST)
    written = prompt[prompt.rindex("<tool_call>") :].partition("<|im_end|>")[0]  # what the template shows of a call
    assert calls(parse(format, [written])) == [("get", '{"city": "Rome"}')]
    for token in [*tokenizer.encode("<think>\nHm.\n</think>\n\n" + written).ids, 2]:
        logits = np.zeros(tokenizer.get_vocab_size(), np.float32)
        constraint.limit(logits)
        assert logits[token] == 0
        constraint.accept(token)
    assert constraint.complete
    grammars.close()


def test_tools_without_parameters_take_any_object() -> None:
    assert parse_tools([function("f")]) == (Tool("f", {"type": "object"}),)
    assert parse_tools([{"type": "function", "function": {"name": "f"}}]) == (Tool("f", {"type": "object"}),)
    assert parse_tools([function("f", {"properties": {"type": {"type": ["string", "null"]}}})])


@pytest.mark.parametrize(
    ("tools", "parameter", "problem"),
    [
        ({}, "tools", "a dict: expected a list"),
        ([], "tools", "0 tools"),
        ([function(f"f{i}") for i in range(129)], "tools", "129 tools"),
        ([3], "tools[0]", "function"),
        ([{"type": "retrieval"}], "tools[0]", "function"),
        ([{"type": "function"}], "tools[0].function.name", "None"),
        ([function("a b")], "tools[0].function.name", "1 to 64"),
        ([function("a\n")], "tools[0].function.name", "1 to 64"),
        ([function("x" * 65)], "tools[0].function.name", "1 to 64"),
        ([function("")], "tools[0].function.name", "1 to 64"),
        ([function("f"), function("f")], "tools[1].function.name", "twice"),
        ([function("f", strict="yes")], "tools[0].function.strict", "neither"),
        ([function("f", description=3)], "tools[0].function.description", "text"),
        ([function("f", [])], "tools[0].function.parameters", "expected an object"),
        ([function("f", {"type": "string"})], "tools[0].function.parameters", "another type"),
        ([function("f", {"type": ["object"]})], "tools[0].function.parameters", "another type"),
        ([function("f", {"properties": {"a": {"type": "text"}}})], "tools[0].function.parameters", "'text'"),
        ([function("f", {"properties": {"a": {"type": [{}]}}})], "tools[0].function.parameters", "holds the type"),
        ([function("f", {"anyOf": [{"items": {"pattern": 3}}]})], "tools[0].function.parameters", "pattern"),
        ([function("f", {"$defs": {"a": {"type": 5}}})], "tools[0].function.parameters", "holds the type"),
        ([function("f", {"a": "x" * 70_000})], "tools[0].function.parameters", "bytes"),
    ],
)
def test_bad_tools(tools: Any, parameter: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        parse_tools(tools)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("schema", [{"pattern": "(("}, {"$ref": "http://127.0.0.1:9/"}, {"unevaluatedItems": False}])
def test_schemas_that_only_the_compiler_refuses(schema: dict[str, Any]) -> None:
    model = Toy("hermes", "text")
    tools = parse_tools([function("f", {"properties": {"a": {"type": "string"} | schema}})])
    with pytest.raises(RequestError, match="cannot be compiled") as caught:
        model.grammar("auto", tools=tools)
    assert caught.value.parameter == "tools"
    model.grammars.close()


def test_many_tools_compile() -> None:
    model = Toy("hermes", "special")
    tools = parse_tools([function(f"f{i}", CITY | {"description": "x" * 500}) for i in range(128)])
    grammar = model.grammar("auto", tools=tools)
    assert model.takes(grammar, message(model.format, ONE.replace("get", "f100")))
    model.grammars.close()


def test_choose() -> None:
    assert choose(None, TOOLS) == ("auto", TOOLS)
    assert choose("none", TOOLS) == ("none", TOOLS)
    assert choose("required", TOOLS) == ("required", TOOLS)
    assert choose({"type": "function", "function": {"name": "get"}}, TOOLS) == ("required", TOOLS[:1])
    for bad in ("any", 3, {}, {"type": "function"}, {"type": "function", "function": {"name": "x"}}, ["auto"]):
        with pytest.raises(RequestError) as caught:
            choose(bad, TOOLS)
        assert caught.value.parameter == "tool_choice"


def test_plain_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    found = plain_arguments(chat)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    assert call["function"]["arguments"] == '{"a": [1]}'  # type: ignore[index]
    assert plain_arguments(found) == found
    for bad in ("{", "[1]", "[" * 5000):
        call["function"]["arguments"] = bad  # type: ignore[index]
        with pytest.raises(RequestError, match="not the JSON text"):
            plain_arguments(chat)
