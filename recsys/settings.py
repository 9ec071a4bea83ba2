"""Every setting, with its default, unit and reason; from flags over RECSYS_* environment over a TOML file.

The only module that reads the environment. An unknown setting is refused wherever it comes from.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from recsys.errors import SettingsError

ENVIRONMENT_PREFIX = "RECSYS_"
MASK = "***"
# Read by other parts than this model: the settings file's path, and the switch of the CUDA tests.
OTHER_VARIABLES = {"RECSYS_CONFIG", "RECSYS_TEST_CUDA", "RECSYS_TEST_DATA"}


class FeedbackClass(BaseModel):
    """Say what one class of feedback means to learning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    positive: bool = Field(description="a target of the softmax over items")
    history: bool = Field(description="enters the user's history, and the item then counts as seen")
    worth: float = Field(
        ge=0, allow_inf_nan=False, description="what one such feedback is worth; orders recommendations"
    )


# What the learned weights depend on: two trainers that agree on these and on the log learn the same bits.
LEARNING_SETTINGS = {
    *("classes", "dimension", "history_length", "blocks", "heads", "successors", "context_buckets", "max_context"),
    *("seed", "batch_size", "replay_size", "replay_every", "replay_capacity", "negatives"),
    *("learning_rate", "row_learning_rate", "weight_decay", "dropout", "gradient_clip"),
    *("batches_per_version", "torch_threads"),
    *("batch_seconds", "batch_growth"),
    *("item_admission", "item_expiry", "max_items"),
    *("trainable", "lora_rank", "optimizer", "average_decay", "anchor_steps", "l2sp_weight", "ewc_weight"),
    *("adapter_width", "prompt_length", "delayed_feedback"),
    *("distillation_weight", "follow_loss", "squared_error_weight", "bayesian_head"),
    *("drift_fading", "drift_boost", "trust"),
    *("gate", "gate_events", "gate_confidence", "gate_margin", "gate_past_margin", "gate_growth", "gate_holds"),
}


def _class(name: str, worth: float, *, positive: bool = True) -> FeedbackClass:
    return FeedbackClass(name=name, positive=positive, history=positive, worth=worth)


CLASS_PRESETS: dict[str, tuple[FeedbackClass, ...]] = {
    "shop": (
        _class("impression", 0.0, positive=False),
        _class("click", 1.0),
        _class("like", 2.0),
        _class("purchase", 5.0),
    ),
    "clicks": (_class("impression", 0.0, positive=False), _class("click", 1.0)),
    "ratings": tuple(_class(f"{half / 2:.1f}", half / 2) for half in range(1, 11)),
}


def _expand_classes(value: Any) -> Any:
    if isinstance(value, str):
        if value in CLASS_PRESETS:
            return CLASS_PRESETS[value]
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"neither a preset ({', '.join(CLASS_PRESETS)}) nor JSON: {value!r}") from None
    return value


Classes = Annotated[tuple[FeedbackClass, ...], BeforeValidator(_expand_classes), Field(min_length=1, max_length=100)]


