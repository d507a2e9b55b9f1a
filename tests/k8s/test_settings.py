"""Settings: flag > environment > file > default."""

import re
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_k8s.settings import load


def test_the_default_store_is_in_the_working_directory() -> None:
    assert load().store == "./llamarefine-store"


def test_a_given_value_overrides_the_file_and_the_file_overrides_the_default(tmp_path: Path) -> None:
    (tmp_path / "llamarefine.yaml").write_text("store: s3://from/file\n")
    assert load().store == "s3://from/file"
    assert load(store=None).store == "s3://from/file"
    assert load(store="s3://from/flag").store == "s3://from/flag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sotre: x", "`sotre` is not a setting; did you mean `store`?"),
        ("zzz: x", "`zzz` is not a setting; the settings are store"),
        ("store: 3", "`store`: .* found 3"),
        ("- store", "expected settings such as"),
        ("store: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "llamarefine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load()
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
