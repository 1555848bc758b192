"""`make gpu` names what exists, and a step that fails or cannot run is named."""

import importlib.util
import re
import sys
from pathlib import Path

import gpu
import pytest
import torch
from gpu import ROOT, Step, missing, run, steps

STEPS = steps(10)


def parts(step: Step) -> list[str]:
    return [str(part) for part in step.command]


def named_files() -> list[Path]:
    """Files of this checkout in the commands: scripts, configs, folders and files of tests."""
    words = [word for step in STEPS for word in parts(step)]
    return [ROOT / word for word in words if re.fullmatch(r"(tools|configs|datasets|tests)\b.*|setup\.py", word)]


def test_all_files_exist():
    files = named_files()
    assert {"setup.py", "tools", "configs", "datasets", "tests"} <= {file.relative_to(ROOT).parts[0] for file in files}
    assert not [file for file in files if not file.exists()]


def test_the_tests_of_the_operators_are_those_for_a_gpu():
    """Each file has tests that are marked cuda."""
    for name in gpu.OPERATOR_TESTS:
        assert "marks=pytest.mark.cuda" in (ROOT / name).read_text(encoding="utf-8")


def test_every_needed_step_comes_before():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for i, step in enumerate(STEPS):
        assert set(step.needs) <= set(names[:i])


def test_modules_are_known():
    for module in {step.module for step in STEPS} - {""}:
        assert module in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [s for s in STEPS if "--" in " ".join(parts(s))], ids=lambda step: step.name)
def test_scripts_know_their_options(step):
    """Every long option of a script of this checkout stands in it or in the package beside it."""
    script = next((ROOT / word for word in parts(step) if word.startswith(("tools/", "datasets/"))), None)
    if script is None or script.name == "train_net.py":  # whose options are Detectron2's
        return
    package = ROOT / "tools" / script.stem
    files = [script, *package.glob("*.py"), ROOT / "datasets" / "preparation.py"]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for option in (word for word in parts(step) if word.startswith("--")):
        assert f'"{option}"' in text, option


@pytest.mark.detectron2
@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed")
def test_configs_have_the_overridden_keys():
    from detectron2.config import get_cfg

    from kg_detectron.d2.config import add_kg_config, merge_config

    for step in STEPS:
        if step.name.startswith("train"):
            words = parts(step)
            cfg = get_cfg()
            add_kg_config(cfg)
            merge_config(cfg, str(ROOT / words[words.index("--config-file") + 1]))
            cfg.merge_from_list(words[words.index("--config-file") + 2 :])
            assert cfg.MODEL.DEVICE == "cuda" and cfg.DATASETS.TEST == ("synthetic_val",)


def test_why_a_step_cannot_run():
    assert missing(Step("b", [], needs=("a",)), ["a"]) == "needs a"
    assert missing(Step("b", [], needs=("a",)), []) == ""
    assert missing(Step("b", [], program="no-such-program"), []) == "no-such-program is not installed"
    assert missing(Step("b", [], module="no_such_module"), []) == "no_such_module is not installed"


def test_output_status_and_time_limit(tmp_path):
    output = tmp_path / "output.txt"
    assert run(Step("a", [sys.executable, "-c", "print('here'); raise SystemExit(3)"]), output) == "exit status 3"
    assert output.read_text() == "here\n"
    wait = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(130)"
    assert run(Step("a", [sys.executable, "-c", wait], seconds=2), output) == ""


def test_a_failure_is_named_and_the_rest_is_left_out(tmp_path, monkeypatch, capsys):
    """The first steps, where there is no GPU: the card fails, and what needs it is not run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "card", "tests", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert "FAILED: card, tests" in capsys.readouterr().out
    table = (tmp_path / "no_card" / "README.md").read_text()
    assert re.search(r"\| card \| exit status 1 \| \d+ \| card.txt \|", table)
    assert re.search(r"\| tests \| not run: needs card \| 0 \|  \|", table)
    assert "Error" in (tmp_path / "no_card" / "card.txt").read_text()
