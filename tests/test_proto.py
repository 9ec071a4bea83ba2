"""The generated stubs are those of the proto files, and the proto files explain themselves."""

from __future__ import annotations

from pathlib import Path

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "proto"
SOURCES = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
STUBS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
    for path in (ROOT / "recsys").rglob(pattern)
)


def compile_protos(*arguments: str) -> None:
    includes = (f"-I{PROTO}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}")
    assert protoc.main(["protoc", *includes, *arguments, *SOURCES]) == 0


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make proto` would write."""
    out = tmp_path_factory.mktemp("stubs")
    compile_protos(f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}")
    for unused in (out / "recsys" / "store" / "v1").glob("*_pb2_grpc.py"):
        unused.unlink()
    return out


def test_every_stub_belongs_to_a_proto_file(generated: Path) -> None:
    assert sorted(str(path.relative_to(generated)) for path in generated.rglob("*.py*")) == STUBS


@pytest.mark.parametrize("stub", STUBS)
def test_stubs_are_fresh(generated: Path, stub: str) -> None:
    assert (ROOT / stub).read_bytes() == (generated / stub).read_bytes(), "run `make proto`"


def test_every_part_of_the_public_api_has_a_comment(tmp_path: Path) -> None:
    compile_protos("--include_source_info", f"--descriptor_set_out={tmp_path / 'set'}")
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    missing = [name for file in files if file.package == "recsys.v1" for name in uncommented(file)]
    assert not missing, f"no comment above {', '.join(missing)}"


def uncommented(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Name the methods, fields and enum values that no comment stands above, but for an enum's zero."""
    commented = {tuple(place.path) for place in file.source_code_info.location if place.leading_comments.strip()}
    parts = {(6, s, 2, m): f"{x.name}.{y.name}" for s, x in enumerate(file.service) for m, y in enumerate(x.method)}
    parts |= {
        (4, m, 2, f): f"{x.name}.{y.name}" for m, x in enumerate(file.message_type) for f, y in enumerate(x.field)
    }
    parts |= {
        (5, e, 2, v): f"{x.name}.{y.name}" for e, x in enumerate(file.enum_type) for v, y in enumerate(x.value) if v
    }
    return [name for path, name in parts.items() if path not in commented]