class Settings(BaseModel):
    """Hold every setting; immutable, validated on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Where things are
    # Not in repr: it may hold a password.
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", repr=False, description="the store: redis://, rediss:// (TLS) or unix://"
    )
    key_prefix: str = Field(
        "recsys", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="first part of every key in the store"
    )
    data_dir: Path = Field(Path("data"), description="where `up` and `demo` keep the embedded store's files")
    host: str = Field("127.0.0.1", description="address that the server and the metrics listen on")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_port: int = Field(
        9464, ge=0, le=65535, description="HTTP port of the server's /metrics; 0 takes a free one"
    )
    trainer_metrics_port: int = Field(
        9465, ge=0, le=65535, description="HTTP port of the trainer's /metrics; 0 takes a free one"
    )
    log_format: Literal["text", "json"] = Field("text", description="how the log on stderr is written: logfmt or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged; debug tells every answer by its recommendation_id"
    )
    traces: Literal["off", "on"] = Field(
        "off",
        description="record OpenTelemetry traces from request to commit, with the extra otel; the OTEL_* variables say "
        "where they go and how many (OTEL_TRACES_SAMPLER: all, unless set)",
    )
    reflection: bool = Field(True, description="serve gRPC reflection, for grpcurl and the like")
    transport: Literal["auto", "grpcio", "native"] = Field(
        "auto",
        description="native: HTTP/2 outside Python, several times as many calls; auto: native where it is installed, "
        "else grpcio",
    )

    # What feedback means
    classes: Classes = Field(
        CLASS_PRESETS["shop"],
        description="feedback classes: a preset (shop, clicks, ratings), or a list of name, positive, history, worth",
    )

    # Limits of requests
    max_id_bytes: int = Field(
        256, ge=1, le=4096, description="longest user, item, feedback or recommendation id, in bytes"
    )
    max_feedback_batch: int = Field(1000, ge=1, le=100_000, description="feedback in one LogFeedback")
    max_recommend_count: int = Field(1000, ge=1, le=10_000, description="items in one Recommend")
    max_candidates: int = Field(
        1000, ge=1, le=100_000, description="candidates in one Score; items in one catalogue call"
    )
    max_excluded: int = Field(10_000, ge=0, le=1_000_000, description="exclude_item_ids in one Recommend")
    max_context: int = Field(20, ge=0, le=1000, description="context pairs in one request")
    max_categories: int = Field(100, ge=1, le=10_000, description="categories of an item, and in each part of a filter")
    max_title_bytes: int = Field(1024, ge=1, le=65_536, description="longest item title, in bytes")
    max_message_bytes: int = Field(4 << 20, ge=1 << 16, le=1 << 30, description="largest gRPC message received")
    max_future_seconds: float = Field(
        300.0, ge=0, description="how far a feedback's time may lie ahead of the server's clock"
    )

    # The store
    store_timeout_seconds: float = Field(2.0, gt=0, le=60, description="longest wait for one answer of the store")
    durability: Literal["memory", "disk", "replica"] = Field(
        "memory",
        description="where feedback is when it is acknowledged: in the store's memory (its disk follows, within two "
        "seconds at worst), on its disk, or in the memory of durable_replicas replicas too",
    )
    durable_replicas: int = Field(1, ge=1, le=16, description="replicas that must have feedback (durability = replica)")
    history_limit: int = Field(
        2000,
        ge=1,
        le=100_000,
        description="entries kept per user; older ones fall off and their items may come back",
    )
    deduplication_seconds: int = Field(
        3600, ge=1, description="how long a feedback_id is remembered, about 100 bytes each"
    )
    log_max_bytes: int = Field(
        1 << 30,
        ge=1 << 16,
        description="feedback log's bound; past it feedback is refused, nothing is dropped",
    )
    snapshots_retained: int = Field(
        3, ge=1, le=100, description="full copies of the weights kept; deltas behind the oldest are trimmed"
    )
    versions_retained: int = Field(
        10_000, ge=1, description="versions kept beside the full copies, at the most until the next copy"
    )
    weights_max_bytes: int = Field(
        8 << 30,
        ge=1 << 20,
        description="bound of all versions and full copies; the newest copy and what follows it are kept at any size",
    )
    snapshot_every_bytes: int = Field(
        0, ge=0, description="bytes of deltas after which a snapshot is written; 0: as many as it has, at least 64 MiB"
    )

    # The network
    dimension: int = Field(64, ge=4, le=1024, description="length of an item row and of the user state")
    history_length: int = Field(
        50,
        ge=1,
        le=1000,
        description="most recent history entries that the network sees and a log record holds",
    )
    blocks: int = Field(1, ge=1, le=16, description="transformer blocks")
    heads: int = Field(2, ge=1, le=64, description="attention heads; divides dimension")
    successors: int = Field(64, ge=1, le=1024, description="items remembered as following an item (transition memory)")
    context_buckets: int = Field(1024, ge=1, le=1 << 20, description="rows that context pairs are hashed into")
    item_admission: int = Field(
        1, ge=1, le=1_000_000, description="feedback on an item, within the replay window, that it needs to get a row"
    )
    item_expiry: int = Field(
        0,
        ge=0,
        description="feedback on others after which an unused item loses its row, once an eighth of all are unused; "
        "0: never",
    )
    max_items: int = Field(
        0,
        ge=0,
        le=1 << 30,
        description="items with a row when a version begins; past it those unused for longest lose theirs, an eighth "
        "at once; 0: unbounded",
    )

    # Learning
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where the trainer learns and the server scores; auto takes CUDA where there is one",
    )
    torch_threads: int = Field(
        1, ge=1, le=256, description="torch threads per process; bitwise repeatability holds for one value"
    )
    seed: int = Field(1, ge=0, lt=1 << 31, description="of initial weights, replay and negatives")
    batch_size: int = Field(64, ge=1, le=65_536, description="new feedback per learning step")
    batch_seconds: float = Field(
        0.125, ge=0, le=3600, description="time that the acceptance of a full batch spans; one that fills faster grows"
    )
    batch_growth: int = Field(
        4, ge=1, le=1024, description="times batch_size that a batch grows to when feedback comes fast; 1: never grows"
    )
    replay_size: int = Field(512, ge=0, le=4096, description="earlier choices that are replayed together; 0: no replay")
    replay_every: int = Field(
        512,
        ge=1,
        le=1 << 20,
        description="feedback from one replay to the next; at most one a batch, so that larger batches make it rarer",
    )
    replay_capacity: int = Field(
        100_000, ge=1, description="most recent feedback that replay draws from; the log keeps at least these"
    )
    negatives: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="sampled negatives per batch, shared by it; a replay has four for each choice at least",
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="AdamW, dense part")
    row_learning_rate: float = Field(0.05, gt=0, le=10, description="row-wise Adagrad, item rows")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW, dense part")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the transformer's input and residuals while learning")
    gradient_clip: float = Field(5.0, gt=0, description="largest norm of the dense gradient")
    trainable: Literal["all", "head", "bias", "lora", "adapter", "prompt"] = Field(
        "all",
        description="what learns beside the mixing weights: all; head: the class head alone; bias: biases and item "
        "rows; lora: low-rank pairs on the blocks' maps, and item rows; adapter, prompt: what adapter_width or "
        "prompt_length added, and item rows",
    )
    lora_rank: int = Field(4, ge=1, le=1024, description="rank of each pair (trainable = lora)")
    adapter_width: int = Field(
        0, ge=0, le=1024, description="width of an adapter behind the feed-forward of each block; 0: there is none"
    )
    prompt_length: int = Field(
        0, ge=0, le=1024, description="learned vectors before every history, in each block; 0: there are none"
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="of the dense part; sgd has momentum 0.9 and needs a learning_rate of its own"
    )
    average_decay: float = Field(
        0.0, ge=0, lt=1, description="share that the average of dense weights that is served keeps at a step; 0: none"
    )
    follow_loss: bool = Field(
        False, description="lower the learning rates on a plateau of the prequential loss, raise them on a drift"
    )
    drift_fading: float = Field(
        0.2,
        gt=0,
        le=1,
        description="times what followed items, each time that the newest choices show that this misleads; 1: never",
    )
    drift_boost: float = Field(
        1.0,
        ge=1,
        le=16,
        description="times the learning rates, and half of the replay from what is recent, while accuracy has fallen "
        "in a drift and not come back; 1: no response",
    )
    anchor_steps: int = Field(
        256, ge=1, description="steps, replays included, after which the anchor of the next three moves to the network"
    )
    l2sp_weight: float = Field(0.0, ge=0, le=1e6, description="of the pull of the dense weights to the anchor (L2-SP)")
    ewc_weight: float = Field(
        0.0, ge=0, le=1e6, description="of the pull to the anchor of those dense weights that mattered (EWC)"
    )
    distillation_weight: float = Field(
        0.0, ge=0, le=1e6, description="of the divergence from what the anchor says of sampled items"
    )
    squared_error_weight: float = Field(
        0.0, ge=0, le=1e6, description="of the squared error of the expected worth, for classes in an order"
    )
    delayed_feedback: Literal["none", "weighted", "corrected"] = Field(
        "corrected",
        description="when feedback follows an impression with its recommendation_id, user and item: corrected: what "
        "was learned of the impression is taken back; weighted: all feedback is weighted for such (Ktena et al. 2019); "
        "none: both are learned",
    )
    bayesian_head: bool = Field(
        False, description="learn beside the class head how sure it is (online Laplace on its last layer)"
    )
    batches_per_version: int = Field(4, ge=1, le=10_000, description="batches in a version when feedback is plentiful")
    publish_seconds: float = Field(
        0.25, gt=0, le=3600, description="a version is closed when its first feedback is this old"
    )

    # Not misled
    trust: bool = Field(
        True,
        description="when many accounts at once choose what their histories no longer explain, as if they were taken "
        "over, or newcomers push items that hardly anybody else chooses, count nothing that these choose, as long as "
        "it lasts",
    )

    # What may be published
    gate: bool = Field(True, description="test each version beside the one being served, and hold it when it is worse")
    gate_events: int = Field(16, ge=1, le=65_536, description="feedback of each batch that both versions are tested on")
    gate_confidence: float = Field(4.0, ge=0, le=100, description="standard errors by which worse must be sure")
    gate_margin: float = Field(0.02, ge=0, le=100, description="nats by which a version may be worse and still pass")
    gate_past_margin: float = Field(
        0.5, ge=0, le=100, description="nats by which a version may be worse on feedback of the past and still pass"
    )
    gate_growth: float = Field(2.0, ge=1, le=1e6, description="factor by which a dense tensor's norm may grow at once")
    gate_holds: int = Field(3, ge=1, le=1000, description="holds in a row after which the feedback is set aside")

    # Serving
    worth_weight: float = Field(
        0.5, ge=0, le=10, description="power of the expected worth in the final order; 0 orders by score alone"
    )
    retrieval: Literal["auto", "exact", "partitioned"] = Field(
        "auto",
        description="exact: look at every item; partitioned: only where k-means lets the best be expected; auto: "
        "partitioned from 300,000 items on; exact on CUDA and without AVX2",
    )
    server_processes: int = Field(
        1,
        ge=1,
        le=256,
        description="processes that serve one port and share one copy of the weights, in main memory; Linux only",
    )
    max_score_batch: int = Field(32, ge=1, le=4096, description="requests scored together")
    queue_limit: int = Field(
        1024, ge=1, le=1_000_000, description="requests waiting; more are refused with RESOURCE_EXHAUSTED"
    )
    drain_seconds: float = Field(5.0, ge=0, le=600, description="how long a stopping server finishes calls in flight")

    # Security
    tls_certificate: str = Field("", description="PEM file of the gRPC server's certificate chain; empty: no TLS")
    tls_key: str = Field("", description="PEM file of that certificate's private key, without a passphrase")
    tls_client_ca: str = Field(
        "", description="PEM file of the authorities whose certificates clients must show (mTLS); empty: none needed"
    )
    tokens_file: str = Field(
        "", description="TOML file of bearer tokens by their SHA-256, and their roles; empty: no token needed"
    )
    insecure: bool = Field(
        False, description="listen beyond this machine without TLS and tokens; for networks that are guarded otherwise"
    )
    redis_password_file: str = Field(
        "", description="file with the store's password, read at every connect; instead of one in redis_url"
    )
    redis_tls_ca: str = Field(
        "", description="PEM file of the store's authorities; empty: the system's; needs rediss://"
    )
    redis_tls_certificate: str = Field("", description="PEM file of the certificate shown to the store")
    redis_tls_key: str = Field("", description="PEM file of that certificate's private key")
    client_tls_ca: str = Field(
        "", description="for the commands that call a server: PEM file of its authorities; turns TLS on"
    )
    client_tls_certificate: str = Field("", description="likewise: PEM file of the client's certificate")
    client_tls_key: str = Field("", description="likewise: PEM file of that certificate's private key")
    client_token_file: str = Field("", description="likewise: file with the bearer token to show")
    max_metadata_bytes: int = Field(
        8192, ge=1024, le=1 << 20, description="largest metadata of one gRPC call; a call with more is refused"
    )
    max_concurrent_streams: int = Field(
        1000, ge=1, le=1 << 20, description="calls in flight on one connection; further ones wait in the client"
    )
    max_connections: int = Field(4096, ge=1, le=1 << 20, description="gRPC connections at a time; further are closed")
    max_idle_seconds: float = Field(
        3600.0, ge=1, le=1_000_000, description="a gRPC connection without calls is closed after this time"
    )
    min_ping_seconds: float = Field(
        30.0, ge=0, le=3600, description="clients that send keepalive pings more often are disconnected"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        names = [c.name for c in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"classes: names repeat: {names}")
        if not any(c.positive for c in self.classes):
            raise ValueError("classes: at least one must be positive")
        if self.dimension % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dimension {self.dimension}")
        if self.history_length > self.history_limit:
            raise ValueError(f"history_length: {self.history_length} is above history_limit {self.history_limit}")
        for trainable, added in (("adapter", "adapter_width"), ("prompt", "prompt_length")):
            if self.trainable == trainable and not getattr(self, added):
                raise ValueError(f"trainable: {trainable} needs {added} above 0")
        return self

    @model_validator(mode="after")
    def _secured(self) -> Settings:
        for first, second in (
            *(("tls_certificate", "tls_key"), ("redis_tls_certificate", "redis_tls_key")),
            ("client_tls_certificate", "client_tls_key"),
        ):
            if bool(getattr(self, first)) != bool(getattr(self, second)):
                raise ValueError(f"{first}, {second}: give both or neither")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca: needs tls_certificate and tls_key")
        if (self.redis_tls_ca or self.redis_tls_certificate) and not self.redis_url.startswith("rediss://"):
            raise ValueError("redis_tls_ca, redis_tls_certificate: need a redis_url that starts with rediss://")
        return self

    @property
    def bounded_items(self) -> bool:
        """Return whether an item may be without a row after feedback on it."""
        return self.item_admission > 1 or self.item_expiry > 0 or self.max_items > 0

    @property
    def class_index(self) -> dict[str, int]:
        """Map a class name to its index in `classes`."""
        return {c.name: i for i, c in enumerate(self.classes)}

    @property
    def provisional_class(self) -> int | None:
        """Return the index of the class that other feedback may follow and correct: that of an impression.

        The first that is neither positive nor enters histories; None without one, or where nothing is corrected.
        """
        found = (i for i, c in enumerate(self.classes) if not c.positive and not c.history)
        return None if self.delayed_feedback == "none" else next(found, None)

    def redacted(self) -> dict[str, Any]:
        """Return every setting as JSON takes it, with a mask for the password in `redis_url`."""
        return self.model_dump(mode="json") | {"redis_url": masked(self.redis_url)}

    def learning_digest(self) -> str:
        """Hash the settings that the learned weights depend on, hexadecimal."""
        text = json.dumps(self.model_dump(mode="json", include=LEARNING_SETTINGS), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def masked(url: str) -> str:
    """Return a URL with a mask for its password, in whichever of its two places that stands, well-formed or not."""
    url = re.sub(r"([?&]password=)[^&]*", rf"\1{MASK}", url, flags=re.IGNORECASE)
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    user = re.fullmatch(r"(\w+://[^:/@]*)(:.*)?", head, flags=re.DOTALL)
    # What cannot be told apart is hidden as a whole.
    return (user[1] + (f":{MASK}" if user[2] else "") if user else MASK) + at + tail


def bracketed(host: str) -> str:
    """Write a host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine alone; a name other than localhost counts as not."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load(
    flags: dict[str, Any] | None = None,
    *,
    file: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Settings:
    """Merge flags over RECSYS_* variables over a TOML file over the defaults.

    `file` defaults to the path in RECSYS_CONFIG, if set. Flags that are None count as absent.

    Raises:
        SettingsError: naming each setting that is unknown or out of range, and where it came from.
    """
    environment = dict(os.environ) if environment is None else environment
    path = file or (Path(environment["RECSYS_CONFIG"]) if environment.get("RECSYS_CONFIG") else None)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, found in (
        (f"file {path}", _from_file(path)),
        ("environment", _from_environment(environment)),
        ("flag", {k: v for k, v in (flags or {}).items() if v is not None}),
    ):
        values.update(found)
        origin.update(dict.fromkeys(found, source))
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_explain(error, origin)) from None


def trace_exporters(environment: dict[str, str] | None = None) -> list[str]:
    """Name the exporters that OpenTelemetry's variables ask for, as packages offer them; OTLP when they say nothing."""
    environment = dict(os.environ) if environment is None else environment
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"settings file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"settings file {path} cannot be read: {error}") from None


def _from_environment(environment: dict[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_VARIABLES
    }


def _explain(error: ValidationError, origin: dict[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"])
        source = origin.get(str(problem["loc"][0])) if problem["loc"] else None
        where = f" (from {source})" if source else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting {name!r}{where}; `recsys config` lists them all")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            shown = problem["loc"] and problem["loc"][0] != "redis_url" and not isinstance(problem["input"], dict)
            given = f", got {problem['input']!r}" if shown else ""
            lines.append(f"{name + where + ': ' if name else ''}{text}{given}")
    return "; ".join(lines)
