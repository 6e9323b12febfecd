"""Commands that README.md and the READMEs of folders tell people to type work, and what they name is there."""

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

from conf.composition.compose import compose_data, compose_drafter_config, compose_run_config, compose_size
from conf.composition.trees import RUN_TREE
from conf.rules.drafter import check_drafter_rules
from conf.rules.run import check_rules
from data_pipeline.storage.manifest import load_manifest
from model.hf.options import DecodeOptions
from tests.helpers.toy_data import ToyData

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAX_LINES, MAX_WORDS = 150, 1500  # of README.md: one page
BASE = "checkpoints/Ministral-3-8B-Base-2512"


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


README = read("README.md")


def code_blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(document), re.DOTALL)


def shell_lines(document: str) -> list[list[str]]:
    """Return the words of every command in a document's shell blocks; continued lines joined, comments dropped."""
    text = "\n".join(code_blocks("bash", document)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def commands_of(module: str) -> list[list[str]]:
    """Return the words of every documented command that runs `module`; those with placeholders are left out."""
    found = [words for document in DOCUMENTS for words in shell_lines(document) if module in words]
    return [words for words in found if not any(re.search(r"[\[\]<>]|=NAME$|^NAME$|\.\.\.", word) for word in words)]


def arguments_of(words: list[str], module: str) -> list[str]:
    return words[words.index(module) + 1 :]


def count_ranks(words: list[str]) -> int:
    options = dict(word[2:].split("=") for word in words if word.startswith(("--nnodes=", "--nproc_per_node=")))
    return int(options.get("nnodes", "1")) * int(options.get("nproc_per_node", "1"))


def name_of(words: list[str]) -> str:
    return " ".join(words)[:80]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def prose_commands(document: str) -> list[str]:
    """Return everything between backticks, and the shell blocks, of one document."""
    return re.findall(r"`([^`\n]+)`", read(document)) + re.findall(r"^(make .*)$", read(document), re.MULTILINE)


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert len(README.split()) <= MAX_WORDS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_named_in_a_document_exists(document: str) -> None:
    commands = [command for command in prose_commands(document) if command.startswith("make ")]
    words = [word for command in commands for word in re.sub(r"#.*|\"[^\"]*\"", "", command).split()[1:]]
    named = {word for word in words if re.fullmatch(r"[a-z-]+", word)}
    assert named <= make_targets()


def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    for target in make_targets():
        assert f"make {target} " in shown


def test_every_module_that_is_run_exists() -> None:
    text = "".join(map(read, DOCUMENTS)) + MAKEFILE
    modules = set(re.findall(r"-m ((?:conf|data_pipeline|model|pretrain|launch|lora|tests)\.[\w.]*\w)", text))
    assert {"pretrain.train", "model.convert", "launch.quickstart", "lora.train"} <= modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("words", commands_of("pretrain.train"), ids=name_of)
def test_every_training_command_composes_and_fits_its_ranks(words: list[str]) -> None:
    arguments = arguments_of(words, "pretrain.train")
    if "--help" in arguments or "--cfg" in arguments:
        return  # run for real by tests/pretrain/test_train.py
    check_rules(compose_run_config(arguments), count_ranks(words))


@pytest.mark.parametrize("words", commands_of("lora.train"), ids=name_of)
def test_every_drafter_command_composes_and_fits_its_ranks(words: list[str]) -> None:
    check_drafter_rules(compose_drafter_config(arguments_of(words, "lora.train")), count_ranks(words))


@pytest.mark.parametrize(
    "words", [words for module in ("launch.plan", "launch.preflight") for words in commands_of(module)], ids=name_of
)
def test_every_command_before_a_run_composes(words: list[str]) -> None:
    overrides = [word for word in words if re.fullmatch(r"[\w.]+=\S+", word)]
    assert compose_size(overrides).num_steps > 0


def test_every_experiment_in_a_document_is_one() -> None:
    named = {
        name for document in DOCUMENTS for name in re.findall(r"[ `]experiment=(nld_\w+|quickstart\w+)", read(document))
    }
    assert {"nld_8b_ar", "nld_8b_joint"} <= named - {"quickstart"} <= set(RUN_TREE.options("experiment"))


def test_the_stage_table_gives_the_tokens_of_the_quickstart() -> None:
    runs = [compose_run_config([f"experiment=quickstart_{stage}"]) for stage in ("ar", "joint", "sft")]
    assert f"| try it | {sum(run.train.tokens for run in runs) / 1e6:.1f}M |" in README


def lever_table_rows() -> list[list[str]]:
    table = read("conf/README.md").split("| lever |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_levers_names_keys_and_fields_that_exist() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for owner in (TransformerConfig, DistributedDataParallelConfig) for field in fields(owner)}
    assert len(lever_table_rows()) > 5
    for _, key, field, run in lever_table_rows():
        assert key == "chosen" or key.strip("`") in RUN_TREE.keys
        assert set(re.findall(r"`(\w+)`", field)) <= known
        assert run == "not yet" or re.fullmatch(r"\d{1,2} \w+ \d{4}", run)


def test_every_lever_is_in_the_table() -> None:
    named = {key.strip("`") for _, key, _, _ in lever_table_rows()}
    levers = ("overlap_", "offload_", "bucket_", "recompute")
    keys = {key for key in RUN_TREE.keys if key.startswith(tuple(f"parallel.{lever}" for lever in levers))}
    assert keys | {"precision.fp8", "chosen"} == named


def test_the_reading_order_shows_what_exists() -> None:
    steps = re.findall(r"^\d\. (.*) - ", README, re.MULTILINE)
    assert len(steps) > 5
    for step in steps:
        for name in re.findall(r"`([^`]+)`", step):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(document)):
        assert target.startswith("http") or ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith("/README.md")])
