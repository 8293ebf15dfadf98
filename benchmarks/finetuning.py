"""Quality and cost of fine-tuning by method: a small Llama pretrained on sums, tuned on word problems.

    python -m benchmarks.finetuning

A base model is pretrained on generated text about arithmetic, then every method fine-tunes it on the same
generated word problems at its own learning rate: that of the lowest held-out loss on a grid that grows until
the best is inside it. Then the script counts exact matches on other problems. Every cell is kept in
finetuning.json at once and never repeated. `--report` writes the page from the existing cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.common import circumstances, describe_circumstances, table
from examples.llama.comparing.tuning import search_rate
from examples.llama.data.arithmetic import arithmetic_problems, arithmetic_text
from examples.llama.data.instructions import prompt_template
from examples.llama.data.tokenizer import BOS, EOS
from examples.llama.finetuning.evaluation import Task, evaluate
from examples.llama.finetuning.loading import Model, load_model
from examples.llama.finetuning.run import FinetuneConfig, instruction_data, prepare_finetuning
from examples.llama.model.config import LlamaConfig
from examples.llama.model.hf_write import save_folder
from examples.llama.reporting.files import read_json, write_json
from examples.llama.training.config import TrainConfig
from examples.llama.training.program import Program
from examples.llama.training.run import Run, prepare_run

MODEL = LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
    max_seq_len=160,
)
LARGEST, PROBLEM_STEPS = 10, 2
PRETRAIN_STEPS, STEPS = 800, 120
BATCH, LENGTH = 16, 96
TEST_PROBLEMS = 200
TASK = Task("generated", kind="number")

METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "AdamW, all matrices": ("adamw", {}, 1e-3),
    "SinkGD, all matrices (sage_hybrid)": ("sage_hybrid", {}, 1e-3),
    "LoRA-Pre Adam r=8, paper": ("lorapre_adamw", {}, 1e-3),
    "LoRA-Pre Adam r=8, recommended": ("lorapre_adamw", {"option_set": "recommended"}, 1e-3),
    "LoRA-Pre Muon r=8": ("lorapre_muon", {}, 3e-3),
    "GaLore r=8": ("galore", {}, 3e-3),
    "LoRA r=8": ("lora", {}, 3e-3),
    "rsLoRA r=8": ("rslora", {}, 3e-3),
    "DoRA r=8": ("dora", {}, 3e-3),
}
"""Label: method, further options, and the start of its learning-rate search."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/finetuning"))
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trials", type=int, default=6, help="most rates of a method")
    parser.add_argument("--report", action="store_true", help="write the page only")
    given = parser.parse_args(arguments)
    store = Store(given.results / "finetuning.json", setting(given.pretrain_steps, given.steps))
    if not given.report:
        measure(store, given.work, given.pretrain_steps, given.steps, given.trials)
    (given.results / "finetuning.md").write_text(page(store.data), encoding="utf-8")
    return 0


class Store:
    """Results by key in a JSON file, written at every change.

    Raises:
        ValueError: The file's results have another setting.
    """

    def __init__(self, path: pathlib.Path, made_with: Mapping[str, Any]):
        self.path = path
        self.data = read_json(path) or {"setting": dict(made_with), "base": None, "cells": {}}
        if self.data["setting"] != made_with:
            raise ValueError(f"{path} holds results of another setting; move it away")

    def save(self) -> None:
        """Writes the file, with the circumstances."""
        self.data["circumstances"] = circumstances("python -m benchmarks.finetuning")
        write_json(self.path, self.data)


def setting(pretrain_steps: int, steps: int) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(MODEL),
        "pretrain_steps": pretrain_steps,
        "steps": steps,
        "batch": BATCH,
        "length": LENGTH,
        "largest": LARGEST,
        "problem_steps": PROBLEM_STEPS,
        "test_problems": TEST_PROBLEMS,
    }


