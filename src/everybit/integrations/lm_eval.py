"""Task suites of EleutherAI's lm-evaluation-harness on the native engine: `everybit eval OVERLAY --tasks piqa`.

    with Runtime.open("overlay") as runtime:
        scores = evaluate_tasks(EverybitLM(runtime, Tokenizer.open("overlay"), bits=4), load_tasks(["piqa"]))

Importing this module also makes `everybit` a model type of lm-eval, which looks for none itself; so its own command is
run through it:

    python -m everybit.integrations.lm_eval run --model everybit --model_args pretrained=overlay,bits=4 --tasks piqa

Needs: lm-eval 0.4.13 or newer of 0.4 (the extra `tasks`). It brings no torch, and neither does this module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from numpy.typing import NDArray
from tqdm import tqdm

from everybit.engine.generate import choose_bits, generate
from everybit.engine.plan import Plan, Precision
from everybit.engine.runtime import Runtime
from everybit.engine.sampling import Sampling
from everybit.errors import EverybitError, ModelError, SourceError, reason
from everybit.integrations.lm_eval_tasks import local_task
from everybit.server.template import ChatTemplate
from everybit.tokenizer import Tokenizer

F32 = NDArray[np.float32]
NEW_TOKENS = 256  # of generate_until where the task does not say, as lm-eval's own models
SAMPLING = {field.name for field in fields(Sampling)} - {"temperature", "logit_bias"}  # may be asked by those names
BOOTSTRAPS = 1000  # for metrics without a standard error in closed form (lm-eval's own default is 100,000)


@dataclass(frozen=True)
class Score:
    """One metric of one task; `stderr` is None where lm-eval has no estimate of it."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


class EverybitLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types we could check against
    """An `lm_eval.api.model.LM` that runs in `Runtime`, at one precision (0 for float weights) or by a plan.

    A prompt that begins as the one before it keeps its place in the cache, so that the choices of one question cost
    little more than one of them.
    """

    def __init__(
        self, runtime: Runtime, tokenizer: Tokenizer, bits: Precision | None = None, progress: bool = True
    ) -> None:
        super().__init__()
        self.runtime, self.text = runtime, tokenizer
        self.bits = choose_bits(runtime, bits)
        self._bars: dict[str, Any] = {"file": sys.stderr, "disable": None if progress else True}
        self._cached: list[int] = []
        bare, some = tokenizer.encode(""), tokenizer.encode("a")
        same = next((i for i, (x, y) in enumerate(zip(bare, some, strict=False)) if x != y), min(len(bare), len(some)))
        self._before, self._after = bare[:same], len(bare) - same  # special tokens that the tokenizer adds
        self._prefix = _first_token(runtime.checkpoint.config, tokenizer, self._before)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> EverybitLM:
        """From lm-eval's --model_args, `pretrained=OVERLAY,bits=4,...`; the rest as `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> EverybitLM:
        """`pretrained` (a folder), and if wanted `bits` (a number or a plan, PLAN.json), `adapter` (a folder),
        `context`, `threads`, `mode` (exact, as in `everybit eval`, unless it says default or fast) and `device` (cuda,
        cuda:0, ...).

        `additional_config`: lm-eval's --batch_size has to be 1; its --device, which it sets to cuda:0 itself, is
        not looked at. Raises: SourceError for other options; as Runtime
        """
        given, asked = dict(arg_dict), additional_config or {}
        for name in ("batch_size", "max_batch_size"):
            if str(value := given.pop(name, None) or asked.get(name) or 1) != "1":
                raise SourceError(f"{name} {value} arrived, everybit scores one text at a time: leave it out")
        folder, bits, device = given.pop("pretrained", None), given.pop("bits", None), given.pop("device", "cpu")
        if unknown := sorted(set(given) - {"adapter", "context", "threads", "mode"}):
            raise SourceError(
                f"model_args {unknown[0]!r} arrived, expected pretrained, bits, adapter, context, threads, mode or "
                "device"
            )
        if folder in (None, ""):
            raise SourceError("no model arrived: expected model_args pretrained=OVERLAY,bits=4 or another precision")
        folder = str(folder)  # lm-eval makes a number of a folder called 1
        if given.get("adapter") is not None:
            given["adapter"] = str(given["adapter"])
        if device == "cpu":
            given = {"mode": "exact", **given}
        else:
            from everybit.gpu.engine import Device, open_device

            open_device(device)
            given["backend"] = partial(Device, device=device)
        runtime = Runtime.open(folder, kv_dtype="float32", **given)
        if isinstance(bits, str):
            bits = Plan.open(bits, runtime.checkpoint.overlay)
        return cls(runtime, Tokenizer.open(folder), bits)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the first one where the model has none."""
        return min(self.text.eos_ids, default=self._prefix)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's leading special tokens unless `add_special_tokens` is False, never trailing ones.

        (A context that ends in the tokenizer's own EOS could not be continued.) A text that holds the leading ones, as
        a chat template writes them, does not get them twice.
        """
        ids, before = self.text.encode(string), len(self._before)
        ids = ids[: len(ids) - self._after]
        return ids[before:] if add_special_tokens is False or ids[before : 2 * before] == self._before else ids

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells apart the requests it caches with --apply_chat_template."""
        return str(self.runtime.checkpoint.folder.resolve()).replace(os.sep, "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template, for lm-eval's records; `chat_template` is what --apply_chat_template says.

        Raises: SourceError (a template asked by name, or a model without one)
        """
        if isinstance(chat_template, str):
            raise SourceError(
                f"--apply_chat_template {chat_template} arrived, the model's own is taken: leave its name out"
            )
        return self._chat.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages to a prompt. Raises: SourceError (no template, or an answer begun by the task), RequestError"""
        if not add_generation_prompt:
            raise SourceError("--apply_chat_template and a task with gen_prefix arrived: everybit takes one of them")
        return self._chat.render(chat_history)

    @cached_property
    def _chat(self) -> ChatTemplate:
        if (found := ChatTemplate.open(folder := self.runtime.checkpoint.folder)) is None:
            raise SourceError(f"{folder} has no chat template: leave --apply_chat_template out")
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in tqdm(requests, desc="scoring", **self._bars):
            answer = self._score(context, continuation)
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token with as much context as windows of the model's length leave it."""
        found = []
        for request in tqdm(requests, desc="scoring", **self._bars):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self._prefix, self.runtime.context, 1
            )
            found.append(math.fsum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of the task's stop strings.

        Request n draws from its seed + n, so that the samples of a task with `repeats` differ.
        """
        asked = [_read_options(request.args[1]) for request in requests]  # refused before hours of work
        found = []
        for index, request in enumerate(tqdm(requests, desc="writing", **self._bars)):
            context, (sampling, most, stops) = request.args[0], asked[index]
            found.append(self._write(context, replace(sampling, seed=sampling.seed + index), most, stops))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of `continuation`, and whether each of its tokens is the likeliest.

        What does not fit into the model's context is cut off at the left. Raises: ModelError (logits that are NaN or
        infinite)
        """
        if not continuation:
            return 0.0, True
        ids = (context + continuation)[-(self.runtime.context + 1) :]
        rows = len(ids) - 1 - max(len(ids) - len(continuation) - 1, 0)  # of logits that are wanted
        targets = np.asarray(ids[-rows:])
        total, greedy, at = 0.0, True, 0
        for logits in self._logits(ids[:-1], rows):
            wide = logits.astype(np.float64)
            top = wide.max(axis=-1, keepdims=True)  # NaN where any of its row is
            if not np.isfinite(top).all():
                raise ModelError(
                    "the model's output holds a number that is not finite: Runtime.open with debug=True names the "
                    "layer that broke"
                )
            wide -= top
            log_sum = np.log(np.exp(wide).sum(axis=-1))
            own = targets[at : at + len(logits)]
            at += len(logits)
            total += float((wide[np.arange(len(own)), own] - log_sum).sum())
            greedy = greedy and bool((logits.argmax(axis=-1) == own).all())
        return total, greedy

    def _logits(self, ids: list[int], rows: int) -> Iterator[F32]:
        """The logits after each of the last `rows` tokens. Mutates: the cache, of which a common beginning is kept."""
        first = len(ids) - rows
        kept = next((i for i, (x, y) in enumerate(zip(ids, self._cached, strict=False)) if x != y), len(self._cached))
        kept = min(kept, first)
        self._cached = []  # in case what follows fails half-way
        self.runtime.reset(0, kept)
        if kept < first:
            self.runtime.prefill(0, ids[kept:first], self.bits)
        yield from self.runtime.score(0, ids[first:], self.bits)
        self._cached = ids

    def _write(self, context: str, sampling: Sampling, most: int, stops: list[str]) -> str:
        prompt, room = self.tok_encode(context) or [self._prefix], self.runtime.context
        # A prompt that does not leave room for all that is asked keeps at least half of the context.
        most = max(1, min(most, max(room - len(prompt), room // 2)))
        prompt = prompt[-(room - most) :]
        self._cached = []
        text, stream = "", self.text.stream(prompt)
        for token in generate(self.runtime, prompt, sampling, most, self.bits or None, self.text.eos_ids):
            text += stream.add(token)
            if any(stop in text for stop in stops):
                break
        else:
            text += stream.finish()
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


if "everybit" not in model_registry:
    model_registry.register("everybit", target="everybit.integrations.lm_eval:EverybitLM")


def load_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """What `evaluate_tasks` runs: tasks of lm-eval by name, or made from `folder`/NAME.jsonl (nothing is downloaded).

    Raises: SourceError (no such task or file, or a hub that cannot be reached)
    """
    with _calm():
        try:
            wanted: list[Any] = [local_task(name, folder) if folder else name for name in names]
            loaded: dict[str, Any] = TaskManager(include_defaults=folder is None).load(wanted)
        except SourceError:
            raise
        except Exception as error:  # unknown names, datasets and the hub raise a dozen types
            raise SourceError(
                f"--tasks {','.join(names)}: lm-eval cannot load them ({reason(error)}): check the names and the "
                "network, or give --tasks-data a folder of NAME.jsonl"
            ) from error
        return loaded


def evaluate_tasks(model: EverybitLM, tasks: Mapping[str, Any], limit: int | None = None) -> list[Score]:
    """The scores of every task, `limit` samples of each at most.

    Cost: one forward pass per choice of every question; standard errors by lm-eval (a bootstrap where there is no
    formula). Raises: as Runtime
    """
    with _calm():
        results = evaluator.evaluate(model, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    if results is None:
        raise ModelError("lm-eval gave no result: run it in one process")
    return list(_scores(results))


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    for task, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, comma, where = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{where}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            name = metric if where == "none" else f"{metric}:{where}"
            yield Score(task, name, float(value), float(stderr) if known else None, int(samples))


def _read_options(given: Mapping[str, Any]) -> tuple[Sampling, int, list[str]]:
    """How tokens are chosen, how many at most, and the stop strings, of a generate_until request.

    By lm-eval's rule: a temperature without do_sample samples, neither of them is greedy, and the limit has four names.
    Raises: SourceError, RequestError
    """
    try:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(
            f"a task's max_gen_toks or temperature is not a number ({reason(error)}): correct it in the task or in "
            "--gen_kwargs"
        ) from None
    stops, most = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
    if not all(isinstance(stop, str) for stop in stops):
        raise SourceError(f"until {stops} arrived, expected a text or a list of them")
    if most < 1:
        raise SourceError(f"max_gen_toks {most} arrived, expected 1 or more, or none of it for {NEW_TOKENS}")
    if (beams := options.pop("num_beams", 1)) != 1:
        raise SourceError(f"num_beams {beams} arrived, everybit writes one text at a time: leave it out")
    draws, temperature = options.pop("do_sample"), float(options.pop("temperature", 1.0))
    if unknown := sorted(set(options) - SAMPLING):
        raise SourceError(
            f"generation option {unknown[0]!r} arrived, expected until, max_gen_toks, do_sample, temperature, "
            f"{', '.join(sorted(SAMPLING))}"
        )
    return Sampling(temperature if draws else 0.0, **options), most, stops


def _first_token(config: Mapping[str, Any], tokenizer: Tokenizer, before: Sequence[int]) -> int:
    if before:
        return before[0]
    for owner in (config, config.get("text_config") or {}):
        if isinstance(found := owner.get("bos_token_id"), int):
            return found
    if tokenizer.eos_ids:
        return min(tokenizer.eos_ids)
    raise ModelError("the model names neither a BOS nor an EOS token: a text without context cannot be scored")


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """lm-eval without its log, prints and bars, and without a process pool for its bootstrap. Ours go on: the bars of
    `EverybitLM` hold the stderr they were made with."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    os.environ["DISABLE_MULTIPROC"] = "1"
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def main() -> int:
    """lm-eval's own command, which then knows `--model everybit`. Returns an exit code: 2 for a user's error."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except EverybitError as error:
        print("everybit: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
