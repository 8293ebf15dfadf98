"""The planner: the papers' memory tables, meshes of devices that are not there, and the row to take."""

from __future__ import annotations

import io
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from examples.llama.comparing import plan_text
from examples.llama.comparing.memory import Planner
from examples.llama.comparing.order import LEAST, LONG, ORDER, QUALITY, RECIPE, recommend
from examples.llama.comparing.plan import PlanConfig, make_plan
from examples.llama.comparing.plan_text import answer, plan_tables
from examples.llama.finetuning import run as finetuning
from examples.llama.model.config import LlamaConfig, preset
from examples.llama.optimizers.variants import Variant, parse_variant
from examples.llama.plan import main
from examples.llama.reporting.command import parse
from examples.llama.training.config import TrainConfig, resolve

GIB = 2**30
ROOT = Path(__file__).parents[3]
HF_CONFIG = ROOT / "tests" / "golden" / "hf_llama_untied" / "config.json"
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def plan(**fields):
    return make_plan(PlanConfig(**fields))


def by_key(found):
    return {row.key: row for row in found.rows}


def test_the_sage_papers_memory_table():
    found = by_key(plan(preset="sage_1.3b", optimizers="adamw,lion,sinkgd_hybrid,sage_hybrid"))
    gib = {key: round(row.state_bytes / GIB, 3) for key, row in found.items()}
    assert gib == {"adamw": 9.832, "lion": 4.916, "sinkgd_hybrid": 1.958, "sage_hybrid": 0.979}
    for row in found.values():
        assert row.parameters == row.gradients == 4 * 1_319_684_096
        assert row.bytes == 8 * 1_319_684_096 + row.state_bytes + row.activations


@pytest.mark.parametrize(
    ("name", "rank", "lorapre", "galore_paper", "galore_optax"),
    [
        ("galore_60m", 128, 19.99, 16.32, 13.66),
        ("galore_130m", 256, 89.65, 73.14, 61.34),
        ("galore_350m", 256, 239.27, 195.23, 163.68),
        ("galore_1b", 512, 956.28, 780.12, 654.30),
    ],
)
def test_elements_of_low_rank_states(name, rank, lorapre, galore_paper, galore_optax):
    found = plan(preset=name, optimizers="lorapre_adamw,galore")
    assert found.rank == rank
    paper, optax_galore = by_key(found)["galore (paper's formula)"], by_key(found)["galore"]
    millions = [
        round(row.matrix_elements / 1e6, 2)
        for row in (by_key(found)["lorapre_adamw"], paper, optax_galore)
    ]
    assert millions == [lorapre, galore_paper, galore_optax]
    assert (paper.source, optax_galore.source) == ("formula (min + 2 max) r", "abstract evaluation")
    assert paper.state["matrix"] == 4 * paper.matrix_elements
    tables = ("embedding", "head", "vector")
    assert [paper.state[role] for role in tables] == [optax_galore.state[role] for role in tables]
    others = paper.all_devices_state - paper.state["matrix"]
    assert others == optax_galore.all_devices_state - optax_galore.state["matrix"] - 8  # two counts


@pytest.mark.parametrize(
    ("name", "layers", "width", "kv", "ffn", "adamw_gib"),
    [
        ("llama2_7b", 32, 4096, 4096, 11008, 48.25),
        ("llama3.1_8b", 32, 4096, 1024, 14336, 52.0),
    ],
)
def test_fine_tuning_at_rank_8(name, layers, width, kv, ffn, adamw_gib):
    found = plan(preset=name, finetune=True, rank=8, optimizers="adamw,lorapre_adamw,galore")
    rows = by_key(found)
    matrices = layers * (2 * width * width + 2 * width * kv + 3 * width * ffn)
    adapters = layers * 8 * (2 * 2 * width + 2 * (width + kv) + 3 * (width + ffn))
    assert round(rows["adamw"].state_bytes / GIB, 2) == adamw_gib
    for key in ("adamw", "lorapre_adamw", "galore"):
        assert rows[key].gradients == 4 * matrices  # no gradient of tables and norms
        assert rows[key].parameters == 4 * sum(_parameters(name))
        assert set(rows[key].state) == {"matrix", "shared"}
    assert rows["lorapre_adamw"].matrix_elements == 2 * adapters
    assert rows["lora"].matrix_elements == 2 * adapters  # two moments of as many numbers
    assert rows["lora"].gradients == 4 * adapters
    assert rows["lora"].parameters == rows["adamw"].parameters + 4 * adapters


