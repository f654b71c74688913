"""Results that DVC would refuse after hours of work are refused before it."""

import pytest

from quantline.errors import ConfigError
from quantline.run.result_folders import FOLDERS, check_result_folders


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_of_results_that_leads_out_of_the_project_is_refused(
    tmp_path, monkeypatch, folder
):
    project = tmp_path / "project"
    elsewhere = tmp_path / "large disk"
    elsewhere.mkdir()
    (project / folder).parent.mkdir(parents=True)
    monkeypatch.chdir(project)
    folder.symlink_to(elsewhere)
    check_result_folders()  # DVC minds only where there is git
    (project / ".git").mkdir()
    with pytest.raises(ConfigError, match=f"expected {folder} to be a folder .* found a link to"):
        check_result_folders()
    folder.unlink()
    (project / "inside").mkdir()
    folder.symlink_to(project / "inside")
    check_result_folders()


def test_a_stage_asks_before_it_begins(project, tmp_path, capsys):
    (project.root / ".git").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (project.root / "artifacts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        project.stage("load")
    assert "load: config_invalid (config_invalid): expected artifacts to be a folder" in (
        capsys.readouterr().err
    )