def measure(store: Store, work: pathlib.Path, pretrain_steps: int, steps: int, trials: int) -> None:
    problems = arithmetic_problems(1, 4000, steps=PROBLEM_STEPS, largest=LARGEST)
    train = problems[TEST_PROBLEMS:]
    tests = problems[:TEST_PROBLEMS]
    folder = pretrained(work, pretrain_steps)
    model = load_model(folder)
    data_file = work / "problems.jsonl"
    data_file.write_text("".join(json.dumps(problem) + "\n" for problem in train))
    if store.data["base"] is None:
        store.data["base"] = {"exact_match": exact_match(model, tests)}
        store.save()
    programs: dict[str, Program] = {}
    config = FinetuneConfig(
        model=str(folder),
        data=str(data_file),
        template="plain",
        steps=steps,
        batch_size=BATCH,
        seq_len=LENGTH,
        eval_every=steps,
        eval_batches=8,
        heldout_fraction=0.05,
        log_every=max(1, steps // 5),
        checkpoint_every=steps,
        keep_best=0,
        tensorboard=False,
        out=work / "run",
        overwrite=True,
    )
    data = instruction_data(config, model)
    for label, (method, options, start) in METHODS.items():
        cell = store.data["cells"].setdefault(label, {"trials": {}})
        more = cell.get("rate_at_edge") and len(cell["trials"]) < trials
        if "exact_match" in cell and not more:
            continue
        asked = dataclasses.replace(config, method=method, **options)

        def train_at(rate: float, asked=asked, cell=cell, label=label) -> float:
            known = cell["trials"].get(f"{rate:g}")
            if known is not None:
                return math.inf if known["loss"] is None else known["loss"]
            run = prepare_finetuning(
                dataclasses.replace(asked, learning_rate=rate),
                model=model,
                data=data,
                program=programs.get(label),
                console=quiet(),
            )
            programs[label] = run.program
            started = time.perf_counter()
            summary = run.train()
            if summary.status not in ("finished", "non_finite"):
                sys.exit(f"stopped: {summary.message}")
            finished = summary.status == "finished"
            cell["trials"][f"{rate:g}"] = {
                "loss": summary.heldout_loss if finished else None,
                "seconds": time.perf_counter() - started,
            }
            cell |= costs(run)
            store.save()
            print(label, rate, summary.heldout_loss, flush=True)
            return summary.heldout_loss if finished and summary.heldout_loss else math.inf

        found = search_rate(train_at, start, factor=3.0, max_trials=trials)
        cell["rate"], cell["rate_at_edge"] = found.best.rate, found.at_edge
        best = dataclasses.replace(asked, learning_rate=found.best.rate)
        run = prepare_finetuning(
            best, model=model, data=data, program=programs.get(label), console=quiet()
        )
        programs[label] = run.program
        summary = run.train()
        cell["loss"] = summary.heldout_loss
        cell["exact_match"] = exact_match(load_model(best.out), tests)
        store.save()
        print(label, cell["rate"], cell["exact_match"], flush=True)
    if "step_time" not in store.data:
        store.data["step_time"] = step_times(config, model, data, programs)
        store.save()


def pretrained(work: pathlib.Path, steps: int) -> pathlib.Path:
    """The base model as a Hugging Face folder, pretrained unless it exists."""
    folder = work / f"base-{steps}"
    if (folder / "model.safetensors").is_file():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    text = arithmetic_text(0, 6000, largest=LARGEST)
    corpus = work / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in text))
    digits_tokenizer([d.text for d in text]).save(str(work / "tokenizer.json"))
    run = prepare_run(
        TrainConfig(
            data=str(corpus),
            tokenizer=str(work / "tokenizer.json"),
            cache_dir=str(work / "cache"),
            optimizer="adamw",
            learning_rate=3e-3,
            steps=steps,
            batch_size=BATCH,
            seq_len=LENGTH,
            statistics_every=0,
            tensorboard=False,
            checkpoint_every=steps,
            keep_best=0,
            log_every=100,
            eval_batches=4,
            out=work / "pretraining",
            overwrite=True,
        ),
        model=MODEL,
    )
    run.train()
    model = load_model(work / "pretraining")
    save_folder(folder, model.config, model.params, tokenizer=work / "pretraining")
    fields = json.loads((folder / "config.json").read_text())
    fields["eos_token_id"] = model.stop_ids[0]
    write_json(folder / "config.json", fields)
    return folder


def digits_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE in which every digit is a separate token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def exact_match(model: Model, tests: list[dict[str, str]]) -> dict[str, Any]:
    result = evaluate(
        model, tests, prompt_template("plain"), TASK, batch_size=TEST_PROBLEMS, new_tokens=48
    )
    return result.summary()


def costs(run: Run) -> dict[str, Any]:
    return {
        "trained_parameters": run.program.parameter_count(),
        "optimizer_state_bytes": run.program.state_bytes(),
    }