def _parameters(name):
    return {"llama2_7b": (6_738_415_616,), "llama3.1_8b": (8_030_261_248,)}[name]


@pytest.fixture
def llama_70b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path / "config.json"


def test_a_70b_model_on_devices_that_are_not_there(llama_70b):
    found = plan(
        hf_config=llama_70b,
        mesh="fsdp=8,tensor=8",
        dtype="bfloat16",
        optimizers="adamw,sage_hybrid,lorapre_adamw",
        rank=256,
    )
    rows = by_key(found)
    count = 70_553_706_496
    norms = 161 * 8192  # not split
    assert rows["adamw"].parameters == (2 * (count - norms)) // 64 + 2 * norms
    assert rows["adamw"].all_devices_state == 4 * count + 4
    assert rows["adamw"].state_bytes == 2 * rows["adamw"].parameters + 4
    # SAGE's momentum of tables and norms, in their dtype and split as they are.
    tables = 2 * 128256 * 8192
    momentum = 2 * tables // 64 + 2 * norms
    scales = rows["sage_hybrid"].state_bytes - momentum
    assert 0 < scales < 4 * (norms + 2 * 8192) + 100
    assert rows["lorapre_adamw"].state_bytes < rows["adamw"].state_bytes
    assert {row.key for row in found.rows if row.bytes < found.limit} == set(rows)


def test_a_dimension_that_a_mesh_does_not_divide_is_copied():
    model = preset("galore_60m")
    whole = Planner(model, rank=8).row(Variant("adamw"))
    split = Planner(model, rank=8, mesh={"data": 2, "fsdp": 1, "tensor": 1}).row(Variant("adamw"))
    assert split.parameters == whole.parameters  # data alone copies everything
    split = Planner(model, rank=8, mesh={"data": 1, "fsdp": 3, "tensor": 1}).row(Variant("adamw"))
    assert split.parameters == whole.parameters  # 512 does not divide by 3


def test_dtypes_follow_or_do_not():
    found = by_key(
        plan(preset="galore_60m", dtype="bfloat16", optimizers="adamw,lorapre_adamw,galore")
    )
    full = by_key(plan(preset="galore_60m", optimizers="adamw,lorapre_adamw,galore"))
    assert found["adamw"].parameters == full["adamw"].parameters // 2
    assert found["adamw"].state["matrix"] == full["adamw"].state["matrix"] // 2
    assert found["lorapre_adamw"].state == full["lorapre_adamw"].state  # float32 either way
    name = "galore (paper's formula)"
    assert found[name].state["matrix"] == full[name].state["matrix"] // 2


def test_the_first_in_the_order_that_fits_is_recommended():
    names = "adamw,muon,lion_hybrid,sage_hybrid"

    def plan_for(device_gb, **fields):
        fields = {"activation_gb": 2.0, "optimizers": names, "margin": 0.0} | fields
        return plan(preset="sage_1.3b", device_gb=device_gb, **fields)

    assert plan_for(80.0).recommended == "muon"
    assert plan_for(14.0).recommended == "lion_hybrid"
    assert plan_for(80.0, margin=0.1, activation_gb=60.0).recommended == "lion_hybrid"
    # Adafactor needs less than the hybrids and comes before them in the longer experiment.
    assert plan_for(14.0, optimizers=f"{names},adafactor").recommended == "adafactor"
    preferred = plan_for(80.0, prefer="adamw,muon")
    assert preferred.recommended == "adamw"
    assert "your preference (adamw,muon)" in preferred.rule


