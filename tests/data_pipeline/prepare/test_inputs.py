"""A folder and a glob name the same files: through links, not in hidden folders, in no cycle."""

from pathlib import Path

from data_pipeline.prepare.inputs import list_input_files, list_left_out, list_surprises


def make(folder: Path) -> Path:
    """Make a folder with a linked folder, a link that leads back, and the copies of a notebook's checkpoints."""
    elsewhere, root = folder / "elsewhere", folder / "root"
    for path in (elsewhere, root / "sub", root / ".ipynb_checkpoints"):
        path.mkdir(parents=True)
    for number, path in enumerate((elsewhere / "a", root / "b", root / "sub" / "c", root / ".ipynb_checkpoints" / "d")):
        path.with_suffix(".jsonl").write_text(f'{{"text": "{number}"}}\n')
    (root / "sub" / "notes.txt").write_text("x")
    (root / "linked").symlink_to(elsewhere)
    (root / "sub" / "back").symlink_to(root)
    return root


def names(files: str) -> list[str]:
    return [file.name for file in list_input_files(files)]


def test_a_folder_is_read_as_a_glob_of_it(tmp_path: Path) -> None:
    root = make(tmp_path)
    expected = ["b.jsonl", "linked/a.jsonl", "sub/c.jsonl"]
    assert names(str(root)) == expected
    assert names(f"{root}/**/*.jsonl") == expected
    assert list_left_out(str(root)) == ["sub/notes.txt"]


def test_what_may_surprise_is_said(tmp_path: Path) -> None:
    root = make(tmp_path)
    assert list_surprises(str(root)) == [
        f"{root / 'linked'} is a link that is followed",
        f"{root / '.ipynb_checkpoints'} is hidden and not read",
    ]
    assert list_surprises(f"{root}/*.jsonl") == []


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    assert names(str(make(tmp_path) / ".ipynb_checkpoints")) == ["d.jsonl"]


def test_a_preparation_warns_of_them(workshop) -> None:
    workshop.write("a.jsonl", [{"text": "a"}])
    workshop.write(".hidden/b.jsonl", [{"text": "b"}])
    report = workshop.prepare()
    assert report.manifest.documents == 1
    assert report.warnings == [f"{workshop.folder / 'in' / '.hidden'} is hidden and not read"]
