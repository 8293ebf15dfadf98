"""Evaluation: answers found and compared, Wilson's interval, items and figures of a task."""

import json
import re

import numpy as np
import pytest

from examples.llama.data.arithmetic import arithmetic_problems, arithmetic_text
from examples.llama.data.arithmetic import main as write_problems
from examples.llama.data.documents import DataError
from examples.llama.data.instructions import prompt_template
from examples.llama.evaluate import main
from examples.llama.finetuning.answers import (
    boxed,
    find_answer,
    number,
    same_answer,
    wilson_interval,
)
from examples.llama.finetuning.evaluation import (
    TASKS,
    EvaluateConfig,
    Evaluation,
    Item,
    evaluate,
    run,
)
from examples.llama.finetuning.loading import load_model
from examples.llama.model.generation import Completion, Generator
from tests.llama import finetune_case


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finetune_case.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("16 - 3 = 13. The answer is: 13", "number", "13"),
        ("The answer is 5. No, wait. The answer is: 7 apples in 2 days.", "number", "7"),
        ("First 3, the final answer is $1,234.50.", "number", "1,234.50"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "number", "72"),
        ("#### -1,000", "number", "-1,000"),
        ("so she has 3 left and 4 more, 7.", "number", "7"),
        ("no numbers here", "number", None),
        ("The answer is: none", "number", None),
        (r"Hence $x = \boxed{\frac{\sqrt{3}}{2}}$ as claimed.", "math", r"\frac{\sqrt{3}}{2}"),
        ("The answer is: $x^2 + 1$\nThanks", "math", "$x^2 + 1$"),
        (r"The answer is: $\boxed{(0,1]}$", "math", "(0,1]"),
        (r"\boxed{1}, but The answer is: 2", "math", "2"),
        (r"\boxed{unclosed", "math", None),
        ("nothing", "math", None),
    ],
)
def test_answers_are_found(text, kind, answer):
    assert find_answer(text, kind) == answer


def test_braces_are_matched():
    assert boxed(r"\boxed{a} then \fbox{b_{1}^{2}}") == "b_{1}^{2}"
    assert boxed("none") is None


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("18", "18.00"),
        ("1,234", "1234"),
        ("$70,000", "70000"),
        ("0.25", r"\frac14"),
        (r"\dfrac{3}{4}", "3/4"),
        (r"\left(3, \frac{\pi}{2}\right)", r"( 3,\tfrac\pi2 )".replace(r"\pi2", r"{\pi}2")),
        (r"10\text{ cm}", "10"),
        (r"90^\circ", "90"),
        ("x = 5", "5"),
        (r"\text{Tuesday}", "Tuesday"),
        (r"25\%", "25"),
        (".5", "0.5"),
        (r"-\frac{1}{2}", "-0.5"),
    ],
)
def test_same_answers(left, right):
    assert same_answer(left, right)
    assert same_answer(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("18", "19"),
        ("1,2", "12"),
        ("(1,2)", "(2,1)"),
        ("x+1", "x-1"),
        (None, "3"),
        ("3", None),
        ("", ""),
        ("1/0", "0"),
    ],
)
def test_other_answers(left, right):
    assert not same_answer(left, right)


def test_numbers_are_exact():
    assert number("0.1") + number("0.2") == number("0.3")
    assert number("1/0") is None


def test_wilson_interval_by_its_definition():
    """The ends are the shares p at which the observed one is just 1.96 deviations away."""
    for correct, count in ((0, 7), (3, 7), (250, 500), (500, 500)):
        for end in wilson_interval(correct, count):
            deviation = np.sqrt(end * (1 - end) / count)
            np.testing.assert_allclose(abs(correct / count - end), 1.96 * deviation, atol=1e-6)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_problems_are_right():
    for problem in arithmetic_problems(3, 300, steps=3, largest=15):
        for equation in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", problem["response"]):
            a, sign, b, result = equation
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(
                result
            )
        assert find_answer(problem["response"], "number") == problem["answer"]
        numbers = [int(x) for x in re.findall(r"\d+", problem["query"] + problem["response"])]
        assert 0 < min(numbers) <= max(numbers) <= 60
    for a, sign, b, result in re.findall(
        r"(\d+) ([-+*]) (\d+) = (\d+)", arithmetic_text(0, 50)[7].text
    ):
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(
            result
        )


