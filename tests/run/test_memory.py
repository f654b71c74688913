"""Memory in a control group: the least limit counts, of the group and those above it."""

import psutil
import pytest

from quantline.run import memory

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups(lines of /proc/self/cgroup, {file: content}) makes control groups."""

    def make(lines: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(lines)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MOUNT", tmp_path / "fs")
    return make


def test_of_version_2_the_least_limit_of_all_groups_above_counts(groups):
    groups(
        "0::/a/b\n",
        {
            "a/b/memory.max": "max\n",
            "a/memory.max": f"{64 * MIB}\n",
            "a/memory.stat": f"file {50 * MIB}\nanon {24 * MIB}\n",
            "memory.max": f"{96 * MIB}\n",
            "memory.stat": "anon 0\n",
        },
    )
    assert memory.allowed_bytes() == 64 * MIB
    assert memory.available_bytes() == 40 * MIB  # pages of files can be dropped


def test_of_version_1_a_container_sees_its_group_as_the_root(groups):
    groups(
        "7:cpu:/not/here\n4:memory:/not/here\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{64 * MIB}\n",
            "memory/memory.stat": f"total_rss {63 * MIB}\n",
        },
    )
    assert memory.allowed_bytes() == 64 * MIB
    assert memory.available_bytes() == MIB


@pytest.mark.parametrize("lines", ["", "0::/\n", "4:memory:/\n"])
def test_without_a_limit_it_is_the_machines(groups, lines):
    groups(lines, {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory.max": "max\n"})
    assert memory.allowed_bytes() == psutil.virtual_memory().total
