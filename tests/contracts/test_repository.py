"""What is in the repository, and what must never be."""

import re
import subprocess
from collections import Counter

import pytest

from tests.contracts.tree import ROOT, repository_files

# Written so that no pattern matches its own text here.
NEVER = {
    "an absolute path of one machine": re.compile(r"(?<![\w.~*-])/(?:wor[k]|roo[t]|hom[e]/\w+)/"),
    "a package registry's host name": re.compile(r"\bpypi\.(?:org|python)|pythonhosted\.or[g]|npmjs\.(?:com|org)"),
}


def text(path) -> str | None:
    """Contents of a text file, None of a binary one."""
    data = path.read_bytes()
    return None if b"\0" in data else data.decode(errors="replace")


def test_the_lock_file_is_not_tracked():
    """It would hold the addresses of the registry that it was made with."""
    tracked = ["git", "-c", "safe.directory=*", "ls-files", "uv.lock"]
    listing = subprocess.run(tracked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert listing == ""
    assert "/uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("what", NEVER)
def test_no_file_names(what):
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in repository_files()
        for number, line in enumerate((text(path) or "").splitlines(), 1)
        if NEVER[what].search(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("what", "line", "seen"),
    [
        ("an absolute path of one machine", "open('/wor" + "k/x')", True),
        ("an absolute path of one machine", "cd /roo" + "t/x", True),
        ("an absolute path of one machine", "https://host/wor" + "k/x", False),
        ("an absolute path of one machine", "network/wor" + "k/", False),
        ("a package registry's host name", "https://py" + "pi.org/simple", True),
        ("a package registry's host name", "https://arxiv.org/abs/1706.03762", False),
    ],
)
def test_each_pattern_can_match(what, line, seen):
    assert bool(NEVER[what].search(line)) == seen


def test_gitignore_patterns_are_anchored():
    """A bare `data/` would hide a package of ours."""
    from tests.contracts.tree import PACKAGES

    patterns = (ROOT / ".gitignore").read_text().split()
    assert not [pattern for pattern in patterns if pattern.strip("/") in PACKAGES]


def test_test_file_names_are_unique():
    """pytest imports test files by their base name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    assert "uv run --group test pytest" in script.read_text()