def test_problems_follow_the_seed_and_differ():
    first = arithmetic_problems(0, 200)
    assert first == arithmetic_problems(0, 200)
    assert len({p["query"] for p in first}) == 200
    shared = {p["query"] for p in first} & {p["query"] for p in arithmetic_problems(1, 200)}
    assert len(shared) < 10
    with pytest.raises(DataError, match="not 10000 different"):
        arithmetic_problems(0, 10_000, steps=1, largest=5)
    with pytest.raises(DataError, match=r"steps in 1\.\.3"):
        arithmetic_problems(0, 5, steps=4)


def test_problems_as_a_file(tmp_path):
    assert write_problems(["--out", str(tmp_path / "p.jsonl"), "--count", "5"]) == 0
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == arithmetic_problems(0, 5)
    assert write_problems(["--out", str(tmp_path / "q.jsonl"), "--steps", "9"]) == 2


def answering(monkeypatch, model, answers):
    """Replaces the model's writing by texts, in the order of the prompts."""

    def complete(self, prompts, sampling, report=None):
        assert len(prompts) == len(answers)
        return [Completion(model.tokenizer.encode(text).ids, True) for text in answers]

    monkeypatch.setattr(Generator, "__call__", complete)


def test_right_and_wrong_answers_are_counted(model, monkeypatch):
    model = load_model(model)
    records = [
        {"question": "2 + 2?", "answer": "2 + 2 = <<4>>4\n#### 4"},
        {"question": "2 + 3?", "answer": "#### 5"},
        {"question": "2 + 4?", "answer": "#### 1,006"},
    ]
    answering(monkeypatch, model, ["The answer is: 4", "It is 6", "The answer is: 1006."])
    result = evaluate(model, records, prompt_template("plain"), TASKS["gsm8k"], new_tokens=8)
    assert [item.correct for item in result.items] == [True, False, True]
    assert [item.predicted for item in result.items] == ["4", "6", "1006"]
    assert result.items[0].query == "2 + 2?"
    assert result.summary()["interval_95"] == list(wilson_interval(2, 3))


def test_latex_answers(model, monkeypatch):
    model = load_model(model)
    records = [
        {"problem": "half?", "solution": r"\boxed{9}", "answer": r"\frac{1}{2}"},
        {"problem": "pair?", "solution": "", "answer": r"\left(3,4\right)"},
    ]
    answering(monkeypatch, model, [r"It is \boxed{\dfrac12}", "The answer is: $(3, 4)$"])
    result = evaluate(model, records, prompt_template("plain"), TASKS["math500"], new_tokens=8)
    assert result.accuracy == 1


def test_a_model_that_wrote_is_measured(model, tmp_path):
    config = EvaluateConfig(
        str(model),
        tmp_path / "out",
        data="arithmetic:0:5:1",
        template="plain",
        batch_size=2,
        new_tokens=8,
    )
    summary = run(config)
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert [item["reference"] for item in items] == [
        p["answer"] for p in arithmetic_problems(0, 5, steps=1)
    ]
    assert summary["problems"] == 5
    assert summary["correct"] == sum(item["correct"] for item in items)
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
        == (summary["accuracy"])
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ""}, "data is empty"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"new_tokens": -1}, "new_tokens must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be 0 or positive"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_model_is_read(tmp_path, fields, message):
    asked = {"model": str(tmp_path / "none"), "data": "arithmetic:0", **fields}
    with pytest.raises(ValueError, match=message):
        run(EvaluateConfig(out=tmp_path / "out", **asked))


def test_problems_without_an_answer_are_named(model):
    model = load_model(model)
    with pytest.raises(DataError, match="Problem 0: no number answer in its field 'answer'"):
        evaluate(model, [{"query": "?"}], prompt_template("plain"), TASKS["gsm8k"])
    with pytest.raises(DataError, match="no problems"):
        evaluate(model, [], prompt_template("plain"), TASKS["gsm8k"])


def test_hub_data_needs_the_client(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    arguments = ["--model", str(model), "--out", str(tmp_path), "--task", "gsm8k"]
    assert main(arguments) == 2
    assert "needs the package `datasets`" in capsys.readouterr().err
    assert main([*arguments[:-1], "mmlu"]) == 2
    assert "the tasks are gsm8k, math500" in capsys.readouterr().err


def test_summary_counts_what_did_not_end():
    items = [Item("q", "r", None, "1", False, False), Item("q", "1", "1", "1", True, True)]
    summary = Evaluation(items).summary()
    assert (summary["without_answer"], summary["not_stopped"], summary["accuracy"]) == (1, 1, 0.5)