def step_times(
    config: FinetuneConfig, model: Model, data: Any, programs: dict[str, Program]
) -> dict[str, Any]:
    """Seconds of a step of every method, taken in turns, and their ratio to AdamW's in the same round."""
    runs = {}
    for label, (method, options, rate) in METHODS.items():
        asked = dataclasses.replace(config, method=method, learning_rate=rate, **options)
        with tempfile.TemporaryDirectory() as folder:
            runs[label] = prepare_finetuning(
                dataclasses.replace(asked, out=pathlib.Path(folder)),
                model=model,
                data=data,
                program=programs.get(label),
                console=quiet(),
            )
    states = {label: run.program.init(0) for label, run in runs.items()}
    batch = next(next(iter(runs.values())).batches)
    rounds: dict[str, list[float]] = {label: [] for label in runs}
    for number in range(13):
        for label, run in runs.items():
            started = time.perf_counter()
            states[label], metrics, _ = run.program.step(states[label], batch, 1e-6)
            jax.block_until_ready((states[label], metrics))
            if number:
                rounds[label].append(time.perf_counter() - started)
    first = rounds[next(iter(METHODS))]
    found = {}
    for label, seconds in rounds.items():
        ratios = [a / b for a, b in zip(seconds, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[label] = {
            "median_seconds": statistics.median(seconds),
            "ratio": middle,
            "ratio_quartiles": [low, high],
        }
    return found


def quiet() -> Console:
    return Console(file=io.StringIO())


def page(data: Mapping[str, Any]) -> str:
    """The page about the results, from the stored numbers only."""
    made, cells, times = data["setting"], data["cells"], data.get("step_time", {})
    adamw = cells.get(next(iter(METHODS)), {}).get("optimizer_state_bytes")
    rows = []
    for label in METHODS:
        cell = cells.get(label, {})
        if "exact_match" not in cell:
            rows.append([label, "missing", *[""] * 6])
            continue
        match = cell["exact_match"]
        low, high = match["interval_95"]
        edge = " (edge)" if cell["rate_at_edge"] else ""
        timed = times.get(label)
        rows.append(
            [
                label,
                f"{100 * match['accuracy']:.1f} ({100 * low:.0f} to {100 * high:.0f})",
                f"{cell['loss']:.4f}",
                f"{cell['rate']:g}{edge}",
                f"{cell['trained_parameters']:,}",
                f"{cell['optimizer_state_bytes']:,}",
                f"{cell['optimizer_state_bytes'] / adamw:.3f}" if adamw else "",
                f"{timed['ratio']:.2f}" if timed else "",
            ]
        )
    header = [
        *("method", "exact match, %", "held-out loss", "rate", "trained parameters"),
        *("state bytes", "of AdamW's", "step time, of AdamW's"),
    ]
    base = data["base"]
    before = "" if base is None else f"{100 * base['exact_match']['accuracy']:.1f} %"
    shape = made["model"]
    return "\n".join(
        [
            "# Fine-tuning by method: word problems after pretraining on sums",
            "",
            f"A Llama of width {shape['hidden_size']} and {shape['num_layers']} layers, pretrained for "
            f"{made['pretrain_steps']} steps on generated text about arithmetic, then fine-tuned for "
            f"{made['steps']} steps of {made['batch']} rows of {made['length']} tokens on generated word "
            f"problems of up to {made['problem_steps']} steps (numbers up to {made['largest']} to begin with), "
            f"the loss on responses alone. Before fine-tuning it solves {before} of the "
            f"{made['test_problems']} test problems, none of which is trained on.",
            "",
            "Embeddings and norms are frozen: all methods train the attention and MLP matrices or adapters of "
            "them (alpha 16). Each runs at its own rate, the best by held-out loss on a grid of factor 3 that "
            "grows until the best is inside it; (edge) marks a search that ended before. One seed. Exact match "
            "with Wilson's 95 % interval. State is in bytes; step times are medians of ratios to AdamW's "
            "step in the same round.",
            "",
            table(header, rows),
            "",
            *findings(cells),
            "",
            describe_circumstances(data["circumstances"]) if "circumstances" in data else "",
            "",
        ]
    )


def findings(cells: Mapping[str, Any]) -> list[str]:
    """The paper's comparison here, in a sentence made from the numbers."""
    paper, good, lora = (
        cells.get(label, {}).get("exact_match")
        for label in ("LoRA-Pre Adam r=8, paper", "LoRA-Pre Adam r=8, recommended", "LoRA r=8")
    )
    if not (paper and good and lora):
        return []
    ours = max(paper["correct"], good["correct"])
    apart = max(paper["interval_95"][0], good["interval_95"][0]) > lora["interval_95"][1]
    order = "above" if ours > lora["correct"] else "not above"
    certain = "the intervals are apart" if apart else "the intervals overlap or touch"
    losses = {label: cell["loss"] for label, cell in cells.items() if cell.get("loss") is not None}
    ranked = ", ".join(f"{x} ({losses[x]:.3f})" for x in sorted(losses, key=losses.__getitem__))
    highest = max(c["exact_match"]["accuracy"] for c in cells.values() if "exact_match" in c)
    said = [
        f"The paper finds LoRA-Pre at rank 8 above LoRA at rank 8 (GSM8K, 7B and 8B). Here LoRA-Pre Adam "
        f"solves {paper['correct']} problems with the paper's options, {good['correct']} with the recommended, "
        f"LoRA {lora['correct']}, of {lora['problems']}: {order}, and {certain}. By held-out loss the order "
        f"of all methods is {ranked}."
    ]
    if highest < 0.25:
        said += [
            "",
            f"Exact match is at most {100 * highest:.0f} %: so short a run of so small a model learns the form "
            "of an answer and little of the sums, and the held-out loss tells the methods apart better. The "
            "experiment says nothing about 7B models.",
        ]
    return said


if __name__ == "__main__":
    sys.exit(main())
