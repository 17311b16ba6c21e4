import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import halfbyte as hb
from halfbyte.errors import UsageError


def test_importing_is_light_and_names_are_the_intended_ones() -> None:
    code = (
        "import sys, halfbyte as hb\n"
        "heavy = [m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "print(sorted(hb.__all__))\n"
        "assert set(hb.__all__) <= set(dir(hb))\n"
        "assert all(getattr(hb, name) is not None for name in hb.__all__)\n"
        "assert all(callable(getattr(hb, name)) for name in hb.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ["RunConfig", "RunResult", "classify", "compare", "evaluate"]
    expected += ["load", "load_config", "plan", "resume", "train"]
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("first", ["import halfbyte.train.loop", "from halfbyte.plan import memory", "pass"])
def test_packages_are_verbs_in_whichever_order_they_are_imported(first: str) -> None:
    code = (
        f"{first}\n"
        "import halfbyte as hb, halfbyte.plan.memory as memory, halfbyte.train.options\n"
        "from halfbyte.errors import UsageError\n"
        "assert memory.Job and hb.train.options.TrainOptions\n"
        "for verb in (hb.plan, hb.train):\n"
        "    try: verb(model='./nowhere', data='x')\n"
        "    except UsageError as error: assert 'nowhere' in str(error), error\n"
        "    else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        _ = hb.tain  # type: ignore[attr-defined]


def test_the_way_through_in_python(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = hb.RunConfig(model=str(model_folder), data=str(data_file), output_dir=tmp_path / "run", max_steps=2)
    plan: Any = hb.plan(config)
    assert plan.method == "lora"
    assert "fits with room" in plan.reason
    asked: Any = hb.plan(config, methods=["lora", "dora"], price="3.6 EUR/h", deadline="6h")
    assert [e.name for e in asked.estimates] == ["lora", "dora"]
    assert asked.chosen.cost.p50 == pytest.approx(asked.chosen.total_seconds / 1000)
    result: hb.RunResult = hb.train(config)
    assert result.eval_loss is not None
    assert result.train_loss is not None
    scores: Any = hb.evaluate(result.path)
    assert scores.tuned.loss == pytest.approx(result.eval_loss, rel=1e-3)
    assert hb.resume(result.path, max_steps=3).result["step"] == 3
    model: Any = hb.load(result.path)
    assert inspect.ismethod(model.loss)
    with pytest.raises(UsageError, match="already holds a run"):
        hb.train(config)


def test_keywords_win_over_a_config(model_folder: Path, tmp_path: Path) -> None:
    from halfbyte.run.api import config_of

    config = hb.RunConfig(model="a", lora_r=8)
    assert config_of(config, {}) is config
    assert config_of(config, {"lora_r": 4}) == hb.RunConfig(model="a", lora_r=4)
    (tmp_path / "c.yaml").write_text("model: b\nlora_r: 8\n")
    assert config_of(tmp_path / "c.yaml", {"lora_rank": 2}).lora_r == 2
    with pytest.raises(UsageError, match="argument: lora_rnk is not a key"):
        config_of(None, {"model": "a", "lora_rnk": 2})
