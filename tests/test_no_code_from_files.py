"""Nothing in this repository runs code from a file: read off its own syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("zoo", "kernels", "recipes", "weights", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)

# Calls that can run what a file says, by the end of their dotted name.
BANNED = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load",
    "cloudpickle.load",
    "marshal.load", "marshal.loads", "torch.package.PackageImporter",
    "torch.export.load", "torch.jit.load", "torch.hub.load", "load_state_dict_from_url",
    "checkpoint.load", "dcp.load", "load_from_checkpoint",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.unsafe_load_all",
    "builtins.eval", "builtins.exec", "os.system", "extractall", "shutil.unpack_archive",
    "io.decode_image", "io.read_image", "io.decode_png", "io.decode_jpeg",
    "hydra.utils.instantiate", "OmegaConf.register_new_resolver",
)  # fmt: skip
# Files that a test has written itself a line above; such a call belongs to tests alone.
OWN_FILES = ("torch.export.load", "extractall")
BARE = ("eval", "exec", "__import__")  # as methods of something else these names mean another thing
THE_READER = ("weights/loader.py", "unpickle")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST):
    """Every call with its dotted name and the function it stands in."""

    def walk(node: ast.AST, inside: str):
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else inside
            if isinstance(child, ast.Call):
                yield dotted(child.func), child, inside
            yield from walk(child, name)

    yield from walk(tree, "")


def is_round_trip(name: str, call: ast.Call) -> bool:
    """pickle.loads(pickle.dumps(x)), which reads nothing from anywhere."""
    source = call.args[0] if call.args else None
    made_here = isinstance(source, ast.Call) and dotted(source.func) == "pickle.dumps"
    return name == "pickle.loads" and made_here


def offences(text: str, path: str) -> list[str]:
    found = []
    for name, call, inside in calls(ast.parse(text)):
        where = f"{path}:{call.lineno}: {name}"
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if path.startswith("tests/") and (name.endswith(OWN_FILES) or is_round_trip(name, call)):
            continue
        if name in BARE or any(name == banned or name.endswith(f".{banned}") for banned in BANNED):
            found.append(where)
        elif name == "torch.load":
            safe = keywords.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"{where} without weights_only=True")
            elif not path.startswith("tests") and (path, inside) != THE_READER:
                found.append(f"{where} beside the one reader")
        elif name.endswith(("np.load", "numpy.load")):
            allowed = keywords.get("allow_pickle", ast.Constant(False))
            if not (isinstance(allowed, ast.Constant) and allowed.value is False):
                found.append(f"{where} with allow_pickle")
        elif name.endswith(("subprocess.run", "Popen", "check_call", "check_output")) and "shell" in keywords:
            found.append(f"{where} through a shell")
        elif "trust_remote_code" in keywords:
            found.append(f"{where} with trust_remote_code")
    return found


def test_no_source_can_run_what_a_file_says():
    assert [
        offence
        for path in SOURCES
        for offence in offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, weights_only=True)",  # elsewhere than in the reader
        "pickle.loads(data)",
        "torch.hub.load_state_dict_from_url(url)",
        "torch.distributed.checkpoint.load(state)",
        "torch.export.load(file)",
        "yaml.load(text, Loader=yaml.Loader)",
        "archive.extractall(folder)",
        "torchvision.io.decode_image(data)",
        "np.load(file, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "pipe.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scan_sees(line):
    assert offences(line, "zoo/somewhere.py")


def test_a_test_may_unpickle_what_it_has_pickled_and_nothing_else():
    assert not offences("pickle.loads(pickle.dumps(model))", "tests/somewhere.py")
    assert offences("pickle.loads(pickle.dumps(model))", "zoo/somewhere.py")
    assert offences("pickle.loads(data)", "tests/somewhere.py")
