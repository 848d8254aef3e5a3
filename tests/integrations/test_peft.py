"""PEFT on overlays: LoRA at any precision, gradients to the adapter alone, no merging, adapters saved and loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import everybit
from everybit.errors import OutputError, SourceError
from everybit.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.e2e.architectures import make
from tests.unit.test_adapter import TOKENS, difference, native, reference

peft = pytest.importorskip("peft")  # everybit[peft]

TEXT = "The cat sat on the mat, and the dog sat on the log. "


@pytest.fixture(scope="module")
def overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(3, 4, 8), progress=False)
    return out


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options))


def train(tuned: Any, batches: list[torch.Tensor], rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=rate)
    tuned.train()
    for batch in batches:
        tuned(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    return sum(float(model(input_ids=part, labels=part).loss) for part in ids.split(8)) / len(ids.split(8))


@pytest.fixture(scope="module")
def adapter(overlay: Path) -> Path:
    """Trained at 3 bits."""
    tuned = with_lora(everybit.load(overlay, 3, dtype=torch.float32))
    ids = torch.tensor([Tokenizer.open(overlay).encode(TEXT)])
    train(tuned, [ids] * 30, 5e-3)
    tuned.save_pretrained(overlay.parent / "adapter")
    return overlay.parent / "adapter"


def test_it_learns_at_three_bits_and_serves_at_any(overlay: Path, adapter: Path) -> None:
    tokenizer = Tokenizer.open(overlay)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    for bits in (3, 4, 8):
        plain = everybit.load(overlay, bits, dtype=torch.float32)
        tuned = everybit.load(overlay, bits, adapter=adapter, dtype=torch.float32)
        assert loss(tuned, ids) < 0.6 * loss(plain, ids)
        assert tuned.precision == bits
    one = tuned.generate(input_ids=ids[:, :8], max_new_tokens=8, do_sample=False, bits=3, pad_token_id=1)
    tuned.set_precision(3)
    assert torch.equal(one, tuned.generate(input_ids=ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=1))
    again = peft.PeftModel.from_pretrained(everybit.load(overlay, 3, dtype=torch.float32), adapter)
    assert torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
    assert torch.equal(again(input_ids=ids, bits=8).logits, tuned(input_ids=ids, bits=8).logits)
    assert not torch.equal(again(input_ids=ids, bits=8).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize("kernels", ["dense", "reference"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_reach_the_adapter_alone(tmp_path: Path, family: str, kernels: str) -> None:
    make(family).save_pretrained(tmp_path / "model")
    everybit.quantize(tmp_path / "model", tmp_path / "out", bits=(3, 4), progress=False)
    model = everybit.load(tmp_path / "out", 3, kernels=kernels, dtype=torch.bfloat16)
    weights = len(model._slots)
    tuned = with_lora(model, init_lora_weights=False)  # else A has no gradient at first
    ids = torch.tensor([[1, 5, 9, 33, 2]])
    tuned(input_ids=ids, labels=ids).loss.backward()
    reached = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(reached) == 2 * weights
    assert all("lora_A" in n or "lora_B" in n for n in reached)
    dense = [slot._dense is not None for slot in model._slots]
    assert not any(dense) if kernels == "reference" else all(dense)


def test_merging_is_refused_and_changes_nothing(overlay: Path, adapter: Path, tmp_path: Path) -> None:
    tuned = everybit.load(overlay, 4, adapter=adapter, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 33, 2]])
    before = tuned(input_ids=ids).logits
    for safe in (False, True):
        for merge in (tuned.merge_adapter, tuned.merge_and_unload):
            with pytest.raises(
                OutputError, match=r"^an overlay's weight cannot be written.*dequantize\(\) first"
            ) as found:
                merge(safe_merge=safe)
            assert "\n" not in str(found.value)
    with pytest.raises(OutputError, match="carries an adapter"):
        tuned.get_base_model().save_pretrained(tmp_path / "saved")
    assert torch.equal(tuned(input_ids=ids).logits, before)
    tuned.dequantize()
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)  # float32 sums


def test_other_initialisations_that_write_weights_are_refused(overlay: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        with_lora(everybit.load(overlay, 3, dtype=torch.float32), init_lora_weights="pissa")


def test_adapters_that_do_not_fit(overlay: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no adapter_config\.json"):
        everybit.load(overlay, adapter=tmp_path)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(SourceError, match="trained on another model"):
        everybit.load(overlay, adapter=other)
    (other / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(SourceError, match="PEFT cannot put it on this model"):
        everybit.load(overlay, adapter=other)
    (other / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SourceError, match="PEFT cannot put it on this model"):
        everybit.load(overlay, adapter=other)


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def test_the_engine_runs_it_as_peft_does(tiny_llama: Path, overlay: Path, adapter: Path) -> None:
    for bits in (3, 4, 8):
        wanted = logits(everybit.load(overlay, bits, adapter=adapter, dtype=torch.float32))
        assert difference(native(overlay, None, bits), wanted) > 0.1
        for found in (native(overlay, adapter, bits), reference(overlay, adapter, bits)):
            assert difference(found, wanted) < 1e-5  # sums in float32; measured at most 2.3e-6 here and below
    wanted = logits(peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), adapter))
    for found in (native(tiny_llama, adapter), reference(tiny_llama, adapter)):
        assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma3", "smollm3", "bitnet", "gpt_oss"])
def test_the_engine_runs_whatever_peft_saves(family: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "model")
    model = make(family)
    head = not model.config.tie_word_embeddings
    layers = "q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|gate_up_proj|up_proj|down_proj|fc2|c_attn|c_proj"
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            init_lora_weights=False,
            target_modules=rf".*({layers}{'|lm_head' if head else ''})",
            rank_pattern={r".*1\.(self_attn|attn)\.\w+": 6, "down_proj": 2},
            alpha_pattern={"^model.layers.1.self_attn.k_proj": 9, "c_proj": 1},
        ),
    ).eval()
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted = logits(tuned)
    assert difference(native(tmp_path / "model"), wanted) > 0.1
    assert difference(native(tmp_path / "model", tmp_path / "adapter"), wanted) < 1e-5
    if head:
        tuned.save_pretrained(tmp_path / "adapter")  # with the head itself
        with pytest.raises(SourceError, match=r"lm_head\.base_layer\.weight'.*save_embedding_layers=False"):
            native(tmp_path / "model", tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_the_engine_refuses_what_is_not_plain_lora(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with_lora(LlamaForCausalLM.from_pretrained(tiny_llama), **options).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=f"{next(iter(options))} .* arrived, expected plain LoRA"):
        native(tiny_llama, tmp_path)


def test_the_trainer_trains_it(overlay: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    tuned = with_lora(everybit.load(overlay, 3, dtype=torch.float32))
    ids = torch.tensor(Tokenizer.open(overlay).encode(TEXT))
    before = loss(tuned, ids[None])
    how = TrainingArguments(
        tmp_path / "run",
        max_steps=5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=True,
        use_cpu=True,
    )
    trainer = Trainer(tuned, how, train_dataset=[{"input_ids": ids, "labels": ids}] * 5)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    tuned.eval()
    after = loss(tuned, ids[None])
    assert after < 0.98 * before
    saved = everybit.load(overlay, 3, adapter=tmp_path / "saved", dtype=torch.float32)
    assert loss(saved, ids[None]) == pytest.approx(after, abs=1e-4)


@pytest.mark.slow
def test_the_demo_model_at_three_bits_recovers_half_of_its_loss(tmp_path: Path) -> None:
    """Loss on held-out text, nats per token: 3.757 at 3 bits, 3.705 with the adapter, 3.661 at 8 bits."""
    examples = REPOSITORY / "examples"
    everybit.quantize(examples / "models" / "prose-10m", tmp_path / "out", bits=(3, 8), progress=False)
    encode = Tokenizer.open(tmp_path / "out").encode
    texts = []
    for name in ("calibration", "heldout"):
        ids = encode((examples / "text" / f"{name}.txt").read_text().replace("<|endoftext|>", ""))
        texts.append(torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256))
    model = everybit.load(tmp_path / "out", 3, dtype=torch.float32)
    with model.at_precision(8):
        best = loss(model, texts[1][:32])
    before = loss(model, texts[1][:32])
    tuned = with_lora(model, r=8, lora_alpha=16)
    chosen = torch.randint(len(texts[0]), (20, 4), generator=torch.Generator().manual_seed(0))
    train(tuned, [texts[0][rows] for rows in chosen], 5e-4)
    tuned.save_pretrained(tmp_path / "adapter")
    saved = everybit.load(tmp_path / "out", 3, adapter=tmp_path / "adapter", dtype=torch.float32)
    after = loss(saved, texts[1][:32])
    assert after < before - 0.4 * (before - best)
