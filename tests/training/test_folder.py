import pytest

from errors import UserError
from training.folder import choose_folder, prepare_folder


def choose(tmp_path, **given):
    return choose_folder(given, default_name="vit", default_dir=tmp_path)


def test_runs_are_numbered_until_a_name_is_free(tmp_path):
    assert choose(tmp_path) == (tmp_path / "vit", False)
    for name in ("vit", "vit-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    assert choose(tmp_path) == (tmp_path / "vit-3", False)
    assert choose(tmp_path, resume="auto") == (tmp_path / "vit", True)
    assert choose(tmp_path, resume=str(tmp_path / "vit-2")) == (tmp_path / "vit-2", True)
    assert choose(tmp_path, resume="auto", run_name="new") == (tmp_path / "new", False)
    assert choose(tmp_path, overwrite=True) == (tmp_path / "vit", False)
    assert choose(tmp_path, out_dir=str(tmp_path / "mounted"), run_name="a") == (tmp_path / "mounted" / "a", False)
    with pytest.raises(UserError, match="--run-name vit: .* exists; use --resume .*, or --overwrite"):
        choose(tmp_path, run_name="vit")
    with pytest.raises(UserError, match="--resume .*nothing: that is no run.s folder, and no last.pt"):
        choose(tmp_path, resume=str(tmp_path / "nothing"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        prepare_folder(tmp_path / "file" / "run", resuming=False)


def test_a_replaced_run_leaves_only_what_no_run_wrote(tmp_path):
    for name in ("last.pt", "epoch-3.pt", "result.json", "notes.txt", "another.pt"):
        (tmp_path / name).touch()
    prepare_folder(tmp_path, resuming=True)
    assert len(list(tmp_path.iterdir())) == 5
    prepare_folder(tmp_path, resuming=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.pt", "notes.txt"]


def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert choose(tmp_path, resume="auto", run_name="mine") == (folder, False)
    (folder / "result.json").touch()
    with pytest.raises(UserError, match="mine is finished, but has no last.pt; --overwrite"):
        choose(tmp_path, resume="auto", run_name="mine")
