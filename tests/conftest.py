"""Fixtures that several files use, and how the kernel's tests run."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

# small tensors: threads would only wait for each other, and long if something else runs here
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which some parts of torch do
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_kernel.py"]  # there is none outside Linux

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "golden"


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """A folder with the golden cases and, made afresh (the same bits everywhere), the small checkpoints they need."""
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN, root, dirs_exist_ok=True)
    for name, folder in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        shutil.copytree(FIXTURES / "tokenizers" / name, root / "tokenizers" / folder)
    spec = importlib.util.spec_from_file_location("make_checkpoint", root / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_all(root / "models")
    return root