def test_no_order_for_fine_tuning():
    found = plan(preset="llama3.1_8b", finetune=True, rank=8, remat=True)
    assert found.recommended is None
    said = "\n".join(answer(found))
    assert "exact match of all methods overlaps" in said
    assert "Needs least memory: LoRA adapters, AdamW" in said
    assert "examples.llama.finetune --model MODEL_FOLDER --data DATA.jsonl --method lora" in said
    assert "--learning-rate 2e-05 --batch-size 128 --seq-len 512" in said
    assert plan(preset="demo", finetune=True, prefer="muon").recommended == "muon"
    assert plan_text.PAPER_RATE == finetuning.PAPER_RATE
    assert set(plan_text.PAPER_METHODS) <= set(finetuning.PAPER_METHODS)
    assert plan_text.ADAPTER in finetuning.ADAPTERS


def test_options_have_their_place_and_formulas_none():
    planner = Planner(preset("demo"), rank=16)
    rows = [
        planner.galore_paper(),
        planner.lora(),
        *(
            planner.row(parse_variant(key))
            for key in (
                "adamw",
                "lorapre_adamw:rank=4",
                "lorapre_adamw:rank=4:options=recommended",
                "lorapre_adamw:rank=8:options=recommended",
                "lorapre_muon:rank=8:table_rank=8",
                "lorapre_muon:rank=8",
                "lorapre_lion",
            )
        ),
    ]
    found = []
    while rows:
        row = recommend(rows, 1e12)
        if row is None:
            break
        found.append(row.key)
        rows.remove(row)
    assert found == [
        "lorapre_muon:rank=8",
        "lorapre_adamw:rank=8:options=recommended",
        "lorapre_adamw:rank=4:options=recommended",
        "adamw",
        "lorapre_muon:rank=8:table_rank=8",  # in the early table only
        "lorapre_adamw:rank=4",
        "lorapre_lion",  # not measured
    ]
    assert [row.key for row in rows] == ["galore (paper's formula)", "lora"]


def test_the_order_is_what_was_measured():
    recommended = "bias_correction=exact:bound=1:residual=0.9:initial_subspace=gradient"
    variants = {
        **{key: key for key in QUALITY},
        "galore": "galore:rank=16",
        "lorapre_muon": "lorapre_muon:rank=16",
        "lorapre_muon:table_rank": "lorapre_muon:rank=16:table_rank=16:b2=0.95",
        "lorapre_adamw": "lorapre_adamw:rank=16:scale=0.25",
        "lorapre_adamw:options=recommended": f"lorapre_adamw:rank=16:scale=0.25:{recommended}",
        "lorapre_sinkgd": f"lorapre_sinkgd:rank=16:options=paper:scale=5:{recommended}",
    }
    cells = json.loads((ROOT / "docs/results/quality.json").read_text())["cells"]
    seeds: dict[str, list[float]] = {key: [] for key in QUALITY}
    for cell in cells:
        for key, variant in variants.items():
            if (cell["variant"], cell["steps"]) == (variant, 400):
                seeds[key].append(cell["heldout_perplexity"])
    assert {key: round(statistics.fmean(v), 1) for key, v in seeds.items()} == QUALITY
    assert list(QUALITY) == sorted(QUALITY, key=lambda key: statistics.fmean(seeds[key]))


