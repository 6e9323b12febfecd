"""Set-up of the environment: interpreters are tested by running them, and a complete environment is left alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.check_environment import find_damaged, find_problems, read_requirements

ROOT = Path(__file__).parents[2]
FIND_PYTHON = ROOT / "launch" / "find_python.sh"
HAS_CUDA_DEVICE = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def find_python(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run find_python.sh where `home`/bin comes first on PATH and nothing may be installed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYENV_ROOT")}
    path = f"{home / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        [str(FIND_PYTHON)],
        env={**inherited, "HOME": str(home), "PATH": path, "OBTAIN": "0", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_shim_that_lies_is_passed_over(tmp_path: Path) -> None:
    for name in ("python3.12", "python3", "python"):
        write_script(tmp_path / "bin" / name, "exit 127")
    write_script(tmp_path / ".pyenv/versions/3.12.99/bin/python3.12", f'exec "{sys.executable}" "$@"')
    result = find_python(tmp_path)
    assert result.returncode == 0
    version = subprocess.run([result.stdout.strip(), "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("Python 3.12")


def test_another_python_version_is_passed_over(tmp_path: Path) -> None:
    write_script(tmp_path / "bin" / "python3.12", "echo ''")  # runs, but prints no interpreter: not 3.12
    write_script(tmp_path / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    assert Path(find_python(tmp_path).stdout.strip()).exists()


def test_a_named_interpreter_that_does_not_work_is_an_error(tmp_path: Path) -> None:
    result = find_python(tmp_path, PYTHON=str(write_script(tmp_path / "broken", "exit 127")))
    assert result.returncode == 1 and result.stdout == ""
    assert f"PYTHON={tmp_path / 'broken'} is not a working CPython 3.12" in result.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pytest>=9", None),
        ("pytest<2", "is needed"),
        ("no-such-distribution", "no-such-distribution is not installed"),
    ],
)
def test_the_environment_check_compares_versions(line: str, problem: str | None) -> None:
    found = find_problems([line])
    assert found == [] if problem is None else problem in found[0]


def test_a_package_whose_folder_was_deleted_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "halfgone-1.0.dist-info"
    records.mkdir()
    (records / "METADATA").write_text("Metadata-Version: 2.1\nName: halfgone\nVersion: 1.0\n")
    (records / "RECORD").write_text("halfgone/__init__.py,,\nhalfgone/deep/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_problems(["halfgone==1.0"]) == ["halfgone has lost its files: halfgone"]
    assert find_damaged(["halfgone==1.0", "pytest", "no-such-distribution"]) == ["halfgone==1.0"]
    (tmp_path / "halfgone").mkdir()
    assert find_problems(["halfgone==1.0"]) == find_damaged(["halfgone==1.0"]) == []


def test_the_gpu_packages_are_in_their_extra_alone() -> None:
    base = read_requirements(["dev"], without=[])
    assert not [line for line in base if "transformer-engine" in line or "apex" in line]
    assert [line for line in read_requirements(["gpu"], without=[]) if "transformer-engine[core-cu13" in line]
    assert not [line for line in read_requirements([], without=["torch"]) if line.startswith("torch")]


class Checkout:
    """A copy of the set-up scripts whose interpreter records calls of pip instead of running them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pip_log = folder / "pip.log"
        shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        inside = f'[ "$1 $2" = "-m pip" ] && {{ echo "$*" >>"{self.pip_log}"; exit ${{PIP_STATUS:-0}}; }}'
        interpreter = write_script(folder / "inside", f'{inside}\nexec "{sys.executable}" "$@"')
        make_venv = f'mkdir -p "$3/bin" && cp "{interpreter}" "$3/bin/python"'
        base = write_script(folder / "base", make_venv)
        write_script(folder / "launch" / "find_python.sh", f'echo "{base}"')

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "launch" / "setup.sh")]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)

    @property
    def pip_calls(self) -> list[str]:
        return self.pip_log.read_text().splitlines() if self.pip_log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout with a space")


def test_the_second_set_up_does_nothing(checkout: Checkout) -> None:
    assert checkout.set_up().returncode == 0
    assert checkout.pip_calls == ["-m pip install -e .[dev]"]
    second = checkout.set_up()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(checkout.pip_calls) == 1


def test_a_changed_pyproject_is_installed_again(checkout: Checkout) -> None:
    checkout.set_up()
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# another pin\n")
    checkout.set_up()
    assert len(checkout.pip_calls) == 2


def test_a_missing_package_is_noticed_although_set_up_was_completed(checkout: Checkout) -> None:
    pyproject = checkout.folder / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("dependencies = [", 'dependencies = [\n  "lost-package",', 1))
    checkout.set_up()
    result = checkout.set_up()
    assert "lost-package is not installed" in result.stderr
    assert len(checkout.pip_calls) == 2


def test_an_interrupted_installation_is_taken_up_again(checkout: Checkout) -> None:
    assert checkout.set_up(PIP_STATUS="1").returncode != 0
    assert checkout.set_up().returncode == 0
    assert len(checkout.pip_calls) == 2


@pytest.mark.skipif(HAS_CUDA_DEVICE, reason="this machine may have the GPU packages")
def test_gpu_packages_are_refused_without_a_device(checkout: Checkout) -> None:
    result = checkout.set_up(GPU="1")
    assert result.returncode == 1 and "no NVIDIA device" in result.stderr
    assert checkout.pip_calls == []
