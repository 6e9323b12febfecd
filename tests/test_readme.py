"""What README.md tells people to type exists and works, and what it says is there is there."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from conf.composition.compose import compose_data, compose_run_config
from conf.composition.trees import RUN_TREE
from conf.rules.run import check_rules
from data_pipeline.storage.manifest import load_manifest
from model.hf.options import DecodeOptions
from tests.helpers.toy_data import ToyData

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "conf/README.md", "data_pipeline/README.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell_lines() -> list[list[str]]:
    """Words of every command in README's shell blocks; continued lines joined, comments dropped."""
    text = "\n".join(code_blocks("bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def train_commands() -> list[list[str]]:
    return [words for words in shell_lines() if "pretrain.train" in words]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def prose_commands(document: str) -> list[str]:
    """Everything between backticks, and the shell blocks, of one document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(make .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_named_in_a_document_exists(document: str) -> None:
    commands = [command for command in prose_commands(document) if command.startswith("make ")]
    words = [word for command in commands for word in shlex.split(command, comments=True)[1:]]
    named = {word for word in words if re.fullmatch(r"[a-z-]+", word)}
    assert named <= make_targets()


def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    for target in make_targets():
        assert f"make {target} " in shown


def test_every_module_that_is_run_exists() -> None:
    modules = set(re.findall(r"-m ((?:conf|data_pipeline|model|pretrain|launch|lora)[\w.]*)", README + MAKEFILE))
    assert {"pretrain.train", "model.convert", "launch.quickstart"} <= modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("words", train_commands(), ids=lambda words: " ".join(words)[:60])
def test_every_training_command_composes_and_fits_its_ranks(words: list[str]) -> None:
    arguments = words[words.index("pretrain.train") + 1 :]
    if "--help" in arguments or "--cfg" in arguments:
        return  # run for real by tests/pretrain/test_train.py
    options = dict(word[2:].split("=") for word in words if word.startswith(("--nnodes=", "--nproc_per_node=")))
    world_size = int(options.get("nnodes", "1")) * int(options["nproc_per_node"])
    check_rules(compose_run_config(arguments), world_size)


def test_every_experiment_in_the_stage_table_is_one() -> None:
    named = set(re.findall(r"experiment=(\w+)", README))
    assert {"nld_8b_ar", "nld_8b_joint"} <= named <= set(RUN_TREE.options("experiment"))


def test_the_stage_table_gives_the_tokens_of_the_quickstart() -> None:
    runs = [compose_run_config([f"experiment=quickstart_{stage}"]) for stage in ("ar", "joint", "sft")]
    assert f"| try it | {sum(run.train.tokens for run in runs) / 1e6:.1f}M |" in README


def lever_rows() -> list[list[str]]:
    table = README.split("| lever |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_levers_names_keys_and_fields_that_exist() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for owner in (TransformerConfig, DistributedDataParallelConfig) for field in fields(owner)}
    assert len(lever_rows()) > 5
    for _, key, field, run in lever_rows():
        assert key == "chosen" or key.strip("`") in RUN_TREE.keys
        assert set(re.findall(r"`(\w+)`", field)) <= known
        assert run == "not yet" or re.fullmatch(r"\d{1,2} \w+ \d{4}", run)


def test_every_lever_is_in_the_table() -> None:
    named = {key.strip("`") for _, key, _, _ in lever_rows()}
    levers = ("overlap_", "offload_", "bucket_", "recompute")
    keys = {key for key in RUN_TREE.keys if key.startswith(tuple(f"parallel.{lever}" for lever in levers))}
    assert keys | {"precision.fp8", "chosen"} == named


def test_the_annotated_tree_and_the_reading_order_show_what_exists() -> None:
    parent = ROOT
    for line in code_blocks("text")[0].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        path = (parent if indent else ROOT) / name
        assert path.exists(), name
        parent = parent if indent else path
    for name in re.findall(r"^\d\. `([^`]+)`", README, re.MULTILINE):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / document).parent / target).exists(), target


def test_the_data_example_runs(toy_data: ToyData, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    rows = [json.dumps({"text": f"def number_{i}(): return {i}"}) + "\n" for i in range(2500)]
    (tmp_path / "corpus" / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "DIR").symlink_to(toy_data.tokenizer)
    [make] = [words for words in shell_lines() if words[:2] == ["make", "prepare-data"]]
    given = dict(word.split("=", 1) for word in make[2:])
    inspect = next(words for words in shell_lines() if "data_pipeline.inspect" in words)
    for command in (["-m", "data_pipeline.prepare", f"data={given['CONFIG']}", *given["ARGS"].split()], inspect[1:]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, timeout=120)
    heldout = load_manifest(tmp_path / "tokens" / "heldout").documents
    assert heldout >= 1
    assert load_manifest(tmp_path / "tokens" / "train").documents + heldout == 2500


def test_the_blend_example_composes(tmp_path: Path) -> None:
    [example] = code_blocks("yaml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(example, encoding="utf-8")
    data = compose_data(["data=mine"], tmp_path)
    assert (set(data.train), set(data.heldout)) == ({"web", "code"}, {"web"})


def test_the_decoding_example_calls_what_an_export_has() -> None:
    (example,) = [block for block in code_blocks("python") if "ar_generate" in block]
    shipped = ast.parse((ROOT / "model/hf/modeling_nemotron_labs_diffusion.py").read_text(encoding="utf-8"))
    options = {field.name for field in fields(DecodeOptions)}
    parameters = {
        node.name: {argument.arg for argument in node.args.args + node.args.kwonlyargs} | options
        for node in ast.walk(shipped)
        if isinstance(node, ast.FunctionDef)
    }
    calls = [
        (node.func.attr, {keyword.arg for keyword in node.keywords if keyword.arg})
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "generate" in node.func.attr
    ]
    assert {name for name, _ in calls} == {"ar_generate", "generate", "linear_spec_generate", "quadratic_spec_generate"}
    assert all(keywords <= parameters[name] for name, keywords in calls)


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    assert commands == ["make check", "make test"]
    assert "`make check` (ruff, pyright) and `make test`" in README