def test_the_longer_experiment_is_what_was_measured():
    path = ROOT / "docs/results/accelerator/h200_training.json"
    rows = json.loads(path.read_text())["rows"]
    variants = {
        **{key: key for key in LONG},
        "adamw": "adamw:b2=0.95",
        "lorapre_muon": "lorapre_muon:rank=32",
        "lorapre_adamw:options=recommended": "lorapre_adamw:rank=32:options=recommended:scale=0.25",
    }
    for key, run in LONG.items():
        cells = [row for row in rows if row["key"] == variants[key]]
        best = min(cells, key=lambda row: row["ppl"])
        assert (round(best["ppl"], 2), best["rate"]) == (run.perplexity, run.rate)
        neighbours = [
            next(
                (f"{row['ppl']:.1f}" for row in cells if row["rate"] == factor * best["rate"]), "-"
            )
            for factor in (0.5, 2)
        ]
        for page in ("README.md", "docs/choosing.md"):
            (line,) = re.findall(rf"\| {best['ppl']:.2f} \|.*", (ROOT / page).read_text())
            assert f"| {', '.join(neighbours)} |" in line, page
    assert list(LONG) == sorted(LONG, key=lambda key: LONG[key].perplexity)


def test_the_pages_have_the_plans_order():
    """The table that README and Choosing share has the rows of `LONG`, in its order."""
    for page in ("README.md", "docs/choosing.md"):
        text = (ROOT / page).read_text()
        figures = [text.index(f"| {run.perplexity:.2f} |") for run in LONG.values()]
        assert figures == sorted(figures), page
    quickstart = (ROOT / "docs/index.md").read_text().partition("## Which one?")[2]
    places = [
        quickstart.index(name) for name in ("contrib.muon", "lorapre_muon(", "lorapre_adamw(")
    ]
    assert places == sorted(places)
    assert ORDER[:4] == ("muon", "lorapre_muon", "lorapre_adamw:options=recommended", "adamw")
    assert ORDER[4:7] == (RECIPE, "adafactor", LEAST)


def test_the_table_and_the_answer(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["--hf-config", str(HF_CONFIG), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "SAGE-Hybrid int8",
        "GaLore (paper's formula)",
        "Recommended: ",
        "Not counted: the optimizer's temporaries",
    ):
        assert word in printed
    stored = json.loads(path.read_text())
    assert {row["key"] for row in stored["rows"]} >= {"adamw", "lorapre_sinkgd"}
    for row in stored["rows"]:
        held = row["parameters"] + row["gradients"] + sum(row["state"].values())
        assert row["bytes"] == held + row["activations"] > held
        assert (row["fits"], row["accumulate"]) == (True, 1)


def test_json_alone(capsys):
    assert main(["--preset", "demo", "--optimizers", "adamw", "--json", "-"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["recommended"] == "adamw"
    assert stored["unit"] == "bytes on each device"


def test_nothing_fits():
    fields = {"preset": "sage_1.3b", "optimizers": "adamw,sage_hybrid"}
    found = plan(**fields, device_gb=8)
    assert found.recommended is None
    (line,) = (line for line in answer(found) if line.startswith("Nothing fits 7.2 GiB"))
    assert "the least is SAGE-Hybrid with " in line
    assert line.endswith("Try --mesh fsdp=N with more devices.")
    assert not any("--dtype" in line for line in answer(found))  # the trainer keeps float32
    # What the answer advises is tried, so that following it helps.
    line = next(line for line in answer(plan(**fields, device_gb=13)) if "Nothing fits" in line)
    advice = "With --remat --compute-dtype bfloat16 --batch-size 1 SAGE-Hybrid would fit."
    assert line.endswith(advice)
    followed = plan(**fields, device_gb=13, remat=True, compute_dtype="bfloat16", batch_size=1)
    assert followed.recommended == "sage_hybrid"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_number_is_cut(width):
    found = plan(preset="llama3.1_8b", mesh="fsdp=8", optimizers="adamw,lorapre_adamw,sage_hybrid")
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    for table in plan_tables(found, width):
        console.print(table)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    for row in found.rows:
        assert f"{row.bytes / GIB:.3f}" in words
        assert f"{row.parameters / GIB:.3f}" in words
    for heading in ("parameters", "gradients", "activations", "rank", "fits"):
        assert heading in words
    for state in ("embedding", "head", "matrices", "vectors"):
        assert f"state: {state}" in printed


def test_more_state_than_adamw_is_marked():
    found = plan(preset="llama3.1_8b", mesh="fsdp=8", optimizers="adamw,galore,lorapre_adamw")
    (line,) = (line for line in answer(found) if line.startswith("!"))
    assert line.startswith(
        "! More state than AdamW: GaLore, GaLore (paper's formula). Take a lower"
    )
    assert not any(line.startswith("!") for line in answer(plan(preset="demo")))


def test_the_command_can_be_run():
    """The command's options are the trainer's, and it resolves to the plan's batch and rate."""
    found = plan(
        preset="demo", optimizers="lorapre_adamw:options=recommended", rank=16, accumulate=2
    )
    *_, line = answer(found)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "examples.llama.train"]
    settings = resolve(parse(TrainConfig, words[3:], prog="train"))
    assert (settings.optimizer, settings.options.rank) == ("lorapre_adamw", 16)
    assert (settings.options.option_set, settings.options.scale) == ("recommended", 0.25)
    assert (settings.learning_rate, settings.accumulate) == (0.005, 2)
    assert (settings.batch_size, settings.seq_len) == (16, 128)


def test_no_command_that_the_trainer_cannot_do(tmp_path):
    own = answer(plan(preset="demo", dtype="bfloat16"))
    assert any("for a trainer of your own; the one here keeps float32" in line for line in own)
    assert not any("python -m" in line for line in own)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "model_type": "qwen2"}))
    found = plan(hf_config=tmp_path, mesh="fsdp=64", optimizers="adamw,adafactor", batch_size=64)
    assert found.model_type == "qwen2"
    assert any("The trainer loads Llama only" in line for line in answer(found))


