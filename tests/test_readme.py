"""README's Python runs, and its tree is the real one."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_own_network_example_runs() -> None:
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "nn.Sequential" in block)
    assert sum(1 for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))) <= 15
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    pruned, groups = scope["pruned"], scope["groups"]
    assert isinstance(pruned, torch.nn.Module)
    assert pruned(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    kept = scope["best"].score.cost.macs  # type: ignore[attr-defined]
    dense = 30 * 30 * 27 * 32 + 28 * 28 * 9 * 32 * 64 + 64 * 10
    assert 0.45 <= kept / dense <= 0.5
    assert len(groups.prunable) == 2  # type: ignore[attr-defined]


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", README, re.MULTILINE)


def test_the_tree_names_files_that_exist_and_all_of_them() -> None:
    tree = README.partition("## The tree is the pipeline")[2].split("```")[1].strip("\n")
    named: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        words = line.split("  ")[0] if not line.startswith("  ") else line
        if line and not line.startswith(" "):
            folder = line.split()[0] if line.split()[0].endswith("/") else ""
            named.add(line.split()[0].rstrip("/"))
        elif words.strip():
            named.add((folder + line.split()[0]).rstrip("/"))
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cacp").glob("*.py") if path.name != "__init__.py"}
    entries = {path.name for path in ROOT.glob("*.py")}
    assert modules | entries <= named
