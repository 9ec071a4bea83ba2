"""Guard: who may call what, by bearer tokens that are known only by their digests."""

from __future__ import annotations

import hashlib
import hmac
import logging
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from recsys.errors import PermissionDenied, SettingsError, Unauthenticated

Role = Literal["recommend", "feedback", "admin"]

AUTHORIZATION = "authorization"
SCHEME = "bearer "
# A token with any of a method's roles may call it. A method that is not listed takes an admin.
ROLES: dict[str, frozenset[Role]] = {
    "/recsys.v1.RecommenderService/Recommend": frozenset({"recommend"}),
    "/recsys.v1.RecommenderService/Score": frozenset({"recommend"}),
    "/recsys.v1.RecommenderService/Explain": frozenset({"recommend"}),
    "/recsys.v1.RecommenderService/LogFeedback": frozenset({"feedback"}),
    "/recsys.v1.CatalogService/GetItems": frozenset({"recommend"}),
    "/recsys.v1.ModelService/GetStatus": frozenset({"recommend", "admin"}),
    "/recsys.v1.ModelService/ListVersions": frozenset({"recommend", "admin"}),
    "/recsys.v1.ModelService/GetVersion": frozenset({"recommend", "admin"}),
}
ADMIN: frozenset[Role] = frozenset({"admin"})

_log = logging.getLogger(__name__)


class Token(BaseModel):
    """Hold what is known of a token: its name, its digest, never itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    sha256: Annotated[str, Field(pattern="^[0-9A-Fa-f]{64}$"), AfterValidator(str.lower)]
    roles: frozenset[Role] = Field(min_length=1)


class TokensFile(BaseModel):
    """Hold a tokens file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: tuple[Token, ...] = Field(min_length=1)


class Guard:
    """Let a call pass when its token has a role that the method takes; without a file everything passes.

    The file is read again when it changed. While its new content is unusable the old tokens stay valid, and the log
    says so once.
    """

    def __init__(self, tokens_file: str) -> None:
        """Read the file.

        Raises:
            SettingsError: when it cannot be used, saying why.
        """
        self._path = Path(tokens_file) if tokens_file else None
        self._tokens: tuple[Token, ...] = ()
        self._stamp: tuple[int, ...] | None = None
        if self._path:
            self._stamp = _stamp(self._path)
            self._tokens = read_tokens(self._path)

    def check(self, method: str, metadata: Iterable[tuple[str, Any]]) -> None:
        """Let the call of `method` ("/package.Service/Method") pass, or refuse it.

        Raises:
            Unauthenticated: without a token, or with one that is not known.
            PermissionDenied: when the token has none of the method's roles.
        """
        if self._path is None:
            return
        self._reload(self._path)
        token = self._find(metadata)
        allowed = ROLES.get(method, ADMIN)
        if not token.roles & allowed:
            raise PermissionDenied(f"the token {token.name!r} has none of the roles {', '.join(sorted(allowed))}")

    def _find(self, metadata: Iterable[tuple[str, Any]]) -> Token:
        given = [value for key, value in metadata if key == AUTHORIZATION]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].lower().startswith(SCHEME):
            raise Unauthenticated("send one bearer token as metadata: 'authorization: Bearer <token>'")
        digest = digest_of(given[0][len(SCHEME) :].strip())
        # All are compared, so that the time tells nothing of where one stands.
        found = [token for token in self._tokens if hmac.compare_digest(token.sha256, digest)]
        if not found:
            raise Unauthenticated("the bearer token is not known here")
        return found[0]

    def _reload(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = read_tokens(path)
        except SettingsError as error:
            _log.error("the tokens of before stay valid: %s", error)
        else:
            _log.info("read %d tokens from %s", len(self._tokens), path)


def digest_of(token: str) -> str:
    """Return what a tokens file holds of a token: its SHA-256, hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read a tokens file.

    Raises:
        SettingsError: saying what is wrong and where, without the values: one could be a token put there by mistake.
    """
    try:
        tokens = TokensFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).token
    except OSError as error:
        raise SettingsError(f"tokens_file: cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise SettingsError(f"tokens_file: {path} is not TOML") from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        places = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
        raise SettingsError(f"tokens_file: {path}: {places}") from None
    for field in ("name", "sha256"):
        if len({getattr(token, field) for token in tokens}) < len(tokens):
            raise SettingsError(f"tokens_file: {path}: two tokens have the same {field}")
    return tokens


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes with the file, None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