def test_a_batch_is_taken_in_the_fewest_parts_that_fit():
    fields = {"preset": "sage_270m", "optimizers": "adafactor", "remat": True, "batch_size": 64}
    (row,) = plan(**fields, device_gb=6).rows
    assert 1 < (row.sequences or 0) < 64
    wider = plan(**fields, device_gb=6, accumulate=64 // (row.sequences or 1) // 2)
    assert row.bytes <= wider.limit < wider.rows[0].bytes
    (whole,) = plan(**fields, device_gb=1000).rows
    assert whole.sequences == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give --preset or --hf-config"),
        ({"preset": "demo", "hf_config": HF_CONFIG}, "one of them"),
        ({"preset": "dem"}, "unknown preset 'dem'"),
        ({"preset": "demo", "optimizers": "adam"}, "unknown optimizer 'adam'"),
        ({"preset": "demo", "mesh": "fsdp=*"}, "every size of --mesh must be given"),
        ({"preset": "demo", "mesh": "gpu=8"}, "unknown axis"),
        ({"preset": "demo", "rank": 0}, "rank must be at least 1"),
        ({"preset": "demo", "margin": 1.0}, "margin in"),
        ({"preset": "demo", "batch_size": 0}, "batch_size must be at least 1"),
        ({"preset": "demo", "accumulate": 3}, "accumulate must divide the 16 sequences"),
        ({"preset": "demo", "mesh": "fsdp=3"}, "multiple of the 3 devices"),
        ({"preset": "demo", "device_gb": 0.0}, "device_gb must be positive"),
        ({"hf_config": ROOT / "pyproject.toml"}, "must be a config.json"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_bad_input_on_the_command_line(capsys):
    assert main(["--preset", "demo", "--rank", "-1"]) == 2
    assert "rank must be at least 1" in capsys.readouterr().err


def test_unscanned_layers_for_galore_alone():
    model = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
    )
    planner = Planner(model, rank=4)
    galore, lorapre = (planner.row(Variant(name)) for name in ("galore", "lorapre_adamw"))
    assert galore.matrix_elements == 2 * 4 * (4 * 3 * 32 + 3 * (2 * 32 + 48))
    assert lorapre.matrix_elements == 2 * 2 * 4 * (4 * 64 + 3 * 80)
    assert galore.parameters == lorapre.parameters
