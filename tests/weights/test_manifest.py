"""Manifests: facts only, every field checked, every mistake named."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

import zoo
from zoo.weights import manifest


@pytest.mark.parametrize("path", manifest.manifests(), ids=lambda path: path.stem)
def test_every_manifest_of_the_package_is_sound(path):
    models = set(zoo.list_models())
    for entry in manifest.read_manifest(path):
        assert entry.model in models
        if entry.packaged:
            data = entry.packaged.read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry.sha256
            assert entry.size in (None, len(data))


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "family.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = "nat_mini.in1k: {url: https://example.org/w.pth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a manifest|must be a mapping"),
        ("4", "not a manifest"),
        ("[1, 2]", "must be a mapping"),
        ("!!set {a}", "not a manifest|hold fields|named"),
        ("nat_mini: {url: https://example.org/w.pth}", "named <model>.<tag>"),
        ("'../../etc.in1k': {url: https://example.org/w.pth}", "letters, digits"),
        ('"nat\\0mini.in1k": {url: https://example.org/w.pth}', "letters, digits|not a manifest"),
        (f"{GOOD}, ulr: x}}", "unknown field 'ulr'; did you mean url"),
        (f"{GOOD}, sha256: abc}}", "sha256 must be 64 hexadecimal digits"),
        (f"{GOOD}, sha256: {'A' * 64}}}", "sha256 must be 64 hexadecimal digits in lower case"),
        (f"{GOOD}, sha256: 12}}", "sha256 must be a text"),
        (f"{GOOD}, size: -1}}", "size must be a positive number"),
        (f"{GOOD}, size: '12'}}", "size must be a positive number"),
        (f"{GOOD}, metric: {{top1: .nan}}}}", "metric must be a mapping of plain finite values"),
        (f"{GOOD}, input: [1]}}", "input must be a mapping"),
        (f"{GOOD}, file: w.safetensors}}", "exactly one of url, hub or file"),
        ("nat_mini.in1k: {license: MIT}", "exactly one of url, hub or file"),
        ("nat_mini.in1k: {url: 'http://example.org/w.pth'}", "must be https"),
        ("nat_mini.in1k: {url: 'file:///etc/passwd'}", "must be https"),
        ("nat_mini.in1k: {url: 'ftp://example.org/w'}", "must be https"),
        ("nat_mini.in1k: {url: 'data:,x'}", "must be https"),
        ("nat_mini.in1k: {url: 'https://me:secret@example.org/w'}", "without a user name"),
        ("nat_mini.in1k: {url: 'https://example.org:port/w'}", "must be https"),
        ("nat_mini.in1k: {hub: '../up/w.pth'}", "hub must be"),
        ("nat_mini.in1k: {hub: owner}", "hub must be"),
        ("nat_mini.in1k: {hub: owner/name/../../w.pth}", "hub must be"),
        (f"{GOOD}, revision: main}}", "revision belongs to a hub entry"),
        ("nat_mini.in1k: {hub: owner/name, dead: gone}", "dead belongs to an entry with a url"),
        (f"nat_mini.in1k: {{file: ../w.safetensors, sha256: {'a' * 64}}}", "beside the manifest"),
        ("nat_mini.in1k: {file: w.safetensors}", "with its sha256"),
        (f"{GOOD}}}\n{GOOD}}}", "not a manifest"),
        ("a: !!python/object/apply:os.mkdir [ran]", "not a manifest"),
        ("[" * 100_000, "not a manifest"),
        (b"\xff\xfe\x00", "not a manifest"),
    ],
)
def test_a_wrong_manifest_names_the_field(text, message, tmp_path):
    with pytest.raises(zoo.IntegrityError, match=message) as caught:
        manifest.read_manifest(written(tmp_path, text))
    assert "family.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_manifests_raise_one_kind_of_error(tmp_path):
    whole = manifest.manifests()[0].read_bytes()[:2000]
    chance = random.Random(0)
    refused = 0
    for number in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(data)
        try:
            manifest.read_manifest(path)
        except zoo.IntegrityError:
            refused += 1
    assert refused > 100
