"""What is packed: a source distribution can be built from."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_holds_all_that_a_build_reads(tmp_path):
    pack = ["-q", "egg_info", "--egg-base", tmp_path, "sdist", "--formats=tar", "-d", tmp_path]
    subprocess.run([sys.executable, "setup.py", *pack], cwd=ROOT, check=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [ROOT / name for name in ("CMakeLists.txt", "setup.py", "README.md", "LICENSE")]
    needed += (ROOT / "torch_pd").rglob("*.py")
    assert {str(path.relative_to(ROOT)) for path in needed} <= held
    assert not [name for name in held if name.endswith(".so")]
