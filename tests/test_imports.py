"""Imports point one way: conf <- data_pipeline, model <- pretrain <- lora, launch; libraries stay in their folders."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"conf", "data_pipeline", "model", "pretrain", "lora", "launch", "tests"}

# Folder: what of ours it may import. The longest matching folder counts.
MAY_IMPORT = {
    "conf": ("conf",),
    "data_pipeline": (
        *("conf", "data_pipeline"),
        *("model.hf.image_loading", "model.hf.image_tokens"),  # how the released models see a picture, without torch
    ),
    "model": ("conf", "model", "data_pipeline.batch"),
    "model/hf": (),  # shipped with exports: its siblings only, relatively
    "model/checkpoint": ("conf", "model.checkpoint"),
    "model/export": ("conf", "model.export", "model.hf"),
    "model/convert": (
        *("conf", "model.checkpoint", "model.convert", "model.export", "model.megatron.shards"),
        *("model.hf.options", "model.hf.rope"),  # defaults and the maths of YaRN, without transformers
        *("model.hf.image_loading", "model.hf.image_tokens"),
    ),
    "model/commands": (
        *("conf", "model.commands", "model.hf.image_tokens", "model.hf.options"),
        "model.export.images",  # a type
    ),
    "model/chat": ("conf", "model.chat", "model.commands", "model.export", "model.hf"),
    "model/evaluate": ("conf", "model.commands", "model.evaluate", "model.export", "model.hf"),
    "model/harness": ("conf", "model.commands", "model.export", "model.harness", "model.hf"),
    "model/verify_export": (
        *("conf", "model.checkpoint", "model.convert", "model.export"),
        *("model.hf.configuration_nemotron_labs_diffusion", "model.hf.configuration_nemotron_labs_diffusion_vlm"),
        *("model.hf.image_tokens", "model.verify_export"),
    ),
    "pretrain": ("conf", "data_pipeline", "model", "pretrain"),
    "lora": (
        *("conf", "data_pipeline", "pretrain", "lora"),
        *("model.checkpoint", "model.commands", "model.evaluate", "model.export", "model.hf"),
        "model.attention.visibility",  # who sees whom, which needs torch alone
    ),
    "launch": ("conf", "data_pipeline", "model.commands", "model.evaluate", "model.export", "model.hf", "launch"),
    "launch/plan": (
        "conf",
        "launch.plan",
        "pretrain.costs",
        "pretrain.costs",
    ),  # answers in a second: no torch
    "launch/simulate": (  # runs the trainer's own code, and compares with the plan
        "conf",
        "data_pipeline",
        "launch.plan",
        "launch.simulate",
        "lora",
        "model",
        "pretrain",
    ),
    "launch/preflight": (  # asks the trainer's own code: what it would open, choose and begin with
        *("conf", "launch.check_environment", "launch.preflight"),
        *(
            "model.attention.plan",
            "model.checkpoint.layout",
            "model.megatron.kernel_choice",
            "model.megatron.transformer_config",
        ),
        *("pretrain.costs", "pretrain.run.run_data", "pretrain.dry_batch", "pretrain.run.process_group"),
        *("pretrain.run.run_folder", "pretrain.resume.start_point", "pretrain.run.run_status"),
    ),
}

# The wings of pretrain/, each of which may import those before it, and which of them the monitor may import.
WINGS_OF_PRETRAIN = ("costs", "objective", "run", "step", "health", "checkpointing", "resume", "reporting")
LOOP_OF_PRETRAIN = ("trainer", "assemble", "dry_batch", "train")
MONITOR_MAY_IMPORT = ("costs", "run", "monitor")

# Library: the folders that may import it ("entry": also files that are run, hydra's home).
HOMES = {
    "megatron": ("model", "pretrain", "launch/simulate"),
    "megatron.core.datasets": ("data_pipeline", "model", "pretrain"),
    "transformer_engine": ("model", "pretrain"),
    "deepspeed": ("lora",),
    "peft": ("lora",),
    "hydra": ("conf", "entry"),
    "omegaconf": ("conf", "entry"),
}

# Distribution: the module it brings, where the names differ.
MODULE_OF = {"megatron-core": "megatron", "hydra-core": "hydra", "pyyaml": "yaml", "pillow": "PIL"}

# Composing is for entry files; what lies below them receives dataclasses.
COMPOSING = (
    "conf.composition.compose",
    "conf.composition.explain",
    "conf.composition.help",
    "conf.composition.command_line",
)


@dataclass(frozen=True)
class Import:
    """One absolute import: `file` relative to the repository root, and the dotted module name."""

    file: str
    line: int
    module: str

    def is_within(self, *packages: str) -> bool:
        return any(self.module == package or self.module.startswith(package + ".") for package in packages)

    def lies_in(self, *folders: str) -> bool:
        return any(self.file.startswith(folder + "/") for folder in folders)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def source_files() -> list[str]:
    folders = sorted(OURS - {"tests"})
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def absolute_imports(file: str) -> Iterator[Import]:
    """Yield every import of the file wherever it stands; `from a import b` counts as a.b, because b may be a module."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (Import(file, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_entry(file: str) -> bool:
    """Return whether the file is run: it has a main guard, is a __main__.py, or is what its __main__.py calls."""
    path = ROOT / file
    if path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
        return True
    beside, module = path.with_name("__main__.py"), file.removesuffix(".py").replace("/", ".")
    return beside.exists() and any(
        found.is_within(module) for found in absolute_imports(beside.relative_to(ROOT).as_posix())
    )


