"""The repository itself: the development commands, what is made from what, and that the pieces agree."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectranb.dev import made_files, notebooks, out_of_step, settings, tidy_text, write_readme

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = settings(ROOT)


def code(source, **extra):
    return dict(cell_type="code", source=source, metadata={}, execution_count=None, outputs=[]) | extra


def stream(text):
    return dict(output_type="stream", name="stdout", text=[text])


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    text = re.sub(r"^lib_(name|path) = .*", r"lib_\1 = toy", (ROOT / "settings.ini").read_text(), flags=re.M)
    (folder / "settings.ini").write_text(text)
    write(folder / "nbs/00_toy.ipynb", code("#| default_exp toy", id="a"), code("#| export\ndef f(x): return x + 1", id="b"),
          code("#| slow\nprint('here')", id="c", outputs=[stream("elsewhere\n")]), code("f(1)", id="d"))
    write(folder / "nbs/index.ipynb", dict(cell_type="markdown", source="# Toy", metadata={}, id="e"))
    out_of_step(folder, fix=True)
    assert out_of_step(folder) == []
    return folder


@pytest.fixture
def project(template, tmp_path):
    "A small project with one exported notebook, an index and a README, all in step."
    return Path(shutil.copytree(template, tmp_path / "project"))


def write(path, *cells):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def outputs(path):
    return {c["id"]: c.get("outputs") for c in json.loads(path.read_text())["cells"]}


def dev(*args, cwd, **env):
    return subprocess.run([sys.executable, "-m", "spectranb.dev", *map(str, args)], cwd=cwd, text=True, capture_output=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)) | env)


# Running notebooks

def test_flagged_outputs_survive(project):
    path = project / "nbs/00_toy.ipynb"
    assert dev("run", path, cwd=project).returncode == 0
    assert outputs(path)["c"] == [stream("elsewhere\n")] and outputs(path)["d"][0]["data"]["text/plain"] == ["2"]
    first = path.read_bytes()
    assert dev("run", path, cwd=project).returncode == 0 and path.read_bytes() == first
    assert dev("run", path, "--flags", "slow", cwd=project).returncode == 0
    assert outputs(path)["c"] == [stream("here\n")]


def test_outputs_that_are_gone_are_removed(project):
    path = write(project / "nbs/01_old.ipynb", code("x = 1", id="a", outputs=[stream("old\n")]))
    assert dev("run", path, cwd=project).returncode == 0 and outputs(path)["a"] == []


def test_semicolon_hides_the_value_but_not_what_was_printed(project):
    path = write(project / "nbs/01_semi.ipynb", code("print('said'); 5;", id="a"))
    assert dev("run", path, cwd=project).returncode == 0 and outputs(path)["a"] == [stream("said\n")]


@pytest.mark.parametrize("source, said", [("1 / 0", "ZeroDivisionError"), ("def f(:", "SyntaxError"),
                                          ("import sys; sys.exit(3)", "SystemExit"), ("raise KeyboardInterrupt", "KeyboardInterrupt")])
def test_a_failing_cell_is_named_and_nothing_is_saved(project, source, said):
    path = write(project / "nbs/01_bad.ipynb", code("print(1)", id="fine"), code(source, id="wrong"))
    before = path.read_bytes()
    done = dev("run", path, cwd=project)
    assert done.returncode == 1 and f"nbs/01_bad.ipynb, cell 1 (wrong): raised {said}" in done.stderr
    assert path.read_bytes() == before and not list(path.parent.glob(".01_bad*"))


def test_no_notebook(project):
    (project / "nbs/text.ipynb").write_text("not a notebook")
    for name in ("nbs/missing.ipynb", "nbs/text.ipynb"):
        done = dev("run", project / name, cwd=project)
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr


def test_cells_without_ids_get_the_same_ones_everywhere(project):
    paths = [write(project / f"nbs/0{i}_noid.ipynb", code("1")) for i in (1, 2)]
    for path in paths: assert dev("run", path, cwd=project).returncode == 0
    assert list(outputs(paths[0])) == list(outputs(paths[1])) and None not in outputs(paths[0])


def test_figures_are_the_same_bytes_twice(project):
    path = write(project / "nbs/01_figure.ipynb", code("import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()", id="a"))
    assert dev("run", path, cwd=project).returncode == 0
    assert "image/png" in outputs(path)["a"][0]["data"]
    assert dev("run", path, "--check", cwd=project).returncode == 0


def test_tidy_text_keeps_windows_line_ends_and_plain_text():
    assert tidy_text("a\r\nb\n", []) == "a\nb\n" and tidy_text("a\nb", ["/x"]) == "a\nb"


# What is made from what

DRIFT = {
    "README.md": lambda text: text + "more",
    "toy/toy.py": lambda text: text.replace("x + 1", "x + 2"),
    "toy/__init__.py": lambda text: '__version__ = "9.9"\n',
    "nbs/nbdev.yml": lambda text: text.replace("main", "master"),
    "nbs/00_toy.ipynb": lambda text: text.replace('"execution_count": null', '"execution_count": 7'),
}


def test_sync_finds_and_mends_drift(project):
    before = {name: (project / name).read_text() for name in DRIFT}
    for name, change in DRIFT.items():
        (project / name).write_text(change(before[name]))
        assert (project / name).read_text() != before[name]
    done = dev("sync", cwd=project)
    assert done.returncode == 1 and all(f"out of step: {name}\n" in done.stdout for name in DRIFT)
    assert dev("sync", "--fix", cwd=project).returncode == 0
    assert {name: (project / name).read_text() for name in DRIFT} == before


def test_sync_leaves_the_checkout_alone(project):
    (project / "toy/toy.py").unlink()
    files = made_files(project)
    assert out_of_step(project) == ["toy/toy.py"] and made_files(project) == files


def test_sync_names_a_broken_notebook(project):
    write(project / "nbs/01_bad.ipynb", code("#| default_exp bad", id="a"), code("#| export\ndef f(:", id="b"))
    done = dev("sync", cwd=project)
    assert done.returncode == 1 and done.stderr


def test_readme_drops_figures_it_no_longer_shows(project):
    (project / "README_files").mkdir()
    (project / "README_files/old.png").write_bytes(b"")
    write_readme(project)
    assert not (project / "README_files/old.png").exists()


def test_tests_are_counted(project):
    write(project / "nbs/01_bad.ipynb", code("assert False", id="a"))
    (project / "tests").mkdir()
    (project / "tests/test_toy.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip(reason='why')\ndef test_c(): pass\n")
    done = dev("test", "--jobs", 2, cwd=project)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "3 passed, 3 failed, 1 skipped"   # sync: not clean


def test_a_killed_test_run_leaves_nothing_running(project):
    mark = project / "alive"
    write(project / "nbs/01_long.ipynb", code(f"import time\nwhile True: open({str(mark)!r}, 'a').write('.'); time.sleep(0.05)", id="a"))
    run = subprocess.Popen([sys.executable, "-m", "spectranb.dev", "test", "--jobs", "4"], cwd=project, stdout=subprocess.DEVNULL,
                           env=os.environ | dict(PYTHONPATH=str(ROOT)))
    for _ in range(600):
        if mark.exists(): break
        time.sleep(0.1)
    run.terminate()
    assert run.wait(60) == 1
    size = mark.stat().st_size
    time.sleep(0.5)
    assert mark.stat().st_size == size > 0


# Without the development tools

def test_dev_without_its_tools_says_what_to_install():
    blocked = "import sys\nfor m in 'nbdev execnb nbconvert nbformat IPython'.split(): sys.modules[m] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + "from spectranb.dev import main; sys.exit(main(['run', 'nbs/00_core.ipynb']))"],
                          cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and "pip install -e '.[dev]'" in done.stderr and "Traceback" not in done.stderr


# Pieces that must agree

def test_versions_agree():
    assert f"version: {SETTINGS['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'"{SETTINGS["version"]}"' in (ROOT / "spectranb/__init__.py").read_text()


def test_every_notebook_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    within = lambda p: p.relative_to(ROOT / SETTINGS["nbs_path"]).as_posix()
    assert [within(p) for p in notebooks(ROOT) if p.name != SETTINGS["readme_nb"] and f"(nbs/{within(p)})" not in readme] == []


def test_links_lead_to_files():
    "In the README, in every notebook, and in the cards of what ships."
    pages = {p: p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "spectranb/bundled").glob("*/README.md")]}
    for p in notebooks(ROOT):
        pages[p] = "\n".join("".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    targets = [(p, target) for p, text in pages.items() for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)]
    assert len(targets) > 60 and not [(p.name, target) for p, target in targets if not (p.parent / target).exists()]


def test_every_notebook_has_a_title_and_a_subtitle_of_one_line():
    "nbdev takes the page's title and description from the first cell, and only this form of it."
    for path in notebooks(ROOT):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        assert first["cell_type"] == "markdown" and re.fullmatch(r"# .+\n+> .+\n?", "".join(first["source"])), path.name


DISTRIBUTION = dict(sklearn="scikit-learn")                                # where the import has another name


def test_every_import_is_a_requirement():
    names_in = lambda *keys: {re.split(r"[<>=!~\[]", r)[0].lower() for key in keys for r in SETTINGS[key].split()}
    always, extra = names_in("requirements"), names_in(*(k for k in SETTINGS if k.endswith("_requirements") and k != "dev_requirements"))
    for path in (ROOT / "spectranb").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            declared = always if node in tree.body else always | extra      # an extra is imported where it is used
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"spectranb"}:
                assert DISTRIBUTION.get(top, top).lower().replace("_", "-") in declared, f"{path.name} imports {top}"


def test_pins_are_within_the_requirements():
    from packaging.requirements import Requirement
    loose = {r.name: r.specifier for r in map(Requirement, SETTINGS["requirements"].split())}
    for pin in map(Requirement, SETTINGS["dev_requirements"].split()):
        exact = [s.version for s in pin.specifier if s.operator == "=="]
        if pin.name in loose and exact: assert exact[0] in loose[pin.name], pin
    torch = re.search(r"^TORCH\s+\?= (\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert torch in SETTINGS["dev_requirements"].split()


# make

def make(*args, path):
    "Run make as from a shell with this search path, also where the tests themselves were started by make PYTHON=…"
    inherited = ("MAKE", "MFLAGS", "PYTHON", "VENV", "LATEST", "TORCH")
    return subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", *args], text=True, capture_output=True, timeout=60,
                          env={k: v for k, v in os.environ.items() if not k.startswith(inherited)} | dict(PATH=path))


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def only_old_python(tmp_path):
    "A search path where every Python is version 3.9."
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        program(tmp_path / "bin" / name, 'case "$1" in --version) echo "Python 3.9.2";; *) exit 1;; esac')
    return f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "test-latest"])
def test_an_old_python_is_refused(only_old_python, tmp_path, target):
    done = make(target, f"VENV={tmp_path}/venv", f"LATEST={tmp_path}/latest", path=only_old_python)
    assert done.returncode and "spectranb needs Python 3.11 or newer" in done.stderr and "python3: Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists() and not (tmp_path / "latest").exists()


@needs_make
def test_a_named_python_is_the_only_one_tried(only_old_python):
    assert make("python", f"PYTHON={sys.executable}", path=only_old_python).stdout.strip() == sys.executable
    assert make("python", "PYTHON=no-such-python", path=os.environ["PATH"]).returncode


@pytest.mark.parametrize("said, status, last, code", [
    ("7 passed, 0 failed", 0, "7 passed, 0 failed", 0), ("6 passed, 1 failed, 2 skipped", 2, "6 passed, 1 failed, 2 skipped", 2),
    ("no such index", 2, "0 passed, 1 failed", 2), ("nothing", 0, "0 passed, 1 failed", 1)])
def test_ci_run_ends_with_the_count(tmp_path, said, status, last, code):
    program(tmp_path / "bin" / "make", f"echo '{said}'; echo 'make: *** [test]' >&2; exit {status}")
    done = subprocess.run([ROOT / ".ci/run"], text=True, capture_output=True,
                          env=os.environ | dict(PATH=f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"))
    assert (done.stdout.splitlines()[-1], done.returncode) == (last, code)
