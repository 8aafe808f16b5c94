"""The Python blocks of README.md run, in order and in one namespace."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks(text):
    """(line, code) of the ```python blocks."""
    return [
        (text[: m.start(1)].count("\n"), m[1])
        for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


def test_blocks_are_found():
    assert blocks("a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny\n```\n") == [
        (2, "x = 1\n"),
        (8, "y\n"),
    ]
    assert blocks(README.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(seed):
    text, names = README.read_text(encoding="utf-8"), {"__name__": "readme"}
    if "torch.compile(" in "".join(code for _, code in blocks(text)) and not (
        shutil.which("g++") or shutil.which("clang++")
    ):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    torch._dynamo.reset()
    for line, code in blocks(text):
        exec(compile(ast.increment_lineno(ast.parse(code), line), str(README), "exec"), names)
