"""Task suites: files to task definitions (always), and the adapter against direct calculation (where lm-eval is)."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everybit
from everybit.cli.main import main
from everybit.engine.runtime import Runtime
from everybit.errors import EverybitError, ModelError, SourceError
from everybit.integrations.lm_eval_tasks import local_task, read_samples
from everybit.tokenizer import Tokenizer

QUESTIONS = [
    {"query": "Question: Which one purrs?", "choices": ["a cat", "a stone", "a lamp"], "gold": 0},
    {"query": "The sun is", "choices": ["hot", "wet"], "gold": 1},
    {"query": "The sun is", "choices": ["wet", "a very far away star"], "gold": 0},
]
FILES: dict[str, list[dict[str, Any]]] = {
    "mini": QUESTIONS,
    "last_word": [{"context": "One two", "continuation": "three"}, {"context": "Up and", "continuation": "down"}],
    "who": [{"context_options": ["Ann saw Bob so Ann", "Ann saw Bob so Bob"], "continuation": "ran.", "gold": 1}] * 3,
    "pairs": [{"good": "The cats sleep.", "bad": "The cats sleeps.", "uid": "x"}] * 2,
}
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: tasks; some 700 MB)"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, samples in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples) + "\n")
    return tmp_path


def test_the_kind_of_a_file_is_told_by_its_fields(data: Path) -> None:
    kinds = {name: local_task(name, data)["output_type"] for name in FILES}
    assert kinds == {
        "mini": "multiple_choice",
        "last_word": "loglikelihood",
        "who": "multiple_choice",
        "pairs": "multiple_choice",
    }
    asked, completed = (local_task("mini", data)["doc_to_text"](sample) for sample in QUESTIONS[:2])
    assert (asked, completed) == ("Question: Which one purrs?\nAnswer:", "The sun is")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "x"}'], "line 1 has not the fields of one kind of task: expected query, choices, gold;"),
        (['{"good": "x", "bad": "y"}', '{"context": "x", "continuation": "y"}'], "line 2 has not the fields"),
        (['{"good": "x", "bad": "y"}', "not json"], "line 2 is not JSON"),
        (
            ['{"query": "x", "choices": ["a", "b"], "gold": 2}'],
            "line 1: gold 2 is not the number of one of its choices",
        ),
        (['{"query": "x", "choices": "ab", "gold": 0}'], "line 1: gold 0 is not the number"),
        ([], "an empty file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=r"t\.jsonl") as found:
        read_samples("t", tmp_path)
    assert message in str(found.value)


def test_an_absent_file_names_those_that_are_there(data: Path) -> None:
    with pytest.raises(SourceError, match="the folder holds last_word, mini, pairs, who"):
        read_samples("absent", data)


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("tasks") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 8), progress=False)
    return str(out)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "give --text FILE, --tasks NAMES or both"),
        (["--tasks", "mini", "--plot", "x.svg"], "--plot has no effect without --text"),
        (["--text", "x.txt", "--limit", "3"], "--limit has no effect without --tasks"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "mini", "--tasks-data", "absent"], "--tasks-data absent: no such folder"),
    ],
)
def test_refusals(overlay: str, capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    assert main(["eval", overlay, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_without_lm_eval_one_line_says_how_to_get_it(
    overlay: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))
    assert main(["eval", overlay, "--tasks", "mini", "--tasks-data", str(data)]) == 2
    assert 'pip install "everybit[tasks]"' in capsys.readouterr().err.splitlines()[-1]


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def loglikelihood(folder: Path, ids: list[int], start: int) -> tuple[float, bool]:
    """Of ids[start:], by one whole pass on a fresh runtime."""
    with Runtime.open(folder, mode="exact", kv_dtype="float32", threads=1) as runtime:
        logits = np.concatenate(list(runtime.score(0, ids[:-1]))).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = range(start - 1, len(ids) - 1)
    return sum(log_p[i, ids[i + 1]] for i in wanted), all(logits[i].argmax() == ids[i + 1] for i in wanted)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    from everybit.integrations.lm_eval import EverybitLM

    with Runtime.open(tiny_llama, mode="exact", kv_dtype="float32", threads=1) as runtime:
        yield EverybitLM(runtime, Tokenizer.open(tiny_llama), progress=False)


@needs_lm_eval
def test_loglikelihood_is_that_of_one_whole_pass(tiny_llama: Path, model: Any) -> None:
    encode = Tokenizer.open(tiny_llama).encode
    # The same context, then another; what was kept of the first must not leak into the second.
    pairs = [("One two", " three"), ("One two", " four or more"), ("One", " two"), ("Up", " and down"), ("", "Alone")]
    found = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = encode(context + continuation)
        expected, likeliest = loglikelihood(tiny_llama, ids, len(encode(context)))
        # float32 sums in another order: 1e-6 of logits of order ten, a dozen tokens
        assert total == pytest.approx(expected, abs=2e-4)
        assert greedy == likeliest
    best = int(model.runtime.vocabulary)
    assert best == 258


@needs_lm_eval
def test_a_greedy_continuation_is_found_greedy(tiny_llama: Path, model: Any) -> None:
    from everybit.engine.generate import generate
    from everybit.engine.sampling import Sampling

    prompt = model.tok_encode("Once")
    model._cached = []
    tokens = list(generate(model.runtime, prompt, Sampling(temperature=0), 5))
    assert model._score(prompt, tokens)[1] is True
    assert model._score(prompt, [*tokens[:-1], (tokens[-1] + 1) % 258])[1] is False


@needs_lm_eval
def test_what_is_longer_than_the_context_is_cut_at_the_left(tiny_llama: Path, model: Any) -> None:
    ids = Tokenizer.open(tiny_llama).encode("x" * 300)
    context, continuation = ids[:-4], ids[-4:]
    assert len(context) > model.runtime.context == 128
    kept = ids[-129:]
    expected, _ = loglikelihood(tiny_llama, kept, len(kept) - 4)
    assert model._score(context, continuation)[0] == pytest.approx(expected, abs=2e-4)


@needs_lm_eval
def test_rolling_scores_every_token_once(tiny_llama: Path, model: Any) -> None:
    text = "Many words that are said again and again, until they are too many. " * 4
    ids = Tokenizer.open(tiny_llama).encode(text)
    assert len(ids) > 2 * 128
    # lm-eval's windows: the first 128 tokens after BOS, the next 128 after the one before them, and the rest with as
    # much context as fits.
    first, _ = loglikelihood(tiny_llama, ids[:129], 1)
    second, _ = loglikelihood(tiny_llama, ids[128:257], 1)
    third, _ = loglikelihood(tiny_llama, ids[-129:], 129 - (len(ids) - 257))
    (found,) = model.loglikelihood_rolling([Request(text)])
    assert found == pytest.approx(first + second + third, abs=2e-3)


@needs_lm_eval
def test_generation_stops_before_the_stop_string(model: Any) -> None:
    from everybit.engine.generate import generate
    from everybit.engine.sampling import Sampling

    (whole,) = model.generate_until([Request("Once", {"until": [], "max_gen_toks": 30})])
    stop = next(character for character in whole if character != whole[0])
    (cut,) = model.generate_until([Request("Once", {"until": [stop, "never"], "max_gen_toks": 30})])
    assert cut == whole[: whole.index(stop)] != ""
    assert model.generate_until([Request("Once", {"until": stop})] * 2) == [cut, cut]  # room for 123 of 256 tokens
    (long,) = model.generate_until([Request("x" * 300, {"max_gen_toks": 100})])
    kept = model.tok_encode("x" * 300)[-64:]  # half of the context
    expected = list(generate(model.runtime, kept, Sampling(temperature=0), 64, None, model.text.eos_ids))
    stream = model.text.stream(kept)
    assert long == "".join(map(stream.add, expected)) + stream.finish()


@needs_lm_eval
def test_logits_that_are_not_numbers_are_no_score(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.zeros((2, 258), np.float32)
    broken[1, 7] = np.nan
    monkeypatch.setattr(model.runtime, "score", lambda *_: iter([broken]))
    with pytest.raises(ModelError, match="holds a number that is not finite"):
        model._loglikelihood_tokens([(None, [0, 5], [0, 0])])


@needs_lm_eval
def test_generation_options_mean_what_lm_eval_says(model: Any) -> None:
    from everybit.engine.sampling import Sampling
    from everybit.integrations.lm_eval import _read_options

    greedy = Sampling(temperature=0)
    assert _read_options({}) == (greedy, 256, [])
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert _read_options({name: 7, "until": "x", "num_beams": 1}) == (greedy, 7, ["x"])
    assert _read_options({"temperature": 0.7})[0] == Sampling(temperature=0.7)
    assert _read_options({"temperature": 0.7, "do_sample": False})[0] == greedy
    assert _read_options({"do_sample": True})[0] == Sampling()
    asked: dict[str, Any] = {"top_k": 9, "top_p": 0.5, "min_p": 0.1, "seed": 3}
    asked |= {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    assert _read_options({"do_sample": True, "temperature": 2, **asked})[0] == Sampling(2, **asked)

    drawn = {"temperature": 5.0, "max_tokens": 12}
    texts = model.generate_until([Request("Once", drawn)] * 3)
    assert len(set(texts)) == 3  # the samples of a task with `repeats: 3`
    assert model.generate_until([Request("Once", drawn)] * 3) == texts
    assert model.generate_until([Request("Once", {**drawn, "seed": 1})] * 2) == texts[1:]
    plain, penalized = (
        model.generate_until([Request("Once", {"max_tokens": 30, **more})])
        for more in ({}, {"repetition_penalty": 50.0})
    )
    assert plain != penalized


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": -1}, "max_gen_toks -1 arrived"),
        ({"max_tokens": "x"}, "is not a number (invalid literal"),
        ({"temperature": None}, "is not a number"),
        ({"temperature": -1, "do_sample": True}, "temperature -1.0: expected 0"),
        ({"top_p": 2}, "top_p 2: expected"),
        ({"num_beams": 10}, "num_beams 10 arrived"),
        ({"max_length": 9}, "generation option 'max_length' arrived"),
        ({"until": [1]}, "until [1] arrived"),
    ],
)
def test_generation_options_that_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EverybitError, match=re.escape(message)) as found:
        model.generate_until([Request("Once", options)])
    assert "\n" not in str(found.value)


@needs_lm_eval
def test_a_chat_template_is_applied(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import evaluate

    from everybit.integrations.lm_eval import EverybitLM, load_tasks

    folder = tmp_path / "1"  # which lm-eval reads as a number
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    monkeypatch.chdir(tmp_path)
    made = EverybitLM.create_from_arg_string("pretrained=1,threads=1")
    text = made.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<s>[user] Hi\n[assistant]"
    bare = made.tok_encode(text[3:])
    assert made.tok_encode(text) == bare  # one BOS
    assert made.chat_template(True).startswith("{{ bos_token }}")
    (tmp_path / "mini.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    found = evaluate(made, load_tasks(["mini"], tmp_path), limit=1, bootstrap_iters=0, apply_chat_template=True)
    (sample,) = found["samples"]["mini"]
    assert sample["arguments"][0][0].startswith("<s>[user] Question: Which one purrs?")
    with pytest.raises(SourceError, match="gen_prefix"):
        made.apply_chat_template([{"role": "assistant", "content": "Hi"}], add_generation_prompt=False)
    with pytest.raises(SourceError, match="--apply_chat_template tool_use arrived"):
        made.chat_template("tool_use")


@needs_lm_eval
def test_a_model_without_a_chat_template_says_so(model: Any) -> None:
    with pytest.raises(SourceError, match="has no chat template: leave --apply_chat_template out"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}])


@needs_lm_eval
def test_local_tasks_are_scored_as_by_hand(tiny_llama: Path, model: Any, data: Path) -> None:
    from everybit.integrations.lm_eval import evaluate_tasks, load_tasks

    scores = {(s.task, s.metric): s for s in evaluate_tasks(model, load_tasks(list(FILES), data))}
    encode = Tokenizer.open(tiny_llama).encode

    def of(context: str, continuation: str) -> float:
        start = len(encode(context)) if context else 1
        return loglikelihood(tiny_llama, encode(context + continuation), start)[0]

    right, norm = [], []
    for sample in QUESTIONS:
        prompt = sample["query"] + ("\nAnswer:" if sample["query"].startswith("Question") else "")
        totals = [of(prompt, f" {choice}") for choice in sample["choices"]]
        right.append(int(np.argmax(totals)) == sample["gold"])
        norm.append(int(np.argmax(np.divide(totals, [len(c) for c in sample["choices"]]))) == sample["gold"])
    acc = scores["mini", "acc"]
    assert (acc.value, acc.samples) == (pytest.approx(np.mean(right)), 3)
    assert acc.stderr == pytest.approx(np.std(right, ddof=1) / 3**0.5)
    assert scores["mini", "acc_norm"].value == pytest.approx(np.mean(norm))

    words = [of(sample["context"], " " + sample["continuation"]) for sample in FILES["last_word"]]
    assert scores["last_word", "perplexity"].value == pytest.approx(np.exp(-np.mean(words)), rel=1e-3)

    (who,) = {json.dumps(sample) for sample in FILES["who"]}
    options = [of(option, " ran.") for option in json.loads(who)["context_options"]]
    assert scores["who", "acc"].value == float(np.argmax(options) == 1)
    pair = FILES["pairs"][0]
    assert scores["pairs", "acc"].value == float(of("", pair["good"]) > of("", pair["bad"]))


@needs_lm_eval
def test_the_command_scores_every_precision_and_the_float_model(
    overlay: str, tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", overlay, "--tasks", "mini,pairs", "--tasks-data", str(data), "--threads", "1"]
    assert main([*given, "--reference", str(tiny_llama), "--limit", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    tasks = json.loads(out)["tasks"]
    assert [row["bits"] for row in tasks["rows"]] == [2, 8]
    for scores in (tasks["float"], *(row["scores"] for row in tasks["rows"])):
        assert [(s["task"], s["metric"], s["samples"]) for s in scores] == [
            ("mini", "acc", 2),
            ("mini", "acc_norm", 2),
            ("pairs", "acc", 2),
        ]
    (data / "text.txt").write_text("Once upon a time.\n" * 20)
    assert main([*given, "--text", str(data / "text.txt"), "--bits", "8"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert ["mini", "acc", "3"] in [line.split()[:3] for line in shown.splitlines()]
    assert "standard errors in brackets" in shown


@needs_lm_eval
def test_unknown_tasks_are_refused(overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", overlay, "--tasks", "no_such_task_at_all"]) == 2
    assert "lm-eval cannot load them" in capsys.readouterr().err.splitlines()[-1]


@needs_lm_eval
def test_blimp_as_measured_independently(shared_data: Path) -> None:
    """Share of pairs whose good sentence is likelier: 0.5315 for stories260k (shared data's README)."""
    from everybit.integrations.lm_eval import EverybitLM, evaluate_tasks, load_tasks

    folder = shared_data / "models" / "stories260k"
    with Runtime.open(folder, mode="exact", kv_dtype="float32") as runtime:
        model = EverybitLM(runtime, Tokenizer.open(folder), progress=False)
        (score,) = evaluate_tasks(model, load_tasks(["blimp_100"], shared_data / "tasks"))
    assert score.samples == 6700
    assert score.value == pytest.approx(0.5315, abs=0.5e-4 + 1 / 6700)  # as printed, and one pair that is a near tie


@needs_lm_eval
def test_lm_eval_makes_the_model_itself(overlay: str, data: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    from everybit.integrations.lm_eval import EverybitLM, evaluate_tasks, load_tasks

    assert get_model("everybit") is EverybitLM
    asked = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # as lm-eval's command does by default
    made = EverybitLM.create_from_arg_string(f"pretrained={overlay},bits=2,threads=1,context=64", asked)
    assert (made.bits, made.runtime.context, made.runtime.threads) == (2, 64, 1)
    expected = {s.metric: s.value for s in evaluate_tasks(made, load_tasks(["mini"], data))}
    task = local_task("mini", data)
    results = simple_evaluate("everybit", f"pretrained={overlay},bits=2", tasks=[task], bootstrap_iters=0)
    assert {m: results["results"]["mini"][f"{m},none"] for m in expected} == expected
    assert EverybitLM.create_from_arg_obj({"pretrained": overlay}).bits == 8


@needs_lm_eval
@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        ("bits=2", {}, "expected model_args pretrained=OVERLAY"),
        ("pretrained=absent", {}, "absent"),
        ("pretrained={0},bits=5", {}, "bits 5 asked"),
        ("pretrained={0},dtype=float16", {}, "model_args 'dtype' arrived"),
        ("pretrained={0}", {"batch_size": 8}, "batch_size 8 arrived"),
        ("pretrained={0},batch_size=auto", {"batch_size": 1}, "batch_size auto arrived"),
        ("pretrained={0},device=cuda:77", {}, "device 'cuda:77' arrived"),
        ("pretrained={0},bits=no.json", {}, "no.json"),
        ("pretrained=0", {}, "0 does not exist"),
        ("pretrained={0},adapter=7", {}, "7: there is no adapter_config.json"),
    ],
)
def test_model_args_that_are_refused(overlay: str, given: str, asked: dict[str, Any], message: str) -> None:
    from everybit.integrations.lm_eval import EverybitLM

    with pytest.raises(EverybitError, match=re.escape(message)):
        EverybitLM.create_from_arg_string(given.format(overlay), asked)


@needs_lm_eval
def test_lm_evals_own_command_knows_the_model(
    overlay: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from everybit.integrations import lm_eval

    task = {
        "task": "one",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "mini.jsonl")}, "cache_dir": str(data / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (data / "one.yaml").write_text(json.dumps(task))
    given = ["run", "--model", "everybit", "--tasks", "one", "--include_path", str(data), "--model_args"]
    codes = []
    for bits in (2, 5):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *given, f"pretrained={overlay},bits={bits}"])
        codes.append(lm_eval.main())
    assert codes == [0, 2]
    out, err = capsys.readouterr()
    assert "|one  |" in out
    assert "everybit: error: bits 5 asked" in err.splitlines()[-1]