ALL_IMPORTS = [found for file in source_files() for found in absolute_imports(file)]


def assert_none(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(str(found) for found in wrong)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(file: str, modules: set[str]) -> set[str]:
    """Return the modules of ours that the file imports anywhere, in functions and relatively as well."""
    package = module_name(file) if file.endswith("/__init__.py") else module_name(file).rpartition(".")[0]
    names = [found.module for found in absolute_imports(file)]
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], node.module or ""])
            names += [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
    # `from a import b` means module a.b where there is one, else module a.
    found = {name if name in modules else name.rpartition(".")[0] for name in names}
    return (found & modules) - {module_name(file)}


def declared_modules() -> set[str]:
    """Return top-level module names of the distributions in pyproject.toml, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["wandb"], *extras["evaluation"]]
    names = {re.split(r"[^\w-]", line)[0] for line in lines}
    return {MODULE_OF.get(name, name).replace("-", "_") for name in names}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    deeper = tuple(other for other in MAY_IMPORT if other.startswith(folder + "/"))
    here = [found for found in ALL_IMPORTS if found.lies_in(folder) and not found.lies_in(*deeper)]
    assert_none([found for found in here if found.is_within(*OURS) and not found.is_within(*MAY_IMPORT[folder])])


def wing_of(path: str) -> str:
    """Return the name of the wing or file of pretrain/ in which a file or module lies."""
    return path.removesuffix(".py").replace("/", ".").split(".")[1]


def test_the_wings_of_pretrain_stand_on_those_before_them() -> None:
    order = (*WINGS_OF_PRETRAIN, *LOOP_OF_PRETRAIN)
    arrows = [found for found in ALL_IMPORTS if found.lies_in("pretrain") and found.is_within("pretrain")]
    inside = [found for found in arrows if wing_of(found.file) != "monitor"]
    assert {wing_of(found.file) for found in inside} | {wing_of(found.module) for found in inside} <= set(order)
    assert_none([found for found in inside if order.index(wing_of(found.module)) > order.index(wing_of(found.file))])
    watching = [found for found in arrows if wing_of(found.file) == "monitor"]
    assert_none([found for found in watching if wing_of(found.module) not in MONITOR_MAY_IMPORT])


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    homes = HOMES[library]
    narrower = tuple(other for other in HOMES if other.startswith(library + "."))
    users = [found for found in ALL_IMPORTS if found.is_within(library) and not found.is_within(*narrower)]
    strangers = [found for found in users if not found.lies_in(*homes) or found.lies_in("model/hf")]
    assert_none([found for found in strangers if not ("entry" in homes and is_entry(found.file))])


def test_no_import_goes_in_a_circle() -> None:
    modules = {module_name(file) for file in source_files()}
    graph = {module_name(file): imported_modules(file, modules) for file in source_files()}
    assert sum(map(len, graph.values())) > 500
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_configuration_needs_no_torch() -> None:
    assert_none([found for found in ALL_IMPORTS if found.lies_in("conf") and found.is_within("torch", "transformers")])


def test_pictures_are_opened_without_torch() -> None:
    """Preparation does it in worker processes, which must start fast."""
    files = ("model/hf/image_loading.py", "model/hf/image_tokens.py", "model/hf/__init__.py", "model/__init__.py")
    assert_none([found for found in ALL_IMPORTS if found.file in files and found.is_within("torch")])


def test_data_and_model_receive_dataclasses_and_compose_nothing() -> None:
    below = [found for found in ALL_IMPORTS if found.lies_in("data_pipeline", "model") and not is_entry(found.file)]
    assert_none([found for found in below if found.is_within(*COMPOSING)])


READ_PICTURES = (  # ship with vision-language models alone
    "model/hf/image_loading.py",
    "model/hf/image_processing_nemotron_labs_diffusion_vlm.py",
)


def test_files_shipped_with_an_export_need_only_torch_and_transformers() -> None:
    shipped = [found for found in ALL_IMPORTS if found.lies_in("model/hf")]
    allowed = (*sys.stdlib_module_names, "torch", "transformers")
    others = [found for found in shipped if not found.is_within(*allowed)]
    assert_none([found for found in others if not (found.is_within("numpy", "PIL") and found.file in READ_PICTURES)])


def test_every_library_in_use_is_declared() -> None:
    known = (*sys.stdlib_module_names, *OURS, *declared_modules())
    assert_none([found for found in ALL_IMPORTS if not found.is_within(*known)])


def test_the_sources_are_seen() -> None:
    assert {file.split("/")[0] for file in source_files()} >= {"conf", "data_pipeline", "model", "pretrain", "launch"}
    assert len(ALL_IMPORTS) > 100