def test_files_in_the_table_of_a_folder_exist(document: str) -> None:
    folder = (ROOT / document).parent
    for names in re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", read(document), re.MULTILINE):
        for name in re.findall(r"`([\w./]+(?:\.py|\.sh|\.sbatch|/))`", names):
            assert (folder / name).exists() or (ROOT / name).exists(), name


def test_every_folder_of_the_product_is_in_the_readme() -> None:
    for folder in ("conf", "data_pipeline", "model", "pretrain", "lora", "launch", "tests"):
        assert f"| [{folder}]({folder}/README.md) |" in README


def test_the_data_example_runs(toy_data: ToyData, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    records = [json.dumps({"text": f"def number_{i}(): return {i}"}) + "\n" for i in range(2500)]
    (tmp_path / "corpus" / "records.jsonl").write_text("".join(records), encoding="utf-8")
    (tmp_path / BASE).parent.mkdir()
    (tmp_path / BASE).symlink_to(toy_data.tokenizer)
    make = next(words for words in shell_lines("README.md") if words[:3] == ["make", "prepare-data", "CONFIG=text"])
    given = dict(word.split("=", 1) for word in make[2:])
    inspect = next(words for words in shell_lines("README.md") if "data_pipeline.inspect" in words)
    for command in (["-m", "data_pipeline.prepare", f"data={given['CONFIG']}", *given["ARGS"].split()], inspect[1:]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, timeout=120)
    heldout = load_manifest(tmp_path / "tokens" / "heldout").documents
    assert heldout >= 1
    assert load_manifest(tmp_path / "tokens" / "train").documents + heldout == 2500


def test_the_documented_preparations_compose() -> None:
    makes = [
        words for document in DOCUMENTS for words in shell_lines(document) if words[:2] == ["make", "prepare-data"]
    ]
    assert len(makes) >= 2
    for words in makes:
        given = dict(word.split("=", 1) for word in words[2:])
        assert compose_data([f"data={given['CONFIG']}", *given["ARGS"].split()]).train


def test_the_blend_example_composes(tmp_path: Path) -> None:
    [example] = code_blocks("yaml", "data_pipeline/README.md")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(example, encoding="utf-8")
    data = compose_data(["data=mine"], tmp_path)
    assert (set(data.train), set(data.heldout)) == ({"web", "code"}, {"web"})


def test_the_decoding_example_calls_what_an_export_has() -> None:
    (example,) = [block for block in code_blocks("python") if "ar_generate" in block]
    shipped = ast.parse(read("model/hf/modeling_nemotron_labs_diffusion.py"))
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


def test_ci_runs_the_two_commands_of_contributing() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    assert commands == ["make check", "make test"]
    assert "`make check test`. CI runs the same two commands (`.ci/run`)" in read("CONTRIBUTING.md")
