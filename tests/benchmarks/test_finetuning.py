"""The fine-tuning benchmarks at small sizes: pages from stored numbers, the memory of a lowered step."""

import pytest

from benchmarks import finetuning
from benchmarks.meshes import lowering
from examples.llama.model.config import LlamaConfig

MODEL = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    max_seq_len=32,
)


@pytest.mark.parametrize("method", lowering.METHODS)
def test_lowered_step_holds_what_was_counted(method):
    found = lowering.measure(method, MODEL, devices=8, rows=8, seq_len=16)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    adapters = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))
    if method == "lora":
        assert found["trained_parameters"] == adapters
        assert found["optimizer_state_bytes"] == 8 * adapters + 8  # copied on every device
        assert found["frozen_bytes"] == 4 * (matrices + 2 * 64 * 64) // 8 + 4 * 5 * 64
    else:
        assert found["trained_bytes"] == 4 * matrices // 8
        assert found["frozen_bytes"] == 4 * 2 * 64 * 64 // 8 + 4 * 5 * 64
        # AdamW's moments, or two factor pairs, each split over the eight devices, and counts; SinkGD has none.
        moments = {"adamw": 8 * matrices, "lorapre_adamw": 8 * adapters, "sage_hybrid": 0}
        assert 0 <= found["optimizer_state_bytes"] - moments[method] // 8 <= 64
    batch, counts = 4 * 3 * 17, 64
    held = found["trained_bytes"] + found["frozen_bytes"] + found["optimizer_state_bytes"] + batch
    assert held <= found["argument_bytes"] <= held + counts
    # What is donated comes back in place.
    assert found["aliased_bytes"] >= found["trained_bytes"]
    assert found["model_parameters"] == matrices + 2 * 64 * 64 + 5 * 64


def test_page_of_the_lowering():
    cell = dict.fromkeys(
        (
            *("trained_parameters", "trained_bytes", "frozen_bytes", "optimizer_state_bytes"),
            *("argument_bytes", "output_bytes", "aliased_bytes", "temporary_bytes"),
        ),
        2**30,
    )
    text = lowering.page({"setting": lowering.SETTING, "methods": {"adamw": cell}})
    assert "| adamw | 1,073,741,824 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 2.000 |" in text
    assert "| lora | missing |" in text


def cell(correct, interval, **fields):
    match = {
        "accuracy": correct / 100,
        "correct": correct,
        "problems": 100,
        "interval_95": interval,
    }
    known = {"loss": 1.0, "rate": 1e-3, "rate_at_edge": False, "trained_parameters": 10}
    return {"exact_match": match, "optimizer_state_bytes": 80, **known, **fields}


def test_page_of_the_methods():
    cells = {
        "AdamW, all matrices": cell(50, [0.4, 0.6]),
        "LoRA-Pre Adam r=8, paper": cell(40, [0.31, 0.5], rate_at_edge=True),
        "LoRA-Pre Adam r=8, recommended": cell(60, [0.5, 0.69], optimizer_state_bytes=8),
        "LoRA r=8": cell(20, [0.13, 0.29]),
    }
    data = {"setting": finetuning.setting(10, 5), "base": None, "cells": cells}
    text = finetuning.page(data)
    assert (
        "| LoRA-Pre Adam r=8, recommended | 60.0 (50 to 69) | 1.0000 | 0.001 | 10 | 8 | 0.100 |"
        in text
    )
    assert "| 0.001 (edge) |" in text
    assert "| GaLore r=8 | missing |" in text
    assert "40 problems with the paper's options, 60 with the recommended" in text
    assert "above, and the intervals are apart" in text
    assert "Exact match is at most" not in text
    cells["LoRA r=8"] = cell(65, [0.55, 0.74])
    assert "not above, and the intervals overlap" in finetuning.page(data)


def test_results_of_another_setting_are_not_mixed(tmp_path):
    finetuning.Store(tmp_path / "x.json", finetuning.setting(10, 5)).save()
    finetuning.Store(tmp_path / "x.json", finetuning.setting(10, 5))
    with pytest.raises(ValueError, match="another setting"):
        finetuning.Store(tmp_path / "x.json", finetuning.setting(10, 6))


def test_digits_are_tokens():
    tokenizer = finetuning.digits_tokenizer(["12 + 30 = 42. Ana has 12 apples."] * 5)
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    assert tokenizer.decode(tokenizer.encode("12 apples, 7 - 3").ids) == "12 apples, 7 - 3"
